//! Lets every system call of the serving path fail once: affected clients get everything or a reset,
//! and later clients are served.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::common::{DEADLINE, Daemon, connect, decode, eventually, sample, says};
use crate::strace::Strace;

/// System calls with the errors that the kernel can return. `mmap` is not included, because no
/// program continues without memory.
const FAULTS: [(&str, &[&str]); 26] = [
    (
        "accept4",
        &["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EINTR", "ECONNABORTED", "EPERM", "EPROTO"],
    ),
    ("bind", &["EACCES", "EADDRINUSE", "ENOMEM"]),
    ("close", &["EINTR", "EIO", "ENOSPC"]),
    ("epoll_ctl", &["ENOMEM", "ENOSPC"]),
    ("epoll_wait", &["EINTR"]),
    ("fcntl", &["EPERM", "ENOMEM"]),
    ("getdents64", &["EACCES", "EIO", "ENOMEM"]),
    ("getsockname", &["ENOBUFS"]),
    ("getsockopt", &["ENOMEM", "ENOBUFS"]),
    ("ioctl", &["EINVAL"]),
    ("listen", &["EADDRINUSE"]),
    ("memfd_create", &["EMFILE", "ENFILE", "ENOMEM"]),
    ("openat", &["EMFILE", "ENFILE", "ENOMEM", "EINTR", "EIO", "EACCES"]),
    ("openat2", &["EMFILE", "ENFILE", "ENOMEM", "EINTR", "EIO", "EACCES", "EAGAIN"]),
    ("ppoll", &["EINTR", "ENOMEM"]),
    ("pread64", &["EINTR", "EIO", "ENOMEM"]),
    ("preadv2", &["EINTR", "EIO", "EOPNOTSUPP"]),
    ("recvfrom", &["ENOMEM", "ECONNRESET"]),
    ("recvmmsg", &["EINTR", "ENOMEM", "ENOBUFS", "ECONNREFUSED"]),
    ("sendfile", &["EINTR", "EIO", "ENOMEM"]),
    ("sendmsg", &["EINTR", "ENOMEM", "ENOBUFS", "EPERM", "EIO"]),
    ("sendto", &["EINTR", "ENOMEM", "ENOBUFS", "ECONNRESET", "EPIPE"]),
    ("setsockopt", &["ENOMEM", "ENOBUFS"]),
    ("shutdown", &["ENOTCONN"]),
    ("socket", &["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EACCES"]),
    ("statx", &["EACCES", "EIO", "ENOMEM", "EINTR"]),
];

/// Maximum number of calls per fault; more indicate a busy loop.
const MANY_CALLS: usize = 20_000;

/// Files served by write, by sendfile in one call, by sendfile in several, and from the disk.
const FILES: [(&str, usize); 4] =
    [("small", 10_000), ("picture", 150_000), ("large", 400_000), ("streamed", 1_200_000)];

fn config(more: &str) -> String {
    let mut config = String::from(
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\", \"unix:clock.sock\"]\n\
         [file.folder]\nlisten = [\"127.0.0.1:0\"]\npath = \"folder\"\ncache-limit = \"1MiB\"\n\
         [metrics]\nlisten = [\"127.0.0.1:0\"]\n",
    );
    for (name, _) in FILES {
        let cache_limit = if name == "streamed" { "cache-limit = \"1MiB\"" } else { "" };
        config += &format!(
            "[file.{name}]\nlisten = [\"127.0.0.1:0\"]\npath = \"folder/{name}\"\n{cache_limit}\n"
        );
    }
    config + more
}

/// The result of a client.
#[derive(Debug, PartialEq)]
enum Got {
    Whole,
    /// The client can detect the failure.
    Fault,
}

/// A daemon with every kind of service, and the expected replies.
struct Everything {
    daemon: Daemon,
    rounds: u32,
}

