//! What good clients do, and what they must get: the whole of one version of a file, or the time.
//!
//! A client that is not served says so as an error and does not panic, as many are run at once.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::common::sample;

/// The longest that a good client waits for a connection or for the next byte.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The last part of the address of good clients.
pub const GOOD: u8 = 1;

/// The content of a version of a file; no part of it is like that of another version.
pub fn content(version: u64, size: usize) -> Vec<u8> {
    let mut content = version.to_le_bytes().to_vec();
    content.extend(sample(version, size - content.len()));
    content
}

pub fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.into())
}

pub fn connect_from(last: u8, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, last], 0)).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

pub fn internet(to: SocketAddr) -> io::Result<Socket> {
    connect_from(GOOD, to).map(Socket::from)
}

pub fn unix(path: &Path) -> io::Result<Socket> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream.into())
}

/// Reads to the end, in turn without a word, after having typed something, and half-closed.
pub fn read_all(mut stream: Socket, round: u64) -> io::Result<Vec<u8>> {
    match round % 3 {
        0 => {}
        1 => stream.write_all(b"\r\n")?,
        _ => stream.shutdown(Shutdown::Write)?,
    }
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply)?;
    Ok(reply)
}

pub fn pushed(address: SocketAddr, name: &str, size: usize, round: u64) -> io::Result<u64> {
    read_document(internet(address)?, name, size, round)
}

/// Reads a pushed document and tells its version.
pub fn read_document(stream: Socket, name: &str, size: usize, round: u64) -> io::Result<u64> {
    let document = read_all(stream, round)?;
    let value: Value = serde_json::from_slice(&document)?;
    if value["filename"] != name || value.as_object().is_none_or(|keys| keys.len() != 2) {
        return Err(wrong(format!("not the document of {name}")));
    }
    version_of(&value, size)
}

/// The version of a file of which every byte is as it should be.
pub fn version_of(document: &Value, size: usize) -> io::Result<u64> {
    let data = STANDARD.decode(document["filedata"].as_str().unwrap_or_default());
    whole(&data.map_err(io::Error::other)?, size)
}

/// The version of which every byte is here.
pub fn whole(data: &[u8], size: usize) -> io::Result<u64> {
    let version = data.first_chunk().map(|version| u64::from_le_bytes(*version));
    let version = version.ok_or_else(|| wrong(format!("{} bytes", data.len())))?;
    if data == content(version, size) {
        Ok(version)
    } else {
        Err(wrong(format!("{} bytes, not those of version {version}", data.len())))
    }
}

pub fn ask_time(stream: Socket, round: u64) -> io::Result<()> {
    let before = SystemTime::now();
    check_time(&read_all(stream, round)?, before)
}

/// The reply must tell a time between the question and now, to a second.
pub fn check_time(reply: &[u8], before: SystemTime) -> io::Result<()> {
    let seconds = |time: SystemTime| {
        time.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
    };
    let value: Value = serde_json::from_slice(reply)?;
    let told = value["unix"].as_f64().unwrap_or_default();
    let possible = seconds(before) - 1.0..seconds(SystemTime::now()) + 1.0;
    if possible.contains(&told) && reply.ends_with(b"}\n") {
        Ok(())
    } else {
        Err(wrong(format!("{value} is not in {possible:?}")))
    }
}
