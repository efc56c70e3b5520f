//! Kills the daemon, `fetch` and `download` at random moments while mirrors, alerts and clients run.
//!
//! - A visible file is the whole of one version. A reply that ends cleanly is complete; over TCP every
//!   other one is reset.
//! - The next start succeeds at once, with the same ports and the same Unix socket.
//! - Temporary files are bounded, and none remains at the end.
//! - A message in the outbox is delivered at least once; duplicates have the same Message-ID.
//! - A condition that persists until it is reported is reported.
//!
//! Not promised: alerts that were not in the outbox when the daemon was killed and whose condition had
//! ended when the next one started.
//!
//! `tests/crash [COUNT]` kills 200 times, the test suite a few times.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use jiff::{Timestamp, tz::TimeZone};
use serde_json::Value;
use socket2::Socket;
use tempfile::TempDir;

use crate::common::{DEADLINE, Daemon, eventually, program, run, wait_for_exit};
use crate::good::{content, internet, read_document, unix, whole};
use crate::servers::Running;
use crate::smtp_server::SmtpServer;
use crate::web::{Nginx, touch};

/// A file, and its size: nginx sends the largest of them in a third of a second.
type File = (&'static str, usize);

/// What is mirrored.
const MIRRORED: [File; 4] =
    [("a.bin", 1000), ("b.bin", 100_000), ("c.bin", 200_000), ("d.bin", 400_000)];

/// What the folder service has, and what clients are pushed.
const FETCHED: File = ("large.bin", 2_000_000);
const PUSHED: File = ("small.bin", 100_000);

/// What is mirrored by mirrors of their own, and not there now and then.
const FAULTY: [&str; 3] = ["one", "two", "three"];

/// What is served, and not there now and then. No daemon starts without it.
const MISSING: &str = "missing.bin";

/// A second in the past.
const THEN: u64 = 1_700_000_000;

/// When the next daemon must be ready; far more than it needs.
const AT_ONCE: Duration = Duration::from_secs(15);

/// Pauses of each kind of client and event, in milliseconds.
const CLIENT_PAUSE: u64 = 20;
const FILES_PAUSE: u64 = 200;
const FAULT_PAUSE: u64 = 1500;
const FAULT_LOOK: u64 = 50;

#[test]
fn survives_kills_at_any_moment_without_partial_files_or_lost_alerts() {
    crash(5);
}

#[test]
#[ignore = "takes minutes: tests/crash"]
fn two_hundred_times() {
    crash(std::env::var("CRASH_TIMES").map_or(200, |times| times.parse().unwrap()));
}

fn crash(times: usize) {
    let seed = std::env::var("CRASH_SEED");
    let seed = seed.map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("CRASH_SEED={seed}");
    let mut random = Rng::with_seed(seed);
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::begin(folder.path());
    let mut daemon = Daemon::start_in(folder, &world.config(), |_| {});
    world.ports = ["file.folder", "file.pushed"].map(|name| daemon.tcp(name));
    let (world, config) = (&world, world.config());
    let mut slowest = Duration::ZERO;
    thread::scope(|scope| {
        let over = Over(world);
        scope.spawn(|| world.replace_files());
        scope.spawn(|| world.be_pushed_by_tcp());
        scope.spawn(|| world.be_pushed_by_unix_socket());
        let [mut fetch, mut download] = [random.fork(), random.fork()];
        scope.spawn(move || world.kill_fetch(&mut fetch));
        scope.spawn(move || world.kill_download(&mut download));
        for name in FAULTY {
            scope.spawn(move || world.have_faults(name));
        }
        let mut missing = random.fork();
        scope.spawn(move || world.miss_a_file(&mut missing));
        for turn in 0..times {
            // While it does all that a start is the occasion for, or later.
            pause(if random.bool() { random.u64(..300) } else { random.u64(..3000) });
            let folder = daemon.crash();
            world.look();
            if random.u8(..4) == 0 {
                world.nothing_is_missing(|| {
                    let path = folder.path().join("handout.toml");
                    let mut serve = program();
                    serve.args(["serve", "--config"]).arg(path);
                    kill_within(&mut serve, random.u64(..60));
                });
                world.look();
            }
            let begun = Instant::now();
            world.nothing_is_missing(|| daemon = Daemon::start_in(folder, &config, |_| {}));
            slowest = slowest.max(begun.elapsed());
            world.count("kills of the daemon");
            if turn % 20 == 19 {
                println!("{turn} kills");
            }
            assert!(begun.elapsed() < AT_ONCE, "the start took {:?}", begun.elapsed());
            assert_eq!(*world.failures.lock().unwrap(), [""; 0]);
        }
        // They come to the end of what they are at, for which they need the daemon.
        drop(over);
    });
    println!("{:#?}; the slowest start took {slowest:?}", world.counts.lock().unwrap());
    assert_eq!(*world.failures.lock().unwrap(), [""; 0]);
    world.finish();
    assert!(daemon.stop().success());
    world.assert_no_alert_lost();
}

fn pause(milliseconds: u64) {
    thread::park_timeout(Duration::from_millis(milliseconds));
}

/// Runs the program, and kills it after so many milliseconds if it has not ended.
fn kill_within(command: &mut Command, milliseconds: u64) {
    let mut running = Running::start(command);
    pause(milliseconds);
    running.child.kill().unwrap();
    wait_for_exit(&mut running.child);
}

/// All that outlives the daemon.
struct World {
    nginx: Nginx,
    smtp_server: SmtpServer,
    folder: PathBuf,
    /// Where `fetch` and `download` save.
    saved: TempDir,
    /// Of the folder service, and of what is pushed, once they are known: they stay the same.
    ports: [SocketAddr; 2],
    /// Since when nobody is killed any more.
    over: OnceLock<Instant>,
    /// The last version of the files.
    version: AtomicU64,
    /// Held while the file must be there that is missing now and then.
    missing: Mutex<()>,
    /// What queues had when the daemon was killed: Message-IDs, and what has happened in words.
    promised: Mutex<BTreeSet<String>>,
    mails: Mutex<Vec<Value>>,
    counts: Mutex<BTreeMap<&'static str, usize>>,
    failures: Mutex<Vec<String>>,
}

/// Sends everybody home when it is dropped, however this comes about.
struct Over<'a>(&'a World);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.get_or_init(Instant::now);
    }
}

