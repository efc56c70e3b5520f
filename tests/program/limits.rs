//! Limits of connections, clients, descriptors and access, and recovery from reached limits.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, prlimit};

use crate::common::{Daemon, connect, connect_from, eventually, read_all, sample, says};

#[test]
fn queues_clients_over_the_connection_limit() {
    let daemon = Daemon::start_with(
        "[file.picture]\nlisten = [\"127.0.0.1:0\", \"unix:picture.sock\"]\npath = \"picture.jpg\"\n\
         max-connections = 2\n\
         [time.clock]\nlisten = [\"127.0.0.1:0\"]",
        &[("picture.jpg", &sample(7, 20_000_000))],
        |_| {},
    );
    let address = daemon.tcp("file.picture");
    let begin = || {
        let mut stream = connect(address);
        stream.read_exact(&mut [0; 100]).unwrap();
        stream
    };
    let first = begin();
    let second = begin();
    // The kernel connects further clients, but the daemon does not accept them, over TCP or Unix.
    let mut third = connect(address);
    third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(third.read(&mut [0; 100]).is_err());
    let mut by_unix = UnixStream::connect(daemon.path("picture.sock")).unwrap();
    by_unix.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(by_unix.read(&mut [0; 100]).is_err());
    // Other services have separate limits.
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);

    drop(first);
    drop(second);
    third.set_read_timeout(Some(crate::common::DEADLINE)).unwrap();
    by_unix.set_read_timeout(Some(crate::common::DEADLINE)).unwrap();
    third.read_exact(&mut [0; 100]).unwrap();
    by_unix.read_exact(&mut [0; 100]).unwrap();
}

#[test]
fn logs_the_connection_limit_and_the_recovery_once() {
    let mut daemon = Daemon::start_with(
        "[file.picture]\nlisten = [\"127.0.0.1:0\", \"unix:picture.sock\"]\npath = \"picture.jpg\"\n\
         max-connections = 2",
        &[("picture.jpg", &sample(7, 20_000_000))],
        |_| {},
    );
    let address = daemon.tcp("file.picture");
    let begin = || {
        let mut stream = connect(address);
        stream.read_exact(&mut [0; 100]).unwrap();
        stream
    };
    let reached = "file.picture: connection limit reached (2): new clients wait; raise \
                   max-connections if this persists";
    let (first, second) = (begin(), begin());
    // A reached limit is logged only if a client waits.
    assert!(!daemon.lines().iter().any(|line| says(line, "limit reached")));
    let waiting: Vec<_> = (0..5).map(|_| connect(address)).collect();
    let line = daemon.wait_for_message(reached);
    assert_eq!((&line["level"], &line["limit"]), (&"WARN".into(), &2.into()));
    drop((first, second));
    // Each client leaves after its first bytes, so the limit is reached again and again. Closing
    // with unread data resets the connection; a half-close would keep the permit until
    // idle-timeout.
    for mut stream in waiting {
        stream.read_exact(&mut [0; 100]).unwrap();
    }
    daemon.wait_for_message("file.picture: below the connection limit again (0 of 2)");
    drop((begin(), begin()));
    assert!(daemon.stop().success());
    for message in ["connection limit reached", "below the connection limit"] {
        assert_eq!(daemon.lines().iter().filter(|line| says(line, message)).count(), 1);
    }
}

#[test]
fn shares_one_permit_between_listeners() {
    let daemon = Daemon::start(
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"unix:clock.sock\"]\nmax-connections = 1",
    );
    for _ in 0..5 {
        assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
        let mut reply = Vec::new();
        let mut stream = UnixStream::connect(daemon.path("clock.sock")).unwrap();
        stream.read_to_end(&mut reply).unwrap();
        assert_eq!(reply.len(), 27);
    }
}

#[test]
fn logs_a_remedy_without_descriptors_and_recovers() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\"]");
    let address = daemon.tcp("time.clock");
    let start = Instant::now();
    // Enough for the open descriptors and two clients.
    let open = daemon.usage().1 as u64;
    let limit = Rlimit { current: Some(open + 2), maximum: Some(open + 2) };
    prlimit(Some(daemon.pid()), Resource::Nofile, limit).unwrap();
    let clients: Vec<TcpStream> = (0..20).map(|_| connect(address)).collect();
    let line = daemon.wait_for_message("cannot accept connections");
    assert!(line["remedy"].as_str().unwrap().contains("LimitNOFILE"), "{line}");
    for mut client in clients {
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).unwrap();
        assert_eq!(reply.len(), 27);
    }
    eventually("service as before", || read_all(address).len() == 27);
    let said = |line: &serde_json::Value| says(line, "cannot accept connections");
    // The line is repeated if the condition lasts, as it may on a busy machine.
    let allowed = 1 + start.elapsed().as_secs() / 60;
    assert!(daemon.lines().into_iter().filter(said).count() as u64 <= allowed);
}

#[test]
fn raises_the_descriptor_limit_to_the_hard_limit() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\"]");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let columns: Vec<_> = line.split_whitespace().collect();
    assert_eq!(columns[3], columns[4], "{line}");
}

#[test]
fn resets_clients_over_max_per_client_and_serves_others() {
    let mut daemon = Daemon::start_with(
        "[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\nmax-per-client = 2",
        &[("picture.jpg", &sample(7, 20_000_000))],
        |_| {},
    );
    let address = daemon.tcp("file.picture");
    let begin = || {
        let mut stream = connect(address);
        stream.read_exact(&mut [0; 100]).map(|()| stream)
    };
    let first = begin().unwrap();
    let _second = begin().unwrap();
    assert_eq!(begin().unwrap_err().kind(), ErrorKind::ConnectionReset);
    // Another client.
    connect_from("127.0.0.2", address).read_exact(&mut [0; 100]).unwrap();
    // A closed connection no longer counts.
    drop(first);
    eventually("a free permit", || begin().is_ok());
    assert!(daemon.stop().success());
    let line = daemon.wait_for_message("over max-per-client");
    assert!(line["over_client_limit"].as_u64().unwrap() >= 1, "{line}");
    assert!(says(&line, "over max-per-client (2)"), "{line}");
}

#[test]
fn applies_access_lists_to_tcp_and_udp_only() {
    let mut daemon = Daemon::start(
        "[limits]\nallow = [\"127.0.0.0/8\"]\ndeny = [\"127.0.0.1\"]\n\
         [time.closed]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\", \"unix:clock.sock\"]\n\
         [time.open]\nlisten = [\"127.0.0.1:0\"]\ndeny = []",
    );
    let mut reply = Vec::new();
    let reset = connect(daemon.tcp("time.closed")).read_to_end(&mut reply);
    assert_eq!(reset.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(read_all(daemon.tcp("time.open")).len(), 27);
    UnixStream::connect(daemon.path("clock.sock")).unwrap().read_to_end(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    // Datagrams are handled in order: the first is dropped, the second answered.
    let asker = |address: [u8; 4]| {
        let socket = UdpSocket::bind(SocketAddr::from((address, 0))).unwrap();
        socket.connect(daemon.udp("time.closed")).unwrap();
        socket.set_read_timeout(Some(crate::common::DEADLINE)).unwrap();
        socket.send(b"time?").unwrap();
        socket
    };
    let denied = asker([127, 0, 0, 1]);
    assert_eq!(asker([127, 0, 0, 2]).recv(&mut [0; 64]).unwrap(), 27);
    denied.set_nonblocking(true).unwrap();
    assert!(denied.recv(&mut [0; 64]).is_err());
    assert!(daemon.stop().success());
    assert_eq!(daemon.wait_for_message("not permitted")["denied"], 1);
}
