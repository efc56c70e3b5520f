//! `[mirror.NAME]`: keeps a copy of remote files, whatever the server does.

use std::fs;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::common::{
    Daemon, PROGRAM, connect, eventually, http_get, metric, program, read_all, run, sample, says,
};
use crate::servers::{Server, nobody, with_mounts};
use crate::web::{Nginx, Reply, Web, comes_to_hold, modified};

/// A second in the past.
const THEN: u64 = 1_700_000_000;

/// A folder for a daemon, with one that is mirrored into.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    folder
}

/// A daemon's configuration with a mirror, which has these keys, and with what serves its files.
fn config(keys: &str) -> String {
    format!(
        "[mirror.pictures]\ninto = \"files\"\n{keys}\n\
         [file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n\
         [metrics]\nlisten = [\"127.0.0.1:0\"]\n"
    )
}

/// Returns the keys of a mirror of the listing at `/list.json`.
fn of(web: &Web, more: &str) -> String {
    config(&format!("source = \"{}\"\nlist = \"\"\nurl = \"/url\"\n{more}", web.url("list.json")))
}

/// The same of nginx, over TLS.
fn of_nginx(nginx: &Nginx, more: &str) -> String {
    let (source, ca) = (nginx.url("list.json"), nginx.authority());
    config(&format!(
        "source = \"{source}\"\nlist = \"\"\nurl = \"/url\"\nca-file = \"{ca}\"\n{more}"
    ))
}

fn start(config: &str) -> Daemon {
    Daemon::start_in(folder(), config, |_| {})
}

/// The lines of a mirror's runs that came to their end.
fn runs_of(daemon: &Daemon, mirror: &str) -> Vec<Value> {
    let mut lines = daemon.lines();
    lines.retain(|line| {
        says(line, ": mirrored: ") && line["mirror"] == mirror && line["interrupted"] != true
    });
    lines
}

/// Waits for the log line of a sync, counted from 0.
fn run_of(daemon: &Daemon, mirror: &str, number: usize) -> Value {
    eventually("a run", || runs_of(daemon, mirror).len() > number);
    runs_of(daemon, mirror).swap_remove(number)
}

fn nth_run(daemon: &Daemon, number: usize) -> Value {
    run_of(daemon, "pictures", number)
}

/// Returns the numbers of new, changed, unchanged, failed and removed files of a log line.
fn counts(line: &Value) -> [u64; 5] {
    ["new", "changed", "unchanged", "failed", "removed"]
        .map(|field| line[field].as_u64().unwrap_or_else(|| panic!("no {field} in {line}")))
}

/// Waits for a line about an entry that was not mirrored.
fn failure(daemon: &Daemon, words: &str) -> Value {
    daemon.wait_for("a failure", |line| {
        says(line, ": not mirrored: ") && line.to_string().contains(words)
    })
}

/// Returns the visible names in the mirror's folder.
fn names(daemon: &Daemon) -> Vec<String> {
    let mut names = hidden_and_not(daemon).1;
    names.sort();
    names
}

/// Returns the hidden names except the manifest.
fn leftovers(daemon: &Daemon) -> Vec<String> {
    let mut names = hidden_and_not(daemon).0;
    names.retain(|name| name != ".handout-mirror.json");
    names
}

fn hidden_and_not(daemon: &Daemon) -> (Vec<String>, Vec<String>) {
    let entries = fs::read_dir(daemon.path("files")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.partition(|name| name.starts_with('.'))
}

fn content(daemon: &Daemon, name: &str) -> Vec<u8> {
    fs::read(daemon.path("files").join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns the document of a file service.
fn served(daemon: &Daemon, name: &str) -> Value {
    let mut stream = connect(daemon.tcp("file.files"));
    crate::common::send_and_half_close(&mut stream, format!("{name}\n").as_bytes());
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    serde_json::from_str(&reply).unwrap()
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A list of these names.
fn list(names: &[&str]) -> Value {
    names.iter().map(|name| json!({ "url": name })).collect()
}

#[test]
fn mirrors_listed_files_at_start_and_logs_counts_and_serves_them() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN).has("b.txt", b"beta", THEN + 1);
    nginx.lists(&["a.txt", "b.txt", "missing.txt"], THEN);
    let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let daemon = start(&of_nginx(&nginx, "every = \"1h\""));
    let line = nth_run(&daemon, 0);
    assert_eq!(counts(&line), [2, 0, 0, 1, 0], "{line}");
    assert_eq!(line["level"], "INFO", "{line}");
    assert!(line["bytes"].as_u64().unwrap() >= 9, "{line}");
    assert!(line["duration"].as_f64().is_some_and(|seconds| seconds > 0.0), "{line}");
    let line = failure(&daemon, "missing.txt");
    assert_eq!((&line["level"], &line["mirror"]), (&json!("WARN"), &json!("pictures")), "{line}");
    assert!(line["error"].as_str().unwrap().contains("404"), "{line}");
    assert_eq!(names(&daemon), ["a.txt", "b.txt"]);
    assert!(leftovers(&daemon).is_empty(), "{:?}", leftovers(&daemon));
    assert_eq!(content(&daemon, "a.txt"), b"alpha");
    assert_eq!(modified(&daemon.path("files/b.txt")), THEN + 1);
    assert_eq!(served(&daemon, "b.txt")["sha256"], hex(b"beta"));

    let metrics = daemon.tcp("metrics");
    let files = |outcome: &str| {
        let labels = format!("{{mirror=\"pictures\",outcome=\"{outcome}\"}}");
        metric(metrics, &format!("handout_mirror_files_total{labels}"))
    };
    let found = ["new", "changed", "unchanged", "failed", "removed"].map(files);
    assert_eq!(found, [2.0, 0.0, 0.0, 1.0, 0.0]);
    let of_mirror = |name: &str| metric(metrics, &format!("{name}{{mirror=\"pictures\"}}"));
    let partial = "handout_mirror_runs_total{mirror=\"pictures\",outcome=\"partial\"}";
    assert_eq!(metric(metrics, partial), 1.0);
    assert!(of_mirror("handout_mirror_received_bytes_total") >= 9.0);
    assert!(of_mirror("handout_mirror_run_seconds") > 0.0);
    // One that was not complete is no success.
    let (_, text) = http_get(metrics, "/metrics");
    let success = "handout_mirror_last_success_timestamp_seconds{mirror=\"pictures\"} ";
    let success = text.lines().find_map(|line| line.strip_prefix(success));
    assert!(success.is_none_or(|time| time.parse::<f64>().unwrap() < before), "{success:?}");
}

#[test]
fn exports_the_time_of_the_last_complete_sync() {
    let web = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let before = now();
    let daemon = start(&of(&web, "every = \"1h\""));
    nth_run(&daemon, 0);
    let metrics = daemon.tcp("metrics");
    let complete = "handout_mirror_runs_total{mirror=\"pictures\",outcome=\"complete\"}";
    assert_eq!(metric(metrics, complete), 1.0);
    let success =
        metric(metrics, "handout_mirror_last_success_timestamp_seconds{mirror=\"pictures\"}");
    assert!(success >= before.floor() && success <= now(), "{success}");
}

#[test]
fn mirrors_urls_without_a_listing() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN).has("b.txt", b"beta", THEN);
    let urls = json!([nginx.url("a.txt"), nginx.url("b.txt")]);
    let daemon = start(&config(&format!("urls = {urls}\nca-file = \"{}\"", nginx.authority())));
    assert_eq!(counts(&nth_run(&daemon, 0)), [2, 0, 0, 0, 0]);
    assert_eq!(names(&daemon), ["a.txt", "b.txt"]);
}

