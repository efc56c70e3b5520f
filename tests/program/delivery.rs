//! Every byte owed is delivered, or the connection is reset, whatever the client does.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::common::{
    DEADLINE, Daemon, connect, decode, eventually, read_all, sample, says, send_and_half_close,
};
use crate::strace::Strace;

fn picture_daemon(size: usize, limits: &str) -> (Daemon, Vec<u8>) {
    let picture = sample(2, size);
    let daemon = Daemon::start_with(
        &format!(
            "[limits]\n{limits}\n[time.clock]\nlisten = [\"127.0.0.1:0\"]\n\
             [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\""
        ),
        &[("picture.jpg", &picture)],
        |_| {},
    );
    (daemon, picture)
}

fn outcome_of_one(daemon: &Daemon) -> String {
    daemon.wait_for_connections(1)[0]["outcome"].as_str().unwrap().to_owned()
}

#[test]
fn serves_clients_that_send_before_they_read() {
    let (daemon, picture) = picture_daemon(2_000_000, "");
    let address = daemon.tcp("file.picture");
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let mut stream = connect(address);
                stream.write_all(&[b'x'; 300_000]).unwrap();
                let mut document = Vec::new();
                stream.read_to_end(&mut document).unwrap();
                assert_eq!(decode(&document).1, picture);
            });
        }
    });
    let lines = daemon.wait_for_connections(100);
    assert!(lines.iter().all(|line| line["outcome"] == "complete"), "{lines:#?}");
}

#[test]
fn serves_clients_that_half_close_first() {
    let (daemon, picture) = picture_daemon(2_000_000, "");
    let mut stream = connect(daemon.tcp("file.picture"));
    send_and_half_close(&mut stream, b"\r\n");
    let mut document = Vec::new();
    stream.read_to_end(&mut document).unwrap();
    assert_eq!(decode(&document).1, picture);
    assert_eq!(outcome_of_one(&daemon), "complete");
}

#[test]
fn serves_clients_that_half_close_and_read_slowly() {
    let (daemon, picture) = picture_daemon(500_000, "");
    let mut stream = connect(daemon.tcp("file.picture"));
    SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
    send_and_half_close(&mut stream, b"\r\n");
    // While the client reads nothing, the daemon must neither close nor reset the connection.
    for _ in 0..3 {
        thread::park_timeout(Duration::from_millis(300));
        stream.read_exact(&mut [0]).unwrap();
    }
    let mut document = b"{\"f".to_vec();
    stream.read_to_end(&mut document).unwrap();
    assert_eq!(decode(&document).1, picture);
    assert_eq!(outcome_of_one(&daemon), "complete");
}

#[test]
fn serves_clients_that_read_one_byte_at_a_time() {
    let (daemon, _) = picture_daemon(1, "");
    let mut stream = connect(daemon.tcp("time.clock"));
    let mut reply = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        reply.push(byte[0]);
        // Input from a keyboard while the reply is read.
        let _ = stream.write(b"?");
    }
    assert_eq!(reply.len(), 27);
}

#[test]
fn serves_clients_that_never_stop_sending_and_disconnects_them() {
    let (daemon, picture) = picture_daemon(300_000, "");
    let mut stream = connect(daemon.tcp("file.picture"));
    let mut sender = stream.try_clone().unwrap();
    let sending = thread::spawn(move || {
        let start = Instant::now();
        while sender.write_all(&[b'x'; 65536]).is_ok() {
            assert!(start.elapsed() < DEADLINE, "the connection is still open");
        }
    });
    let mut document = Vec::new();
    // The daemon stops reading at some point, which may reset the connection, but only after the reply.
    if let Err(error) = stream.read_to_end(&mut document) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(decode(&document).1, picture);
    sending.join().unwrap();
    assert_eq!(outcome_of_one(&daemon), "complete");
}

