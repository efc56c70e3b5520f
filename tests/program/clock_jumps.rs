//! The wall clock jumps, as that of a machine without a battery does when it hears the time: clients
//! are told the new time, and nothing else takes notice.

use std::fs;
use std::io::Read;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::common::{DEADLINE, Daemon, connect, decode, eventually, read_all, replace, sample};

/// Years there and back, each written as the library reads it, and what it comes to in seconds.
const JUMPS: [(&str, f64); 4] =
    [("+3650d", 315_360_000.0), ("-3650d", -315_360_000.0), ("+1d", 86_400.0), ("+0", 0.0)];

/// A wall clock that is set by writing to a file; what runs does not go with it.
struct Clock {
    set: PathBuf,
}

impl Clock {
    fn in_folder(folder: &Path) -> Self {
        let clock = Self { set: folder.join("clock") };
        clock.jump("+0");
        clock
    }

    fn jump(&self, to: &str) {
        replace(&self.set, format!("{to}\n").as_bytes());
    }

    fn prepare(&self, command: &mut Command) {
        let libraries = fs::read_dir("/usr/lib").unwrap().flatten();
        let library = libraries
            .map(|architecture| architecture.path().join("faketime/libfaketimeMT.so.1"))
            .find(|library| library.exists())
            .expect("faketime, which tests/run installs");
        command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", &self.set);
        // It looks at each call, and only at what tells the wall clock.
        for on in ["FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC", "NO_FAKE_STAT"] {
            command.env(on, "1");
        }
    }
}

/// By how many seconds the time that a service has told is ahead of the real one.
fn ahead(told: &[u8]) -> f64 {
    let told: f64 = str::from_utf8(told).unwrap().trim().parse().unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    told - now.as_secs_f64()
}

fn is_told(told: &[u8], jump: f64) -> bool {
    (ahead(told) - jump).abs() < DEADLINE.as_secs_f64()
}

#[test]
fn after_a_jump_clients_are_told_the_new_time_and_nothing_else_takes_notice() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::in_folder(folder.path());
    fs::write(folder.path().join("picture.jpg"), sample(0, 1000)).unwrap();
    fs::write(folder.path().join("large"), sample(9, 8_000_000)).unwrap();
    let mut daemon = Daemon::start_in(
        folder,
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\nformat = \"unix\"\n\
         [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n\
         [file.large]\nlisten = [\"127.0.0.1:0\"]\npath = \"large\"\n",
        |command| clock.prepare(command),
    );
    // It is in the middle of this all the while, and its deadlines are far away.
    let mut waiting = connect(daemon.tcp("file.large"));
    let mut document = vec![0; 1000];
    waiting.read_exact(&mut document).unwrap();
    let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.connect(daemon.udp("time.clock")).unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    for (round, (to, jump)) in (1..).zip(JUMPS) {
        clock.jump(to);
        assert!(is_told(&read_all(daemon.tcp("time.clock")), jump), "{to}");
        asker.send(b"?").unwrap();
        let mut reply = [0; 64];
        let length = asker.recv(&mut reply).unwrap();
        assert!(is_told(&reply[..length], jump), "{to}");
        // Files are still looked at.
        let content = sample(round, 1000);
        replace(&daemon.path("picture.jpg"), &content);
        eventually("the new version", || {
            decode(&read_all(daemon.tcp("file.picture"))).1 == content
        });
    }
    clock.jump("+1d");
    let line = daemon.wait_for("the step", |line| line["step"].is_number());
    assert!(line["step"].as_f64().unwrap().abs() >= 80_000.0, "{line}");
    waiting.read_to_end(&mut document).unwrap();
    assert!(decode(&document).1 == sample(9, 8_000_000));
    drop(waiting);
    assert!(daemon.stop().success());
    for line in daemon.lines().iter().filter(|line| line["outcome"].is_string()) {
        assert_eq!(line["outcome"], "complete", "{line}");
        let duration = line["duration"].as_f64().unwrap();
        assert!((0.0..DEADLINE.as_secs_f64()).contains(&duration), "{line}");
    }
}

#[cfg(feature = "gateway")]
#[test]
fn after_a_jump_a_mirror_waits_as_long_as_it_was_told() {
    use crate::web::{Reply, Web};

    let web = Web::lists(|_| serde_json::json!([{ "url": "a.txt" }]), |_| Reply::ok("alpha"));
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    let clock = Clock::in_folder(folder.path());
    let source = web.url("list.json");
    let mut daemon = Daemon::start_in(
        folder,
        &format!(
            "[mirror.m]\ninto = \"files\"\nsource = \"{source}\"\nlist = \"\"\nurl = \"/url\"\n\
             every = \"1h\"\n[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"unix\"\n"
        ),
        |command| clock.prepare(command),
    );
    let runs = || web.requests_for("/list.json").len();
    daemon.wait_for_message("mirrored");
    for (to, jump) in JUMPS {
        clock.jump(to);
        // Whoever began anew because of it would have done so meanwhile.
        let mut asked = 0;
        eventually("some answers", || {
            assert!(is_told(&read_all(daemon.tcp("time.clock")), jump), "{to}");
            asked += 1;
            asked > 50
        });
        assert_eq!(runs(), 1, "{to}");
    }
    assert!(daemon.stop().success());
}
