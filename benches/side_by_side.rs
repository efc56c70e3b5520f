//! What handout costs beside the simplest server that there can be, measured in one run.
//!
//! `cargo bench` starts every contender, each on the same processor core, while the clients of this
//! process keep to another. The rounds of the contenders take turns, so that whatever else the
//! machine does hits all alike, and the table shows medians. The floor is a loop that accepts,
//! writes bytes that lie ready and closes: what it costs is nearly all the kernel's TCP.
//!
//! Processor time per connection is the number to compare. Connections per second are a server's
//! own only where it is busy all the time; where the clients are, they set the pace, and where
//! neither is, something else on this machine took the cores from them.
//!
//! A further benchmark is a group of [`Contender`]s, and its kind of exchange for [`measure`].
//! Without `--bench`, as `cargo test` runs it, or with `--test`, it only shows that it works.

mod common;

use std::env;
use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::param::clock_ticks_per_second;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use tempfile::TempDir;

use common::pseudo_random;

/// The argument that turns this program into the floor, which hands out its standard input.
const FLOOR: &str = "--floor";

/// Clients at one time: enough to keep a server busy while some of them are at their own work.
const CLIENTS: usize = 8;

/// How long anything may keep us waiting before the run is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the floor hands out as the time: as many bytes as the time service sends.
const TIME: &[u8] = b"2026-11-22 13:46:01.123456\n";

/// The size of the file that is handed out.
const FILE_SIZE: usize = 186_068;

/// How much is measured.
#[derive(Clone, Copy)]
struct Effort {
    warm_up: Duration,
    round: Duration,
    rounds: usize,
}

const FULL: Effort =
    Effort { warm_up: Duration::from_millis(500), round: Duration::from_millis(500), rounds: 9 };
const SMOKE: Effort =
    Effort { warm_up: Duration::ZERO, round: Duration::from_millis(20), rounds: 1 };

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let given = |flag| arguments.iter().any(|argument| argument == flag);
    if given(FLOOR) {
        return Ok(floor()?);
    }
    let (effort, rounds) = if given("--bench") && !given("--test") {
        (FULL, format!("medians of {} rounds, in turns", FULL.rounds))
    } else {
        (SMOKE, "too short a run for its numbers to mean anything".to_owned())
    };
    let cores = Cores::choose()?;
    let folder = TempDir::new()?;
    println!("\n{cores}; {CLIENTS} clients; {rounds}\n");

    let service = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
    let mut group = floor_and_handout(&cores, folder.path(), service, TIME)?;
    match nginx(&cores, folder.path(), TIME.len())? {
        Some(nginx) => group.push(nginx),
        None => println!("nginx is left out: none is here that has the stream module\n"),
    }
    compare(effort, "the time over TCP", group, TIME.len())?;

    let data = pseudo_random(FILE_SIZE);
    fs::write(folder.path().join("data.bin"), &data)?;
    let encoded = STANDARD.encode(&data);
    let document = format!("{{\"filename\":\"data.bin\",\"filedata\":\"{encoded}\"}}\n");
    let service = "[file.data]\nlisten = [\"127.0.0.1:0\"]\npath = \"data.bin\"\n";
    let group = floor_and_handout(&cores, folder.path(), service, document.as_bytes())?;
    let title = format!("a file of {FILE_SIZE} bytes over TCP");
    compare(effort, &title, group, document.len())
}

/// The floor, and handout with and without a line in the log for each connection.
fn floor_and_handout(
    cores: &Cores,
    folder: &Path,
    service: &str,
    reply: &[u8],
) -> Result<Vec<Contender>, Box<dyn Error>> {
    // With the second filter the line about the address that it has got is still logged.
    let quiet = "warn,handout::running=info";
    Ok(vec![
        start_floor(cores, folder, reply)?,
        start_handout("handout, no line per connection", cores, folder, quiet, service)?,
        start_handout("handout, a line per connection", cores, folder, "info", service)?,
    ])
}