#[test]
fn resets_connections_when_the_daemon_is_killed() {
    let (mut daemon, _) = picture_daemon(20_000_000, "");
    let mut stream = connect(daemon.tcp("file.picture"));
    stream.read_exact(&mut [0; 1000]).unwrap();
    daemon.signal(rustix::process::Signal::KILL);
    daemon.wait();
    let error = stream.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn resets_connections_that_epoll_refuses_and_logs_the_reason() {
    let (daemon, _) = picture_daemon(20_000_000, "");
    // The next registrations with epoll fail.
    let strace =
        Strace::attach(&daemon, ["--trace=epoll_ctl", "--inject=epoll_ctl:error=ENOSPC:when=1..4"]);
    let fetch = || {
        let mut reply = Vec::new();
        // Either the whole reply or a reset.
        match connect(daemon.tcp("file.picture")).read_to_end(&mut reply) {
            Ok(_) => assert!(reply.ends_with(b"\"}\n")),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
        reply.ends_with(b"\"}\n")
    };
    // Connections of fast readers are never registered.
    let message = "the client cannot be waited for";
    eventually("a client that cannot be waited for", || {
        fetch();
        daemon.lines().iter().any(|line| says(line, message))
    });
    eventually("service as before", &fetch);
    let line = daemon.wait_for_message(message);
    assert_eq!(line["outcome"], "failed");
    assert!(line["cause"].as_str().unwrap().contains("max_user_watches"), "{line}");
    strace.detach();
}

#[test]
fn logs_resets_by_clients_and_serves_others() {
    let (daemon, _) = picture_daemon(2_000_000, "");
    let stream = connect(daemon.tcp("file.picture"));
    stream.peek(&mut [0]).unwrap();
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    assert_eq!(outcome_of_one(&daemon), "reset");
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
}

#[test]
fn resets_clients_that_read_nothing_within_idle_timeout() {
    let (daemon, _) = picture_daemon(20_000_000, "idle-timeout = \"300ms\"");
    let mut stream = connect(daemon.tcp("file.picture"));
    assert_eq!(outcome_of_one(&daemon), "idle-timeout");
    let error = stream.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let line = &daemon.wait_for_connections(1)[0];
    assert!(line["bytes"].as_u64().unwrap() < 20_000_000, "{line}");
}

#[test]
fn resets_active_connections_after_max_duration() {
    let (daemon, _) = picture_daemon(60_000_000, "max-duration = \"500ms\"");
    let mut stream = connect(daemon.tcp("file.picture"));
    let mut buffer = vec![0; 65536];
    let error = loop {
        match stream.read(&mut buffer) {
            Ok(0) => panic!("the document ended early"),
            // At this rate, the document takes a minute.
            Ok(_) => thread::park_timeout(Duration::from_millis(50)),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(outcome_of_one(&daemon), "max-duration");
}

#[test]
fn serves_others_beside_clients_that_never_read_in_little_memory() {
    let (daemon, _) = picture_daemon(2_000_000, "");
    let address = daemon.tcp("file.picture");
    read_all(address);
    let (before, _) = daemon.usage();
    let idle: Vec<TcpStream> = (0..1000).map(|_| connect(address)).collect();
    eventually("all connections", || daemon.usage().1 >= 1000);
    for stream in &idle {
        stream.peek(&mut [0]).unwrap();
    }
    for _ in 0..50 {
        assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    }
    let (after, _) = daemon.usage();
    assert!(after < before + 64_000_000, "{before} {after}");
    drop(idle);
    eventually("their descriptors to be free again", || daemon.usage().1 < 100);
}

#[test]
fn frees_connections_of_clients_that_disconnect_early() {
    // A daemon that mistakes the clients for silent ones waits this long.
    let (daemon, _) = picture_daemon(20_000_000, "idle-timeout = \"10m\"\nmax-duration = \"10m\"");
    let (_, descriptors) = daemon.usage();
    for _ in 0..20 {
        drop(connect(daemon.tcp("time.clock")));
        let mut stream = connect(daemon.tcp("file.picture"));
        send_and_half_close(&mut stream, b"\r\n");
        stream.peek(&mut [0]).unwrap();
    }
    // Clients that left without a byte of the time are not logged individually.
    let lines = daemon.wait_for_connections(20);
    assert!(lines.iter().all(|line| line["service"] == "file.picture"), "{lines:#?}");
    assert!(lines.iter().all(|line| line["outcome"] == "reset"), "{lines:#?}");
    eventually("closed connections", || daemon.usage().1 < descriptors + 10);
}

fn unix_daemon() -> (Daemon, Vec<u8>) {
    let picture = sample(3, 100_000);
    let daemon = Daemon::start_with(
        "[time.clock]\nlisten = [\"unix:clock\"]\n\
         [file.picture]\nlisten = [\"unix:picture\"]\npath = \"picture.jpg\"",
        &[("picture.jpg", &picture)],
        |_| {},
    );
    (daemon, picture)
}

#[test]
fn ends_unix_connections_cleanly_despite_unread_input() {
    let (daemon, _) = unix_daemon();
    let mut stream = UnixStream::connect(daemon.path("clock")).unwrap();
    stream.write_all(&[b'x'; 5000]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.read_exact(&mut [0; 27]).unwrap();
    assert_eq!(outcome_of_one(&daemon), "complete");
    // The daemon has closed its side by now.
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn counts_unix_clients_that_leave_without_reading_as_reset() {
    let (daemon, _) = unix_daemon();
    let stream = UnixStream::connect(daemon.path("picture")).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    eventually("the document to be sent", || {
        rustix::event::poll(
            &mut [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::IN)],
            Some(&rustix::event::Timespec::default()),
        ) == Ok(1)
    });
    drop(stream);
    assert_eq!(outcome_of_one(&daemon), "reset");
}
