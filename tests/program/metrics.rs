//! What monitoring is told, and that it cannot be made to harm.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::process::Command;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};

use crate::common::{
    DEADLINE, Daemon, connect, eventually, http_get, metric, read_all, replace, run, sample,
};

const CONFIG: &str = "\
[time.clock]
listen = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]
[file.picture]
listen = [\"127.0.0.1:0\"]
path = \"picture.jpg\"
[metrics]
listen = [\"127.0.0.1:0\"]
";

fn daemon() -> Daemon {
    Daemon::start_with(CONFIG, &[("picture.jpg", &sample(13, 200_000))], |_| {})
}

#[test]
fn what_happens_is_counted_by_service_and_outcome() {
    let daemon = daemon();
    let metrics = daemon.tcp("metrics");
    let value = |name: &str| metric(metrics, name);
    read_all(daemon.tcp("time.clock"));
    let document = read_all(daemon.tcp("file.picture")).len() as f64;
    let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    asker.send_to(b"time?", daemon.udp("time.clock")).unwrap();
    asker.recv(&mut [0; 64]).unwrap();
    daemon.wait_for_connections(2);

    for service in ["time.clock", "file.picture"] {
        let labels = format!("{{service=\"{service}\",outcome=\"complete\"}}");
        assert_eq!(value(&format!("handout_connections_total{labels}")), 1.0);
        let labels = format!("{{service=\"{service}\"}}");
        assert_eq!(value(&format!("handout_connections_active{labels}")), 0.0);
        assert_eq!(value(&format!("handout_connection_duration_seconds_count{labels}")), 1.0);
        assert_eq!(value(&format!("handout_service_healthy{labels}")), 1.0);
    }
    assert_eq!(value("handout_sent_bytes_total{service=\"time.clock\"}"), 27.0);
    assert_eq!(value("handout_sent_bytes_total{service=\"file.picture\"}"), document);
    let answered = "handout_datagrams_total{service=\"time.clock\",outcome=\"answered\"}";
    eventually("the datagram", || value(answered) == 1.0);
    let modified = fs::metadata(daemon.path("picture.jpg")).unwrap().modified().unwrap();
    let modified = modified.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let version = "handout_file_version_timestamp_seconds{service=\"file.picture\"}";
    assert_eq!(value(version), modified as f64);
    assert!([0.0, 1.0].contains(&value("handout_clock_synchronized")));
    assert!(value("handout_clock_max_error_seconds") >= 0.0);
    assert_eq!(
        value(concat!("handout_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}")),
        1.0
    );
    // The monitoring itself does not fill the log.
    assert!(
        !daemon
            .lines()
            .iter()
            .any(|line| line["service"] == "metrics" && line["outcome"].is_string())
    );
}

#[test]
fn a_connection_under_way_is_active_and_a_refused_one_is_counted() {
    let daemon = Daemon::start_with(
        &CONFIG.replace("path =", "max-per-client = 1\npath ="),
        &[("picture.jpg", &sample(13, 20_000_000))],
        |_| {},
    );
    let metrics = daemon.tcp("metrics");
    let mut stream = connect(daemon.tcp("file.picture"));
    stream.read_exact(&mut [0; 10]).unwrap();
    assert_eq!(metric(metrics, "handout_connections_active{service=\"file.picture\"}"), 1.0);
    let reset = connect(daemon.tcp("file.picture")).read_to_end(&mut Vec::new());
    assert_eq!(reset.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let refused = "handout_refused_total{service=\"file.picture\",reason=\"max-per-client\"}";
    assert_eq!(metric(metrics, refused), 1.0);
}

#[test]
fn curl_reads_it() {
    let daemon = daemon();
    let url = format!("http://{}/metrics", daemon.tcp("metrics"));
    let reply = run(Command::new("curl").args(["-sS", "--fail", "-i", &url]));
    assert!(reply.status.success(), "{reply:?}");
    let reply = String::from_utf8(reply.stdout).unwrap();
    assert!(reply.contains("Content-Type: application/openmetrics-text; version=1.0.0"));
    assert!(reply.ends_with("# EOF\n"));
}

#[test]
fn the_access_lists_of_all_hold_for_monitoring_too() {
    let daemon = Daemon::start(&format!(
        "[limits]\ndeny = [\"127.0.0.0/8\"]\n{}",
        "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n[metrics]\nlisten = [\"127.0.0.1:0\"]\n"
    ));
    let reset = connect(daemon.tcp("metrics")).read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_file_that_cannot_be_read_is_not_healthy_until_it_is_back() {
    let daemon = daemon();
    let metrics = daemon.tcp("metrics");
    assert!(http_get(metrics, "/healthz").0.starts_with("HTTP/1.1 200 OK"));
    fs::remove_file(daemon.path("picture.jpg")).unwrap();
    eventually("trouble", || http_get(metrics, "/healthz").0.starts_with("HTTP/1.1 503"));
    let (_, body) = http_get(metrics, "/healthz");
    assert!(body.starts_with("file.picture: ") && body.contains("picture.jpg"), "{body}");
    assert_eq!(metric(metrics, "handout_service_healthy{service=\"file.picture\"}"), 0.0);
    replace(&daemon.path("picture.jpg"), b"back");
    eventually("health", || http_get(metrics, "/healthz").1 == "ok\n");
}

#[test]
fn a_folder_that_is_gone_is_not_healthy_until_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    let daemon = Daemon::start_in(folder, &CONFIG.replace("picture.jpg", "files"), |_| {});
    let metrics = daemon.tcp("metrics");
    fs::rename(daemon.path("files"), daemon.path("elsewhere")).unwrap();
    eventually("trouble", || http_get(metrics, "/healthz").1.starts_with("file.picture: "));
    fs::rename(daemon.path("elsewhere"), daemon.path("files")).unwrap();
    eventually("health", || http_get(metrics, "/healthz").1 == "ok\n");
}

#[test]
fn a_listener_without_descriptors_is_not_healthy_until_it_has_some() {
    let daemon = daemon();
    let metrics = daemon.tcp("metrics");
    // One connection to monitoring is accepted before there are none left.
    let mut asker = connect(metrics);
    let active = "handout_connections_active{service=\"metrics\"}";
    eventually("the connection", || metric(metrics, active) == 2.0);
    // Fewer than are open: some may be closed yet, as that of whoever asked for the metric.
    let few = daemon.usage().1 as u64 / 2;
    let before = getrlimit(Resource::Nofile);
    let none_left = Rlimit { current: Some(few), maximum: before.maximum };
    let before = prlimit(Some(daemon.pid()), Resource::Nofile, none_left).unwrap();
    let waiting = connect(daemon.tcp("time.clock"));
    daemon.wait_for_message("cannot accept connections");
    asker.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").unwrap();
    let mut reply = String::new();
    asker.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
    assert!(reply.contains("time.clock: cannot accept clients"), "{reply}");
    prlimit(Some(daemon.pid()), Resource::Nofile, before).unwrap();
    drop(waiting);
    eventually("health", || http_get(metrics, "/healthz").1 == "ok\n");
}

#[test]
fn while_it_drains_it_says_so_and_then_it_is_gone() {
    let mut daemon =
        Daemon::start_with(CONFIG, &[("picture.jpg", &sample(13, 20_000_000))], |_| {});
    let metrics = daemon.tcp("metrics");
    let mut stream = connect(daemon.tcp("file.picture"));
    stream.read_exact(&mut [0; 10]).unwrap();
    daemon.signal(Signal::TERM);
    daemon.wait_for_message("stopping: ");
    let (head, body) = http_get(metrics, "/healthz");
    assert!(head.starts_with("HTTP/1.1 503") && body.contains("stopping"), "{head} {body}");
    drop(stream);
    assert!(daemon.wait().success());
}

#[test]
fn slow_large_and_foreign_requests_are_bounded() {
    let config = CONFIG.to_owned() + "idle-timeout = \"300ms\"\nmax-duration = \"1s\"\n";
    let daemon = Daemon::start_with(&config, &[("picture.jpg", b"x")], |_| {});
    let metrics = daemon.tcp("metrics");
    // Who says nothing is reset.
    let mut silent = connect(metrics);
    let reset = silent.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
    // So is who says a byte now and then.
    let mut slow = connect(metrics);
    let mut ended = false;
    eventually("the end of a slow one", || {
        ended |= slow.write_all(b"G").is_err();
        ended
    });
    // Too large: an error, without waiting for the rest.
    let mut large = connect(metrics);
    large.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    let _ = large.write_all(&b"A: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\r\n".repeat(60_000));
    let mut reply = String::new();
    let _ = large.read_to_string(&mut reply);
    assert!(reply.starts_with("HTTP/1.1 431 "), "{reply}");
    for (request, status) in [
        ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "405"),
        ("GET /etc/passwd HTTP/1.1\r\n\r\n", "404"),
        ("\x16\x03\x01\x02 TLS?\r\n", "400"),
        ("SSH-2.0-x\r\n", "400"),
    ] {
        let mut stream = connect(metrics);
        stream.write_all(request.as_bytes()).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        assert!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {reply}");
    }
}