impl Everything {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        for (name, size) in FILES {
            fs::write(folder.path().join("folder").join(name), sample(1, size)).unwrap();
        }
        Self { daemon: Daemon::start_in(folder, &config(""), |_| {}), rounds: 0 }
    }

    /// Asks every service over every transport.
    fn ask_all(&mut self) -> Vec<(&'static str, Got)> {
        self.ask_all_within(DEADLINE)
    }

    /// Like [`Self::ask_all`], where a datagram may be lost after `patience`.
    fn ask_all_within(&mut self, patience: Duration) -> Vec<(&'static str, Got)> {
        self.rounds += 1;
        let mut got = vec![
            (
                "time",
                read(self.daemon.tcp("time.clock")).map_or(Got::Fault, |reply| is_time(&reply)),
            ),
            ("datagram", self.datagram(patience)),
            ("unix", self.unix()),
            ("folder", self.folder()),
            ("metrics", self.metrics()),
        ];
        for (name, size) in FILES {
            let document = read(self.daemon.tcp(&format!("file.{name}")));
            let is_whole = |document: Vec<u8>| {
                assert!(decode(&document) == (name.to_owned(), sample(1, size)), "{name}");
                Got::Whole
            };
            got.push((name, document.map_or(Got::Fault, is_whole)));
        }
        got
    }

    /// Adds or removes a service whose file is read anew.
    fn reload(&self) -> Got {
        let more = "[file.more]\nlisten = [\"127.0.0.1:0\"]\npath = \"folder/picture\"\n";
        let line = self.daemon.reload(&config(if self.rounds % 2 == 1 { more } else { "" }));
        if says(&line, "reloaded: ") { Got::Whole } else { Got::Fault }
    }

    fn datagram(&self, patience: Duration) -> Got {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(self.daemon.udp("time.clock")).unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        socket.send(b"?").unwrap();
        let mut reply = [0; 64];
        socket.recv(&mut reply).map_or(Got::Fault, |length| is_time(&reply[..length]))
    }

    /// Unix sockets have no reset: a truncated reply lacks its end.
    fn unix(&self) -> Got {
        let mut stream = UnixStream::connect(self.daemon.path("clock.sock")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut reply = Vec::new();
        match stream.read_to_end(&mut reply) {
            Ok(_) if !reply.is_empty() => is_time(&reply),
            Ok(_) => Got::Fault,
            Err(error) => fault(&error),
        }
    }

    /// Requests cached, large and new files over one connection.
    fn folder(&self) -> Got {
        let fresh = format!("fresh-{}", self.rounds);
        fs::write(self.daemon.path("folder").join(&fresh), &fresh).unwrap();
        let mut stream = connect(self.daemon.tcp("file.folder"));
        let mut replies = String::new();
        let asked = format!("small\n{fresh}\nstreamed\n\n");
        if let Err(error) = stream.write_all(asked.as_bytes()) {
            return fault(&error);
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
        if let Err(error) = stream.read_to_string(&mut replies) {
            return fault(&error);
        }
        fs::remove_file(self.daemon.path("folder").join(&fresh)).unwrap();
        let replies: Vec<Value> =
            replies.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(replies.len(), 4, "{replies:?}");
        if replies.iter().any(|reply| reply["error"].is_string()) {
            return Got::Fault;
        }
        for (reply, content) in
            replies.iter().zip([sample(1, 10_000), fresh.into_bytes(), sample(1, 1_200_000)])
        {
            assert!(STANDARD.decode(reply["filedata"].as_str().unwrap()).unwrap() == content);
        }
        assert!(replies[3]["files"].as_array().unwrap().len() > FILES.len());
        Got::Whole
    }

    fn metrics(&self) -> Got {
        let mut stream = connect(self.daemon.tcp("metrics"));
        if let Err(error) = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") {
            return fault(&error);
        }
        let mut reply = String::new();
        match stream.read_to_string(&mut reply) {
            Ok(_) => {
                assert!(reply.ends_with("# EOF\n"), "{reply}");
                Got::Whole
            }
            Err(error) => fault(&error),
        }
    }
}

/// Returns the whole reply, or `None` if the client can detect that it is incomplete.
fn read(address: std::net::SocketAddr) -> Option<Vec<u8>> {
    let mut reply = Vec::new();
    match connect(address).read_to_end(&mut reply) {
        Ok(_) => Some(reply),
        Err(error) => {
            fault(&error);
            None
        }
    }
}

fn is_time(reply: &[u8]) -> Got {
    assert!(reply.len() == 27 && reply.ends_with(b"\n"), "{reply:?}");
    Got::Whole
}

/// Accepts the only error that a client may see.
fn fault(error: &std::io::Error) -> Got {
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    Got::Fault
}

