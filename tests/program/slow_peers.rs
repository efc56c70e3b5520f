//! Slow and paused peers are served as long as they make progress.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::thread::UnshareFlags;
use socket2::{Domain, Socket, Type};

use crate::common::{DEADLINE, Daemon, connect, decode, eventually, program, run, sample};
use crate::mounts::apart;
use crate::servers::Running;

/// Size in bytes that exceeds the kernel's buffers.
const LARGE: usize = 6_000_000;

/// Duration of pauses; longer than every idle time-out in these tests.
const PAUSE: Duration = Duration::from_secs(3);

/// A daemon that hands out `picture` over TCP and a Unix socket, and a folder, with this idle
/// time-out.
fn daemon(picture: &[u8], idle_timeout: &str) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    fs::write(folder.path().join("files/a.txt"), b"alpha").unwrap();
    fs::write(folder.path().join("picture.jpg"), picture).unwrap();
    let config = format!(
        "[limits]\nidle-timeout = \"{idle_timeout}\"\n\
         [file.picture]\nlisten = [\"127.0.0.1:0\", \"unix:picture\"]\npath = \"picture.jpg\"\n\
         [file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n\
         [file.proxied]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n\
         proxy-protocol = [\"127.0.0.1\"]\n"
    );
    Daemon::start_in(folder, &config, |_| {})
}

/// Reads 10 kB/s for `time`.
fn read_slowly(stream: &mut impl Read, time: Duration) -> Vec<u8> {
    let (start, mut received) = (Instant::now(), Vec::new());
    let mut piece = [0; 500];
    while start.elapsed() < time {
        stream.read_exact(&mut piece).unwrap();
        received.extend_from_slice(&piece);
        thread::park_timeout(Duration::from_millis(50));
    }
    received
}

/// Connects with a receive buffer of this size, in bytes.
fn connect_with_buffer(address: SocketAddr, size: usize) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(size).unwrap();
    socket.connect(&address.into()).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

#[test]
fn serves_clients_on_a_slow_link() {
    apart(UnshareFlags::NEWNET, || {
        for arguments in [
            "ip link set lo mtu 1500 up",
            "tc qdisc add dev lo root tbf rate 64kbit burst 3000 limit 40000",
        ] {
            let mut words = arguments.split(' ');
            let output = run(Command::new(words.next().unwrap()).args(words));
            assert!(output.status.success(), "{arguments}: {output:?}");
        }
        // The first needs longer than the kernel's buffer lasts, the second lingers in it.
        for picture in [sample(4, 100_000), sample(5, 20_000)] {
            let daemon = daemon(&picture, "2s");
            let start = Instant::now();
            // Less than the link's queue holds, so that no packet is lost.
            let mut socket = connect_with_buffer(daemon.tcp("file.picture"), 16_384);
            let mut document = Vec::new();
            socket.read_to_end(&mut document).unwrap();
            assert!(decode(&document).1 == picture);
            assert!(start.elapsed() > Duration::from_secs(2), "the link is not slow");
            assert_eq!(daemon.wait_for_connections(1)[0]["outcome"], "complete");
        }
    });
}

#[test]
fn serves_slow_readers_as_long_as_they_read() {
    let picture = sample(6, LARGE);
    let daemon = daemon(&picture, "2s");
    let slowly = PAUSE * 2;
    thread::scope(|scope| {
        scope.spawn(|| {
            // A large buffer hides for many seconds that the client reads.
            let mut socket = connect_with_buffer(daemon.tcp("file.picture"), 4096);
            let mut document = read_slowly(&mut socket, slowly);
            socket.set_recv_buffer_size(1 << 20).unwrap();
            socket.read_to_end(&mut document).unwrap();
            assert!(decode(&document).1 == picture);
        });
        scope.spawn(|| {
            let mut stream = UnixStream::connect(daemon.path("picture")).unwrap();
            let mut document = read_slowly(&mut stream, slowly);
            stream.read_to_end(&mut document).unwrap();
            assert!(decode(&document).1 == picture);
        });
    });
}

