//! What `handout fetch` costs beside a loop that only reads, and beside the pipeline that people
//! write: `nc | jq -r .filedata | base64 -d`.
//!
//! All fetch the same document, from a thread that sends bytes which lie ready; its own time is not
//! counted. Below the table stand the processor times of the parts alone: decoding and digesting in
//! memory, and writing a file. Without `--bench`, as `cargo test` runs it, or with `--test`, the
//! file is small.

mod common;

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::Simd;
use base64::engine::general_purpose::PAD;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use common::pseudo_random;

/// The argument that turns this program into the loop that only reads.
const READ: &str = "--read";

/// The size of the file.
const FULL: usize = 1 << 30;
const SMOKE: usize = 1 << 20;

/// How much the parts alone take at one time, as `handout fetch` does.
const PIECE: usize = 256 << 10;

/// How often a client is looked at while it runs.
const LOOK: Duration = Duration::from_millis(5);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let given = |flag| arguments.iter().any(|argument| argument == flag);
    if given(READ) {
        return Ok(read_all(arguments.last().map_or("", String::as_str))?);
    }
    let full = given("--bench") && !given("--test");
    let size = if full { FULL } else { SMOKE };
    let data = pseudo_random(size);
    let encoded = Simd::standard(PAD).encode(&data);
    let document = format!("{{\"filename\":\"data\",\"filedata\":\"{encoded}\"}}\n").into_bytes();
    drop(encoded);

    let folder = TempDir::new()?;
    let target = folder.path().join("data");
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| send_to_all(&listener, &document, &ended));
        let compared = compare(address, &target, &data, &document);
        ended.store(true, Ordering::Relaxed);
        // Wakes the server, which then sees that it has ended.
        TcpStream::connect(address)?;
        compared
    })
}

fn compare(
    address: SocketAddr,
    target: &Path,
    data: &[u8],
    document: &[u8],
) -> Result<(), Box<dyn Error>> {
    let size = data.len();
    println!("\nfetching a file of {} MiB\n", size >> 20);
    println!("{:<34} {:>9} {:>11} {:>8} {:>10}", "", "seconds", "processor", "MB/s", "peak");

    let read = run(Command::new(env::current_exe()?).arg(READ).arg(address.to_string()))?;
    read.print("a loop that only reads", size);

    let handout = env!("CARGO_BIN_EXE_handout");
    let mut fetch = Command::new(handout);
    fetch.args(["fetch", &address.to_string(), "--quiet", "--max-size", "2GiB", "-o"]).arg(target);
    let fetched = run(&mut fetch)?;
    fetched.print("handout fetch", size);
    expect(target, data)?;

    let script = "set -o pipefail; nc -d \"$1\" \"$2\" | jq -r .filedata | base64 -d > \"$3\"";
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let mut pipeline = Command::new("bash");
    pipeline.args(["-c", script, "bash", &host, &port]).arg(target);
    match run(&mut pipeline) {
        Ok(piped) => {
            piped.print("nc | jq -r .filedata | base64 -d", size);
            expect(target, data)?;
            let factor = piped.wall.as_secs_f64() / fetched.wall.as_secs_f64();
            println!("\nhandout fetch is {factor:.1} times as fast as the pipeline");
        }
        Err(error) => println!("\nthe pipeline is left out, as it failed: {error}"),
    }

    let sum = read.processor + parts(data, document, target)?;
    let ratio = fetched.processor.as_secs_f64() / sum.as_secs_f64();
    println!("reading, decoding, digesting and writing alone: {:.2} s", sum.as_secs_f64());
    println!("handout fetch takes {ratio:.2} times their processor time");
    Ok(())
}

/// What a client took.
struct Taken {
    wall: Duration,
    processor: Duration,
    /// Its peak of resident memory in KiB, without that of processes that it started.
    peak: u64,
}

impl Taken {
    #[expect(clippy::cast_precision_loss, reason = "it is printed with few digits")]
    fn print(&self, name: &str, size: usize) {
        let (wall, processor) = (self.wall.as_secs_f64(), self.processor.as_secs_f64());
        let rate = size as f64 / wall / 1e6;
        println!("{name:<34} {wall:>9.2} {processor:>11.2} {rate:>8.0} {:>6} KiB", self.peak);
    }
}

/// Runs a client to its end.
fn run(command: &mut Command) -> Result<Taken, Box<dyn Error>> {
    let before = processor_time(UsageWho::RUSAGE_CHILDREN)?;
    let start = Instant::now();
    let mut child = command.spawn()?;
    let status_file = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let status = loop {
        // Asked while it lives, as nobody tells afterwards.
        let status = fs::read_to_string(&status_file).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let seen = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(seen.unwrap_or(0));
        match child.try_wait()? {
            Some(status) => break status,
            None => thread::sleep(LOOK),
        }
    };
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    let processor = processor_time(UsageWho::RUSAGE_CHILDREN)?.saturating_sub(before);
    Ok(Taken { wall: start.elapsed(), processor, peak })
}

fn processor_time(of: UsageWho) -> io::Result<Duration> {
    let usage = getrusage(of)?;
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros).unwrap_or(0)))
}

fn expect(target: &Path, data: &[u8]) -> Result<(), Box<dyn Error>> {
    let same = fs::read(target)? == data;
    fs::remove_file(target)?;
    if same { Ok(()) } else { Err("something else was fetched".into()) }
}

/// The processor time of decoding, of digesting, and of writing a file that is forced to the disk.
fn parts(data: &[u8], document: &[u8], target: &Path) -> Result<Duration, Box<dyn Error>> {
    let before = processor_time(UsageWho::RUSAGE_THREAD)?;
    let engine = Simd::standard(PAD);
    let encoded = document.split(|byte| *byte == b'"').nth(7).ok_or("there is no data")?;
    let mut decoded = vec![0; PIECE];
    for piece in encoded.chunks(PIECE) {
        engine.decode_slice(piece, &mut decoded)?;
    }
    let mut digest = Sha256::new();
    let mut file = File::create(target)?;
    for piece in data.chunks(PIECE) {
        digest.update(piece);
        file.write_all(piece)?;
    }
    std::hint::black_box(digest.finalize());
    file.sync_all()?;
    let after = processor_time(UsageWho::RUSAGE_THREAD)?;
    fs::remove_file(target)?;
    Ok(after.saturating_sub(before))
}

/// The loop that only reads.
fn read_all(address: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let mut buffer = vec![0; PIECE];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Sends the document to one client after the other, until the comparison has ended.
fn send_to_all(listener: &TcpListener, document: &[u8], ended: &AtomicBool) -> io::Result<()> {
    loop {
        let (mut client, _) = listener.accept()?;
        if ended.load(Ordering::Relaxed) {
            return Ok(());
        }
        // A client that goes early has its own exit code.
        let _ = client.write_all(document);
    }
}