/// Measures contenders that all send `length` bytes over TCP, prints the table and ends them.
fn compare(
    effort: Effort,
    title: &str,
    mut contenders: Vec<Contender>,
    length: usize,
) -> Result<(), Box<dyn Error>> {
    measure(effort, &mut contenders, |address, buffer| read_to_end(address, buffer, length))?;
    print_table(title, &contenders, length);
    Ok(())
}

/// A server that is compared with others; the first of a group is the floor of the rest.
struct Contender {
    name: &'static str,
    server: Server,
    address: SocketAddr,
    rounds: Vec<Round>,
}

impl Contender {
    fn new(name: &'static str, server: Server, address: SocketAddr) -> Self {
        Self { name, server, address, rounds: Vec::new() }
    }
}

/// What was seen of a contender in one round.
struct Round {
    exchanges: f64,
    wall: Duration,
    /// Processor time of the server.
    processor: Duration,
    /// Processor time of the clients.
    clients: Duration,
}

impl Round {
    fn per_second(&self) -> f64 {
        self.exchanges / self.wall.as_secs_f64()
    }

    /// Microseconds of processor time for each exchange.
    fn cost(&self) -> f64 {
        self.processor.as_secs_f64() * 1e6 / self.exchanges
    }

    /// How much of the time the server was at work, in percent.
    fn server_busy(&self) -> f64 {
        self.processor.as_secs_f64() * 100.0 / self.wall.as_secs_f64()
    }

    /// How much of the time the clients were at work, in percent.
    fn clients_busy(&self) -> f64 {
        self.clients.as_secs_f64() * 100.0 / self.wall.as_secs_f64()
    }
}

/// Gives every contender its rounds, in turns. An exchange is all that one client does once; it
/// may use the buffer for whatever it receives.
fn measure(
    effort: Effort,
    contenders: &mut [Contender],
    exchange: impl Fn(SocketAddr, &mut [u8]) -> io::Result<()> + Sync,
) -> io::Result<()> {
    for contender in &*contenders {
        run_clients(contender, effort.warm_up, &exchange)?;
    }
    for _ in 0..effort.rounds {
        for contender in &mut *contenders {
            let before = contender.server.processor_time()?;
            let clients_before = own_processor_time()?;
            let start = Instant::now();
            let exchanges = run_clients(contender, effort.round, &exchange)?;
            let wall = start.elapsed();
            let processor = contender.server.processor_time()?.saturating_sub(before);
            let clients = own_processor_time()?.saturating_sub(clients_before);
            contender.rounds.push(Round { exchanges, wall, processor, clients });
        }
    }
    Ok(())
}

/// Lets all clients repeat the exchange for a while; returns how often they did, which is at least
/// once for each.
fn run_clients(
    contender: &Contender,
    time: Duration,
    exchange: &(impl Fn(SocketAddr, &mut [u8]) -> io::Result<()> + Sync),
) -> io::Result<f64> {
    let end = Instant::now() + time;
    let client = || {
        let mut buffer = vec![0; 256 * 1024];
        let mut exchanges = 0.0;
        loop {
            exchange(contender.address, &mut buffer)
                .map_err(|error| io::Error::other(format!("{}: {error}", contender.name)))?;
            exchanges += 1.0;
            if Instant::now() >= end {
                return Ok::<_, io::Error>(exchanges);
            }
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().expect("a client panicked")).sum()
    })
}

/// Connects, reads until the server ends the connection, and checks the number of bytes.
fn read_to_end(address: SocketAddr, buffer: &mut [u8], length: usize) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut received = 0;
    loop {
        match stream.read(buffer)? {
            0 if received == length => return Ok(()),
            0 => return Err(io::Error::other(format!("{received} bytes, not {length}"))),
            read => received += read,
        }
    }
}