#[test]
fn resets_clients_that_stop_reading() {
    let daemon = daemon(&sample(7, LARGE), "1s");
    let mut tcp = connect(daemon.tcp("file.picture"));
    let mut unix = UnixStream::connect(daemon.path("picture")).unwrap();
    for stream in [&mut tcp as &mut dyn Read, &mut unix] {
        stream.read_exact(&mut [0; 200_000]).unwrap();
    }
    for line in daemon.wait_for_connections(2) {
        assert_eq!(line["outcome"], "idle-timeout", "{line}");
        assert!(line["duration"].as_f64().unwrap() >= 1.0, "{line}");
    }
}

/// Stops the process for longer than its idle time-out. `act` runs while it is stopped.
fn pause(pid: rustix::process::Pid, act: impl FnOnce()) {
    let signal = |signal| rustix::process::kill_process(pid, signal).unwrap();
    signal(Signal::STOP);
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    eventually("the process to stop", || fs::read_to_string(&stat).unwrap().contains(") T "));
    let stopped = Instant::now();
    act();
    while stopped.elapsed() < PAUSE {
        thread::park_timeout(PAUSE.saturating_sub(stopped.elapsed()));
    }
    signal(Signal::CONT);
}

#[test]
fn serves_waiting_clients_after_a_pause_of_the_daemon() {
    let picture = sample(8, LARGE);
    let daemon = daemon(&picture, "2s");
    let mut tcp = connect(daemon.tcp("file.picture"));
    let mut unix = UnixStream::connect(daemon.path("picture")).unwrap();
    let mut asking = connect(daemon.tcp("file.files"));
    let mut proxied = connect(daemon.tcp("file.proxied"));
    tcp.peek(&mut [0]).unwrap();
    let mut document = vec![0];
    unix.read_exact(&mut document).unwrap();
    eventually("every client to be accepted", || daemon.usage().1 >= 16);
    pause(daemon.pid(), || {
        asking.write_all(b"a.txt\n").unwrap();
        proxied.write_all(b"PROXY TCP4 192.0.2.7 127.0.0.1 4321 5566\r\na.txt\n").unwrap();
    });
    thread::scope(|scope| {
        for stream in [&mut asking, &mut proxied] {
            scope.spawn(|| {
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut reply = String::new();
                stream.read_to_string(&mut reply).unwrap();
                assert!(reply.contains("\"a.txt\""), "{reply}");
            });
        }
        scope.spawn(|| {
            unix.read_to_end(&mut document).unwrap();
            assert!(decode(&document).1 == picture);
        });
        let mut document = Vec::new();
        tcp.read_to_end(&mut document).unwrap();
        assert!(decode(&document).1 == picture);
    });
}

/// Runs a client that is paused after `beginning` while a server sends `rest`. The server first
/// waits for a request that ends with `request_end`.
fn pause_client(
    request_end: &[u8],
    beginning: &[u8],
    rest: &[u8],
    client: impl FnOnce(&str) -> Command,
) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut running = Running::start(&mut client(&server.local_addr().unwrap().to_string()));
    let (mut stream, _) = server.accept().unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    let mut request = Vec::new();
    while !request.ends_with(request_end) {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        request.extend(byte);
    }
    stream.write_all(beginning).unwrap();
    let pid = rustix::process::Pid::from_child(&running.child);
    pause(pid, || stream.write_all(rest).unwrap());
    let status = crate::common::wait_for_exit(&mut running.child);
    assert!(status.success(), "{}", running.stderr());
}

#[test]
fn fetch_takes_what_arrived_during_its_pause() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("a.txt");
    let document = b"{\"filename\":\"a.txt\",\"filedata\":\"YWxwaGE=\"}\n";
    let (beginning, rest) = document.split_at(20);
    pause_client(b"", beginning, rest, |server| {
        let mut command = program();
        command.args(["fetch", server, "--idle-timeout", "2s", "-o"]).arg(&saved);
        command
    });
    assert_eq!(fs::read(saved).unwrap(), b"alpha");
}

#[test]
#[cfg(feature = "gateway")]
fn download_takes_what_arrived_during_its_pause() {
    let folder = tempfile::tempdir().unwrap();
    let beginning = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nal";
    pause_client(b"\r\n\r\n", beginning, b"pha", |server| {
        let mut command = program();
        command.args(["download", "--timeout", "2s", "--retries", "0", "-o"]).arg(folder.path());
        command.arg(format!("http://{server}/a.txt"));
        command
    });
    assert_eq!(fs::read(folder.path().join("a.txt")).unwrap(), b"alpha");
}
