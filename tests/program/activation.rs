//! Sockets that the service manager passes.

use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use tempfile::TempDir;

use crate::common::{
    DEADLINE, Daemon, PROGRAM, connect, eventually, program, read_all, run, sample,
};

/// Passes named sockets to the program as systemd does.
fn pass(command: &mut Command, sockets: Vec<(&str, OwnedFd)>) {
    // A shell runs the command, as only it knows the process id.
    let mut shell = Command::new("sh");
    shell.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\"", PROGRAM]).args(command.get_args());
    let names: Vec<_> = sockets.iter().map(|(name, _)| *name).collect();
    shell.env("LISTEN_FDS", sockets.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    shell.env("TZ", "UTC").stdin(Stdio::null()).stderr(Stdio::piped());
    let mappings = sockets
        .into_iter()
        .zip(3..)
        .map(|((_, parent_fd), child_fd)| FdMapping { parent_fd, child_fd });
    shell.fd_mappings(mappings.collect()).unwrap();
    *command = shell;
}

fn start(config: &str, sockets: Vec<(&str, OwnedFd)>) -> Daemon {
    Daemon::start_with(config, &[("picture.jpg", &sample(14, 1000))], |command| {
        pass(command, sockets);
    })
}

/// Runs the program, which is expected to exit.
fn refused(config: &str, sockets: Vec<(&str, OwnedFd)>) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("handout.toml");
    std::fs::write(&path, config).unwrap();
    let mut command = program();
    command.args(["serve", "--config"]).arg(&path);
    pass(&mut command, sockets);
    let Output { status, stderr, .. } = run(&mut command);
    (status.code(), String::from_utf8(stderr).unwrap())
}

fn ask(socket: &UdpSocket) -> usize {
    let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    asker.send_to(b"time?", socket.local_addr().unwrap()).unwrap();
    asker.recv(&mut [0; 64]).unwrap()
}

struct Sockets {
    folder: TempDir,
    tcp: TcpListener,
    udp: UdpSocket,
    unix: UnixListener,
}

impl Sockets {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            udp: UdpSocket::bind("127.0.0.1:0").unwrap(),
            unix: UnixListener::bind(folder.path().join("clock.sock")).unwrap(),
            folder,
        }
    }

    fn passed(&self) -> Vec<(&'static str, OwnedFd)> {
        vec![
            ("handout", self.tcp.try_clone().unwrap().into()),
            ("handout", self.udp.try_clone().unwrap().into()),
            ("handout", self.unix.try_clone().unwrap().into()),
        ]
    }

    fn addresses(&self) -> String {
        let (tcp, udp) = (self.tcp.local_addr().unwrap(), self.udp.local_addr().unwrap());
        let unix = self.folder.path().join("clock.sock");
        format!("\"{tcp}\", \"udp:{udp}\", \"unix:{}\"", unix.display())
    }

    fn all_answer(&self) {
        assert_eq!(read_all(self.tcp.local_addr().unwrap()).len(), 27);
        assert_eq!(ask(&self.udp), 27);
        let mut reply = Vec::new();
        let path = self.folder.path().join("clock.sock");
        UnixStream::connect(path).unwrap().read_to_end(&mut reply).unwrap();
        assert_eq!(reply.len(), 27);
    }
}

#[test]
fn serves_on_inherited_sockets_of_every_kind_by_their_address() {
    let sockets = Sockets::new();
    let config = format!("[time.clock]\nlisten = [{}]", sockets.addresses());
    let mut daemon = start(&config, sockets.passed());
    sockets.all_answer();
    daemon.wait_for_message("(from systemd)");
    assert!(daemon.stop().success());
    // The file belongs to the service manager.
    assert!(sockets.folder.path().join("clock.sock").exists());
}

#[test]
fn serves_on_every_inherited_socket_of_a_name() {
    let sockets = Sockets::new();
    let _daemon = start("[time.clock]\nlisten = [\"systemd:handout\"]", sockets.passed());
    sockets.all_answer();
}