fn print_table(title: &str, contenders: &[Contender], length: usize) {
    println!(
        "{title:<32} {:>13} {:>7} {:>11} {:>12} {:>9} {:>15} {:>7}",
        "connections/s",
        "MB/s",
        "server busy",
        "clients busy",
        "processor",
        "lowest-highest",
        "x floor"
    );
    let floor = contenders.first().map(|floor| median(floor, Round::cost));
    for contender in contenders {
        let per_second = median(contender, Round::per_second);
        let cost = median(contender, Round::cost);
        let costs = sorted(contender, Round::cost);
        let [lowest, highest] = [costs.first(), costs.last()].map(|cost| cost.unwrap_or(&0.0));
        println!(
            "{:<32} {per_second:>13.0} {:>7.1} {:>9.0} % {:>10.0} % {cost:>6.1} µs {:>15} {:>7.2}",
            contender.name,
            per_second * length as f64 / 1e6,
            median(contender, Round::server_busy),
            median(contender, Round::clients_busy),
            format!("{lowest:.1}-{highest:.1}"),
            cost / floor.unwrap_or(cost),
        );
    }
    println!();
}

fn sorted(contender: &Contender, number: fn(&Round) -> f64) -> Vec<f64> {
    let mut numbers: Vec<f64> = contender.rounds.iter().map(number).collect();
    numbers.sort_by(f64::total_cmp);
    numbers
}

fn median(contender: &Contender, number: fn(&Round) -> f64) -> f64 {
    let numbers = sorted(contender, number);
    numbers[numbers.len() / 2]
}

/// A process that is ended with the value, however the run ends.
struct Server(Child);

impl Server {
    /// Starts it on the servers' core: a process inherits the core of the thread that starts it,
    /// so all its threads keep to it, and its runtime sees no more cores than there are for it.
    fn start(command: &mut Command, cores: &Cores) -> io::Result<Self> {
        pin(cores.server)?;
        let server = command.spawn().map(Self);
        // The clients' threads inherit this one.
        pin(cores.clients)?;
        server
    }

