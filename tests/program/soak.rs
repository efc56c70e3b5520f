//! Serves well-behaved clients beside abusive ones of every kind, with stable memory and descriptors.
//!
//! Takes minutes and is not part of the test suite: `tests/soak [MINUTES]`. Abusive clients have other
//! addresses than well-behaved ones, because limits apply per address.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use serde_json::Value;
use socket2::SockRef;

use crate::common::{Daemon, eventually, mebibytes, replace, sample};
use crate::good::{
    GOOD, ask_time, check_time, connect_from, content, internet, pushed, read_document, unix,
    version_of, wrong,
};
use crate::load::Settled;

/// Time after which the daemon must have ended a connection: `max-duration` and a margin for a
/// loaded machine.
const LET_GO: Duration = Duration::from_secs(30);

/// Configuration in which all abusive clients together (`max-per-client` each) cannot use all
/// `max-connections`.
const CONFIG: &str = "
[log]
format = \"json\"
level = \"info,handout::net::connection=warn\"    # not a line for each connection
[limits]
max-connections = 500
max-per-client = 40
idle-timeout = \"2s\"
max-duration = \"20s\"
deny = [\"127.0.0.250\"]
[time.clock]
listen = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\", \"unix:clock.sock\"]
format = \"json\"
[file.small]
listen = [\"127.0.0.1:0\", \"unix:small.sock\"]
path = \"small.bin\"
[file.large]
listen = [\"127.0.0.1:0\"]
path = \"large.bin\"
cache-limit = \"1MiB\"
[file.rewritten]
listen = [\"127.0.0.1:0\"]
path = \"rewritten.bin\"
cache-limit = \"1MiB\"
[file.folder]
listen = [\"127.0.0.1:0\"]
path = \"files\"
cache-limit = \"1MiB\"
";

/// Added by every second reload.
const CONFIG_OF_A_GUEST: &str = "[time.guest]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\n";

const SMALL: usize = 200_000;
const LARGE: usize = 20_000_000;
const REWRITTEN: usize = 2_000_000;
/// A file below and one above the cache limit of the folder service.
const FOLDER_FILES: [(&str, usize); 2] = [("one.bin", 50_000), ("sub/two.bin", 1_000_000)];

const DENIED: u8 = 250;

#[test]
#[ignore = "takes minutes: tests/soak"]
fn soak() {
    let minutes = std::env::var("SOAK_MINUTES").map_or(10.0, |minutes| minutes.parse().unwrap());
    let length = Duration::from_secs_f64(60.0 * minutes);
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("files/sub")).unwrap();
    write_files(folder.path(), 0);
    let mut daemon = Daemon::start_in(folder, CONFIG, |_| {});
    let places = Places::of(&daemon);
    let begin = Settled::now(&daemon);
    let soak = Soak::begin();
    let mut memory = Memory::default();

    let last_version = thread::scope(|scope| {
        let over = Over(&soak);
        for (kind, every, ask) in GOOD_CLIENTS {
            let (soak, places) = (&soak, &places);
            scope.spawn(move || soak.ask_again_and_again(kind, every, |round| ask(places, round)));
        }
        for ((kind, every, act), address) in BAD_CLIENTS.into_iter().zip(2..) {
            let soak = &soak;
            let client = Bad { soak, places: &places, kind, address };
            scope.spawn(move || {
                while soak.rest(every) {
                    act(&client);
                }
            });
        }
        let files = scope.spawn(|| replace_files(&soak, daemon.folder.path()));

        let mut second = 0;
        while soak.start.elapsed() < length && soak.failures() < 100 {
            thread::park_timeout(Duration::from_secs(1));
            second += 1;
            assert_eq!(daemon.child.try_wait().unwrap(), None, "the daemon ended");
            memory.note(&soak, &daemon);
            if second % 3 == 0 {
                reload(&daemon, if second % 2 == 0 { CONFIG_OF_A_GUEST } else { "" });
            }
            if second % 10 == 0 {
                println!("{}", soak.line(&daemon));
            }
        }
        drop(over);
        files.join().unwrap()
    });

    println!("{}", soak.line(&daemon));
    println!("{}", soak.table());
    soak.assert_that_all_is_well();
    reload(&daemon, "");
    Settled::wait(&daemon, begin);
    eventually("the last version of every file", || {
        let versions = [
            pushed(places.small, "small.bin", SMALL, 0),
            pushed(places.large, "large.bin", LARGE, 0),
            pushed(places.rewritten, "rewritten.bin", REWRITTEN, 0),
        ];
        versions.into_iter().all(|version| version.is_ok_and(|version| version == last_version))
    });
    for (kind, _, ask) in GOOD_CLIENTS {
        ask(&places, 0).unwrap_or_else(|error| panic!("{kind}, at the end: {error}"));
    }
    // Once more without clients.
    memory.note(&soak, &daemon);
    memory.assert_that_it_is_flat(length);
    assert!(daemon.stop().success());
    for line in daemon.lines() {
        // Only panic messages are not JSON.
        assert!(line.is_object() && line["level"] != "ERROR", "{line}");
        assert_ne!(line["outcome"], "panic", "{line}");
    }
}

/// Reloads with an addition to the configuration.
fn reload(daemon: &Daemon, more: &str) {
    replace(&daemon.path("handout.toml"), format!("{CONFIG}{more}").as_bytes());
    daemon.signal(Signal::HUP);
}

type Ask = fn(&Places, u64) -> io::Result<()>;

/// Well-behaved clients: name, pause in milliseconds, and the request, which must always succeed.
/// Each runs in a thread.
const GOOD_CLIENTS: [(&str, u64, Ask); 9] = [
    ("time by TCP", 20, |places, round| ask_time(internet(places.clock)?, round)),
    ("time by Unix socket", 20, |places, round| {
        ask_time(unix(&places.folder.join("clock.sock"))?, round)
    }),
    ("time by UDP", 50, |places, _| ask_time_by_datagram(places.clock_datagrams)),
    ("small file", 50, |places, round| pushed(places.small, "small.bin", SMALL, round).map(drop)),
    ("small file by Unix socket", 50, |places, round| {
        let stream = unix(&places.folder.join("small.sock"))?;
        read_document(stream, "small.bin", SMALL, round).map(drop)
    }),
    ("large file", 500, |places, round| pushed(places.large, "large.bin", LARGE, round).map(drop)),
    // A file rewritten while it is sent must end in a reset.
    ("rewritten file, or a reset", 100, |places, round| {
        let asked = pushed(places.rewritten, "rewritten.bin", REWRITTEN, round);
        // Writing or half-closing after the reset returns other errors.
        asked.map(drop).or_else(|error| match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected => Ok(()),
            _ => Err(error),
        })
    }),
    ("folder", 50, |places, _| ask_folder(places.folder_service)),
    ("denied, and reset", 50, |places, round| be_denied(places, round)),
];

type Act = fn(&Bad<'_>);

/// Abusive clients: name, pause in milliseconds, and the action.
const BAD_CLIENTS: [(&str, u64, Act); 11] = [
    ("says nothing", 0, |bad| {
        bad.stay(30, bad.places.folder_service, 200, |stream| stream.read(&mut [0; 1000]));
    }),
    ("never reads", 0, |bad| {
        bad.stay(30, bad.places.large, 200, |stream| {
            stream.take_error()?.map_or(Err(ErrorKind::WouldBlock.into()), Err)
        });
    }),
    ("reads a byte a second", 0, |bad| {
        bad.stay(20, bad.places.large, 1000, |stream| {
            // Received data can be read long after the reset.
            stream.take_error()?.map_or_else(|| stream.read(&mut [0]), Err)
        });
    }),
    ("sends a byte a second", 0, |bad| {
        bad.stay(20, bad.places.folder_service, 1000, |stream| stream.write(b"x"));
    }),
    ("half-closes and leaves", 20, |bad| {
        bad.with_every_service(|stream| drop(stream.shutdown(Shutdown::Write)));
    }),
    ("resets at once", 20, |bad| {
        bad.with_every_service(|stream| {
            drop(SockRef::from(&*stream).set_linger(Some(Duration::ZERO)));
        });
    }),
    ("sends megabytes", 500, |bad| {
        bad.with_every_service(|stream| {
            // Sends twice as much as the daemon reads, or until the socket is full.
            drop(stream.set_write_timeout(Some(Duration::from_millis(300))));
            drop((0..512).try_for_each(|_| stream.write_all(&[b'x'; 65536])));
        });
    }),
    ("sends garbage", 100, |bad| {
        for garbage in garbage() {
            bad.with(bad.places.folder_service, |stream| {
                drop(stream.write_all(&garbage));
                drop(stream.read(&mut [0; 1000]));
            });
        }
    }),
    ("holds what it can get", 100, |bad| {
        // More than max-per-client; the excess is reset.
        let held: Vec<_> = (0..60).flat_map(|_| bad.places.internet()).collect();
        let held: Vec<_> = held.into_iter().filter_map(|to| bad.connect(to).ok()).collect();
        bad.soak.rest(5000);
        drop(held);
    }),
    ("holds Unix sockets", 100, |bad| {
        let paths = ["clock.sock", "small.sock"].repeat(30);
        let held: Vec<_> =
            paths.into_iter().filter_map(|path| unix(&bad.places.folder.join(path)).ok()).collect();
        bad.soak.count_bad(bad.kind, held.len());
        bad.soak.rest(5000);
        drop(held);
    }),
    ("floods with datagrams", 50, flood),
];

/// The addresses of the services.
struct Places {
    folder: PathBuf,
    clock: SocketAddr,
    clock_datagrams: SocketAddr,
    small: SocketAddr,
    large: SocketAddr,
    rewritten: SocketAddr,
    folder_service: SocketAddr,
}

impl Places {
    fn of(daemon: &Daemon) -> Self {
        Self {
            folder: daemon.folder.path().to_owned(),
            clock: daemon.tcp("time.clock"),
            clock_datagrams: daemon.udp("time.clock"),
            small: daemon.tcp("file.small"),
            large: daemon.tcp("file.large"),
            rewritten: daemon.tcp("file.rewritten"),
            folder_service: daemon.tcp("file.folder"),
        }
    }

    fn internet(&self) -> [SocketAddr; 5] {
        [self.clock, self.small, self.large, self.rewritten, self.folder_service]
    }
}

/// State shared by all clients.
struct Soak {
    start: Instant,
    over: Mutex<bool>,
    changed: Condvar,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    /// Served requests of each kind, and the slowest.
    good: BTreeMap<&'static str, (u64, Duration)>,
    /// Connections or datagrams of each abusive kind.
    bad: BTreeMap<&'static str, u64>,
    failures: Vec<String>,
}

/// Stops all clients on drop.
struct Over<'a>(&'a Soak);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        *self.0.over.lock().unwrap() = true;
        self.0.changed.notify_all();
    }
}

impl Soak {
    fn begin() -> Self {
        Self {
            start: Instant::now(),
            over: Mutex::new(false),
            changed: Condvar::new(),
            counts: Mutex::default(),
        }
    }

    /// Sleeps; returns false if the soak is over.
    fn rest(&self, milliseconds: u64) -> bool {
        let time = Duration::from_millis(milliseconds);
        let over = self.over.lock().unwrap();
        !*self.changed.wait_timeout_while(over, time, |over| !*over).unwrap().0
    }

    fn ask_again_and_again(
        &self,
        kind: &'static str,
        pause: u64,
        ask: impl Fn(u64) -> io::Result<()>,
    ) {
        for round in 0.. {
            if !self.rest(pause) {
                break;
            }
            let begun = Instant::now();
            let asked = ask(round);
            match asked {
                Ok(()) => {
                    let mut counts = self.counts.lock().unwrap();
                    let (served, longest) = counts.good.entry(kind).or_default();
                    *served += 1;
                    *longest = begun.elapsed().max(*longest);
                }
                Err(error) => self.fail(&format!("{kind}, after {:?}: {error}", begun.elapsed())),
            }
        }
    }

    fn count_bad(&self, kind: &'static str, count: usize) {
        *self.counts.lock().unwrap().bad.entry(kind).or_default() += count as u64;
    }

    fn fail(&self, what: &str) {
        let failure = format!("at {:.1?}: {what}", self.start.elapsed());
        println!("FAILURE {failure}");
        self.counts.lock().unwrap().failures.push(failure);
    }

    fn failures(&self) -> usize {
        self.counts.lock().unwrap().failures.len()
    }

    /// Returns a line with the progress.
    fn line(&self, daemon: &Daemon) -> String {
        let counts = self.counts.lock().unwrap();
        let good: u64 = counts.good.values().map(|(served, _)| served).sum();
        let bad: u64 = counts.bad.values().sum();
        let (memory, descriptors) = daemon.usage();
        let threads = daemon.threads();
        format!(
            "{:4} s: {good} good served, {} failed; {bad} bad connections and datagrams; {:.1} MiB, {descriptors} \
             descriptors, {threads} threads",
            self.start.elapsed().as_secs(),
            counts.failures.len(),
            mebibytes(memory),
        )
    }

    fn table(&self) -> String {
        let counts = self.counts.lock().unwrap();
        let mut table = String::new();
        for (kind, (served, longest)) in &counts.good {
            writeln!(table, "{served:10} {kind}; the slowest took {longest:.3?}").unwrap();
        }
        for (kind, count) in &counts.bad {
            writeln!(table, "{count:10} {kind}").unwrap();
        }
        table
    }

    fn assert_that_all_is_well(&self) {
        let counts = self.counts.lock().unwrap();
        assert!(counts.failures.is_empty(), "{:#?}", counts.failures);
        // Without clients the soak proves nothing.
        for (kind, ..) in GOOD_CLIENTS {
            assert!(counts.good.contains_key(kind), "none of: {kind}");
        }
        for (kind, ..) in BAD_CLIENTS {
            assert!(counts.bad.get(kind).is_some_and(|count| *count > 0), "none of: {kind}");
        }
    }
}

/// Resident memory and threads of the daemon, sampled every second.
#[derive(Default)]
struct Memory(Vec<(Duration, u64, u64)>);

impl Memory {
    fn note(&mut self, soak: &Soak, daemon: &Daemon) {
        self.0.push((soak.start.elapsed(), daemon.usage().0, daemon.threads()));
    }

    /// Compares the second half with the first minute, which has the same load. A leak of a hundred
    /// bytes per connection would be tens of megabytes in ten minutes. Fragmentation and the stacks
    /// of file threads are allowed.
    fn assert_that_it_is_flat(&self, length: Duration) {
        let highest = |from: Duration, to: Duration| {
            let within = || self.0.iter().filter(|(at, ..)| (from..to).contains(at));
            let bytes = within().map(|(_, bytes, _)| *bytes).max().unwrap_or(0);
            (bytes, within().map(|(.., threads)| *threads).max().unwrap_or(0))
        };
        let minute = Duration::from_secs(60).min(length / 4);
        let (early, early_threads) = highest(Duration::ZERO, minute);
        let (late, late_threads) = highest(length / 2, Duration::MAX);
        let allowed = early
            + early / 4
            + (4 << 20)
            + late_threads.saturating_sub(early_threads) * MEMORY_OF_A_THREAD;
        println!(
            "memory: {:.1} MiB and {early_threads} threads at most in the first {minute:?}, \
             {:.1} MiB and {late_threads} threads in the second half; {:.1} MiB would be too much",
            mebibytes(early),
            mebibytes(late),
            mebibytes(allowed),
        );
        assert!(late <= allowed, "memory grew");
    }
}

/// Memory of a file thread: a piece of a file on its stack, and allocator caches.
const MEMORY_OF_A_THREAD: u64 = 80 << 10;

/// Replaces each file by a rename.
fn write_files(folder: &Path, version: u64) {
    for (name, size) in [("small.bin", SMALL), ("large.bin", LARGE), ("rewritten.bin", REWRITTEN)] {
        replace(&folder.join(name), &content(version, size));
    }
    for (name, size) in FOLDER_FILES {
        replace(&folder.join("files").join(name), &content(version, size));
    }
}

/// Replaces each file every second and returns the last version.
fn replace_files(soak: &Soak, folder: &Path) -> u64 {
    let mut version = 0;
    while soak.rest(1000) {
        version += 1;
        let small = content(version, SMALL);
        if version % 2 == 0 {
            replace(&folder.join("small.bin"), &small);
        } else {
            fs::write(folder.join("small.bin"), &small).unwrap();
        }
        replace(&folder.join("large.bin"), &content(version, LARGE));
        fs::write(folder.join("rewritten.bin"), content(version, REWRITTEN)).unwrap();
        for (name, size) in FOLDER_FILES {
            // The folder service ignores hidden files.
            let beside = folder.join("files/.new");
            fs::write(&beside, content(version, size)).unwrap();
            fs::rename(beside, folder.join("files").join(name)).unwrap();
        }
    }
    version
}

/// Asks up to ten times, because a datagram may be lost.
fn ask_time_by_datagram(to: SocketAddr) -> io::Result<()> {
    for _ in 0..10 {
        let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, GOOD], 0)))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let before = SystemTime::now();
        socket.send(b"time?")?;
        let mut reply = [0; 1000];
        if let Ok(length) = socket.recv(&mut reply) {
            return check_time(reply.get(..length).unwrap_or_default(), before);
        }
    }
    Err(ErrorKind::TimedOut.into())
}

