//! Summarises connections of health checks and port scans in the log.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use socket2::SockRef;

use crate::common::{Daemon, connect, eventually, metric, read_all, run, sample};

const CONFIG: &str = "[metrics]\nlisten = [\"127.0.0.1:0\"]\n\
     [time.clock]\nlisten = [\"127.0.0.1:0\", \"unix:clock.sock\"]\n\
     [file.picture]\nlisten = [\"127.0.0.1:0\", \"unix:picture.sock\"]\npath = \"picture.jpg\"\n\
     [file.files]\nlisten = [\"127.0.0.1:0\", \"unix:files.sock\"]\npath = \"files\"\n";

const SERVICES: [&str; 3] = ["time.clock", "file.picture", "file.files"];

fn daemon() -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("picture.jpg"), sample(7, 20_000)).unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    fs::write(folder.path().join("files/a.txt"), "alpha").unwrap();
    Daemon::start_in(folder, CONFIG, |_| {})
}

/// Returns the number of ended connections of a service.
fn ended(daemon: &Daemon, service: &str) -> f64 {
    let outcomes = ["complete", "reset", "idle-timeout", "max-duration", "shutdown"];
    let name = |outcome| {
        format!("handout_connections_total{{service=\"{service}\",outcome=\"{outcome}\"}}")
    };
    outcomes.iter().map(|outcome| metric(daemon.tcp("metrics"), &name(outcome))).sum()
}

/// Stops the daemon once `count` connections of each service have ended, and checks that the log
/// only has their summary.
fn assert_summarised(mut daemon: Daemon, count: u64) {
    for service in SERVICES {
        eventually("the end of the connections", || ended(&daemon, service) == count as f64);
    }
    assert!(daemon.stop().success());
    for service in SERVICES {
        let lines = daemon.lines();
        let own = || lines.iter().filter(|line| line["service"] == service);
        let told: Vec<_> = own().filter(|line| line["outcome"].is_string()).collect();
        assert!(told.is_empty(), "{told:#?}");
        let sums: u64 = own().filter_map(|line| line["unserved"].as_u64()).sum();
        assert_eq!(sums, count, "{lines:#?}");
    }
}

#[test]
fn summarises_clients_that_leave_at_once() {
    let daemon = daemon();
    for service in SERVICES {
        let mut peer = String::new();
        for number in 0..30 {
            let stream = connect(daemon.tcp(service));
            peer = stream.local_addr().unwrap().to_string();
            if number % 2 == 0 {
                SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
        assert!(peer.starts_with("127.0.0.1:"));
        for _ in 0..10 {
            let name = service.split_once('.').unwrap().1;
            drop(UnixStream::connect(daemon.path(&format!("{name}.sock"))).unwrap());
        }
    }
    assert_summarised(daemon, 40);
}

#[test]
fn summary_names_outcomes_and_a_peer() {
    let mut daemon = daemon();
    for _ in 0..2 {
        // A folder service waits for requests; this client sends none.
        let mut stream = connect(daemon.tcp("file.files"));
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    eventually("the end of the connections", || ended(&daemon, "file.files") == 2.0);
    assert!(daemon.stop().success());
    let line = daemon.wait_for_message("before the client took anything");
    let message = line["message"].as_str().unwrap();
    let expected = "file.files: 2 connections ended before the client took anything \
                    (2 complete, one from 127.0.0.1:";
    assert!(message.starts_with(expected), "{message}");
    assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
}

#[test]
fn summarises_port_scans() {
    let daemon = daemon();
    for service in SERVICES {
        for _ in 0..10 {
            let address = daemon.tcp(service);
            let (host, port) = (address.ip().to_string(), address.port().to_string());
            assert!(run(Command::new("nc").args(["-z", &host, &port])).status.success());
        }
    }
    assert_summarised(daemon, 10);
}

#[test]
fn logs_clients_that_take_a_part() {
    let daemon = daemon();
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    let mut stream = connect(daemon.tcp("file.files"));
    stream.write_all(b"a.txt\n").unwrap();
    let mut first = [0];
    stream.read_exact(&mut first).unwrap();
    drop(stream);
    let lines = daemon.wait_for_connections(2);
    let outcome = |service: &str| {
        lines.iter().find(|line| line["service"] == service).unwrap()["outcome"].clone()
    };
    assert_eq!(outcome("time.clock"), "complete");
    assert_eq!(outcome("file.files"), "reset");
}

/// Lets HAProxy check the services twenty times.
fn let_haproxy_check(daemon: &Daemon, check: &str) {
    let paced = TcpListener::bind("127.0.0.1:0").unwrap();
    let pace = paced.local_addr().unwrap();
    let mut config = format!(
        "defaults\n mode tcp\n timeout connect 60s\n timeout client 60s\n timeout server 60s\n\
         frontend unused\n bind {}\n\
         backend paced\n option tcp-check\n tcp-check expect string x\n\
         server one {pace} check inter 20ms\n",
        daemon.path("unused.sock").display()
    );
    for service in SERVICES {
        let (name, address) = (service.replace('.', "-"), daemon.tcp(service));
        config += &format!("backend {name}\n{check} server one {address} check inter 20ms\n");
    }
    let file = daemon.path("haproxy.cfg");
    fs::write(&file, config).unwrap();
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(file).stdout(Stdio::null()).stderr(Stdio::null());
    let mut haproxy = command.spawn().unwrap();
    // HAProxy resets most checks before they are accepted.
    for _ in 0..20 {
        paced.accept().unwrap().0.write_all(b"x").unwrap();
    }
    haproxy.kill().unwrap();
    haproxy.wait().unwrap();
}

#[test]
fn logs_no_line_for_haproxy_health_checks() {
    for check in ["", " option tcp-check\n", " option tcp-check\n tcp-check connect linger\n"] {
        let mut daemon = daemon();
        let_haproxy_check(&daemon, check);
        assert!(daemon.stop().success());
        let lines = daemon.lines();
        let told: Vec<_> = lines.iter().filter(|line| line["outcome"].is_string()).collect();
        assert!(told.is_empty(), "{check}: {told:#?}");
    }
}
