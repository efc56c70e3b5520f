//! A large file from a folder, encoded as it is sent: beside the base64 engine, the digest where
//! the request needs one, and a loop that only writes, each alone.
//!
//! The first request for a version of a file has to digest it; those after it find the digest.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::Simd;
use base64::engine::general_purpose::PAD;
use handout::document::file_closing;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::clients::{connect, read_all};
use crate::contenders::{Handout, QUIET};
use crate::machine::time_of_thread;
use crate::rounds::median;
use crate::table::{Row, Unit};
use crate::{Result, Run, pseudo_random};

/// The size of the file; the smaller one, too, is too large to be kept in memory.
const FULL: usize = 1 << 30;
const SMOKE: usize = 20 << 20;

/// How much the parts alone take at one time: what fits the caches of a core. A multiple of three.
const PIECE: usize = 96 << 10;

/// Clients at one time, when the memory is looked at.
const CLIENTS: usize = 4;

/// The most memory that they may take.
const MEMORY: f64 = (32 << 20) as f64;

pub fn measure(run: &Run) -> Result<Vec<Row>> {
    let folder = TempDir::new()?;
    let data = pseudo_random(run.choose(FULL, SMOKE));
    fs::write(folder.path().join("data"), &data)?;
    let end = file_closing(&Sha256::digest(&data).into());

    let parts = run.cores.as_server(|| Parts::measure(&data))??;
    println!("\na file of {} MiB from a folder, in seconds of processor time", data.len() >> 20);
    println!(
        "alone: encoding {:.2}, digesting {:.2}, writing {:.2}, (reading from the page cache {:.2})",
        parts.encoding, parts.digesting, parts.writing, parts.reading
    );
    drop(data);

    let path = folder.path().display();
    let service = format!("[file.folder]\nlisten = [\"127.0.0.1:0\"]\npath = \"{path}\"\n");
    let handout = Handout::start(run, QUIET, &service)?;
    let address = handout.address("file.folder")?;
    let request = || -> Result<f64> {
        let before = handout.server.processor_time()?;
        fetch(address, &end)?;
        let taken = handout.server.processor_time()?.saturating_sub(before).as_secs_f64();
        println!("handout: {taken:.2}");
        Ok(taken)
    };
    let first = request()?;
    let repeats = (0..run.choose(5, 1)).map(|_| request()).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| -> io::Result<()> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| fetch(address, &end))).collect();
        clients.into_iter().try_for_each(|client| client.join().expect("a client panicked"))
    })?;
    let memory = handout.server.memory("VmHWM")?;

    let repeated = parts.encoding + parts.writing;
    let what = |request| format!("1 GiB from a folder, {request}");
    Ok(vec![
        Row::new(
            &what("first request"),
            Unit::Seconds,
            first,
            ("encoding + digesting + writing", repeated + parts.digesting),
            1.15,
        ),
        Row::new(
            &what("repeated"),
            Unit::Seconds,
            median(repeats),
            ("encoding + writing", repeated),
            1.15,
        ),
        Row::limit(&what("memory with 4 clients"), Unit::Mebibytes, memory, MEMORY),
    ])
}

/// Seconds of processor time that the parts of the work take alone.
struct Parts {
    encoding: f64,
    digesting: f64,
    writing: f64,
    reading: f64,
}

impl Parts {
    fn measure(data: &[u8]) -> Result<Self> {
        let mut encoded = vec![0; PIECE.div_ceil(3) * 4];
        let engine = Simd::standard(PAD);
        let encoding = time_of_thread(|| {
            let pieces = data.chunks(PIECE);
            Ok(pieces
                .map(|piece| engine.encode_slice(piece, &mut encoded))
                .collect::<std::result::Result<Vec<_>, _>>()?)
        })?;
        let digesting = time_of_thread(|| {
            let mut digest = Sha256::new();
            data.chunks(PIECE).for_each(|piece| digest.update(piece));
            Ok(digest.finalize())
        })?;
        let writing = write(&encoded, data.len().div_ceil(3) * 4)?;
        let mut file = tempfile::tempfile()?;
        file.write_all(data)?;
        io::Seek::rewind(&mut file)?;
        let reading = time_of_thread(|| {
            while file.read(&mut encoded[..PIECE])? > 0 {}
            Ok(())
        })?;
        let [encoding, digesting, writing, reading] =
            [encoding, digesting, writing, reading].map(|time| time.as_secs_f64());
        Ok(Self { encoding, digesting, writing, reading })
    }
}

/// What a loop takes that only writes so many bytes to a client.
fn write(piece: &[u8], length: usize) -> Result<Duration> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::scope(|scope| {
        let client = scope.spawn(move || read_all(address));
        let (mut socket, _) = listener.accept()?;
        let taken = time_of_thread(|| {
            let mut left = length;
            while left > 0 {
                left -= socket.write(&piece[..left.min(piece.len())])?;
            }
            Ok(())
        })?;
        drop(socket);
        client.join().expect("the client panicked")?;
        Ok(taken)
    })
}

/// Asks for the file, and sees that the reply ends as it has to, with its digest.
fn fetch(address: SocketAddr, expected: &str) -> io::Result<()> {
    let mut stream = connect(address)?;
    stream.write_all(b"data\n")?;
    stream.shutdown(Shutdown::Write)?;
    let mut buffer = vec![0; 256 << 10];
    let mut end = Vec::new();
    loop {
        let received = stream.read(&mut buffer)?;
        if received == 0 {
            break;
        }
        end.extend_from_slice(&buffer[received.saturating_sub(expected.len())..received]);
        end.drain(..end.len().saturating_sub(expected.len()));
    }
    let same = end == expected.as_bytes();
    if same { Ok(()) } else { Err(io::Error::other("something else was sent")) }
}