#[test]
fn unchanged_files_cost_no_body_by_etag_or_by_time() {
    for more in ["", "etag off;"] {
        let nginx = Nginx::start_with(more);
        nginx.has("a.txt", b"alpha", THEN).has("b.txt", b"beta", THEN);
        nginx.lists(&["a.txt", "b.txt"], THEN);
        let daemon = start(&of_nginx(&nginx, "every = \"1s\""));
        assert_eq!(counts(&nth_run(&daemon, 0)), [2, 0, 0, 0, 0]);
        let line = nth_run(&daemon, 1);
        assert_eq!(counts(&line), [0, 0, 2, 0, 0], "{line}");
        for request in &nginx.requests_after(3, 3)[..3] {
            // The listing is small, and may be asked for as a whole.
            if request["path"] != "/list.json" {
                assert_eq!((&request["status"], &request["sent"]), (&json!(304), &json!(0)));
            }
        }
    }
}

#[test]
fn the_manifest_survives_restarts_and_is_rebuilt_if_lost_or_garbage() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN).has("b.txt", b"beta", THEN);
    nginx.lists(&["a.txt", "b.txt"], THEN);
    let mut daemon = start(&of_nginx(&nginx, "every = \"1h\""));
    nth_run(&daemon, 0);
    let state = daemon.path("files/.handout-mirror.json");
    let good = fs::read(&state).unwrap();
    let deep = "[".repeat(1 << 20);
    let spoilt: [Option<&[u8]>; 9] = [
        Some(&good),
        None,
        Some(b""),
        Some(&good[..good.len() / 2]),
        Some(b"[]"),
        Some(b"null"),
        Some(b"{\"files\": {\"a.txt\": 5}}"),
        Some(&[0xff; 10_000]),
        Some(deep.as_bytes()),
    ];
    let mut known = nginx.requests_after(0, 3).len();
    for state_is in spoilt {
        daemon.stop();
        match state_is {
            Some(bytes) => fs::write(&state, bytes).unwrap(),
            None => fs::remove_file(&state).unwrap(),
        }
        let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
        daemon = Daemon::start_in(folder, &of_nginx(&nginx, "every = \"1h\""), |_| {});
        let line = nth_run(&daemon, 0);
        assert_eq!(counts(&line), [0, 0, 2, 0, 0], "{line}");
        assert_eq!(content(&daemon, "b.txt"), b"beta");
        for request in nginx.requests_after(known, 3) {
            known += 1;
            if request["path"] != "/list.json" {
                // Their own time says enough.
                assert_eq!(request["status"], 304, "{request}");
            }
        }
        assert!(leftovers(&daemon).is_empty(), "{:?}", leftovers(&daemon));
    }
}

#[test]
fn a_forged_manifest_cannot_name_files_outside_the_folder() {
    let web = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let folder = folder();
    fs::write(folder.path().join("precious"), "mine").unwrap();
    let entry =
        json!({"source": "http://127.0.0.1/", "etag": "\"x\"", "size": 4, "modified": [1, 2]});
    let absolute = folder.path().join("precious");
    let traps = ["../precious", absolute.to_str().unwrap(), "..", "", "sub/../../precious", "a\0b"];
    let files: serde_json::Map<_, _> =
        traps.iter().map(|name| ((*name).to_owned(), entry.clone())).collect();
    let state = json!({ "files": files }).to_string();
    fs::write(folder.path().join("files/.handout-mirror.json"), state).unwrap();
    let daemon = Daemon::start_in(folder, &of(&web, "delete = true"), |_| {});
    nth_run(&daemon, 0);
    assert_eq!(fs::read(daemon.path("precious")).unwrap(), b"mine");
    assert_eq!(names(&daemon), ["a.txt"]);
}

#[test]
fn repairs_damaged_files() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN).has("b.txt", b"beta", THEN).lists(&["a.txt", "b.txt"], THEN);
    let daemon = start(&of_nginx(&nginx, "every = \"1s\""));
    nth_run(&daemon, 0);
    fs::write(daemon.path("files/a.txt"), "ALPHA").unwrap();
    fs::remove_file(daemon.path("files/b.txt")).unwrap();
    eventually("the good files", || {
        let read = |name| fs::read(daemon.path("files").join(name)).unwrap_or_default();
        (read("a.txt"), read("b.txt")) == (b"alpha".to_vec(), b"beta".to_vec())
    });
    assert_eq!(modified(&daemon.path("files/a.txt")), THEN);
}

#[test]
fn replaces_changed_files_and_services_see_them() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN).lists(&["a.txt"], THEN);
    let services = "[file.one]\nlisten = [\"127.0.0.1:0\"]\npath = \"files/a.txt\"\n";
    let folder = folder();
    fs::write(folder.path().join("files/a.txt"), "before").unwrap();
    let config = of_nginx(&nginx, "every = \"1s\"") + services;
    let daemon = Daemon::start_in(folder, &config, |_| {});
    let pushed = || crate::common::decode(&read_all(daemon.tcp("file.one"))).1;
    eventually("the first version", || pushed() == b"alpha");
    nginx.has("a.txt", b"ALPHA", THEN + 1);
    eventually("the second version", || pushed() == b"ALPHA");
    eventually("it in the folder", || served(&daemon, "a.txt")["sha256"] == hex(b"ALPHA"));
    assert_eq!(modified(&daemon.path("files/a.txt")), THEN + 1);
}

#[test]
fn clients_never_receive_half_a_file() {
    // Each version is all of one letter, and it changes all the time.
    let web = Web::lists(
        |_| list(&["a.bin"]),
        |request| {
            let letter = b'a' + u8::try_from(request.turn % 26).unwrap();
            Reply::ok(vec![letter; 2_000_000]).with("ETag", &format!("\"{}\"", request.turn))
        },
    );
    let daemon = start(&of(&web, "every = \"1s\""));
    nth_run(&daemon, 0);
    eventually("the third run", || {
        let data = content(&daemon, "a.bin");
        assert_eq!(data.len(), 2_000_000);
        assert!(data.iter().all(|byte| *byte == data[0]));
        let reply = served(&daemon, "a.bin");
        assert_eq!(reply["size"], 2_000_000);
        runs_of(&daemon, "pictures").len() >= 3
    });
}

