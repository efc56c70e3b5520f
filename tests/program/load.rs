//! Load: a well-behaved client is served beside thousands of connected clients, and the daemon then
//! releases all their sockets, files and threads, and the memory that the allocator returns.
//!
//! The test suite runs a small crowd; `tests/load [MINUTES]` runs the full one, which takes minutes.
//! [`crate::soak`] exceeds the limits, these tests remain within them.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::common::{DEADLINE, Daemon, eventually, mebibytes, read_all};
use crate::good::{ask_time, content, internet, pushed, wrong};
use crate::soak::garbage;

/// Time-outs longer than the test, so that idle clients are kept.
const CONFIG: &str = "
[log]
format = \"json\"
level = \"info,handout::net::connection=warn\"    # not a line for each connection
[limits]
max-connections = 20000
max-per-client = 400
idle-timeout = \"2h\"
max-duration = \"2h\"
[time.clock]
listen = [\"127.0.0.1:0\"]
format = \"json\"
[file.small]
listen = [\"127.0.0.1:0\"]
path = \"small.bin\"
[file.slow]
listen = [\"127.0.0.1:0\"]
path = \"slow.bin\"
[file.folder]
listen = [\"127.0.0.1:0\"]
path = \"files\"
";

const SMALL: usize = 20_000;
const SLOW: usize = 60_000;
const REQUEST: &[u8] = b"one.bin\n";

/// Small segments and buffers, or the kernel would take most of a slow client's document at once.
const SEGMENT: u32 = 536;
const BUFFER: usize = 4096;

/// Addresses of the crowd: the ports of an address, and its share of the permits, are limited.
const ADDRESSES: usize = 61;

/// Descriptors for other purposes, in this process and in the daemon.
const OTHERS: usize = 1000;

/// Maximum duration of one abusive connection, and the pause after it.
const ABUSE: Duration = Duration::from_millis(300);
const ABUSE_PAUSE: Duration = Duration::from_millis(500);

/// Simultaneous clients of each kind.
#[derive(Clone, Copy)]
struct Crowd {
    idle: usize,
    slow: usize,
    abusive: usize,
    /// Time between two reads of 1 KiB by a slow client.
    pace: Duration,
}

#[test]
fn serves_beside_a_crowd_and_releases_its_resources() {
    let pace = Duration::from_millis(10);
    load(Crowd { idle: 200, slow: 40, abusive: 10, pace }, Duration::from_secs(3));
}

#[test]
#[ignore = "takes minutes: tests/load"]
fn ten_thousand() {
    let minutes = std::env::var("LOAD_MINUTES").map_or(10.0, |minutes| minutes.parse().unwrap());
    let pace = Duration::from_secs(1);
    let crowd = Crowd { idle: 10_000, slow: 2000, abusive: 200, pace };
    load(crowd, Duration::from_secs_f64(60.0 * minutes));
}

fn load(crowd: Crowd, length: Duration) {
    let needed = crowd.idle + crowd.slow + crowd.abusive + OTHERS;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard >= needed as u64, "{needed} descriptors are needed, the hard limit is {hard}");
    if soft < needed as u64 {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    fs::write(folder.path().join("small.bin"), content(1, SMALL)).unwrap();
    fs::write(folder.path().join("slow.bin"), content(2, SLOW)).unwrap();
    fs::write(folder.path().join("files/one.bin"), content(3, 1000)).unwrap();
    let mut daemon = Daemon::start_in(folder, CONFIG, |_| {});
    let unused = Settled::now(&daemon);
    let places = Arc::new(Places::of(&daemon));

    // Caches are filled after the first crowd, so only the second is compared.
    run(&daemon, &places, crowd, Duration::ZERO).assert_that_all_is_well();
    let begin = Settled::wait(&daemon, unused);
    println!("at the beginning: {begin:?}");
    let load = run(&daemon, &places, crowd, length);
    println!("{}", load.waited());
    let end = Settled::wait(&daemon, unused);
    println!("at the end:       {end:?}");
    load.assert_that_all_is_well();
    let allowed = begin.memory + begin.memory / 10 + TOLERANCE;
    assert!(end.memory <= allowed, "memory grew: more than {:.1} MiB", mebibytes(allowed));
    assert!(daemon.stop().success());
    for line in daemon.lines() {
        // Only the message of a panic is not JSON.
        assert!(line.is_object() && line["level"] != "ERROR", "{line}");
    }
}

/// Allowed growth of memory in bytes, in addition to a tenth: the free memory that the allocator keeps
/// varies. A leak of a hundred bytes per connection exceeds it by far.
const TOLERANCE: u64 = 4 << 20;

/// The daemon's resources while no client is connected.
#[derive(Debug, Clone, Copy)]
pub struct Settled {
    memory: u64,
    sockets: usize,
    /// Descriptors that are not sockets: files in memory and those of the event loops.
    others: usize,
    threads: u64,
}

impl Settled {
    /// Measures while no file is read, as a read takes a thread and a descriptor. Files are checked
    /// twice a second.
    pub fn now(daemon: &Daemon) -> Self {
        let mut settled = None;
        eventually("a moment in which no file is read", || {
            let before = readers(daemon);
            let (sockets, others) = descriptors(daemon);
            let (memory, _) = daemon.usage();
            settled = Some(Self { memory, sockets, others, threads: daemon.threads() });
            before == 0 && readers(daemon) == 0
        });
        settled.unwrap()
    }

    /// Waits until clients hold no more resources than at `begin`.
    pub fn wait(daemon: &Daemon, begin: Self) -> Self {
        let mut settled = begin;
        eventually("every descriptor to be closed, and every thread to end", || {
            settled = Self::now(daemon);
            settled.sockets <= begin.sockets
                && settled.others <= begin.others
                && settled.threads <= begin.threads
        });
        settled
    }
}

/// Open sockets of the daemon, and its other descriptors.
fn descriptors(daemon: &Daemon) -> (usize, usize) {
    let open = fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap();
    // A descriptor that was closed meanwhile has no target.
    let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let (sockets, others): (Vec<_>, Vec<_>) =
        targets.partition(|target| target.to_string_lossy().starts_with("socket:"));
    (sockets.len(), others.len())
}

/// Threads that currently read files.
fn readers(daemon: &Daemon) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim() == "reader").count()
}

/// Addresses of the services and their expected replies.
struct Places {
    clock: SocketAddr,
    small: SocketAddr,
    slow: SocketAddr,
    folder: SocketAddr,
    /// The reply to [`REQUEST`].
    reply: Vec<u8>,
    /// Length of the document for slow clients, in bytes.
    length: usize,
}

impl Places {
    fn of(daemon: &Daemon) -> Self {
        let [clock, small, slow, folder] =
            ["time.clock", "file.small", "file.slow", "file.folder"].map(|name| daemon.tcp(name));
        let reply = ask(folder).unwrap();
        Self { clock, small, slow, folder, reply, length: read_all(slow).len() }
    }
}

/// Asks the folder service for its file.
fn ask(folder: SocketAddr) -> io::Result<Vec<u8>> {
    use std::io::{Read, Write};
    let mut stream = internet(folder)?;
    stream.write_all(REQUEST)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply)?;
    Ok(reply)
}

/// State shared by all clients.
struct Load {
    places: Arc<Places>,
    crowd: Crowd,
    over: CancellationToken,
    /// Currently connected clients.
    idle: AtomicUsize,
    slow: AtomicUsize,
    /// Documents that slow clients have read completely.
    read: AtomicUsize,
    abuses: AtomicUsize,
    /// Response times of the well-behaved client.
    waits: Mutex<Vec<Duration>>,
    failures: Mutex<Vec<String>>,
}

/// Connects the crowd, keeps it for `length` and disconnects it.
fn run(daemon: &Daemon, places: &Arc<Places>, crowd: Crowd, length: Duration) -> Arc<Load> {
    let load = Arc::new(Load {
        places: Arc::clone(places),
        crowd,
        over: CancellationToken::new(),
        idle: AtomicUsize::new(0),
        slow: AtomicUsize::new(0),
        read: AtomicUsize::new(0),
        abuses: AtomicUsize::new(0),
        waits: Mutex::default(),
        failures: Mutex::default(),
    });
    thread::scope(|scope| {
        // However this comes about.
        let _over = load.over.clone().drop_guard();
        scope.spawn(|| load.ask_again_and_again());
        scope.spawn(|| load.be_the_crowd());
        let here = || load.idle.load(Ordering::Relaxed) + load.slow.load(Ordering::Relaxed);
        eventually("the crowd", || load.failed() || here() == crowd.idle + crowd.slow);
        // Only response times beside the complete crowd count.
        load.waits.lock().unwrap().clear();
        let (start, mut told) = (Instant::now(), Duration::ZERO);
        while start.elapsed() < length && !load.failed() {
            thread::park_timeout(Duration::from_millis(100));
            if start.elapsed() >= told {
                println!("{:4} s: {}", start.elapsed().as_secs(), load.line(daemon));
                told += Duration::from_secs(10);
            }
        }
    });
    load
}

impl Load {
    fn fail(&self, what: String) {
        println!("FAILURE {what}");
        self.failures.lock().unwrap().push(what);
    }

    fn failed(&self) -> bool {
        !self.failures.lock().unwrap().is_empty()
    }

    fn assert_that_all_is_well(&self) {
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{failures:#?}");
    }

    /// The progress as one line.
    fn line(&self, daemon: &Daemon) -> String {
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let (memory, descriptors) = daemon.usage();
        format!(
            "{} idle and {} slow clients, {} documents read slowly, {} abuses, {} good requests; \
             {:.1} MiB, {descriptors} descriptors, {} threads",
            count(&self.idle),
            count(&self.slow),
            count(&self.read),
            count(&self.abuses),
            self.waits.lock().unwrap().len(),
            mebibytes(memory),
            daemon.threads(),
        )
    }

    /// Percentiles of the response times.
    fn waited(&self) -> String {
        let mut waits = self.waits.lock().unwrap().clone();
        waits.sort_unstable();
        let part =
            |percent: usize| waits.get(waits.len() * percent / 100).unwrap_or(&Duration::MAX);
        let Some(max) = waits.last() else { return "no good request".to_owned() };
        format!(
            "the good client: {} requests, all served; p50 {:.2?}, p99 {:.2?}, max {max:.2?}",
            waits.len(),
            part(50),
            part(99)
        )
    }

    /// The well-behaved client: requests the time, a document and a file of a folder in turn.
    fn ask_again_and_again(&self) {
        for round in 0_u64.. {
            let begun = Instant::now();
            let served = match round % 3 {
                0 => internet(self.places.clock).and_then(|stream| ask_time(stream, round / 3)),
                1 => pushed(self.places.small, "small.bin", SMALL, round / 3).map(drop),
                _ => ask(self.places.folder).and_then(|reply| self.check(&reply)),
            };
            match served {
                Ok(()) => self.waits.lock().unwrap().push(begun.elapsed()),
                Err(error) => {
                    self.fail(format!("round {round}, after {:?}: {error}", begun.elapsed()));
                }
            }
            thread::park_timeout(Duration::from_millis(20));
            if self.over.is_cancelled() {
                return;
            }
        }
    }

    fn check(&self, reply: &[u8]) -> io::Result<()> {
        let right = reply == self.places.reply;
        if right { Ok(()) } else { Err(wrong(format!("{} bytes, not the file", reply.len()))) }
    }

    /// Runs all other clients on one thread.
    fn be_the_crowd(self: &Arc<Self>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let Crowd { idle, slow, abusive, .. } = self.crowd;
        runtime.block_on(async {
            let mut clients = JoinSet::new();
            for number in 0..idle + slow + abusive {
                let load = Arc::clone(self);
                clients.spawn(async move {
                    let lived = if number < idle {
                        load.idle(number).await
                    } else if number < idle + slow {
                        load.read_slowly(number).await
                    } else {
                        load.abuse(number).await;
                        Ok(())
                    };
                    if let Err(error) = lived {
                        load.fail(format!("client {number} of the crowd: {error}"));
                    }
                });
            }
            clients.join_all().await;
        });
    }

    /// Is silent until the end, then sends a request, which is answered.
    async fn idle(&self, number: usize) -> io::Result<()> {
        let mut stream = connect(number, self.places.folder).await?;
        self.idle.fetch_add(1, Ordering::Relaxed);
        if self.over.run_until_cancelled(stream.readable()).await.is_some() {
            return Err(wrong("it was not to hear anything"));
        }
        let mut reply = Vec::new();
        stream.write_all(REQUEST).await?;
        stream.shutdown().await?;
        timeout(DEADLINE, stream.read_to_end(&mut reply)).await??;
        self.idle.fetch_sub(1, Ordering::Relaxed);
        self.check(&reply)
    }

    /// Reads documents in steps of 1 KiB, one after the other.
    async fn read_slowly(&self, number: usize) -> io::Result<()> {
        let mut buffer = [0; 1024];
        while !self.over.is_cancelled() {
            let mut stream = connect(number, self.places.slow).await?;
            self.slow.fetch_add(1, Ordering::Relaxed);
            let mut length = 0;
            let end = async {
                loop {
                    let read = timeout(DEADLINE, stream.read(&mut buffer)).await??;
                    length += read;
                    if read == 0 {
                        return io::Result::Ok(());
                    }
                    sleep(self.crowd.pace).await;
                }
            };
            let end = self.over.run_until_cancelled(end).await;
            self.slow.fetch_sub(1, Ordering::Relaxed);
            if let Some(end) = end {
                end?;
                if length != self.places.length {
                    return Err(wrong(format!("{length} bytes are not the document")));
                }
                self.read.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Abuses the services in turn; the replies are ignored.
    async fn abuse(&self, number: usize) {
        for turn in number.. {
            drop(timeout(ABUSE, self.abuse_once(number, turn)).await);
            self.abuses.fetch_add(1, Ordering::Relaxed);
            let pause = sleep(ABUSE_PAUSE);
            if self.over.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    async fn abuse_once(&self, number: usize, turn: usize) -> io::Result<()> {
        let Places { clock, small, slow, folder, .. } = *self.places;
        let to = [clock, small, slow, folder][turn / 5 % 4];
        match turn % 5 {
            // Resets at once.
            0 => SockRef::from(&connect(number, to).await?).set_linger(Some(Duration::ZERO)),
            // Half-closes and disconnects.
            1 => connect(number, to).await?.shutdown().await,
            // Sends megabytes, until the daemon reads no more.
            2 => {
                let mut stream = connect(number, to).await?;
                for _ in 0..64 {
                    stream.write_all(&[b'x'; 65536]).await?;
                }
                Ok(())
            }
            // Requests far more than it reads.
            3 => {
                let mut stream = connect(number, folder).await?;
                stream.write_all(&REQUEST.repeat(1000)).await
            }
            // Sends what no client should.
            _ => {
                let mut stream = connect(number, folder).await?;
                let [garbage, ..] = &garbage()[turn / 5 % 8..] else { return Ok(()) };
                stream.write_all(garbage).await?;
                stream.read(&mut [0; 1000]).await.map(drop)
            }
        }
    }
}

/// Connects a client of the crowd, from one of its addresses.
async fn connect(number: usize, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(BUFFER)?;
    socket.set_tcp_mss(SEGMENT)?;
    let last = u8::try_from(number % ADDRESSES).map_err(io::Error::other)? + 1;
    socket.bind(&SocketAddr::from((Ipv4Addr::new(127, 0, 1, last), 0)).into())?;
    timeout(DEADLINE, TcpSocket::from_std_stream(socket.into()).connect(to)).await?
}