    /// The processor time that its living threads have taken.
    fn processor_time(&self) -> io::Result<Duration> {
        let process = format!("/proc/{}", self.0.id());
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("{process}/task"))? {
            match fs::read_to_string(task?.path().join("schedstat")) {
                Ok(text) => nanoseconds += first_number(&text)?,
                // This kernel does not count as finely.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return ticks(&fs::read_to_string(format!("{process}/stat"))?);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Duration::from_nanos(nanoseconds))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The processor time that this process has taken, its ended threads included.
fn own_processor_time() -> io::Result<Duration> {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).map_err(io::Error::other)
}

/// The user and system time in `/proc/PID/stat`; the name, in parentheses, may contain anything.
fn ticks(stat: &str) -> io::Result<Duration> {
    let (_, fields) = stat.rsplit_once(')').ok_or(io::ErrorKind::InvalidData)?;
    let times = fields.split_whitespace().skip(11).take(2);
    let ticks = times.map(first_number).sum::<io::Result<u64>>()?;
    Ok(Duration::from_secs_f64(ticks as f64 / clock_ticks_per_second() as f64))
}

fn first_number(text: &str) -> io::Result<u64> {
    let number = text.split_whitespace().next().and_then(|number| number.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("expected a number, found {text:?}")))
}

/// The floor, which serves one client after the other until it is killed.
fn floor() -> io::Result<()> {
    let mut reply = Vec::new();
    io::stdin().read_to_end(&mut reply)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", listener.local_addr()?);
    loop {
        listener.accept()?.0.write_all(&reply)?;
    }
}

fn start_floor(cores: &Cores, folder: &Path, reply: &[u8]) -> Result<Contender, Box<dyn Error>> {
    let path = folder.join("reply");
    fs::write(&path, reply)?;
    let mut command = Command::new(env::current_exe()?);
    command.arg(FLOOR).stdin(File::open(path)?).stdout(Stdio::piped());
    let mut server = Server::start(&mut command, cores)?;
    let mut address = String::new();
    let output = server.0.stdout.take().ok_or("the floor has no output")?;
    BufReader::new(output).read_line(&mut address)?;
    Ok(Contender::new("accept, write, close", server, address.trim().parse()?))
}

/// Starts handout with one service, and its log in a file.
fn start_handout(
    name: &'static str,
    cores: &Cores,
    folder: &Path,
    level: &str,
    service: &str,
) -> Result<Contender, Box<dyn Error>> {
    let (config, log) = (folder.join("handout.toml"), folder.join(name));
    fs::write(&config, format!("[log]\nlevel = \"{level}\"\nformat = \"json\"\n{service}"))?;
    // It says that it is ready where the service manager would be listening.
    let manager = folder.join("manager");
    let _ = fs::remove_file(&manager);
    let notified = UnixDatagram::bind(&manager)?;
    notified.set_read_timeout(Some(PATIENCE))?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_handout"));
    command.arg("serve").arg("--config").arg(&config).env("NOTIFY_SOCKET", &manager);
    let server = Server::start(command.stderr(File::create(&log)?), cores)?;
    notified.recv(&mut [0; 1024]).map_err(|error| {
        format!(
            "handout did not become ready: {error}\n{}",
            fs::read_to_string(&log).unwrap_or_default()
        )
    })?;
    let address = logged_address(&log)?;
    Ok(Contender::new(name, server, address))
}

/// The address that a log tells of; its lines are written a little later than they are made.
fn logged_address(log: &Path) -> Result<SocketAddr, Box<dyn Error>> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let text = fs::read_to_string(log)?;
        let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(line) = lines.find(|line| line["address"].is_string()) {
            return Ok(line["address"].as_str().unwrap_or_default().parse()?);
        }
        thread::yield_now();
    }
    Err("handout did not say where it listens".into())
}

/// Starts nginx with a service much like the time, or `None` if there is no nginx that can do that.
fn nginx(cores: &Cores, folder: &Path, length: usize) -> io::Result<Option<Contender>> {
    let config = folder.join("nginx.conf");
    // It cannot choose a port by itself.
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    // Its time has no fraction of the second: with the space it is as long as ours.
    let text = format!(
        "load_module modules/ngx_stream_module.so;
        daemon off; master_process off; pid {}; error_log stderr;
        events {{}}
        stream {{ server {{ listen {address}; return \"$time_iso8601 \\n\"; }} }}",
        folder.join("nginx.pid").display(),
    );
    fs::write(&config, text)?;
    let mut command = Command::new("nginx");
    let mut server = match Server::start(command.arg("-c").arg(config).stderr(Stdio::null()), cores)
    {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        server => server?,
    };
    let start = Instant::now();
    // Refused at once until it listens, which takes it some milliseconds.
    while read_to_end(address, &mut [0; 64], length).is_err() {
        if server.0.try_wait()?.is_some() || start.elapsed() > PATIENCE {
            return Ok(None);
        }
    }
    Ok(Some(Contender::new("nginx, return", server, address)))
}

/// Which cores the servers and the clients keep to; none if there is only one.
struct Cores {
    server: Option<usize>,
    clients: Option<usize>,
}

impl Cores {
    /// The servers get the last core, as the first is the one that most machines let serve
    /// interrupts.
    fn choose() -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        let (first, last) = (cores.next(), cores.next_back());
        Ok(Self { server: last, clients: last.and(first) })
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.server, self.clients) {
            (Some(server), Some(clients)) => {
                write!(f, "servers on core {server}, clients on core {clients}")
            }
            _ => f.write_str("servers and clients on the same core"),
        }
    }
}

/// Keeps this thread, and what it starts from now on, to one core.
fn pin(core: Option<usize>) -> io::Result<()> {
    let Some(core) = core else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}