/// Mirrors a valid file, then replies with `then`, which must not replace it.
fn stays(what: &str, keys: &str, then: impl Fn(usize) -> Reply + Send + Sync + 'static) {
    let web = Web::lists(
        |turn| json!([{"url": "a.png", "digest": if turn == 0 { hex(b"good") } else { hex(b"better") }}]),
        move |request| match request.turn {
            0 => Reply::ok("good").with("Content-Type", "image/png"),
            turn => then(turn),
        },
    );
    let daemon =
        start(&of(&web, &format!("every = \"1s\"\nretries = 0\ntimeout = \"300ms\"\n{keys}")));
    assert_eq!(counts(&nth_run(&daemon, 0)), [1, 0, 0, 0, 0]);
    let line = nth_run(&daemon, 1);
    assert_eq!(counts(&line), [0, 0, 0, 1, 0], "{what}: {line}");
    failure(&daemon, "a.png");
    assert_eq!(content(&daemon, "a.png"), b"good", "{what}");
    assert_eq!(served(&daemon, "a.png")["sha256"], hex(b"good"), "{what}");
}

#[test]
fn keeps_old_content_until_new_content_is_verified() {
    stays("gone", "", |_| Reply::status(404));
    stays("an error", "", |_| Reply::status(500));
    stays("cut", "", |_| Reply::ok("better").cut_after(3));
    stays("a stall", "", |_| Reply::ok("better").cut_after(3).then_stall());
    stays("too large", "max-file = \"5B\"", |_| Reply::ok("better"));
    stays("another digest", "sha256 = \"/digest\"", |_| Reply::ok("worse!"));
    stays("a redirect to nowhere", "", |_| Reply::redirect("http://127.0.0.2:1/a.png"));
}

#[test]
fn refuses_other_content_types() {
    let types = "content-types = [\"image/png\", \"image/jpeg\"]";
    stays("HTML", types, |_| Reply::ok("<!DOCTYPE html>").with("Content-Type", "text/html"));
    stays("no type", types, |_| Reply::ok("?"));
    stays("nonsense", types, |_| Reply::ok("?").with("Content-Type", "image/pngx"));
    let answers = ["IMAGE/PNG; charset=binary", "image/jpeg"];
    let web = Web::lists(
        |_| list(&["0", "1"]),
        move |request| {
            let number: usize = request.target[1..].parse().unwrap();
            Reply::ok("x").with("Content-Type", answers[number])
        },
    );
    let daemon = start(&of(&web, types));
    assert_eq!(counts(&nth_run(&daemon, 0)), [2, 0, 0, 0, 0]);
    // A listing is no picture, and need not be one.
}

#[test]
fn removes_only_unlisted_files_and_only_with_delete() {
    for delete in [false, true] {
        let web = Web::lists(
            |turn| if turn == 0 { list(&["a.txt", "b.txt"]) } else { list(&["b.txt", "c.txt"]) },
            |request| Reply::ok(request.target.clone()).with("ETag", "\"x\""),
        );
        let folder = folder();
        fs::write(folder.path().join("files/mine.txt"), "mine").unwrap();
        fs::create_dir(folder.path().join("files/sub")).unwrap();
        let config = of(&web, &format!("every = \"1s\"\ndelete = {delete}"));
        let daemon = Daemon::start_in(folder, &config, |_| {});
        nth_run(&daemon, 0);
        let line = nth_run(&daemon, 1);
        // Files of other programs are kept.
        if delete {
            assert_eq!(names(&daemon), ["b.txt", "c.txt", "mine.txt", "sub"]);
            assert_eq!(counts(&line)[4], 1, "{line}");
            let removed = "handout_mirror_files_total{mirror=\"pictures\",outcome=\"removed\"}";
            assert_eq!(metric(daemon.tcp("metrics"), removed), 1.0);
        } else {
            assert_eq!(names(&daemon), ["a.txt", "b.txt", "c.txt", "mine.txt", "sub"]);
            assert_eq!(counts(&line)[4], 0, "{line}");
        }
    }
}

#[test]
fn does_not_remove_files_that_others_replaced() {
    let gone = Arc::new(AtomicBool::new(false));
    let has_gone = Arc::clone(&gone);
    let web = Web::lists(
        move |_| {
            list(if has_gone.load(Ordering::Relaxed) { &["a.txt"] } else { &["a.txt", "b.txt"] })
        },
        |request| Reply::ok(request.target.clone()).with("ETag", "\"x\""),
    );
    let daemon = start(&of(&web, "every = \"1s\"\ndelete = true"));
    nth_run(&daemon, 0);
    gone.store(true, Ordering::Relaxed);
    fs::write(daemon.path("files/b.txt"), "my own").unwrap();
    let before = runs_of(&daemon, "pictures").len();
    nth_run(&daemon, before + 1);
    let content = fs::read(daemon.path("files/b.txt")).unwrap();
    assert_eq!(String::from_utf8(content).unwrap(), "my own");
}

#[test]
fn kept_unlisted_files_count_for_max_total() {
    let web = Web::lists(
        |turn| list(&[&format!("{turn}.txt")]),
        |_| Reply::ok(vec![b'x'; 1000]).with("ETag", "\"x\""),
    );
    let daemon = start(&of(&web, "max-total = \"2500B\"\nevery = \"1s\"\nretries = 0"));
    nth_run(&daemon, 3);
    assert_eq!(names(&daemon).len(), 2, "{:?}", names(&daemon));
    failure(&daemon, "max-total");
}

#[test]
fn no_failure_removes_anything() {
    // The listing: gone, no listing, cut, half of it wrong; and then files that fail.
    let faults: [fn() -> Reply; 7] = [
        || Reply::status(500),
        || Reply::status(404),
        || Reply::ok("<!DOCTYPE html>"),
        || Reply::ok("[").cut_after(1).announcing(100),
        || Reply::json(&json!({"files": []})),
        || Reply::json(&json!([{"url": "a.txt"}, {"url": 5}])),
        || Reply::json(&json!([{"url": "a.txt"}, {"other": "b.txt"}])),
    ];
    for (number, fault) in faults.into_iter().enumerate() {
        let web = Web::answers(move |request| match (request.target.as_str(), request.turn) {
            ("/list.json", 0) => Reply::json(&list(&["a.txt", "b.txt"])),
            ("/list.json", _) => fault(),
            (_, 0) => Reply::ok("x"),
            _ => Reply::status(404),
        });
        let daemon = start(&of(&web, "every = \"1s\"\ndelete = true\nretries = 0"));
        nth_run(&daemon, 0);
        eventually("another run", || web.requests_for("/list.json").len() >= 3);
        assert_eq!(names(&daemon), ["a.txt", "b.txt"], "{number}");
    }
}

