//! A good client is served beside a crowd that is connected all at the same time; and what the crowd
//! took of the daemon, it gives back: sockets, files and threads, and memory but for what the
//! allocator keeps.
//!
//! The full crowd takes minutes and is not part of the test suite: `tests/load [MINUTES]`. A small one
//! is. What [`crate::soak`] shows of limits that are reached, this shows of numbers within them.

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

/// Who idles may do so for as long as all this takes.
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

/// How many addresses the crowd has, as each has only so many ports, and so many places.
const ADDRESSES: usize = 61;

/// Descriptors that are needed for something else, here and in the daemon.
const OTHERS: usize = 1000;

/// How long one abuse takes at most, and the pause after it.
const ABUSE: Duration = Duration::from_millis(300);
const ABUSE_PAUSE: Duration = Duration::from_millis(500);

/// How many clients there are of each kind, at one time.
#[derive(Clone, Copy)]
struct Crowd {
    idle: usize,
    slow: usize,
    abusive: usize,
    /// How long a slow one waits before it reads the next KiB.
    pace: Duration,
}

#[test]
fn a_good_client_is_served_beside_a_crowd_that_leaves_nothing_behind() {
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

    // The same crowd twice: what is there once for all is there after the first.
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
        // A panic's own words are the only thing that is not JSON.
        assert!(line.is_object() && line["level"] != "ERROR", "{line}");
    }
}

/// What the memory may have grown by, besides a tenth: the allocator keeps free pieces, and does not
/// keep the same ones each time. A leak of a hundred bytes for each connection is far more.
const TOLERANCE: u64 = 4 << 20;

/// The daemon's resources while no client is connected.
#[derive(Debug, Clone, Copy)]
pub struct Settled {
    memory: u64,
    sockets: usize,
    /// Descriptors that are not sockets: files in memory, their pipes, the event loops'.
    others: usize,
    threads: u64,
}

impl Settled {
    /// Measures while no file is read: a thread that reads is one more, and so is its file. Files
    /// are checked twice a second.
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

    /// Waits until clients hold nothing any more that they did not hold at `begin`.
    ///
    /// Equality would be too much: each event loop keeps a spare pipe from the first time it needs
    /// one, which may be at any time, and a thread is counted before it bears its name.
    pub fn wait(daemon: &Daemon, begin: Self) -> Self {
        let mut settled = begin;
        eventually("every descriptor to be closed, and every thread to end", || {
            settled = Self::now(daemon);
            settled.sockets <= begin.sockets
                && settled.others <= begin.others + 2 * event_loops()
                && settled.threads <= begin.threads
        });
        settled
    }
}

fn event_loops() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// How many sockets the daemon has open, and how many other descriptors.
fn descriptors(daemon: &Daemon) -> (usize, usize) {
    let open = fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap();
    // A descriptor that was closed meanwhile has no target.
    let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let (sockets, others): (Vec<_>, Vec<_>) =
        targets.partition(|target| target.to_string_lossy().starts_with("socket:"));
    (sockets.len(), others.len())
}

/// How many threads read files at this moment.
fn readers(daemon: &Daemon) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim() == "reader").count()
}

/// Where the services are, and what they send.
struct Places {
    clock: SocketAddr,
    small: SocketAddr,
    slow: SocketAddr,
    folder: SocketAddr,
    /// The reply to [`REQUEST`].
    reply: Vec<u8>,
    /// How long the slow clients' document is.
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

/// What all the clients share.
struct Load {
    places: Arc<Places>,
    crowd: Crowd,
    over: CancellationToken,
    /// How many are connected at this moment.
    idle: AtomicUsize,
    slow: AtomicUsize,
    /// How many documents slow clients have read to their end.
    read: AtomicUsize,
    abuses: AtomicUsize,
    /// How long the good client waited, each time.
    waits: Mutex<Vec<Duration>>,
    failures: Mutex<Vec<String>>,
}

/// Has the crowd come, waits for so long when all are there, and has it leave.
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
        // Only what it waited beside all of them counts.
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

    /// How it goes.
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

    /// How long the good client waited.
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

    /// The good client: in turn the time, a document and a file of a folder, over and over.
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

    /// Everybody else, on one thread.
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

    /// Says nothing for as long as it lasts, and is served when it asks at last.
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

    /// Reads a document a KiB at a time, to its end, and then the next.
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

    /// Does one bad thing after the other. What comes of it is not the point.
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
            // Half-closes, and leaves.
            1 => connect(number, to).await?.shutdown().await,
            // Sends megabytes, as far as they are taken.
            2 => {
                let mut stream = connect(number, to).await?;
                for _ in 0..64 {
                    stream.write_all(&[b'x'; 65536]).await?;
                }
                Ok(())
            }
            // Asks for far more than it takes.
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