/// Pipelines requests for the list, each file and a missing one.
fn ask_folder(to: SocketAddr) -> io::Result<()> {
    let mut stream = internet(to)?;
    let names: String = FOLDER_FILES.iter().map(|(name, _)| format!("{name}\n")).collect();
    write!(stream, "\n{names}none\n")?;
    stream.shutdown(Shutdown::Write)?;
    let mut replies = BufReader::new(stream).lines();
    let mut next = || -> io::Result<Value> {
        let line = replies.next().ok_or(ErrorKind::UnexpectedEof)??;
        Ok(serde_json::from_str(&line)?)
    };
    let list = next()?;
    let listed = list["files"].as_array().map_or(0, Vec::len);
    if listed != FOLDER_FILES.len() {
        return Err(wrong(list.to_string()));
    }
    for (name, size) in FOLDER_FILES {
        let reply = next()?;
        if reply["filename"] != name || reply["size"] != size {
            return Err(wrong(format!("not the reply to {name}")));
        }
        version_of(&reply, size)?;
    }
    let refusal = next()?;
    if refusal["error"] != "no such file" {
        return Err(wrong(refusal.to_string()));
    }
    match replies.next() {
        None => Ok(()),
        Some(line) => Err(wrong(line?)),
    }
}

/// Checks that a denied client gets no byte over TCP or UDP.
fn be_denied(places: &Places, round: u64) -> io::Result<()> {
    let mut reply = Vec::new();
    let addresses = places.internet();
    let to = addresses.into_iter().cycle().nth(usize::try_from(round % 5).unwrap_or(0));
    // The reset may arrive before connect(2) returns.
    let ended = connect_from(DENIED, to.unwrap_or(places.clock))
        .and_then(|mut stream| stream.read_to_end(&mut reply));
    if !reply.is_empty() || !ended.as_ref().is_err_and(|e| e.kind() == ErrorKind::ConnectionReset) {
        return Err(wrong(format!("{ended:?} after {} bytes", reply.len())));
    }
    let socket = UdpSocket::bind(SocketAddr::from(([127, 0, 0, DENIED], 0)))?;
    socket.connect(places.clock_datagrams)?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    socket.send(b"time?")?;
    match socket.recv(&mut [0; 1000]) {
        Ok(_) => Err(wrong("a datagram was answered")),
        Err(_) => Ok(()),
    }
}