#[test]
fn failed_syncs_are_logged_counted_and_repeated() {
    let web = Web::answers(|request| match (request.target.as_str(), request.turn) {
        ("/list.json", 0) => Reply::status(404),
        ("/list.json", _) => Reply::json(&list(&["a.txt"])),
        _ => Reply::ok("alpha"),
    });
    let daemon = start(&of(&web, "every = \"1s\""));
    let line = daemon.wait_for_message(": failed: ");
    assert_eq!((&line["level"], &line["mirror"]), (&json!("WARN"), &json!("pictures")), "{line}");
    assert!(line["error"].as_str().unwrap().contains("404"), "{line}");
    assert!(!line["next"].is_null(), "{line}");
    nth_run(&daemon, 0);
    assert_eq!(content(&daemon, "a.txt"), b"alpha");
    let failed = "handout_mirror_runs_total{mirror=\"pictures\",outcome=\"failed\"}";
    assert_eq!(metric(daemon.tcp("metrics"), failed), 1.0);
}

#[test]
fn limits_the_size_of_files_their_total_and_their_number() {
    let web = || {
        Web::lists(
            |_| list(&["a", "b", "c", "d"]),
            |request| Reply::ok(vec![7; if request.target == "/c" { 3000 } else { 1000 }]),
        )
    };
    let each = web();
    let daemon = start(&of(&each, "max-file = \"2kB\""));
    assert_eq!(counts(&nth_run(&daemon, 0)), [3, 0, 0, 1, 0]);
    failure(&daemon, "max-file");
    let all = web();
    let daemon = start(&of(&all, "max-total = \"2500B\"\njobs = 1"));
    let line = nth_run(&daemon, 0);
    assert_eq!(counts(&line), [2, 0, 0, 2, 0], "{line}");
    failure(&daemon, "max-total");
    let number = web();
    let daemon = start(&of(&number, "max-files = 3"));
    let line = daemon.wait_for_message(": failed: ");
    assert!(line["error"].as_str().unwrap().contains("max-files"), "{line}");
    assert!(names(&daemon).is_empty());
}

#[test]
fn replaced_files_do_not_count_twice_for_max_total() {
    let web = Web::lists(
        |_| list(&["a", "b"]),
        |request| Reply::ok(vec![7; 1000]).with("ETag", &format!("\"{}\"", request.turn)),
    );
    let daemon = start(&of(&web, "max-total = \"2500B\"\nevery = \"1s\""));
    for number in 0..3 {
        let line = nth_run(&daemon, number);
        assert_eq!(counts(&line)[3], 0, "{line}");
    }
}

#[test]
fn endless_files_end_at_max_file_and_max_duration() {
    let endless = || Reply::ok("").unannounced().then_repeat(vec![7; 1 << 16]);
    let web = Web::lists(|_| list(&["a"]), move |_| endless());
    let daemon = start(&of(&web, "max-file = \"1MB\""));
    nth_run(&daemon, 0);
    failure(&daemon, "max-file");
    // It trickles, so that it is never silent.
    let trickle = Server::answers(|mut stream| {
        use std::io::Write;
        let mut head = [0; 16];
        let _ = stream.read(&mut head);
        let mut alive = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").is_ok();
        while alive {
            std::thread::park_timeout(Duration::from_millis(20));
            alive = stream.write_all(b"x").is_ok();
        }
    });
    let urls = format!("urls = [\"http://{}/a\"]\nmax-duration = \"500ms\"", trickle.address);
    let daemon = start(&config(&(urls + "\nretries = 5")));
    nth_run(&daemon, 0);
    failure(&daemon, "max-duration");
}

#[test]
fn refuses_entries_on_other_hosts() {
    let other = Web::on(Ipv4Addr::new(127, 0, 0, 2).into(), |_| Reply::ok("other"));
    let forbidden = Web::forbidden(Ipv4Addr::new(127, 0, 0, 3).into());
    let urls =
        [other.url("a.txt"), forbidden.url("b.txt"), "http://handout.invalid/c.txt".to_owned()];
    let listing = list(&[&urls[0], &urls[1], &urls[2], "d.txt", "e.txt"]);
    let to = forbidden.url("d.txt");
    let web = Web::lists(
        move |_| listing.clone(),
        move |request| match request.target.as_str() {
            "/d.txt" => Reply::redirect(&to),
            _ => Reply::ok("own"),
        },
    );
    let daemon = start(&of(&web, "hosts = [\"127.0.0.2\"]\nretries = 0"));
    let line = nth_run(&daemon, 0);
    assert_eq!(counts(&line), [2, 0, 0, 3, 0], "{line}");
    assert_eq!(names(&daemon), ["a.txt", "e.txt"]);
    failure(&daemon, "127.0.0.3");
    // Nobody looks it up.
    let line = failure(&daemon, "handout.invalid");
    assert!(line["error"].as_str().unwrap().contains("hosts"), "{line}");
    assert!(forbidden.requests().is_empty());
    // Not even the first without being named.
    let daemon = start(&of(&web, "retries = 0"));
    assert_eq!(counts(&nth_run(&daemon, 0)), [1, 0, 0, 4, 0]);
    assert_eq!(other.requests().len(), 1);
}

#[test]
fn hosts_of_a_pattern_must_have_public_addresses() {
    let other = Web::forbidden(Ipv4Addr::LOCALHOST.into());
    let port = other.port();
    let listing = list(&[
        &format!("http://cdn.example.org:{port}/a.txt"),
        &format!("http://named.example.org:{port}/b.txt"),
        &format!("http://evilexample.org:{port}/c.txt"),
    ]);
    let web = Web::lists(move |_| listing.clone(), |_| Reply::ok("own"));
    let folder = folder();
    let path = folder.path().join("handout.toml");
    let hosts = "127.0.0.1 cdn.example.org named.example.org evilexample.org\n";
    fs::write(folder.path().join("hosts"), hosts).unwrap();
    let keys = "hosts = [\"*.example.org\", \"named.example.org\"]\nretries = 0\nevery = \"1h\"";
    fs::write(&path, format!("[log]\nformat = \"json\"\n{}", of(&web, keys))).unwrap();
    // It ends when its log has the line of the run.
    let script = "mount --bind \"$0/hosts\" /etc/hosts || exit 99
        timeout 60 \"$1\" serve --config \"$0/handout.toml\" 2>\"$0/log\" & child=$!
        until grep -q ': mirrored: ' \"$0/log\" || ! kill -0 $child; do read -t 0.05 _ <> \"$0/wait\"; done
        kill $child
        wait $child
        cat \"$0/log\"";
    let made = run(Command::new("mkfifo").arg(folder.path().join("wait")));
    assert!(made.status.success());
    let bash = script.replace('\'', "'\\''");
    let script = format!("exec bash -c '{bash}' \"$0\" \"$1\"");
    let arguments = [folder.path().as_os_str(), PROGRAM.as_ref()];
    let Some(output) = with_mounts(&script, &arguments) else { return };
    let log = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> =
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let line = lines.iter().find(|line| says(line, ": mirrored: "));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    assert_eq!(counts(line), [1, 0, 0, 2, 0], "{log}");
    let failed: Vec<_> = lines.iter().filter(|line| says(line, ": not mirrored: ")).collect();
    let of = |host: &str| failed.iter().find(|line| line.to_string().contains(host)).unwrap();
    assert!(of("cdn.example.org")["error"].as_str().unwrap().contains("127.0.0.1"), "{log}");
    of("evilexample.org");
    assert_eq!(other.requests().len(), 1);
    assert_eq!(other.requests()[0].target, "/b.txt");
}