/// Lets the next such call of each thread fail until one has, while clients ask. Afterwards all
/// clients must get everything.
fn fail_once(everything: &mut Everything, call: &str, error: &str, of_paths: &[&str]) {
    let trace = [format!("--trace={call}"), format!("--inject={call}:error={error}:when=1")];
    let paths = of_paths.iter().flat_map(|path| ["-P".to_owned(), (*path).to_owned()]);
    let strace = Strace::attach(&everything.daemon, trace.into_iter().chain(paths));
    // The runtime forwards signals through a socket pair that cannot fail.
    let passes_signals = ["recvfrom", "sendto"].contains(&call);
    let start = Instant::now();
    while !strace.seen().contains("(INJECTED)") {
        assert!(start.elapsed() < DEADLINE, "nobody was hit by {error} of {call}");
        if !passes_signals {
            everything.reload();
        }
        // The longest backoff is one second.
        everything.ask_all_within(Duration::from_secs(2));
    }
    let seen = strace.detach();
    assert!(seen.lines().count() < MANY_CALLS, "{call} {error}");
    let mut got = everything.ask_all();
    got.push(("reload", everything.reload()));
    got.retain(|(_, got)| *got != Got::Whole);
    assert!(got.is_empty(), "after {error} of {call}: {got:?}");
}

#[test]
fn serves_later_clients_after_any_call_failed_once() {
    let mut everything = Everything::start();
    for (call, errors) in FAULTS {
        for error in errors {
            fail_once(&mut everything, call, error, &[]);
        }
    }
    // Writes to memory files; other writes wake the event loops and cannot fail.
    for error in ["EINTR", "EIO", "ENOSPC"] {
        fail_once(&mut everything, "write", error, &["/memfd:document"]);
    }
    // The configuration; other reads wake the event loops.
    let configuration = everything.daemon.path("handout.toml");
    for error in ["EINTR", "EIO"] {
        fail_once(&mut everything, "read", error, &[configuration.to_str().unwrap()]);
    }
    assert!(everything.daemon.stop().success());
}

#[test]
fn keeps_unix_sockets_whose_file_cannot_be_examined() {
    let mut everything = Everything::start();
    let path = everything.daemon.path("clock.sock");
    let inode = || fs::metadata(&path).unwrap().ino();
    let before = inode();
    let options = ["--trace=statx", "--inject=statx:error=EIO", "-P", path.to_str().unwrap()];
    let strace = Strace::attach(&everything.daemon, options);
    everything.ask_all();
    assert_eq!(everything.reload(), Got::Whole);
    assert!(strace.detach().contains("(INJECTED)"));
    assert_eq!(inode(), before);
}

#[test]
fn serves_waiting_clients_after_a_lasting_fault_without_spinning() {
    let everything = Everything::start();
    let daemon = &everything.daemon;
    for (call, error) in [("accept4", "EMFILE"), ("recvmmsg", "ENOMEM")] {
        let inject = format!("--inject={call}:error={error}");
        let strace = Strace::attach(daemon, [format!("--trace={call}"), inject]);
        let mut stream = connect(daemon.tcp("time.clock"));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(daemon.udp("time.clock")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.send(b"?").unwrap();
        // A busy loop would make many thousand calls in this time.
        let start = Instant::now();
        eventually("some attempts in a second", || {
            start.elapsed() > Duration::from_secs(1) && strace.seen().contains("(INJECTED)")
        });
        let attempts = strace.detach().matches("(INJECTED)").count();
        // A loaded machine may take longer.
        let allowed = 50 * start.elapsed().as_secs() as usize;
        assert!(attempts < allowed, "{call}: {attempts} of {allowed}");
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        is_time(&reply);
        let mut reply = [0; 64];
        let length = socket.recv(&mut reply).unwrap();
        is_time(&reply[..length]);
    }
}

#[test]
fn serves_clients_and_rejects_reloads_without_new_threads() {
    let mut everything = Everything::start();
    let strace = Strace::attach(
        &everything.daemon,
        ["--trace=clone,clone3", "--inject=clone,clone3:error=EAGAIN"],
    );
    // Earlier threads may still be reading.
    eventually("the end of every other thread", || everything.reload() == Got::Fault);
    for _ in 0..3 {
        assert_eq!(everything.reload(), Got::Fault);
        let got = everything.ask_all();
        // A folder reads files in a thread. An earlier thread serves this client unless it has been
        // idle for 200 ms and ended; then the client is refused.
        let served = |(way, got): &(&str, Got)| *got == Got::Whole || *way == "folder";
        assert!(got.iter().all(served), "{got:?}");
    }
    assert!(strace.detach().contains("(INJECTED)"));
    // The failing step depends on the earlier threads.
    everything.daemon.wait_for("reload without threads", |line| {
        says(line, "reload failed") && says(line, "Resource temporarily unavailable")
    });
    assert_eq!(everything.reload(), Got::Whole);
    let got = everything.ask_all();
    assert!(got.iter().all(|(_, got)| *got == Got::Whole), "{got:?}");
    assert!(everything.daemon.stop().success());
}