/// A kind of abusive client.
struct Bad<'a> {
    soak: &'a Soak,
    places: &'a Places,
    kind: &'static str,
    /// Last octet of its address.
    address: u8,
}

impl Bad<'_> {
    fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = connect_from(self.address, to)?;
        self.soak.count_bad(self.kind, 1);
        Ok(stream)
    }

    /// Connects, acts and leaves; the result does not matter.
    fn with(&self, to: SocketAddr, act: impl FnOnce(&mut TcpStream)) {
        if let Ok(mut stream) = self.connect(to) {
            act(&mut stream);
        }
    }

    fn with_every_service(&self, act: impl Fn(&mut TcpStream)) {
        for to in self.places.internet() {
            self.with(to, &act);
        }
    }

    /// Holds `count` connections and acts on each periodically until the daemon ends it, which it
    /// must.
    fn stay(
        &self,
        count: usize,
        to: SocketAddr,
        every: u64,
        act: impl Fn(&mut TcpStream) -> io::Result<usize>,
    ) {
        let mut staying: Vec<(Instant, TcpStream)> = Vec::new();
        while self.soak.rest(every) {
            while staying.len() < count {
                let Ok(stream) = self.connect(to) else { break };
                drop(SockRef::from(&stream).set_recv_buffer_size(4096));
                drop(stream.set_nonblocking(true));
                staying.push((Instant::now(), stream));
            }
            staying.retain_mut(|(since, stream)| {
                if since.elapsed() > LET_GO {
                    self.soak.fail(&format!("{}: it was not let go", self.kind));
                    return false;
                }
                match act(stream) {
                    Ok(0) => false,
                    Ok(_) => true,
                    Err(error) => error.kind() == ErrorKind::WouldBlock,
                }
            });
        }
    }
}

