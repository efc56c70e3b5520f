//! Starts the executable on free ports, reads its log and stops it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

/// Maximum time of any wait; generous, because the machine may be loaded.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_handout");

/// Returns the program without the environment variables that it reads.
pub fn program() -> Command {
    let mut command = Command::new(PROGRAM);
    for variable in [
        "HANDOUT_CONFIG",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "JOURNAL_STREAM",
        "RUNTIME_DIRECTORY",
        "TZ",
    ] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

pub fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Lets system calls fail with `error` (such as `ENOSYS`), as a seccomp filter does. Each failure is
/// a line in the file `refusals`.
pub fn refuse(command: &mut Command, calls: &str, error: &str, refusals: &Path) {
    inject(command, calls, &format!("error={error}"), refusals);
}

/// Injects `what` into system calls, in the syntax of strace(1).
pub fn inject(command: &mut Command, calls: &str, what: &str, trace: &Path) {
    let mut injected = Command::new("strace");
    // Keeps the program as the direct child.
    injected.args(["-D", "-f", "-qq", "-o"]).arg(trace);
    injected.arg(format!("--inject={calls}:{what}")).arg(format!("--trace={calls}"));
    injected.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => injected.env(name, value),
            None => injected.env_remove(name),
        };
    }
    injected.stdin(Stdio::null()).stderr(Stdio::piped());
    *command = injected;
}

/// A running daemon; killed on drop.
pub struct Daemon {
    pub child: Child,
    pub folder: TempDir,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<Value>, bool)>,
    changed: Condvar,
}

impl Daemon {
    /// Starts the daemon and waits until it is ready.
    pub fn start(config: &str) -> Self {
        Self::start_with(config, &[], |_| {})
    }

