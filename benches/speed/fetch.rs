//! `handout fetch` beside the sum of its parts (reading, decoding, digesting, writing) and the
//! pipeline `nc | jq -r .filedata | base64 -d`.
//!
//! A thread of this process sends the prepared document; its time is not counted.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::Simd;
use base64::engine::general_purpose::PAD;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::machine::{Taken, finish, time_of_thread};
use crate::rounds::median;
use crate::table::{Row, Unit};
use crate::{Result, Run, pseudo_random};

/// Size of the file, in bytes.
const FULL: usize = 1 << 30;
const SMOKE: usize = 1 << 20;

/// Size of a piece, as in `handout fetch`.
const PIECE: usize = 256 << 10;

pub fn measure(run: &Run) -> Result<Vec<Row>> {
    let data = pseudo_random(run.choose(FULL, SMOKE));
    let encoded = Simd::standard(PAD).encode(&data);
    let document = format!("{{\"filename\":\"data\",\"filedata\":\"{encoded}\"}}\n").into_bytes();
    drop(encoded);

    let folder = TempDir::new()?;
    let target = folder.path().join("data");
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let ended = AtomicBool::new(false);
    run.cores.anywhere(|| {
        thread::scope(|scope| {
            scope.spawn(|| send_to_all(&listener, &document, &ended));
            let compared = compare(run, address, &target, &data, &document);
            ended.store(true, Ordering::Relaxed);
            // Wakes the server so that it notices the end.
            TcpStream::connect(address)?;
            compared
        })
    })?
}

fn compare(
    run: &Run,
    address: SocketAddr,
    target: &Path,
    data: &[u8],
    document: &[u8],
) -> Result<Vec<Row>> {
    let title = format!("fetching a file of {} MiB", data.len() >> 20);
    println!("\n{title:<32} {:>10} {:>12} {:>8} {:>12}", "seconds", "processor", "MB/s", "peak");

    let mut read = Command::new(env::current_exe()?);
    read.arg("--read").arg(address.to_string());
    let mut fetch = Command::new(env!("CARGO_BIN_EXE_handout"));
    fetch.args(["fetch", &address.to_string(), "--quiet", "--max-size", "2GiB", "-o"]).arg(target);
    let (mut sums, mut costs) = (Vec::new(), Vec::new());
    for _ in 0..run.choose(3, 1) {
        let read = finish(&mut read)?;
        print(&read, "a loop that only reads", data.len());
        let fetched = finish(&mut fetch)?;
        print(&fetched, "handout fetch", data.len());
        expect(target, data)?;
        sums.push((read.processor + parts(data, document, target)?).as_secs_f64());
        costs.push(fetched.processor.as_secs_f64());
    }

    let script = "set -o pipefail; nc -d \"$1\" \"$2\" | jq -r .filedata | base64 -d > \"$3\"";
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let mut pipeline = Command::new("bash");
    pipeline.args(["-c", script, "bash", &host, &port]).arg(target);
    let piped = finish(&mut pipeline);
    match &piped {
        Ok(piped) => {
            print(piped, "nc | jq -r .filedata | base64 -d", data.len());
            expect(target, data)?;
        }
        Err(error) => println!("the pipeline is left out: {error}"),
    }

    let floor = ("reading, decoding, digesting, writing", median(sums));
    let mut rows = vec![Row::new("fetch of 1 GiB", Unit::Seconds, median(costs), floor, 1.2)];
    rows.extend(piped.ok().map(|piped| {
        let cost = piped.processor.as_secs_f64();
        Row::peer("nc, jq, base64: fetch of 1 GiB", Unit::Seconds, cost, floor)
    }));
    Ok(rows)
}

fn print(taken: &Taken, name: &str, size: usize) {
    let (wall, processor) = (taken.wall.as_secs_f64(), taken.processor.as_secs_f64());
    let (rate, peak) = (size as f64 / wall / 1e6, taken.peak / 1024.0);
    println!("{name:<32} {wall:>10.2} {processor:>12.2} {rate:>8.0} {peak:>8} KiB");
}

fn expect(target: &Path, data: &[u8]) -> Result<()> {
    let same = fs::read(target)? == data;
    fs::remove_file(target)?;
    if same { Ok(()) } else { Err("the fetched file differs".into()) }
}

/// Returns the processor time of decoding, digesting, and writing with fsync.
fn parts(data: &[u8], document: &[u8], target: &Path) -> Result<Duration> {
    let engine = Simd::standard(PAD);
    let encoded = document.split(|byte| *byte == b'"').nth(7).ok_or("there is no data")?;
    let mut decoded = vec![0; PIECE];
    let taken = time_of_thread(|| {
        for piece in encoded.chunks(PIECE) {
            engine.decode_slice(piece, &mut decoded)?;
        }
        let mut digest = Sha256::new();
        let mut file = File::create(target)?;
        for piece in data.chunks(PIECE) {
            digest.update(piece);
            file.write_all(piece)?;
        }
        file.sync_all()?;
        Ok(digest.finalize())
    })?;
    fs::remove_file(target)?;
    Ok(taken)
}

/// Sends the document to one client after the other.
fn send_to_all(listener: &TcpListener, document: &[u8], ended: &AtomicBool) -> io::Result<()> {
    loop {
        let (mut client, _) = listener.accept()?;
        if ended.load(Ordering::Relaxed) {
            return Ok(());
        }
        // A client that disconnects early reports the failure itself.
        let _ = client.write_all(document);
    }
}