/// Invalid requests for a folder service.
pub fn garbage() -> [Vec<u8>; 8] {
    [
        sample(1, 4000),
        sample(2, 100_000),
        vec![0; 10_000],
        vec![b'x'; 10_000],
        b"\xff\xfe\n\x1b[2J\n../../etc/passwd\n/etc/passwd\nsub/../../handout.toml\n.new\n"
            .to_vec(),
        [vec![b'/'; 4090], b"\n".to_vec()].concat(),
        b"one.b".to_vec(),
        // Far more replies than the client reads.
        b"sub/two.bin\n\n".repeat(1000),
    ]
}

/// Sends junk, empty datagrams, possible replies and requests at an excessive rate.
fn flood(bad: &Bad<'_>) {
    let reply = br#"{"time":"2026-11-22T13:46:01.123456Z","unix":1795326361.123456,"synchronized":true,"max-error-us":1234}
"#;
    let junk = sample(bad.soak.start.elapsed().as_secs(), 60_000);
    let Ok(socket) = UdpSocket::bind(SocketAddr::from(([127, 0, 0, bad.address], 0))) else {
        return;
    };
    let kinds = [b"", &b"time?"[..], reply, &junk[..1400], &junk];
    let sent = kinds.iter().cycle().take(200);
    let sent = sent.filter(|bytes| socket.send_to(bytes, bad.places.clock_datagrams).is_ok());
    bad.soak.count_bad(bad.kind, sent.count());
}