    /// Like [`Self::start`], with files in its folder and changes to the command.
    pub fn start_with(
        config: &str,
        files: &[(&str, &[u8])],
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(folder.path().join(name), content).unwrap();
        }
        Self::start_in(folder, config, prepare)
    }

    /// Like [`Self::start_with`], in an existing folder.
    pub fn start_in(folder: TempDir, config: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        configure(&folder.path().join("handout.toml"), config);
        Self::run(folder, prepare)
    }

    /// Starts the daemon with the configuration in `folder`.
    pub fn run(folder: TempDir, prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = program();
        command.args(["serve", "--config"]).arg(folder.path().join("handout.toml"));
        command.env("TZ", "UTC").stderr(Stdio::piped());
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let log = follow(child.stderr.take().unwrap());
        let daemon = Self { child, folder, log };
        daemon.wait_for("ready", |line| {
            // The log is JSON or text.
            says(line, "ready: ") || line.as_str().is_some_and(|line| line.contains(" ready: "))
        });
        daemon
    }

    /// Returns the error output if the daemon does not start.
    pub fn try_start(config: &str) -> Result<(), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("handout.toml");
        configure(&path, config);
        let output = run(program().args(["serve", "--config"]).arg(path));
        let said = String::from_utf8(output.stderr).unwrap();
        if output.status.success() { Ok(()) } else { Err(said) }
    }

    /// Reloads with this configuration and returns the log line with the result.
    pub fn reload(&self, config: &str) -> Value {
        let ended = |line: &Value| says(line, "reloaded: ") || says(line, "reload failed");
        // Without copying all lines, of which there may be many.
        let all = || self.log.lines.lock().unwrap();
        let before = all().0.iter().filter(|line| ended(line)).count();
        configure(&self.path("handout.toml"), config);
        self.signal(Signal::HUP);
        let mut line = None;
        eventually("the end of the reload", || {
            line = all().0.iter().filter(|line| ended(line)).nth(before).cloned();
            line.is_some()
        });
        line.unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns all log lines so far.
    pub fn lines(&self) -> Vec<Value> {
        self.log.lines.lock().unwrap().0.clone()
    }

    pub fn wait_for(&self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let start = Instant::now();
        let mut log = self.log.lines.lock().unwrap();
        loop {
            if let Some(line) = log.0.iter().find(|line| wanted(line)) {
                return line.clone();
            }
            assert!(!log.1 && start.elapsed() < DEADLINE, "no {what} in the log: {:#?}", log.0);
            log = self.log.changed.wait_timeout(log, Duration::from_secs(1)).unwrap().0;
        }
    }

    pub fn wait_for_message(&self, message: &str) -> Value {
        self.wait_for(message, |line| says(line, message))
    }

    /// Waits for the log lines of `count` connections.
    pub fn wait_for_connections(&self, count: usize) -> Vec<Value> {
        let mut found = Vec::new();
        eventually("the lines of the connections", || {
            found = self.lines().into_iter().filter(|line| line["outcome"].is_string()).collect();
            found.len() >= count
        });
        found
    }

    /// Returns the addresses of a service.
    fn listening(&self, service: &str, prefix: &str) -> Vec<SocketAddr> {
        let lines = self.lines();
        let of_service = lines
            .iter()
            .filter(|line| says(line, ": listening on ") && line["service"] == service)
            .filter_map(|line| line["address"].as_str()?.strip_prefix(prefix)?.parse().ok());
        of_service.collect()
    }

    pub fn tcp(&self, service: &str) -> SocketAddr {
        self.listening(service, "")[0]
    }

    pub fn udp(&self, service: &str) -> SocketAddr {
        self.listening(service, "udp:")[0]
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        wait_for_exit(&mut self.child)
    }

    /// Sends SIGTERM and waits for the end.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Returns the resident memory in bytes and the number of open descriptors.
    pub fn usage(&self) -> (u64, usize) {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let status = fs::read_to_string(proc.join("status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        (kib * 1024, fs::read_dir(proc.join("fd")).unwrap().count())
    }

    pub fn threads(&self) -> u64 {
        fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count() as u64
    }

    /// Kills the daemon and returns its folder.
    #[cfg(feature = "gateway")]
    pub fn crash(&mut self) -> TempDir {
        self.signal(Signal::KILL);
        self.wait();
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }
}

/// Writes the configuration; logs JSON unless it has a `[log]` table.
pub fn configure(path: &Path, config: &str) {
    let log = if config.contains("[log]") { "" } else { "[log]\nformat = \"json\"\n" };
    fs::write(path, format!("{log}{config}")).unwrap();
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A failed test shows whether the daemon was still running, and its last messages.
        if std::thread::panicking() {
            eprintln!("the daemon's status: {ended:?}; the end of its log:");
            let lines = self.log.lines.lock().map(|lines| lines.0.clone()).unwrap_or_default();
            for line in lines.iter().rev().take(30).rev() {
                eprintln!("{line}");
            }
        }
    }
}

pub fn wait_for_exit(child: &mut Child) -> ExitStatus {
    let mut status = None;
    eventually("the end of the process", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

fn follow(stderr: impl Read + Send + 'static) -> Arc<Log> {
    let log = Arc::<Log>::default();
    let writer = Arc::clone(&log);
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines() {
            let Ok(line) = line else { break };
            // Lines that are not JSON are kept as strings.
            let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
            writer.lines.lock().unwrap().0.push(line);
            writer.changed.notify_all();
        }
        writer.lines.lock().unwrap().1 = true;
        writer.changed.notify_all();
    });
    log
}

/// Returns whether the message of a log line contains `words`.
pub fn says(line: &Value, words: &str) -> bool {
    line["message"].as_str().is_some_and(|message| message.contains(words))
}

/// Waits until a condition holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "waited too long for {what}");
        thread::park_timeout(Duration::from_millis(5));
    }
}

pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Connects from another loopback address: all of 127.0.0.0/8 is local.
pub fn connect_from(source: &str, address: SocketAddr) -> TcpStream {
    let source = SocketAddr::new(source.parse().unwrap(), 0);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.bind(&source.into()).unwrap();
    socket.connect(&address.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Connects and reads to the end.
pub fn read_all(address: SocketAddr) -> Vec<u8> {
    let mut reply = Vec::new();
    connect(address).read_to_end(&mut reply).unwrap();
    reply
}

/// Returns the header and the body of an HTTP reply.
pub fn http_get(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = connect(address);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// Returns the value of a metric by its name with labels.
pub fn metric(address: SocketAddr, name: &str) -> f64 {
    let (_, metrics) = http_get(address, "/metrics");
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().unwrap()
}

/// Returns the name and the data of a pushed document.
pub fn decode(document: &[u8]) -> (String, Vec<u8>) {
    let value: Value = serde_json::from_slice(document).unwrap();
    let keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["filedata", "filename"]);
    let data = STANDARD.decode(value["filedata"].as_str().unwrap()).unwrap();
    (value["filename"].as_str().unwrap().to_owned(), data)
}

/// Returns pseudo-random bytes without repetitions.
pub fn sample(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

#[expect(clippy::cast_precision_loss, reason = "only to be read by people")]
pub fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Replaces a file by a rename.
pub fn replace(path: &Path, content: &[u8]) {
    let beside = path.with_extension("new");
    fs::write(&beside, content).unwrap();
    fs::rename(beside, path).unwrap();
}

pub fn send_and_half_close(stream: &mut TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
}