impl World {
    fn begin(folder: &Path) -> Self {
        // Nobody else binds or connects there.
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = SocketAddr::from((Ipv4Addr::new(127, 100 + high % 100, low, 1), 0));
        let world = Self {
            nginx: Nginx::start_with("limit_rate 1m;"),
            smtp_server: SmtpServer::start("none"),
            folder: folder.to_owned(),
            saved: tempfile::tempdir().unwrap(),
            ports: [address; 2],
            over: OnceLock::new(),
            version: AtomicU64::new(0),
            missing: Mutex::default(),
            promised: Mutex::default(),
            mails: Mutex::default(),
            counts: Mutex::default(),
            failures: Mutex::default(),
        };
        for name in ["served", "state", "mirrored"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        for name in ["fetch", "download"] {
            fs::create_dir(world.saved.path().join(name)).unwrap();
        }
        fs::write(folder.join(MISSING), "x").unwrap();
        for name in FAULTY {
            world.nginx.has(name, name.as_bytes(), THEN);
        }
        for _ in 0..MIRRORED.len() {
            world.replace_file();
        }
        world
    }

    fn config(&self) -> String {
        let [folder, pushed] = self.ports;
        let urls = MIRRORED.map(|(name, _)| format!("\"{}\"", self.nginx.plain_url(name)));
        let faulty = FAULTY.map(|name| {
            let url = self.nginx.plain_url(name);
            format!(
                "[mirror.{name}]\nurls = [\"{url}\"]\ninto = \"{name}\"\nevery = \"1s\"\n\
                 retries = 0\n"
            )
        });
        format!(
            "[file.folder]\nlisten = [\"{folder}\"]\npath = \"served\"\n\
             [file.pushed]\nlisten = [\"{pushed}\", \"unix:pushed.sock\"]\npath = \"{}\"\n\
             [file.missing]\nlisten = [\"unix:missing.sock\"]\npath = \"{MISSING}\"\n\
             [mirror.files]\nurls = [{}]\ninto = \"mirrored\"\nevery = \"1s\"\n{}\
             {}[alert]\nto = [\"mail.ops\"]\nstate = \"state\"\nwait = \"200ms\"\n\
             max-per-hour = 1000\nattach = false\n\
             on = [\"file-missing\", \"mirror-failed\", \"mirror-updated\"]\n",
            PUSHED.0,
            urls.join(", "),
            faulty.concat(),
            self.smtp_server.channel(""),
        )
    }

    fn is_over(&self) -> bool {
        self.over.get().is_some()
    }

    fn count(&self, what: &'static str) {
        *self.counts.lock().unwrap().entry(what).or_default() += 1;
    }

    fn fail(&self, what: String) {
        println!("FAILURE {what}");
        self.failures.lock().unwrap().push(what);
    }

    /// Gives every file a new version, one after the other, again and again.
    fn replace_files(&self) {
        while !self.is_over() {
            self.replace_file();
            pause(FILES_PAUSE);
        }
    }

    fn replace_file(&self) {
        let version = self.version.fetch_add(1, Ordering::SeqCst) + 1;
        let turn = usize::try_from(version).unwrap();
        let (name, size) = MIRRORED[turn % MIRRORED.len()];
        let served = self.folder.join("served");
        // No two have the same time, by which nginx tells them apart.
        for (beside, path, size) in [
            (self.nginx.path("new"), self.nginx.path(name), size),
            (served.join(".new"), served.join(FETCHED.0), FETCHED.1),
            (self.folder.join("new"), self.folder.join(PUSHED.0), PUSHED.1),
        ] {
            fs::write(&beside, content(version, size)).unwrap();
            touch(&beside, THEN + version);
            fs::rename(beside, path).unwrap();
        }
    }

    /// A client that is pushed a file, over and over: what ends cleanly is whole, all else is a reset.
    fn be_pushed_by_tcp(&self) {
        use ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
        self.be_pushed(
            [BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected],
            ["pushed by TCP", "not pushed by TCP, as the daemon was killed"],
            || internet(self.ports[1]),
        );
    }

    /// A Unix socket knows no reset for what has been sent; the document says that it is not whole.
    fn be_pushed_by_unix_socket(&self) {
        use ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
        self.be_pushed(
            [BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof],
            ["pushed by Unix socket", "not pushed by Unix socket, as the daemon was killed"],
            || unix(&self.folder.join("pushed.sock")),
        );
    }

    fn be_pushed<const N: usize>(
        &self,
        killed: [ErrorKind; N],
        [served, not_served]: [&'static str; 2],
        connect: impl Fn() -> io::Result<Socket>,
    ) {
        for round in 0.. {
            let read =
                connect().and_then(|stream| read_document(stream, PUSHED.0, PUSHED.1, round));
            match read {
                Ok(_) => self.count(served),
                Err(error) if killed.contains(&error.kind()) => self.count(not_served),
                Err(error) => self.fail(format!("{served}: {error:?}")),
            }
            pause(CLIENT_PAUSE);
            if self.is_over() {
                return;
            }
        }
    }

    /// `fetch`, which is killed before its end or not.
    fn kill_fetch(&self, random: &mut Rng) {
        let folder = self.saved.path().join("fetch");
        while !self.is_over() {
            kill_within(&mut self.fetch(), random.u64(..100));
            self.count("kills of fetch");
            self.check(&folder, &[FETCHED], 1);
            pause(CLIENT_PAUSE);
        }
    }

    /// `download`, likewise.
    fn kill_download(&self, random: &mut Rng) {
        let folder = self.saved.path().join("download");
        while !self.is_over() {
            kill_within(&mut self.download(), random.u64(..800));
            self.count("kills of download");
            self.check(&folder, &MIRRORED, 2 + 2 * MIRRORED.len());
            pause(CLIENT_PAUSE);
        }
    }

    fn fetch(&self) -> Command {
        let mut fetch = program();
        fetch
            .arg("fetch")
            .arg(self.ports[0].to_string())
            .args([FETCHED.0, "--force", "-o", "fetch"]);
        fetch.current_dir(self.saved.path());
        fetch
    }

    fn download(&self) -> Command {
        let mut download = program();
        download.args(["download", "--update", "-o", "download"]);
        download.args(MIRRORED.map(|(name, _)| self.nginx.plain_url(name)));
        download.current_dir(self.saved.path());
        download
    }

    /// Looks at what a killed daemon has left.
    fn look(&self) {
        self.check(&self.folder.join("mirrored"), &MIRRORED, 2 + 2 * MIRRORED.len());
        // The queue, and one that is not whole.
        self.check(&self.folder.join("state"), &[], 2);
        let mut promised = self.promised.lock().unwrap();
        let queue = self.queue();
        let of = |list: &Value, key: &str| -> Vec<String> {
            let list = list.as_array().into_iter().flatten();
            list.map(|one| one[key].as_str().unwrap().to_owned()).collect()
        };
        promised.extend(of(&queue["messages"], "id"));
    }

    /// The queue as it is on the disk.
    fn queue(&self) -> Value {
        match fs::read(self.folder.join("state/.handout-alerts.json")) {
            Ok(queue) => serde_json::from_slice(&queue).unwrap(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound);
                Value::Null
            }
        }
    }

    /// Every file in this folder is the whole of one version, and so many are hidden at most.
    fn check(&self, folder: &Path, files: &[File], hidden: usize) {
        let (hides, visible): (Vec<_>, Vec<_>) =
            names(folder).into_iter().partition(|name| name.starts_with('.'));
        if hides.len() > hidden {
            self.fail(format!("{}: {hides:?}", folder.display()));
        }
        for name in visible {
            let Some((_, size)) = files.iter().find(|(known, _)| *known == name) else {
                self.fail(format!("{}: {name}", folder.display()));
                continue;
            };
            let data = fs::read(folder.join(&name)).unwrap();
            if let Err(error) = whole(&data, *size) {
                self.fail(format!("{}: {name}: {error}", folder.display()));
            }
        }
    }

    /// Does something while no file is missing, and none goes.
    fn nothing_is_missing(&self, act: impl FnOnce()) {
        let _missing = self.missing.lock().unwrap();
        fs::write(self.folder.join(MISSING), "x").unwrap();
        act();
    }

    /// Removes a file that is served, and puts it back whatever is told of it.
    fn miss_a_file(&self, random: &mut Rng) {
        while !self.is_over() {
            {
                let _missing = self.missing.lock().unwrap();
                fs::remove_file(self.folder.join(MISSING)).unwrap();
            }
            self.count("files missing");
            pause(random.u64(..3000));
            self.nothing_is_missing(|| {});
            pause(FAULT_PAUSE);
        }
    }

    /// Lets a mirror fail until this is reported.
    fn have_faults(&self, name: &str) {
        let path = self.nginx.path(name);
        let fault = format!("mirror-failed: mirror.{name}");
        while !self.is_over() {
            let since = now();
            fs::remove_file(&path).unwrap();
            self.wait_for(&fault, &since);
            self.nginx.has(name, name.as_bytes(), THEN);
            self.count("reported faults");
            pause(FAULT_PAUSE);
        }
    }

    /// Waits until a fault that began at `since` or later is reported, which may take several daemons.
    fn wait_for(&self, fault: &str, since: &str) {
        let is_told = || {
            let mails = self.mails();
            let told: Vec<_> = mails.iter().flat_map(Told::of).collect();
            told.iter().any(|told| !told.over && told.fault == fault && told.since >= since)
        };
        while !is_told() {
            if self.over.get().is_some_and(|over| over.elapsed() > DEADLINE) {
                self.fail(format!("{fault}, since {since}, was not reported"));
                return;
            }
            pause(FAULT_LOOK);
        }
    }

    /// Every mail so far.
    fn mails(&self) -> MutexGuard<'_, Vec<Value>> {
        let mut mails = self.mails.lock().unwrap();
        let more = self.smtp_server.mails_from(mails.len());
        mails.extend(more);
        mails
    }