#[test]
fn sends_the_token_only_to_its_origin_and_never_logs_it() {
    let other = Web::answers(|_| Reply::ok("other"));
    let (elsewhere, to) = (other.url("a.txt"), other.url("b.txt"));
    let web = Web::lists(
        move |_| list(&[&elsewhere, "b.txt", "c.txt", "d.txt"]),
        move |request| match request.target.as_str() {
            "/b.txt" => Reply::redirect(&to),
            "/d.txt" => Reply::status(401),
            _ => Reply::ok("own"),
        },
    );
    let folder = folder();
    // With the end of the line that editors put there.
    fs::write(folder.path().join("token"), "geheim\n").unwrap();
    let keys =
        "bearer-token-file = \"token\"\nheader = { X-Key = \"geheim2\", Accept = \"image/*\" }";
    let config = format!("[log]\nformat = \"json\"\nlevel = \"trace\"\n{}", of(&web, keys));
    let daemon = Daemon::start_in(folder, &config, |_| {});
    assert_eq!(counts(&nth_run(&daemon, 0)), [3, 0, 0, 1, 0]);
    for request in web.requests() {
        assert_eq!(request.header("authorization"), Some("Bearer geheim"), "{request:?}");
        assert_eq!(request.header("x-key"), Some("geheim2"), "{request:?}");
    }
    assert_eq!(other.requests().len(), 2);
    for request in other.requests() {
        assert!(!request.text().contains("geheim"), "{request:?}");
    }
    for line in daemon.lines() {
        assert!(!line.to_string().contains("geheim"), "{line}");
    }
    for name in ["files/.handout-mirror.json", "files/b.txt"] {
        assert!(!fs::read_to_string(daemon.path(name)).unwrap().contains("geheim"), "{name}");
    }
    assert!(!http_get(daemon.tcp("metrics"), "/metrics").1.contains("geheim"));
}

#[test]
fn names_the_file_of_an_unusable_token() {
    for token in [None, Some(""), Some("a\nb\n"), Some("ä\n")] {
        let folder = folder();
        if let Some(token) = token {
            fs::write(folder.path().join("token"), token).unwrap();
        }
        let web = Web::forbidden(Ipv4Addr::LOCALHOST.into());
        let path = folder.path().join("handout.toml");
        fs::write(&path, of(&web, "bearer-token-file = \"token\"")).unwrap();
        let mut command = Command::new("timeout");
        command.args(["5", PROGRAM, "serve", "--config"]).arg(&path).stdin(Stdio::null());
        let output = run(&mut command);
        let said = String::from_utf8(output.stderr).unwrap();
        // Either the start fails or the mirror logs it; no request is sent without the token.
        assert!(said.contains("token"), "{token:?}: {said}");
        assert!(web.requests().is_empty(), "{token:?}");
    }
}

#[test]
fn retries_and_honours_retry_after() {
    let web = Web::answers(|request| match (request.target.as_str(), request.turn) {
        (_, 0) => Reply::status(429).with("Retry-After", "2"),
        ("/list.json", _) => Reply::json(&list(&["a.txt"])),
        _ => Reply::ok("alpha"),
    });
    let daemon = start(&of(&web, "retries = 1"));
    assert_eq!(counts(&nth_run(&daemon, 0)), [1, 0, 0, 0, 0]);
    for target in ["/list.json", "/a.txt"] {
        let requests = web.requests_for(target);
        assert_eq!(requests.len(), 2, "{target}");
        assert!(requests[1].at - requests[0].at >= Duration::from_secs(2), "{target}");
    }
}

#[test]
fn accepts_compressed_listings_but_not_files() {
    let nginx = Nginx::start_with("gzip on; gzip_types *; gzip_min_length 1;");
    nginx.has("a.txt", &b"alpha".repeat(1000), THEN).lists(&["a.txt"], THEN);
    let daemon = start(&of_nginx(&nginx, ""));
    nth_run(&daemon, 0);
    assert_eq!(content(&daemon, "a.txt"), b"alpha".repeat(1000));
    let requests = nginx.requests_after(0, 2);
    assert_eq!([&requests[0]["encoding"], &requests[1]["encoding"]], ["gzip", ""]);
}

#[test]
fn sends_every_request_to_the_proxy() {
    let proxy = Web::answers(|request| match request.target.as_str() {
        "http://api.invalid/list.json" => Reply::json(&list(&["a.txt"])),
        "http://api.invalid/a.txt" => Reply::ok("by proxy"),
        other => panic!("{other}"),
    });
    let keys = format!(
        "source = \"http://api.invalid/list.json\"\nlist = \"\"\nurl = \"/url\"\nproxy = \"{}\"",
        proxy.url("")
    );
    let daemon = start(&config(&keys));
    assert_eq!(counts(&nth_run(&daemon, 0)), [1, 0, 0, 0, 0]);
    assert_eq!(content(&daemon, "a.txt"), b"by proxy");
}

#[test]
fn refuses_entries_with_harmful_names() {
    let listing = json!([
        {"url": "0", "name": "../x"},
        {"url": "1", "name": "/etc/x"},
        {"url": "2", "name": ".hidden"},
        {"url": "3", "name": "a\u{202e}b"},
        {"url": "4", "name": "a\nb"},
        {"url": "5", "name": ".handout-mirror.json"},
        {"url": "6", "name": "good.txt"},
        {"url": "7", "name": "twice"},
        {"url": "8", "name": "twice"},
    ]);
    let web = Web::lists(move |_| listing.clone(), |request| Reply::ok(request.target.clone()));
    let daemon = start(&of(&web, "filename = \"/name\""));
    let line = nth_run(&daemon, 0);
    let [new, _, _, failed, _] = counts(&line);
    // Of two with one name the first is here, or none.
    assert_eq!(new + failed, 9, "{line}");
    assert_eq!(content(&daemon, "good.txt"), b"/6");
    let names: Vec<_> = names(&daemon).into_iter().filter(|name| name != "twice").collect();
    assert_eq!(names, ["good.txt"]);
    assert!(!daemon.path("x").exists());
    if new == 2 {
        assert_eq!(content(&daemon, "twice"), b"/7");
    }
    for line in daemon.lines() {
        let said = format!("{} {} {}", line["error"], line["name"], line["url"]);
        assert!(!said.contains(['\u{202e}', '\n']), "{line}");
    }
}

