//! The stop: a drain within the grace, and an immediate exit on a second signal.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitStatus;
use std::thread;

use rustix::process::Signal;

use crate::common::{Daemon, connect, decode, eventually, inject, sample};

fn daemon(grace: &str) -> (Daemon, Vec<u8>) {
    let content = sample(6, 20_000_000);
    let daemon = Daemon::start_with(
        &format!(
            "[daemon]\ngrace = \"{grace}\"\n\
             [time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\n\
             [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\""
        ),
        &[("picture.jpg", &content)],
        |_| {},
    );
    (daemon, content)
}

fn start_transfer(daemon: &Daemon) -> (TcpStream, Vec<u8>) {
    let mut stream = connect(daemon.tcp("file.picture"));
    let mut document = vec![0; 1000];
    stream.read_exact(&mut document).unwrap();
    (stream, document)
}

fn refused(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn code(status: ExitStatus) -> Option<i32> {
    status.code()
}

#[test]
fn finishes_transfers_and_refuses_new_clients() {
    for signal in [Signal::TERM, Signal::INT] {
        let (mut daemon, content) = daemon("60s");
        let (mut stream, mut document) = start_transfer(&daemon);
        daemon.signal(signal);
        daemon.wait_for_message("stopping: ");
        eventually("closed listeners", || refused(daemon.tcp("time.clock")));
        stream.read_to_end(&mut document).unwrap();
        assert!(decode(&document).1 == content);
        drop(stream);
        assert_eq!(code(daemon.wait()), Some(0));
        assert_eq!(daemon.wait_for_message("stopped: ")["reset"], 0);
    }
}

#[test]
fn resets_and_counts_connections_after_the_grace() {
    let (mut daemon, _) = daemon("200ms");
    let (mut stream, mut document) = start_transfer(&daemon);
    assert_eq!(code(daemon.stop()), Some(0));
    let error = stream.read_to_end(&mut document).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(daemon.wait_for_message("stopped: ")["reset"], 1);
    assert_eq!(daemon.wait_for_connections(1)[0]["outcome"], "shutdown");
}

#[test]
fn exits_at_once_on_a_second_signal() {
    let (mut daemon, _) = daemon("1h");
    let (mut stream, mut document) = start_transfer(&daemon);
    daemon.signal(Signal::TERM);
    daemon.wait_for_message("stopping: ");
    daemon.signal(Signal::TERM);
    assert_eq!(code(daemon.wait()), Some(0));
    assert!(stream.read_to_end(&mut document).is_err());
}

#[test]
fn waits_for_no_client_that_has_everything_and_does_not_close() {
    let (mut daemon, _) = daemon("1h");
    let mut stream = connect(daemon.tcp("time.clock"));
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    assert_eq!(code(daemon.stop()), Some(0));
    assert_eq!(daemon.wait_for_message("stopped: ")["reset"], 0);
    drop(stream);
}

#[test]
fn waits_for_no_further_request_of_a_client() {
    let mut daemon = Daemon::start_with(
        "[daemon]\ngrace = \"1h\"\n[file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \".\"",
        &[("a.txt", b"alpha")],
        |_| {},
    );
    let mut stream = connect(daemon.tcp("file.files"));
    stream.write_all(b"a.txt\n").unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    replies.read_line(&mut String::new()).unwrap();
    // A line without its end is no request, although a file has that name.
    stream.write_all(b"a.txt").unwrap();
    assert_eq!(code(daemon.stop()), Some(0));
    let mut rest = Vec::new();
    replies.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    assert_eq!(daemon.wait_for_message("stopped: ")["reset"], 0);
}

#[test]
fn serves_or_refuses_clients_that_connect_during_the_stop() {
    // One round would probably catch a failure.
    for _ in 0..3 {
        let trace = tempfile::NamedTempFile::new().unwrap();
        let config = "[time.clock]\nlisten = [\"127.0.0.1:0\"]";
        let mut daemon = Daemon::start_with(config, &[], |command| {
            // Many connect between the last accept and the close.
            inject(command, "close", "delay_enter=20000", trace.path());
        });
        let address = daemon.tcp("time.clock");
        let client = || {
            let mut served = 0;
            while let Ok(mut stream) = TcpStream::connect(address) {
                let mut reply = String::new();
                stream.read_to_string(&mut reply).unwrap();
                assert_eq!(reply.len(), 27);
                served += 1;
            }
            served
        };
        thread::scope(|scope| {
            let clients: Vec<_> = (0..8).map(|_| scope.spawn(client)).collect();
            daemon.wait_for_connections(20);
            assert_eq!(code(daemon.stop()), Some(0));
            let served: u32 = clients.into_iter().map(|client| client.join().unwrap()).sum();
            assert!(served >= 20, "{served}");
        });
    }
}

#[test]
fn frees_every_address_at_the_end() {
    let (mut daemon, _) = daemon("200ms");
    let (_stream, _) = start_transfer(&daemon);
    let tcp = [daemon.tcp("time.clock"), daemon.tcp("file.picture")];
    let udp = daemon.udp("time.clock");
    crate::common::read_all(tcp[0]);
    assert_eq!(code(daemon.stop()), Some(0));
    for address in tcp {
        TcpListener::bind(address).unwrap();
    }
    UdpSocket::bind(udp).unwrap();
}