#[test]
fn keeps_inherited_and_bound_sockets_across_a_reload() {
    let sockets = Sockets::new();
    let config = format!(
        "[time.clock]\nlisten = [{}]\n[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n",
        sockets.addresses()
    );
    let daemon = start(&config, sockets.passed());
    sockets.all_answer();
    let line = daemon.reload(&config.replace("time.clock", "time.other"));
    assert_eq!((&line["added"], &line["unchanged"]), (&1.into(), &1.into()), "{line}");
    sockets.all_answer();
    assert!(!read_all(daemon.tcp("file.picture")).is_empty());
    // The clients of an unused socket would wait without end.
    let line = daemon.reload("[time.clock]\nlisten = [\"127.0.0.1:0\"]");
    assert!(line["message"].as_str().unwrap().contains("no service listens on"), "{line}");
    sockets.all_answer();
}

#[test]
fn serves_clients_that_connected_before_the_start() {
    let sockets = Sockets::new();
    let config = format!("[time.clock]\nlisten = [{}]", sockets.addresses());
    let mut first = start(&config, sockets.passed());
    sockets.all_answer();
    assert!(first.stop().success());
    let address = sockets.tcp.local_addr().unwrap();
    let between: Vec<_> = (0..20).map(|_| connect(address)).collect();
    let clients: Vec<_> = between
        .into_iter()
        .map(|mut stream| {
            thread::spawn(move || {
                let mut reply = Vec::new();
                stream.read_to_end(&mut reply).unwrap();
                reply.len()
            })
        })
        .collect();
    let _second = start(&config, sockets.passed());
    for client in clients {
        assert_eq!(client.join().unwrap(), 27);
    }
}

#[test]
fn resets_connections_of_inherited_sockets_when_it_is_killed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let config = format!("[file.picture]\nlisten = [\"{address}\"]\npath = \"big.jpg\"");
    let big = sample(15, 20_000_000);
    let mut daemon = Daemon::start_with(&config, &[("big.jpg", &big)], |command| {
        pass(command, vec![("x", listener.try_clone().unwrap().into())]);
    });
    let mut stream = connect(address);
    stream.read_exact(&mut [0; 100]).unwrap();
    daemon.child.kill().unwrap();
    daemon.wait();
    assert!(stream.read_to_end(&mut Vec::new()).is_err());
}

#[test]
fn refuses_to_start_with_unsuitable_sockets_and_names_them() {
    let clock = "[time.clock]\nlisten = [\"unix:clock.sock\"]\n";
    let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let (code, said) = refused(clock, vec![("web", listener())]);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("no service listens on 127.0.0.1:"), "{said}");
    assert!(said.contains("under the name \"web\""), "{said}");

    let named = "[time.clock]\nlisten = [\"systemd:clock\"]\n";
    let (code, said) = refused(named, vec![("web", listener())]);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("time.clock: systemd passed no socket of the name \"clock\""), "{said}");
    assert_eq!(said.lines().count(), 2, "{said}");

    let udp = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
    let folder = "[file.x]\nlisten = [\"systemd:x\"]\npath = \".\"\n";
    let (code, said) = refused(folder, vec![("x", udp)]);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("file.x: answers no datagrams"), "{said}");

    // Accept=yes passes a connection; a FIFO is no socket.
    let waiting = TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = connect(waiting.local_addr().unwrap());
    let pipe = std::io::pipe().unwrap().0;
    for odd in [OwnedFd::from(connection), OwnedFd::from(pipe)] {
        let (code, said) = refused(clock, vec![("odd", odd)]);
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains("under the name \"odd\" cannot be served: expected a socket"),
            "{said}"
        );
    }
}

#[test]
fn ignores_sockets_for_another_process() {
    let daemon = Daemon::start_with("[time.clock]\nlisten = [\"127.0.0.1:0\"]", &[], |command| {
        command.env("LISTEN_PID", "1").env("LISTEN_FDS", "3");
    });
    eventually("service", || read_all(daemon.tcp("time.clock")).len() == 27);
}