#[test]
fn a_broken_mirror_does_not_affect_others_or_services() {
    let stalled = Server::stalls_after("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf");
    let good = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let config = of(&good, "every = \"1s\"")
        + &format!(
            "[mirror.broken]\nurls = [\"http://{}/x\"]\ninto = \"other\"\ntimeout = \"1h\"\nmax-duration = \"1h\"\n\
             [mirror.nobody]\nurls = [\"http://{}/x\"]\ninto = \"third\"\nretries = 0\nevery = \"1s\"\n\
             [time.clock]\nlisten = [\"127.0.0.1:0\"]\n",
            stalled.address,
            nobody()
        );
    let folder = folder();
    for name in ["other", "third"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    let mut daemon = Daemon::start_in(folder, &config, |_| {});
    for number in 0..2 {
        let line = run_of(&daemon, "pictures", number);
        assert_eq!(counts(&line)[3], 0, "{line}");
        let line = run_of(&daemon, "nobody", number);
        assert_eq!(counts(&line), [0, 0, 0, 1, 0], "{line}");
    }
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    assert_eq!(served(&daemon, "a.txt")["sha256"], hex(b"alpha"));
    assert!(http_get(daemon.tcp("metrics"), "/healthz").0.contains(" 200 "));
    assert!(daemon.stop().success());
}

#[test]
fn the_daemon_is_ready_before_the_first_sync_ends() {
    // Nobody answers before it is ready.
    let stalled = Server::stalls_after("");
    let daemon = start(&config(&format!("urls = [\"http://{}/a\"]", stalled.address)));
    assert!(http_get(daemon.tcp("metrics"), "/healthz").0.contains(" 200 "));
}

#[test]
fn a_reload_starts_changes_ends_and_keeps_mirrors() {
    let server = || Web::lists(|_| list(&["a.txt"]), |request| Reply::ok(request.target.clone()));
    let (first, second, third) = (server(), server(), server());
    let mirror = |name: &str, web: &Web, into: &str, more: &str| {
        let source = web.url("list.json");
        format!(
            "[mirror.{name}]\nsource = \"{source}\"\nlist = \"\"\nurl = \"/url\"\ninto = \"{into}\"\n{more}\n"
        )
    };
    let folder = folder();
    for name in ["one", "two", "three"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    let clock = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n[metrics]\nlisten = [\"127.0.0.1:0\"]\n";
    let one = mirror("one", &first, "one", "every = \"1h\"");
    let two = |every: &str| mirror("two", &second, "two", &format!("every = \"{every}\""));
    let daemon = Daemon::start_in(folder, &format!("{clock}{one}{}", two("1h")), |_| {});
    run_of(&daemon, "one", 0);
    run_of(&daemon, "two", 0);
    // One mirror is kept, one changes, one is new.
    let three = mirror("three", &third, "three", "every = \"1s\"");
    let line = daemon.reload(&format!("{clock}{one}{}{three}", two("1s")));
    assert!(says(&line, "reloaded: "), "{line}");
    run_of(&daemon, "two", 2);
    run_of(&daemon, "three", 1);
    assert_eq!(first.requests_for("/list.json").len(), 1, "it did not change, and goes on");
    // One goes.
    daemon.reload(&format!("{clock}{one}{}", two("1s")));
    let told = |text: &str| text.contains("mirror=\"three\"");
    let asked = third.requests().len();
    let before = second.requests_for("/list.json").len();
    eventually("two more runs of another", || {
        second.requests_for("/list.json").len() >= before + 3
    });
    assert!(third.requests().len() <= asked + 1, "it is asked no more");
    assert!(!told(&http_get(daemon.tcp("metrics"), "/metrics").1));
    assert!(daemon.path("three/a.txt").exists(), "its files stay");
    // None is left.
    daemon.reload(clock);
    assert_eq!(first.requests_for("/list.json").len(), 1);
    // And again.
    daemon.reload(&format!("{clock}{one}"));
    run_of(&daemon, "one", 1);
}

#[test]
fn a_reload_with_an_invalid_mirror_changes_nothing() {
    let web = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let good = of(&web, "every = \"1s\"");
    let daemon = start(&good);
    nth_run(&daemon, 0);
    let line = daemon.reload(&good.replace("every = \"1s\"", "every = \"soon\""));
    assert!(says(&line, "reload failed"), "{line}");
    let line = daemon.reload(&good.replace("every = \"1s\"", "ca-file = \"none.pem\""));
    assert!(says(&line, "reload failed"), "{line}");
    nth_run(&daemon, 2);
}

#[test]
fn a_mirror_changed_during_a_sync_restarts() {
    let stalled =
        Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha").cut_after(2).then_stall());
    let good = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("ALPHA"));
    let daemon = start(&of(&stalled, "timeout = \"1h\"\nmax-duration = \"2h\""));
    eventually("the stall", || stalled.requests_for("/a.txt").len() == 1);
    daemon.reload(&of(&good, "every = \"1h\""));
    nth_run(&daemon, 0);
    assert_eq!(content(&daemon, "a.txt"), b"ALPHA");
}

#[test]
fn stops_quickly_during_a_sync_without_half_files() {
    let web = Web::lists(
        |_| list(&["good.bin", "half.bin"]),
        |request| match request.target.as_str() {
            "/good.bin" => Reply::ok(sample(51, 500_000)),
            _ => Reply::ok(sample(52, 1_000_000))
                .with("ETag", "\"x\"")
                .cut_after(500_000)
                .then_stall(),
        },
    );
    for signal in [Signal::TERM, Signal::INT] {
        let config = of(&web, "timeout = \"1h\"\nmax-duration = \"2h\"");
        let mut daemon = start(&format!("[daemon]\ngrace = \"30s\"\n{config}"));
        eventually("half a file", || {
            let entries = fs::read_dir(daemon.path("files")).unwrap().flatten();
            let sizes: Vec<_> = entries.filter_map(|it| Some(it.metadata().ok()?.len())).collect();
            daemon.path("files/good.bin").exists() && sizes.iter().any(|size| *size > 400_000)
        });
        let start = Instant::now();
        daemon.signal(signal);
        assert!(daemon.wait().success());
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
        assert_eq!(names(&daemon), ["good.bin"]);
        assert!(content(&daemon, "good.bin") == sample(51, 500_000));
    }
}

/// A server that sends half of a large file quickly, and then hardly anything.
fn slow() -> (Nginx, Vec<u8>) {
    let nginx = Nginx::start_with("location /large.bin { limit_rate_after 2m; limit_rate 20k; }");
    let content = sample(53, 3_000_000);
    nginx.has("large.bin", &content, THEN).lists(&["large.bin"], THEN);
    (nginx, content)
}

#[test]
fn resumes_after_a_kill() {
    let (nginx, whole) = slow();
    let config = of_nginx(&nginx, "every = \"1h\"");
    let mut daemon = start(&config);
    eventually("a file that grows", || {
        let entries = fs::read_dir(daemon.path("files")).unwrap().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).any(|file| file.len() > 1_000_000)
    });
    daemon.child.kill().unwrap();
    daemon.wait();
    assert!(names(&daemon).is_empty());
    nginx.requests_after(0, 2);
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let daemon = Daemon::start_in(folder, &config, |_| {});
    let line = nth_run(&daemon, 0);
    assert_eq!(counts(&line), [1, 0, 0, 0, 0], "{line}");
    assert!(content(&daemon, "large.bin") == whole);
    assert!(leftovers(&daemon).is_empty(), "{:?}", leftovers(&daemon));
    let request = &nginx.requests_after(2, 2)[1];
    assert_eq!((&request["path"], &request["status"]), (&json!("/large.bin"), &json!(206)));
    assert!(request["sent"].as_u64().unwrap() <= 2_000_000, "{request}");
}

#[test]
fn removes_partial_files_that_are_no_longer_listed() {
    let (nginx, _) = slow();
    let config = of_nginx(&nginx, "every = \"1h\"");
    let mut daemon = start(&config);
    eventually("a file that grows", || {
        let entries = fs::read_dir(daemon.path("files")).unwrap().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).any(|file| file.len() > 1_000_000)
    });
    daemon.child.kill().unwrap();
    daemon.wait();
    assert!(!leftovers(&daemon).is_empty());
    nginx.has("small.txt", b"small", THEN).lists(&["small.txt"], THEN + 1);
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let daemon = Daemon::start_in(folder, &config, |_| {});
    nth_run(&daemon, 0);
    assert_eq!(names(&daemon), ["small.txt"]);
    assert!(leftovers(&daemon).is_empty(), "{:?}", leftovers(&daemon));
}

