//! Ten thousand clients that read nothing of a picture: what they cost in memory, and how long
//! those wait beside them that ask for the time.

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

/// Descriptors that are needed for something else, here and in the daemon.
const OTHERS: usize = 100;

/// The size of the picture.
const PICTURE: usize = 2_000_000;

/// How many bytes the time service sends.
const TIME: usize = 27;

/// The most memory that a client may take.
const MEMORY: f64 = 4096.0;

/// Small segments and buffers: the kernel holds megabytes for each of those that have the usual
/// ones, and they are not what is measured.
const SEGMENT: u32 = 536;
const BUFFER: usize = 4096;

pub fn measure(run: &Run) -> Result<Vec<Row>> {
    let count = run.choose(FULL, SMOKE).min(descriptors()?.saturating_sub(OTHERS));
    println!("\n{count} clients that read nothing");
    if run.full && count < FULL {
        println!("not {FULL}, as the hard limit of descriptors does not allow that");
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
    // What is there once, for all clients, is there before they come.
    read_all(picture)?;
    waits(run, clock)?;

    // In turns, as the machine's other work may take minutes; the memory that the first crowd took
    // is there for the next.
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let mut memory = 0.0_f64;
    for _ in 0..run.choose(3, 1) {
        alone.extend(waits(run, clock)?);
        let before = handout.server.memory("VmRSS")?;
        let start = Instant::now();
        let crowd =
            (0..count).map(|number| idle(picture, number)).collect::<io::Result<Vec<_>>>()?;
        // Served is who could read something.
        for client in &crowd {
            client.peek(&mut [0])?;
        }
        println!("all are served after {:.1} s", start.elapsed().as_secs_f64());
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

/// Allows as many descriptors as may be, here and in what is started; returns how many.
fn descriptors() -> Result<usize> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard.try_into()?)
}

/// A client that reads nothing, from one of many addresses, as each has only so many ports.
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

/// How long 99 of 100 clients wait for the time at most, one after the other, in seconds, in each
/// of some rounds.
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

/// What else the machine does only adds to a wait, so that the lower ones tell more.
fn lower_quartile(mut waits: Vec<f64>) -> f64 {
    waits.sort_by(f64::total_cmp);
    waits[waits.len() / 4]
}
