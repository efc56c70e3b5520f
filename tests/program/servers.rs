//! Servers that do what a test tells them, and the clients that are run against them.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, io};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use socket2::SockRef;
use tempfile::TempDir;

use crate::common::{DEADLINE, PROGRAM, program, run};

/// A TCP server that answers every connection as a test says, until it is dropped.
pub struct Server {
    pub address: SocketAddr,
    over: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers every connection with this, in a thread of its own.
    pub fn answers(answer: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::on("127.0.0.1:0".parse().unwrap(), answer)
    }

    /// The same on an address of the test's choice.
    pub fn on(address: SocketAddr, answer: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let over = Arc::<AtomicBool>::default();
        let ended = Arc::clone(&over);
        let answer = Arc::new(answer);
        let accepting = thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                stream.set_read_timeout(Some(DEADLINE)).unwrap();
                stream.set_write_timeout(Some(DEADLINE)).unwrap();
                let answer = Arc::clone(&answer);
                thread::spawn(move || answer(stream));
            }
        });
        Self { address, over, accepting: Some(accepting) }
    }

    /// Sends this to everyone, and ends cleanly.
    pub fn sends(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        Self::answers(move |mut stream| {
            let _ = stream.write_all(&bytes);
            end(stream);
        })
    }

    /// Sends this to everyone, and resets the connection.
    pub fn sends_and_resets(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        Self::answers(move |mut stream| {
            let _ = stream.write_all(&bytes);
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        })
    }

    /// Sends this to everyone, and then nothing until the client goes.
    pub fn stalls_after(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        Self::answers(move |mut stream| {
            let _ = stream.write_all(&bytes);
            let _ = io::copy(&mut stream, &mut io::sink());
        })
    }

    /// Sends the beginning, and then this again and again, so many times.
    pub fn repeats(beginning: impl Into<Vec<u8>>, again: Vec<u8>, times: usize) -> Self {
        let beginning = beginning.into();
        Self::answers(move |mut stream| {
            let _ = stream.write_all(&beginning);
            for _ in 0..times {
                if stream.write_all(&again).is_err() {
                    return;
                }
            }
            end(stream);
        })
    }

    /// Answers every line with what this says, until the client sends no more.
    pub fn replies(reply: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        Self::answers(move |mut stream| {
            let requests = BufReader::new(stream.try_clone().unwrap());
            for line in requests.lines() {
                let Ok(line) = line else { return };
                if stream.write_all(reply(&line).as_bytes()).is_err() {
                    return;
                }
            }
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // Wakes it.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// Half-closes, and reads what the client still sends, so that the end is no reset.
pub fn end(mut stream: TcpStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let _ = io::copy(&mut stream, &mut io::sink());
}

/// An address that nobody listens on.
pub fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A document as the tutorial's server sends it; the name is written as it stands in JSON.
pub fn document(name: &str, data: &[u8]) -> String {
    let data = STANDARD.encode(data);
    format!("{{\"filename\": \"{name}\", \"filedata\": \"{data}\"}}")
}

/// What a client did.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Outcome {
    pub fn of(output: Output) -> Self {
        let stderr = String::from_utf8(output.stderr).unwrap();
        Self { code: output.status.code(), stdout: output.stdout, stderr }
    }

    pub fn text(&self) -> &str {
        str::from_utf8(&self.stdout).unwrap()
    }

    /// It did all of it, and complained of nothing.
    pub fn succeeded(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(!self.stderr.contains("handout: "), "{self:?}");
        self
    }

    /// It failed in the way that is meant for it, and said these words of it.
    pub fn failed_with(&self, words: &[&str]) -> &Self {
        assert_eq!(self.code, Some(1), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self:?}");
        }
        self
    }
}

/// The program as it is run by every test, with an end in any case: 124 is the code of one that
/// took too long.
pub fn bounded() -> Command {
    let mut command = Command::new("timeout");
    for (variable, _) in program().get_envs() {
        command.env_remove(variable);
    }
    command.arg(DEADLINE.as_secs().to_string()).arg(PROGRAM).stdin(Stdio::null());
    command
}

/// A folder of its own that a client is run in.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Everything in it, sub-folders and hidden files too, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut folders = vec![self.0.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let name = entry.path().strip_prefix(self.0.path()).unwrap().to_owned();
                names.push(name.into_os_string().into_string().unwrap());
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        names.sort();
        names
    }

    pub fn is_empty(&self) -> bool {
        self.names().is_empty()
    }

    /// `handout fetch` in this folder.
    pub fn fetch<S: AsRef<OsStr>>(
        &self,
        server: SocketAddr,
        arguments: impl IntoIterator<Item = S>,
    ) -> Outcome {
        let mut command = bounded();
        command.arg("fetch").arg(server.to_string()).args(arguments).current_dir(self.0.path());
        Outcome::of(run(&mut command))
    }

    /// The same, while the test goes on.
    pub fn begin_fetch(&self, server: SocketAddr, arguments: &[&str]) -> Running {
        let mut command = program();
        command.arg("fetch").arg(server.to_string()).args(arguments).current_dir(self.0.path());
        Running::start(&mut command)
    }
}

/// A client that runs, which is killed at the latest when it is dropped.
pub struct Running {
    pub child: Child,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: command.spawn().unwrap() }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// What it wrote to standard error; its end is waited for.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Its peak of memory in bytes so far; nothing if it has ended.
    pub fn peak(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server or a client in Python that prints its port, or what it got.
pub struct Python(Child);

impl Python {
    /// Starts a server, which prints its port when it listens.
    pub fn server(script: &str) -> (Self, SocketAddr) {
        let mut command = Command::new("python3");
        command.args(["-c", script]).env("TZ", "Asia/Shanghai").stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut port = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut port).unwrap();
        let python = Self(child);
        let port = port.trim().parse().unwrap_or_else(|error| panic!("{error}: {port:?}"));
        (python, SocketAddr::from(([127, 0, 0, 1], port)))
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A shell script in a mount namespace of its own, where it may mount what it likes; nothing, and
/// a word about it, where the system does not let it.
pub fn with_mounts(script: &str, arguments: &[&OsStr]) -> Option<Output> {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c"]).stdin(Stdio::null());
        command
    };
    let probe = "mount -t tmpfs none /tmp";
    if !unshare().arg(probe).output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: nothing can be mounted here");
        return None;
    }
    let mut command = unshare();
    for (variable, _) in program().get_envs() {
        command.env_remove(variable);
    }
    Some(run(command.arg(script).args(arguments)))
}
