//! A large file from a folder, encoded while it is sent, beside the sum of its parts: base64,
//! digest and a loop that only writes.
//!
//! Only the first request for a version of a file computes its digest.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::Simd;
use base64::engine::general_purpose::PAD;
use handout::internals::file_closing;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::clients::{connect, read_all};
use crate::contenders::{Handout, QUIET};
use crate::machine::{Cores, time_of_thread};
use crate::rounds::median;
use crate::table::{Row, Unit};
use crate::{Result, Run, pseudo_random};

/// Sizes of the files, in bytes; both exceed the cache.
const FULL: usize = 1 << 30;
const SMOKE: usize = 20 << 20;

/// Size of a piece: fits the caches of a core; a multiple of three.
const PIECE: usize = 96 << 10;

/// Concurrent clients of the memory measurement.
const CLIENTS: usize = 4;

/// Target: their memory, in bytes.
const MEMORY: f64 = (32 << 20) as f64;

pub fn measure(run: &Run) -> Result<Vec<Row>> {
    let folder = TempDir::new()?;
    let data = pseudo_random(run.choose(FULL, SMOKE));
    let mut file =
        File::options().read(true).write(true).create_new(true).open(folder.path().join("data"))?;
    file.write_all(&data)?;
    let end = file_closing(&Sha256::digest(&data).into());

    let path = folder.path().display();
    let service = format!("[file.folder]\nlisten = [\"127.0.0.1:0\"]\npath = \"{path}\"\n");
    let handout = Handout::start(run, QUIET, &service)?;
    let address = handout.address("file.folder")?;
    let request = || -> Result<f64> {
        let before = handout.server.processor_time()?;
        fetch(address, &end)?;
        Ok(handout.server.processor_time()?.saturating_sub(before).as_secs_f64())
    };
    println!("\na file of {} MiB from a folder, in seconds of processor time", data.len() >> 20);
    println!("encoding  digesting  writing  (reading)  first request  repeated");
    let mut rounds = Vec::new();
    for _ in 0..run.choose(5, 1) {
        // Creates a new version, whose digest is unknown.
        file.set_modified(SystemTime::now())?;
        let parts = run.cores.as_server(|| parts(&run.cores, &data, &file))??;
        let [encoding, digesting, writing, reading] = parts;
        let (first, repeated) = (request()?, request()?);
        println!(
            "{encoding:>8.2} {digesting:>10.2} {writing:>8.2} {reading:>10.2} {first:>14.2} \
            {repeated:>9.2}"
        );
        rounds.push([encoding + writing, encoding + digesting + writing, first, repeated]);
    }
    thread::scope(|scope| -> io::Result<()> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| fetch(address, &end))).collect();
        clients.into_iter().try_for_each(|client| client.join().expect("a client panicked"))
    })?;
    let memory = handout.server.memory("VmHWM")?;

    let middle = |column: usize| median(rounds.iter().map(|round| round[column]).collect());
    let name = |request| format!("1 GiB from a folder, {request}");
    Ok(vec![
        Row::new(
            &name("first request"),
            Unit::Seconds,
            middle(2),
            ("encoding, digesting, writing", middle(1)),
            1.15,
        ),
        Row::new(
            &name("repeated"),
            Unit::Seconds,
            middle(3),
            ("encoding, writing", middle(0)),
            1.15,
        ),
        Row::limit(&name("memory with 4 clients"), Unit::Mebibytes, memory, MEMORY),
    ])
}

/// Returns the processor time of encoding, digesting and writing to a socket, in seconds, and
/// that of reading from the page cache, which the target excludes.
fn parts(cores: &Cores, data: &[u8], file: &File) -> Result<[f64; 4]> {
    let mut encoded = vec![0; PIECE.div_ceil(3) * 4];
    let engine = Simd::standard(PAD);
    let encoding = time_of_thread(|| {
        for piece in data.chunks(PIECE) {
            engine.encode_slice(piece, &mut encoded)?;
        }
        Ok(())
    })?;
    let digesting = time_of_thread(|| {
        let mut digest = Sha256::new();
        data.chunks(PIECE).for_each(|piece| digest.update(piece));
        Ok(digest.finalize())
    })?;
    let writing = write(cores, &encoded, data.len().div_ceil(3) * 4)?;
    let reading = time_of_thread(|| {
        for offset in (0..data.len()).step_by(PIECE) {
            let length = PIECE.min(data.len() - offset);
            file.read_exact_at(&mut encoded[..length], offset as u64)?;
        }
        Ok(())
    })?;
    Ok([encoding, digesting, writing, reading].map(|time| time.as_secs_f64()))
}

/// Returns the processor time of writing to a client. The client is on another core, as for
/// handout, because waking it is part of the cost.
fn write(cores: &Cores, piece: &[u8], length: usize) -> Result<Duration> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::scope(|scope| {
        let client = scope.spawn(move || {
            cores.join_clients()?;
            read_all(address)
        });
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

/// Requests the file and checks the end of the reply with its digest.
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
    if same { Ok(()) } else { Err(io::Error::other("the end of the reply differs")) }
}
