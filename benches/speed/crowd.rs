//! Ten thousand clients that read nothing: their memory, and the latency of the time service
//! beside them.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tempfile::TempDir;

use crate::clients::{read_all, reader};
use crate::contenders::{Handout, QUIET};
use crate::table::{Row, Unit};
use crate::{PATIENCE, Result, Run, pseudo_random};

const FULL: usize = 10_000;
const SMOKE: usize = 100;

/// Descriptors reserved for other purposes, here and in the daemon.
const OTHERS: usize = 100;

/// Size of the served file, in bytes.
const PICTURE: usize = 2_000_000;

/// Length of a reply of the time service, in bytes.
const TIME: usize = 27;

/// Target: memory per client, in bytes.
const MEMORY: f64 = 4096.0;

/// Small segments and buffers, because the kernel's defaults are megabytes per connection and
/// not measured here.
const SEGMENT: u32 = 536;
const BUFFER: usize = 4096;

pub fn measure(run: &Run) -> Result<Vec<Row>> {
    let count = run.choose(FULL, SMOKE).min(descriptors()?.saturating_sub(OTHERS));
    println!("\n{count} clients that read nothing");
    if run.full && count < FULL {
        println!("fewer than {FULL}, because of the hard limit of descriptors");
    }
    let folder = TempDir::new()?;
    let file = folder.path().join("picture");
    std::fs::write(&file, pseudo_random(PICTURE))?;
    let services = format!(
        "[limits]\nmax-connections = 20000\nmax-per-client = 20000\n\
        idle-timeout = \"1h\"\nmax-duration = \"2h\"\n\
        [time.clock]\nlisten = [\"127.0.0.1:0\"]\n\
        [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"{}\"\n",
        file.display()
    );
    let handout = Handout::start(run, QUIET, &services)?;
    let clock = handout.address("time.clock")?;
    let picture = handout.address("file.picture")?;
    // Allocates what all clients share before the measurement.
    read_all(picture)?;
    waits(run, clock)?;

    // Alternates, because other load on the machine may last for minutes. Later crowds reuse the
    // memory of the first.
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let mut memory = 0.0_f64;
    for _ in 0..run.choose(3, 1) {
        alone.extend(waits(run, clock)?);
        let before = handout.server.memory("VmRSS")?;
        let start = Instant::now();
        let crowd =
            (0..count).map(|number| idle(picture, number)).collect::<io::Result<Vec<_>>>()?;
        // A client that can read data is being served.
        for client in &crowd {
            client.peek(&mut [0])?;
        }
        println!("all receive data after {:.1} s", start.elapsed().as_secs_f64());
        memory = memory.max((handout.server.memory("VmRSS")? - before) / crowd.len() as f64);
        beside.extend(waits(run, clock)?);
    }
    let [alone, beside] = [alone, beside].map(lower_quartile);

    Ok(vec![
        Row::limit(&format!("{count} idle clients, memory of each"), Unit::Bytes, memory, MEMORY),
        Row::new(
            &format!("p99 of the time beside {count} idle clients"),
            Unit::Microseconds,
            beside,
            ("p99 alone", alone),
            1.5,
        ),
    ])
}

/// Raises the descriptor limit to the maximum and returns it.
fn descriptors() -> Result<usize> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard.try_into()?)
}

/// Connects from one of many addresses, because the ports of each are limited.
fn idle(address: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_recv_buffer_size(BUFFER)?;
    socket.set_tcp_mss(SEGMENT)?;
    let source = Ipv4Addr::new(127, 0, 1, (number % 200) as u8 + 1);
    socket.bind(&SocketAddr::from((source, 0)).into())?;
    socket.connect(&address.into())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

/// Returns the 99th percentile of sequential requests for the time in each round, in seconds.
fn waits(run: &Run, clock: SocketAddr) -> Result<Vec<f64>> {
    let mut client = reader(clock, TIME);
    let mut round = || {
        let mut waits = Vec::new();
        for _ in 0..run.choose(500, 100) {
            let start = Instant::now();
            client()?;
            waits.push(start.elapsed().as_secs_f64());
        }
        waits.sort_by(f64::total_cmp);
        Ok(waits[waits.len() * 99 / 100])
    };
    (0..run.choose(20, 1)).map(|_| round()).collect()
}

/// Returns the lower quartile: other load on the machine only adds to a latency.
fn lower_quartile(mut waits: Vec<f64>) -> f64 {
    waits.sort_by(f64::total_cmp);
    waits[waits.len() / 4]
}