#[test]
fn follows_a_link_to_the_folder() {
    let web = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("real")).unwrap();
    symlink("real", folder.path().join("files")).unwrap();
    let daemon = Daemon::start_in(folder, &of(&web, ""), |_| {});
    nth_run(&daemon, 0);
    assert_eq!(fs::read(daemon.path("real/a.txt")).unwrap(), b"alpha");
    assert!(daemon.path("files").is_symlink());
}

#[test]
fn does_not_follow_links_in_the_folder() {
    let web = Web::lists(|_| list(&["a.txt", "b.txt"]), |_| Reply::ok("alpha"));
    let folder = folder();
    fs::write(folder.path().join("precious"), "mine").unwrap();
    symlink("../precious", folder.path().join("files/a.txt")).unwrap();
    // A link in place of the manifest is not followed either.
    symlink("../precious", folder.path().join("files/.handout-mirror.json")).unwrap();
    let daemon = Daemon::start_in(folder, &of(&web, ""), |_| {});
    nth_run(&daemon, 0);
    assert_eq!(fs::read(daemon.path("precious")).unwrap(), b"mine");
    assert_eq!(content(&daemon, "b.txt"), b"alpha");
}

#[test]
fn recovers_when_the_folder_becomes_writable() {
    let web = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let folder = folder();
    let files = folder.path().join("files");
    let config =
        of(&web, "every = \"1s\"\nretries = 0").replace("path = \"files\"", "path = \".\"");
    let daemon = Daemon::start_in(folder, &config, |_| {});
    nth_run(&daemon, 0);
    // It is gone, and something else has its name.
    fs::rename(&files, daemon.path("elsewhere")).unwrap();
    fs::write(&files, "no folder").unwrap();
    daemon.wait_for("the failure", |line| {
        line["level"] == "WARN"
            && line["mirror"] == "pictures"
            && line.to_string().contains("files")
    });
    assert_eq!(fs::read(&files).unwrap(), b"no folder");
    fs::remove_file(&files).unwrap();
    fs::rename(daemon.path("elsewhere"), &files).unwrap();
    let runs = || runs_of(&daemon, "pictures").len();
    let before = runs();
    eventually("a run again", || runs() > before + 1);
    assert_eq!(content(&daemon, "a.txt"), b"alpha");
}

#[test]
fn a_full_disk_fails_the_file_and_keeps_the_old_one() {
    let web = Web::lists(
        |_| list(&["a.txt", "huge.bin"]),
        |request| match request.target.as_str() {
            "/a.txt" => Reply::ok("alpha"),
            _ => Reply::ok(sample(54, 3_000_000)),
        },
    );
    let folder = folder();
    let config = of(&web, "retries = 0\njobs = 1\nevery = \"1h\"");
    let text = format!("[log]\nformat = \"json\"\n{config}");
    fs::write(folder.path().join("handout.toml"), text).unwrap();
    let script = "mount -t tmpfs -o size=1m none \"$0/files\" || exit 99
        echo old >\"$0/files/huge.bin\"
        timeout 60 \"$1\" serve --config \"$0/handout.toml\" 2>\"$0/log\" & child=$!
        until grep -q ': mirrored: ' \"$0/log\" || ! kill -0 $child; do read -t 0.05 _ <> \"$0/wait\"; done
        kill $child
        wait $child
        grep ': mirrored: ' \"$0/log\"
        grep ': not mirrored: ' \"$0/log\"
        cat \"$0/files/huge.bin\"
        ls \"$0/files\"";
    assert!(run(Command::new("mkfifo").arg(folder.path().join("wait"))).status.success());
    let script = format!("exec bash -c '{}' \"$0\" \"$1\"", script.replace('\'', "'\\''"));
    let arguments = [folder.path().as_os_str(), PROGRAM.as_ref()];
    let Some(output) = with_mounts(&script, &arguments) else { return };
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines();
    let line: Value = serde_json::from_str(lines.next().unwrap_or_default()).expect(&text);
    assert_eq!(counts(&line), [1, 0, 0, 1, 0], "{text}");
    let line: Value = serde_json::from_str(lines.next().unwrap()).expect(&text);
    assert!(line["error"].as_str().unwrap().contains("No space left"), "{text}");
    assert_eq!(lines.collect::<Vec<_>>(), ["old", "a.txt", "huge.bin"]);
}