    /// When nobody is killed any more, all comes to its end, and nothing is left of what was not whole.
    fn finish(&self) {
        for _ in MIRRORED {
            self.replace_file();
        }
        let last = self.version.load(Ordering::SeqCst);
        let download = run(&mut self.download());
        assert!(download.status.success(), "{download:?}");
        let mut known = MIRRORED.map(|(name, _)| name).to_vec();
        known.insert(0, ".handout-mirror.json");
        for folder in [self.folder.join("mirrored"), self.saved.path().join("download")] {
            eventually("the last version of every file", || {
                MIRRORED.iter().all(|(name, size)| {
                    let version = whole(&fs::read(folder.join(name)).unwrap(), *size).unwrap();
                    version > last - MIRRORED.len() as u64
                })
            });
            eventually("what is left over to go", || names(&folder) == known);
        }
        eventually("the last version to be fetched", || {
            let fetch = run(&mut self.fetch());
            assert!(fetch.status.success(), "{fetch:?}");
            let data = fs::read(self.saved.path().join("fetch").join(FETCHED.0)).unwrap();
            whole(&data, FETCHED.1).unwrap() == last
        });
        eventually("every alert to be sent", || {
            let queue = self.queue();
            let none = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
            none(&queue["messages"])
        });
    }

    fn assert_no_alert_lost(&self) {
        let mails = self.mails();
        let mut by_id = BTreeMap::new();
        let mut twice = 0;
        for mail in mails.iter() {
            let said = (&mail["headers"]["subject"], &mail["headers"]["date"], &mail["text"]);
            let id = mail["headers"]["message-id"].as_str().unwrap();
            if let Some(before) = by_id.insert(id, said) {
                assert_eq!(said, before);
                twice += 1;
            }
        }
        let promised = self.promised.lock().unwrap();
        println!(
            "{} mails, {twice} of them duplicates; {} messages were queued when the daemon was killed",
            mails.len(),
            promised.len(),
        );
        let lost: Vec<_> = promised.iter().filter(|id| !by_id.contains_key(id.as_str())).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }
}

/// A line of a mail: a fault, and since when it lasts or lasted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Told<'a> {
    over: bool,
    fault: &'a str,
    since: &'a str,
}

impl<'a> Told<'a> {
    fn of(mail: &'a Value) -> Vec<Self> {
        let text = mail["text"].as_str().unwrap();
        // Before the first line stands the host.
        let lines = text.split_once(": ").unwrap().1.lines();
        let told = lines.filter_map(|line| {
            let (fault, rest) = line.split_once(", since ")?;
            let fault_that_is_over = fault.strip_prefix("over: ");
            let (over, fault) = (fault_that_is_over.is_some(), fault_that_is_over.unwrap_or(fault));
            Some(Self { over, fault, since: rest.get(..FORM.len())? })
        });
        told.collect()
    }
}

/// How long a time is in an alert.
const FORM: &str = "2026-11-22 13:46:01 +00:00";

/// This second, as alerts tell it.
fn now() -> String {
    Timestamp::now().to_zoned(TimeZone::UTC).strftime("%Y-%m-%d %H:%M:%S %:z").to_string()
}

/// Every name in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
