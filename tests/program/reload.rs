//! Reloads by SIGHUP: all or nothing, without effect on unchanged services.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{
    DEADLINE, Daemon, connect, decode, eventually, http_get, metric, program, read_all, sample,
    says,
};

const CLOCK: &str = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
const METRICS: &str = "[metrics]\nlisten = [\"127.0.0.1:0\"]\n";

fn picture() -> Vec<u8> {
    sample(11, 20_000_000)
}

fn start_transfer(address: SocketAddr) -> (TcpStream, Vec<u8>) {
    let mut stream = connect(address);
    let mut document = vec![0; 1000];
    stream.read_exact(&mut document).unwrap();
    (stream, document)
}

fn is_refused(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn counts(line: &Value) -> [u64; 4] {
    ["added", "changed", "removed", "unchanged"]
        .map(|name| line[name].as_u64().unwrap_or_else(|| panic!("{line}")))
}

#[test]
fn keeps_sockets_connections_and_counters_of_unchanged_services() {
    let picture = picture();
    let file = "[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n";
    let config = format!("{file}{METRICS}");
    let daemon = Daemon::start_with(&config, &[("picture.jpg", &picture)], |_| {});
    let (address, metrics) = (daemon.tcp("file.picture"), daemon.tcp("metrics"));
    read_all(address);
    daemon.wait_for_connections(1);
    let (mut stream, mut document) = start_transfer(address);
    assert_eq!(counts(&daemon.reload(&format!("{config}{CLOCK}"))), [1, 0, 0, 2]);

    stream.read_to_end(&mut document).unwrap();
    assert!(decode(&document).1 == picture);
    drop(stream);
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    eventually("three complete connections", || {
        read_all(address);
        let complete = "handout_connections_total{service=\"file.picture\",outcome=\"complete\"}";
        metric(metrics, complete) >= 3.0
    });
    // The socket was bound once.
    let listening = |line: &Value| says(line, "file.picture: listening");
    assert_eq!(daemon.lines().into_iter().filter(listening).count(), 1);
}

#[test]
fn replaces_a_changed_service_on_the_same_socket() {
    let daemon = Daemon::start(CLOCK);
    let address = daemon.tcp("time.clock");
    assert_eq!(read_all(address).len(), 27);
    let line = daemon.reload(&format!("{CLOCK}format = \"time\"\n"));
    assert_eq!(counts(&line), [0, 1, 0, 0]);
    assert_eq!(read_all(address).len(), 4);
    assert_eq!(counts(&daemon.reload(CLOCK)), [0, 1, 0, 0]);
    assert_eq!(read_all(address).len(), 27);
}

#[test]
fn finishes_transfers_of_a_changed_service_with_the_old_contents() {
    let (one, two) = (picture(), sample(12, 3_000_000));
    let config =
        |path: &str| format!("[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"{path}\"\n");
    let files: [(&str, &[u8]); 2] = [("one.jpg", &one), ("two.jpg", &two)];
    let daemon = Daemon::start_with(&config("one.jpg"), &files, |_| {});
    let address = daemon.tcp("file.picture");
    let (mut stream, mut document) = start_transfer(address);
    daemon.reload(&config("two.jpg"));
    assert!(decode(&read_all(address)) == ("two.jpg".to_owned(), two));
    stream.read_to_end(&mut document).unwrap();
    assert!(decode(&document) == ("one.jpg".to_owned(), one));
}

#[test]
fn switches_between_an_address_and_the_wildcard_on_one_port() {
    let daemon = Daemon::start(
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\n[time.other]\nlisten = [\"127.0.0.1:0\"]",
    );
    let port = daemon.tcp("time.clock").port();
    let udp = daemon.udp("time.clock").port();
    for host in ["0.0.0.0", "127.0.0.1", "0.0.0.0"] {
        let also =
            if host == "127.0.0.1" { format!(", \"127.0.0.3:{port}\"") } else { String::new() };
        let config = format!(
            "[time.clock]\nlisten = [\"{host}:{port}\", \"udp:{host}:{udp}\"{also}]\n\
             [time.other]\nlisten = [\"127.0.0.1:0\"]"
        );
        let mut line = Value::Null;
        // A socket of another test may use this port on another address for a moment.
        eventually("a port that is free everywhere", || {
            line = daemon.reload(&config);
            !says(&line, "another program listens there")
        });
        assert_eq!(counts(&line), [0, 1, 0, 1], "{line}");
        assert_eq!(read_all(([127, 0, 0, 1], port).into()).len(), 27);
        assert_eq!(read_all(([127, 0, 0, 3], port).into()).len(), 27);
        let elsewhere = ([127, 0, 0, 2], port).into();
        eventually("the other address", || is_refused(elsewhere) == (host == "127.0.0.1"));
        let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
        asker.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        eventually("an answer by datagram", || {
            asker.send_to(b"time?", ("127.0.0.1", udp)).unwrap();
            asker.recv(&mut [0; 64]).is_ok()
        });
    }
}

#[test]
fn closes_removed_services_and_finishes_their_connections() {
    let picture = picture();
    let config = format!(
        "{CLOCK}[file.picture]\nlisten = [\"127.0.0.1:0\", \"unix:p.sock\"]\npath = \"picture.jpg\"\n"
    );
    let daemon = Daemon::start_with(&config, &[("picture.jpg", &picture)], |_| {});
    let address = daemon.tcp("file.picture");
    let (mut stream, mut document) = start_transfer(address);
    assert_eq!(counts(&daemon.reload(CLOCK)), [0, 0, 1, 1]);
    daemon.wait_for_message(&format!("file.picture: no longer listening on {address}"));
    eventually("a closed listener", || is_refused(address));
    eventually("a removed socket file", || !daemon.path("p.sock").exists());
    stream.read_to_end(&mut document).unwrap();
    assert!(decode(&document).1 == picture);
}

#[test]
fn resets_connections_of_removed_services_after_the_grace() {
    let config = "[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n";
    let files: [(&str, &[u8]); 1] = [("picture.jpg", &picture())];
    let daemon = Daemon::start_with(&format!("{CLOCK}{config}"), &files, |_| {});
    let (mut stream, mut document) = start_transfer(daemon.tcp("file.picture"));
    daemon.reload(&format!("[daemon]\ngrace = \"100ms\"\n{CLOCK}"));
    let line = daemon.wait_for("end of the transfer", |line| {
        line["service"] == "file.picture" && line["outcome"].is_string()
    });
    assert_eq!(line["outcome"], "shutdown");
    assert_eq!(stream.read_to_end(&mut document).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn ends_folder_connections_of_removed_services_after_the_request() {
    let config = format!("{CLOCK}[file.folder]\nlisten = [\"127.0.0.1:0\"]\npath = \".\"\n");
    let daemon = Daemon::start_with(&config, &[("a.txt", b"a")], |_| {});
    let mut stream = connect(daemon.tcp("file.folder"));
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    let mut reply = String::new();
    stream.write_all(b"a.txt\n").unwrap();
    replies.read_line(&mut reply).unwrap();
    assert!(reply.contains("\"a.txt\""), "{reply}");
    daemon.reload(CLOCK);
    // A clean end, long before the idle timeout.
    assert_eq!(replies.read_line(&mut reply).unwrap(), 0);
}

#[test]
fn changes_nothing_and_reports_any_kind_of_fault() {
    let before = format!("{CLOCK}{METRICS}");
    let daemon = Daemon::start(&before);
    let (address, metrics) = (daemon.tcp("time.clock"), daemon.tcp("metrics"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let free = "[time.new]\nlisten = [\"unix:new.sock\"]\n";
    let unreadable = daemon.path("folder");
    fs::create_dir(&unreadable).unwrap();
    let other = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"time\"\n";
    let faults = [
        ("this is not TOML".to_owned(), "not TOML"),
        (format!("{other}colour = 1\n"), "time.clock.colour"),
        (
            format!("{other}{free}[file.x]\nlisten = [\"127.0.0.1:0\"]\npath = \"none.jpg\"\n"),
            "none.jpg",
        ),
        (
            format!("{other}{free}[time.x]\nlisten = [\"{taken}\"]\n"),
            "another program listens there",
        ),
        (
            format!("{other}{free}[time.x]\nlisten = [\"192.0.2.1:9\"]\n"),
            "does not have that address",
        ),
        (
            format!("{other}{free}[time.x]\nlisten = [\"unix:none/x.sock\"]\n"),
            "its folder must exist",
        ),
        (format!("{other}{free}[time.x]\nlisten = [\"systemd:x\"]\n"), "systemd passed no socket"),
        (String::new(), "no service"),
    ];
    for (number, (config, said)) in faults.iter().enumerate() {
        daemon.reload(config);
        let line = daemon.wait_for(said, |line| {
            says(line, "reload failed, nothing was changed: ") && says(line, said)
        });
        assert_eq!(line["level"], "ERROR");
        assert_eq!(read_all(address).len(), 27, "{config}");
        assert!(!daemon.path("new.sock").exists(), "{config}");
        let failed = metric(metrics, "handout_reloads_total{outcome=\"failed\"}");
        assert_eq!(failed, (number + 1) as f64);
        assert_eq!(metric(metrics, "handout_config_last_reload_successful"), 0.0);
    }
    fs::remove_file(daemon.path("handout.toml")).unwrap();
    daemon.signal(Signal::HUP);
    daemon.wait_for_message("cannot be read: No such file");
    assert_eq!(counts(&daemon.reload(&before)), [0, 0, 0, 2]);
    assert_eq!(metric(metrics, "handout_config_last_reload_successful"), 1.0);
    assert_eq!(metric(metrics, "handout_reloads_total{outcome=\"done\"}"), 1.0);
}

#[test]
fn loses_no_client_in_a_failed_reload() {
    let daemon = Daemon::start_with(
        "[time.clock]\nlisten = [\"0.0.0.0:0\"]\n",
        &[("big.bin", &sample(16, 30_000_000))],
        |_| {},
    );
    let port = daemon.tcp("time.clock").port();
    let stop = Arc::new(AtomicBool::new(false));
    let client = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            let mut served = 0;
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(read_all(([127, 0, 0, 1], port).into()).len(), 27);
                served += 1;
            }
            served
        })
    };
    // A more specific address would take the clients; then a large file is read, and then an
    // address that this machine does not have fails.
    let line = daemon.reload(&format!(
        "[time.clock]\nlisten = [\"127.0.0.1:{port}\"]\n\
         [file.big]\nlisten = [\"127.0.0.1:0\"]\npath = \"big.bin\"\n\
         [file.bad]\nlisten = [\"192.0.2.1:9\"]\npath = \"big.bin\"\n"
    ));
    assert!(says(&line, "does not have that address"), "{line}");
    stop.store(true, Ordering::Relaxed);
    assert!(client.join().unwrap() > 0);
    // No other program can bind the port, not even shared.
    let other = Daemon::try_start(&format!("[time.clock]\nlisten = [\"0.0.0.0:{port}\"]\n"));
    assert!(other.unwrap_err().contains("another program listens there"));
}

#[test]
fn drains_a_socket_with_its_new_owner_after_a_move_to_or_from_monitoring() {
    let config = |clock: u16, metrics: u16| {
        format!(
            "[time.clock]\nlisten = [\"127.0.0.1:{clock}\"]\n\
             [metrics]\nlisten = [\"127.0.0.1:{metrics}\"]\n"
        )
    };
    let mut daemon = Daemon::start(&config(0, 0));
    let (one, two) = (daemon.tcp("time.clock").port(), daemon.tcp("metrics").port());
    assert!(says(&daemon.reload(&config(one, two)), "reloaded"));
    assert_eq!(counts(&daemon.reload(&config(two, one))), [0, 2, 0, 0]);
    assert_eq!(read_all(([127, 0, 0, 1], two).into()).len(), 27);
    assert_eq!(http_get(([127, 0, 0, 1], one).into(), "/healthz").1, "ok\n");
    assert!(daemon.stop().success());
}

#[test]
fn counts_old_connections_of_a_service_that_is_added_again() {
    let file =
        "[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\nmax-connections = 1\n";
    let files: [(&str, &[u8]); 1] = [("picture.jpg", &picture())];
    let all = format!("{CLOCK}{METRICS}{file}");
    let daemon = Daemon::start_with(&all, &files, |_| {});
    let metrics = daemon.tcp("metrics");
    let (mut stream, mut document) = start_transfer(daemon.tcp("file.picture"));
    daemon.reload(&format!("{CLOCK}{METRICS}"));
    let active = "handout_connections_active{service=\"file.picture\"}";
    assert_eq!(metric(metrics, active), 1.0);
    daemon.reload(&all);
    assert_eq!(metric(metrics, active), 1.0);
    let lines = daemon.lines();
    let again = lines.iter().rfind(|line| says(line, "file.picture: listening on ")).unwrap();
    let mut second = connect(again["address"].as_str().unwrap().parse().unwrap());
    second.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(second.read(&mut [0; 100]).is_err());
    stream.read_to_end(&mut document).unwrap();
    drop(stream);
    second.set_read_timeout(Some(DEADLINE)).unwrap();
    second.read_exact(&mut [0; 100]).unwrap();
    assert_eq!(metric(metrics, active), 1.0);
    let complete = "handout_connections_total{service=\"file.picture\",outcome=\"complete\"}";
    assert_eq!(metric(metrics, complete), 1.0);
}

#[test]
fn binds_a_unix_socket_again_whose_file_was_removed() {
    let config = "[time.clock]\nlisten = [\"unix:clock.sock\"]\n";
    let daemon = Daemon::start(config);
    fs::remove_file(daemon.path("clock.sock")).unwrap();
    daemon.reload(config);
    let mut reply = Vec::new();
    UnixStream::connect(daemon.path("clock.sock")).unwrap().read_to_end(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
}

#[test]
fn applies_new_deadlines_to_the_next_connection() {
    let config = |idle: &str| {
        format!(
            "[file.folder]\nlisten = [\"127.0.0.1:0\"]\npath = \".\"\nidle-timeout = \"{idle}\"\n"
        )
    };
    let daemon = Daemon::start(&config("1h"));
    let address = daemon.tcp("file.folder");
    let mut patient = connect(address);
    let mut replies = BufReader::new(patient.try_clone().unwrap());
    patient.write_all(b"\n").unwrap();
    replies.read_line(&mut String::new()).unwrap();
    daemon.reload(&config("100ms"));
    let mut hurried = connect(address);
    let reset = hurried.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
    // The older connection keeps its deadlines.
    patient.write_all(b"\n").unwrap();
    assert!(replies.read_line(&mut String::new()).unwrap() > 0);
}

#[test]
fn ignores_reloads_during_the_stop() {
    let files: [(&str, &[u8]); 1] = [("picture.jpg", &picture())];
    let config =
        format!("{CLOCK}[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n");
    let mut daemon = Daemon::start_with(&config, &files, |_| {});
    let (mut stream, mut document) = start_transfer(daemon.tcp("file.picture"));
    daemon.signal(Signal::TERM);
    daemon.wait_for_message("stopping: ");
    daemon.signal(Signal::HUP);
    stream.read_to_end(&mut document).unwrap();
    assert!(decode(&document).1 == files[0].1);
    drop(stream);
    assert!(daemon.wait().success());
}

#[test]
fn changes_the_level_and_the_format_of_the_log() {
    let daemon = Daemon::start(CLOCK);
    let address = daemon.tcp("time.clock");
    let text = |daemon: &Daemon, words: &str| {
        daemon.lines().iter().any(|line| line.as_str().is_some_and(|line| line.contains(words)))
    };
    daemon.reload(&format!(
        "[log]\nformat = \"json\"\nlevel = \"warn,handout::daemon=info\"\n{CLOCK}"
    ));
    read_all(address);
    fs::write(daemon.path("handout.toml"), format!("[log]\nformat = \"text\"\n{CLOCK}")).unwrap();
    daemon.signal(Signal::HUP);
    eventually("a line of text", || text(&daemon, "reloaded: "));
    read_all(address);
    eventually("the line of the connection", || text(&daemon, "outcome=\"complete\""));
    // The connection before was not logged at that level.
    assert!(!daemon.lines().iter().any(|line| line["outcome"].is_string()));
}

#[test]
fn finishes_connections_above_a_lower_limit_and_admits_waiting_clients_below_a_higher_one() {
    let config = |max: u32| {
        format!(
            "[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n\
             max-connections = {max}\n"
        )
    };
    let files: [(&str, &[u8]); 1] = [("picture.jpg", &picture())];
    let daemon = Daemon::start_with(&config(3), &files, |_| {});
    let address = daemon.tcp("file.picture");
    let mut three: Vec<_> = (0..3).map(|_| start_transfer(address)).collect();
    assert_eq!(counts(&daemon.reload(&config(1))), [0, 1, 0, 0]);
    let waits = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let waits = stream.read(&mut [0; 100]).is_err();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        waits
    };
    let mut fourth = connect(address);
    assert!(waits(&mut fourth));
    // Two of three permits are retired with their connections.
    for (mut stream, mut document) in three.drain(1..) {
        stream.read_to_end(&mut document).unwrap();
    }
    daemon.wait_for_connections(2);
    assert!(waits(&mut fourth));
    daemon.reload(&config(2));
    fourth.read_exact(&mut [0; 100]).unwrap();
    let mut fifth = connect(address);
    assert!(waits(&mut fifth));
    drop(three);
    fifth.read_exact(&mut [0; 100]).unwrap();
}

#[test]
fn applies_new_access_lists_to_the_next_connection() {
    let daemon = Daemon::start(CLOCK);
    let address = daemon.tcp("time.clock");
    assert_eq!(read_all(address).len(), 27);
    daemon.reload(&format!("{CLOCK}deny = [\"127.0.0.1\"]\n"));
    let mut stream = connect(address);
    let reset = stream.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
    daemon.reload(CLOCK);
    assert_eq!(read_all(address).len(), 27);
}

#[test]
fn ignores_datagrams_from_ports_that_became_its_own() {
    let asker = UdpSocket::bind("127.0.0.2:0").unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    let port = asker.local_addr().unwrap().port();
    let clock = "[time.clock]\nlisten = [\"udp:127.0.0.1:0\"]\n";
    let daemon = Daemon::start(&format!("{clock}{METRICS}"));
    let (address, metrics) = (daemon.udp("time.clock"), daemon.tcp("metrics"));
    asker.send_to(b"time?", address).unwrap();
    asker.recv(&mut [0; 64]).unwrap();
    let other = format!("[time.other]\nlisten = [\"udp:127.0.0.1:{port}\"]\n");
    daemon.reload(&format!("{clock}{METRICS}{other}"));
    let unanswerable = "handout_datagrams_total{service=\"time.clock\",outcome=\"unanswerable\"}";
    eventually("a datagram that is not answered", || {
        asker.send_to(b"time?", address).unwrap();
        metric(metrics, unanswerable) > 0.0
    });
}

#[test]
fn moves_a_unix_socket_to_its_new_path() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"unix:old.sock\"]");
    daemon.reload("[time.clock]\nlisten = [\"unix:new.sock\"]");
    let mut reply = Vec::new();
    UnixStream::connect(daemon.path("new.sock")).unwrap().read_to_end(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    eventually("the old file gone", || !daemon.path("old.sock").exists());
}

#[test]
fn keeps_services_of_the_command_line() {
    let daemon = Daemon::start_with("", &[], |command| {
        *command = {
            let mut other = program();
            other.args(["serve", "--time", "127.0.0.1:0"]).stderr(std::process::Stdio::piped());
            other
        };
    });
    daemon.signal(Signal::HUP);
    eventually("the end of the reload", || {
        let lines = daemon.lines();
        let mut lines = lines.iter().filter_map(Value::as_str);
        lines.any(|line| line.contains("reloaded: 1 service unchanged; "))
    });
}

#[test]
fn refuses_no_client_and_leaks_nothing_in_fifty_reloads_under_load() {
    let base = format!("[limits]\nmax-datagrams-per-client = 100000\n{CLOCK}{METRICS}");
    let changed = format!(
        "{base}[time.extra]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\", \"unix:x.sock\"]\n"
    );
    let changing = |number: usize| match number % 4 {
        0 => base.clone(),
        1 => changed.clone(),
        // Alternately other limits and another format of the same length.
        2 => base.replace("[metrics]", "max-per-client = 900\n[metrics]"),
        _ => base.replace("[metrics]", "format = \"%Y-%m-%d %H:%M:%S.000000\"\n[metrics]"),
    };
    let daemon = Daemon::start(&changing(0));
    let address = daemon.tcp("time.clock");
    daemon.reload(&changing(1));
    daemon.reload(&changing(0));
    let (memory, descriptors) = daemon.usage();

    let stop = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(read_all(address).len(), 27);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for number in 0..50 {
        let before = served.load(Ordering::Relaxed);
        let line = daemon.reload(&changing(number));
        assert!(says(&line, "reloaded: "), "{line}");
        eventually("clients in between", || served.load(Ordering::Relaxed) > before);
    }
    daemon.reload(&changing(0));
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    eventually("as many descriptors as before", || daemon.usage().1 <= descriptors);
    let grown = daemon.usage().0.saturating_sub(memory);
    assert!(grown < 16 << 20, "{grown} bytes more than before");
    let metrics = daemon.tcp("metrics");
    let complete = "handout_connections_total{service=\"time.clock\",outcome=\"complete\"}";
    let served = served.load(Ordering::Relaxed) as f64;
    eventually("a count that knew no reload", || metric(metrics, complete) == served);
    assert_eq!(http_get(metrics, "/healthz").1, "ok\n");
}