#[test]
fn limits_parallel_downloads() {
    let (now, most) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let seen = (Arc::clone(&now), Arc::clone(&most));
    let web = Web::lists(
        |_| (0..12).map(|number| json!({"url": format!("{number}")})).collect(),
        move |_| {
            let (now, most) = &seen;
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Nobody is answered before three are there.
            comes_to_hold(|| most.load(Ordering::SeqCst) >= 3);
            now.fetch_sub(1, Ordering::SeqCst);
            Reply::ok("x")
        },
    );
    let daemon = start(&of(&web, "jobs = 3"));
    nth_run(&daemon, 0);
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[test]
fn services_answer_while_a_mirror_is_busy() {
    // Files that keep it busy with digests and TLS, for as long as the test likes.
    let nginx = Nginx::start();
    let large = sample(55, 20_000_000);
    let over = Arc::<AtomicBool>::default();
    nginx.has("a.bin", &large, THEN).has("b.bin", &large, THEN).lists(&["a.bin", "b.bin"], THEN);
    let config = of_nginx(&nginx, "every = \"1h\"") + "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
    let daemon = start(&config);
    let mut longest = Duration::ZERO;
    while !over.load(Ordering::SeqCst) {
        let begun = Instant::now();
        assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
        longest = longest.max(begun.elapsed());
        let done = daemon.lines().iter().any(|line| says(line, ": mirrored: "));
        over.store(done, Ordering::SeqCst);
    }
    // A debug build digests such a file for much longer than that.
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    assert_eq!(counts(&nth_run(&daemon, 0)), [2, 0, 0, 0, 0]);
}

#[test]
fn refuses_two_mirrors_of_one_folder() {
    let mirror = |name: &str, into: &str| {
        format!("[mirror.{name}]\nurls = [\"https://example.org/{name}\"]\ninto = \"{into}\"\n")
    };
    let check = |text: &str| {
        let folder = folder();
        let path = folder.path().join("handout.toml");
        fs::write(&path, text).unwrap();
        run(program().args(["check", "--config"]).arg(path))
    };
    let output = check(&format!("{}{}", mirror("one", "files"), mirror("two", "./files")));
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let output = check(&format!("{}{}", mirror("one", "files"), mirror("two", "other")));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn reports_every_fault_of_a_mirror() {
    let table = "\
[mirror.a]
source = \"ftp://example.org/\"
list = \"newslist\"
url = \"/a~2\"
into = \"\"
every = \"0s\"
jobs = 0
timeout = \"soon\"
retries = -1
max-file = 5
max-total = \"1\"
max-files = 0
delete = \"yes\"
hosts = [\"http://x/\", \"*\", \"x:80\"]
header = { \"X Y\" = \"a\", Z = \"a\\nb\" }
proxy = \"nonsense\"
surprise = 1
[mirror.b]
into = \"files\"
[mirror.c]
source = \"https://example.org/\"
urls = [\"https://example.org/a\"]
url = \"/url\"
into = \"third\"
[mirror.d]
urls = []
into = \"fourth\"
[mirror.e]
urls = [\"https://example.org/a\"]
[mirror.f]
source = \"https://example.org/list\"
into = \"sixth\"
";
    let folder = folder();
    let path = folder.path().join("handout.toml");
    fs::write(&path, table).unwrap();
    let output = run(program().args(["check", "--config"]).arg(path));
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let said = format!(
        "{}{}",
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap()
    );
    for key in [
        "source",
        "list",
        "url",
        "into",
        "every",
        "jobs",
        "timeout",
        "retries",
        "max-file",
        "max-total",
        "max-files",
        "delete",
        "hosts",
        "header",
        "proxy",
        "surprise",
    ] {
        assert!(said.contains(&format!("mirror.a.{key}")), "no {key} in {said}");
    }
    for mirror in ["mirror.b", "mirror.c", "mirror.d", "mirror.e", "mirror.f"] {
        assert!(said.contains(mirror), "no {mirror} in {said}");
    }
}

#[test]
fn a_reload_does_not_interrupt_syncs_of_unchanged_mirrors() {
    let good = Arc::<AtomicBool>::default();
    let released = Arc::clone(&good);
    let web = Web::lists(
        |_| list(&["a.txt"]),
        move |_| {
            comes_to_hold(|| released.load(Ordering::SeqCst));
            Reply::ok("alpha")
        },
    );
    let config = of(&web, "timeout = \"1h\"\nmax-duration = \"2h\"\nevery = \"1h\"");
    let daemon = start(&config);
    eventually("the request", || web.requests_for("/a.txt").len() == 1);
    let line = daemon.reload(&(config + "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n"));
    assert!(says(&line, "reloaded: "), "{line}");
    good.store(true, Ordering::SeqCst);
    assert_eq!(counts(&nth_run(&daemon, 0)), [1, 0, 0, 0, 0]);
    assert_eq!(web.requests().len(), 2);
}

#[test]
fn uses_a_replaced_token_after_a_reload() {
    let web = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let folder = folder();
    fs::write(folder.path().join("token"), "one").unwrap();
    let config = of(&web, "bearer-token-file = \"token\"\nevery = \"1s\"");
    let daemon = Daemon::start_in(folder, &config, |_| {});
    nth_run(&daemon, 0);
    crate::common::replace(&daemon.path("token"), b"two");
    daemon.reload(&config);
    eventually("the new token", || {
        web.requests().last().unwrap().header("authorization") == Some("Bearer two")
    });
}

#[test]
fn creates_a_missing_folder() {
    let web = Web::lists(|_| list(&["a.txt"]), |_| Reply::ok("alpha"));
    let config = of(&web, "").replace("into = \"files\"", "into = \"files/new/deep\"");
    let daemon = start(&config);
    nth_run(&daemon, 0);
    assert_eq!(content(&daemon, "new/deep/a.txt"), b"alpha");
    assert_eq!(served(&daemon, "new/deep/a.txt")["sha256"], hex(b"alpha"));
}

#[test]
fn a_download_and_a_mirror_can_share_a_folder() {
    let web = Web::lists(
        |_| list(&["a.bin", "b.bin"]),
        |request| Reply::ok(vec![b'a' + u8::try_from(request.turn % 26).unwrap(); 2_000_000]),
    );
    let daemon = start(&of(&web, "every = \"1s\""));
    let mut command = Command::new("timeout");
    command.args(["60", PROGRAM, "download", "--force", "-o"]).arg(daemon.path("files"));
    command.args(["a.bin", "b.bin"].map(|name| web.url(name))).stdin(Stdio::null());
    for number in 0..3 {
        let output = run(&mut command);
        assert!(output.status.code().is_some_and(|code| code <= 1), "{output:?}");
        nth_run(&daemon, number);
        for name in ["a.bin", "b.bin"] {
            let data = content(&daemon, name);
            assert!(data.len() == 2_000_000 && data.iter().all(|byte| *byte == data[0]), "{name}");
        }
    }
}
