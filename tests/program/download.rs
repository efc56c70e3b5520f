//! `handout download`: saves files over HTTP completely or not at all, and trusts no server.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::{DEADLINE, PROGRAM, eventually, program, run, sample, wait_for_exit};
use crate::servers::{Outcome, Place, Running, bounded, nobody, with_mounts};
use crate::web::{Nginx, Reply, Request, Web, http_date, modified, touch};

/// Maximum resident memory of a client, in bytes. The code of a debug build is larger.
const MOST_MEMORY: u64 = if cfg!(debug_assertions) { 80 << 20 } else { 40 << 20 };

/// A second in the past.
const THEN: u64 = 1_700_000_000;

/// `handout download` in this folder.
fn download(place: &Place, arguments: &[&str]) -> Outcome {
    Outcome::of(run(bounded().arg("download").args(arguments).current_dir(place.path(""))))
}

/// [`download`] without retries, because most failures are permanent.
fn once(place: &Place, arguments: &[&str]) -> Outcome {
    download(place, &[arguments, &["--retries", "0"]].concat())
}

/// [`download`] in the background.
fn begin(place: &Place, arguments: &[&str]) -> Running {
    let mut command = program();
    Running::start(command.arg("download").args(arguments).current_dir(place.path("")))
}

/// Returns the names of the visible files.
fn files(place: &Place) -> Vec<String> {
    let mut names = place.names();
    names.retain(|name| !Path::new(name).file_name().unwrap().as_encoded_bytes().starts_with(b"."));
    names
}

/// Returns the names of hidden files except the manifest.
fn leftovers(place: &Place) -> Vec<String> {
    let mut names = place.names();
    names.retain(|name| {
        let name = Path::new(name).file_name().unwrap().to_str().unwrap();
        name.starts_with('.') && name != ".handout-mirror.json"
    });
    names
}

/// Checks that a download fails with these words and leaves no visible file.
fn is_refused(what: &str, arguments: &[&str], words: &[&str]) {
    let place = Place::new();
    let outcome = once(&place, arguments);
    assert_eq!(outcome.code, Some(1), "{what}: {outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{what}: no {word:?} in {}", outcome.stderr);
    }
    assert!(files(&place).is_empty(), "{what}: {:?}", place.names());
    is_printable(&outcome.stderr);
}

/// Checks that the text contains no control or invisible characters.
fn is_printable(text: &str) {
    let controls = |c: char| c.is_control() && c != '\n' || ('\u{200b}'..='\u{202e}').contains(&c);
    assert!(!text.contains(controls), "{text:?}");
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Accepts a connection, and answers one request with `reply` before it calls `then`.
fn answer_once(listener: &TcpListener, reply: &str, then: impl FnOnce(&mut BufReader<TcpStream>)) {
    let (stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(stream);
    read_head(&mut reader);
    reader.get_mut().write_all(reply.as_bytes()).unwrap();
    then(&mut reader);
}

fn read_head(reader: &mut BufReader<TcpStream>) {
    let mut line = String::new();
    while reader.read_line(&mut line).unwrap() > 2 {
        line.clear();
    }
}

#[test]
fn repeats_requests_on_reused_connections_that_the_server_closes() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/a", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let redirect = "HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n";
        // The request for /b arrives before the connection is closed.
        answer_once(&listener, redirect, read_head);
        let reply = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nalpha";
        answer_once(&listener, reply, |_| ());
    });
    let place = Place::new();
    once(&place, &[&url]).succeeded();
    server.join().unwrap();
    assert_eq!(fs::read(place.path("a")).unwrap(), b"alpha");
}

#[test]
fn names_files_after_their_url_and_sets_the_servers_time() {
    let nginx = Nginx::start();
    let picture = sample(31, 186_068);
    fs::create_dir(nginx.path("sub")).unwrap();
    nginx.has("sub/guido.jpg", &picture, THEN).has("a b.txt", b"alpha", THEN + 1);
    let place = Place::new();
    let ca = nginx.authority();
    let urls = [nginx.url("sub/guido.jpg?size=large#top"), nginx.url("a%20b.txt")];
    let outcome = download(&place, &[&urls[0], &urls[1], "--ca-file", &ca]);
    outcome.succeeded();
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    assert!(outcome.stderr.contains("guido.jpg: "), "{outcome:?}");
    assert!(outcome.stderr.contains("a b.txt: "), "{outcome:?}");
    assert!(outcome.stderr.contains("2 new, 0 changed, 0 unchanged, 0 failed"), "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 3, "{outcome:?}");
    assert_eq!(files(&place), ["a b.txt", "guido.jpg"]);
    assert!(leftovers(&place).is_empty(), "{:?}", place.names());
    assert!(place.read("guido.jpg") == picture);
    assert_eq!(modified(&place.path("guido.jpg")), THEN);
    assert_eq!(modified(&place.path("a b.txt")), THEN + 1);
}

#[test]
fn saves_into_the_folder_of_output() {
    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    fs::create_dir(place.path("into")).unwrap();
    download(&place, &[&web.url("a.txt"), "-o", "into"]).succeeded();
    assert_eq!(files(&place), ["into", "into/a.txt"]);
}

#[test]
fn saves_files_of_any_length_and_framing() {
    let large = sample(32, 3_000_000);
    let content = large.clone();
    let web = Web::answers(move |request| match request.target.as_str() {
        "/empty" => Reply::ok(""),
        "/unannounced" => Reply::ok("until the end").unannounced(),
        "/chunked" => {
            Reply::ok("3\r\nabc\r\n0\r\n\r\n").unannounced().with("Transfer-Encoding", "chunked")
        }
        _ => Reply::ok(content.clone()),
    });
    let place = Place::new();
    let urls = ["empty", "unannounced", "chunked", "large"].map(|name| web.url(name));
    download(&place, &urls.each_ref().map(String::as_str)).succeeded();
    assert_eq!(place.read("empty"), b"");
    assert_eq!(place.read("unannounced"), b"until the end");
    assert_eq!(place.read("chunked"), b"abc");
    assert!(place.read("large") == large);
    for request in web.requests() {
        assert_eq!(request.header("accept-encoding"), Some("identity"), "{request:?}");
        assert!(request.header("user-agent").is_some_and(|agent| agent.starts_with("handout/")));
    }
}

#[test]
fn refuses_untrusted_certificates() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN);
    is_refused("no authority", &[&nginx.url("a.txt")], &["a.txt", "certificate"]);
    // Another authority of the same name, and one that is vouched for, under another address.
    let other = Nginx::start();
    is_refused(
        "a stranger",
        &[&nginx.url("a.txt"), "--ca-file", &other.authority()],
        &["certificate"],
    );
    let elsewhere = Nginx::start_on(Ipv4Addr::new(127, 0, 0, 2), "");
    elsewhere.has("a.txt", b"alpha", THEN);
    let arguments = [&elsewhere.url("a.txt"), "--ca-file", &elsewhere.authority()];
    is_refused("another name", &arguments, &["certificate"]);
    assert!(nginx.requests().is_empty());
}

#[test]
fn an_unreadable_ca_file_is_named_before_any_request() {
    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    fs::write(place.path("empty.pem"), "").unwrap();
    fs::write(
        place.path("wrong.pem"),
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    for name in ["none.pem", "empty.pem", "wrong.pem"] {
        download(&place, &[&web.url("a.txt"), "--ca-file", name]).failed_with(&[name]);
    }
    assert!(web.requests().is_empty());
}

#[test]
fn saves_every_file_of_a_listing() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN).has("b.txt", b"beta", THEN).has("c.txt", b"gamma", THEN);
    let list = json!({"count": 3, "news/list": [
        {"pic": {"url": "a.txt"}, "title": "first"},
        {"pic": {"url": "/b.txt"}, "title": "汇总 数据.txt", "digest": hex(b"beta")},
        {"pic": {"url": nginx.url("c.txt")}, "digest": hex(b"gamma").to_uppercase()},
    ]});
    nginx.has("list.json", list.to_string().as_bytes(), THEN);
    let place = Place::new();
    let (url, ca) = (nginx.url("list.json"), nginx.authority());
    let listing = [&url, "--ca-file", &ca, "--list", "/news~1list", "--url", "/pic/url"];
    let outcome = download(&place, &listing);
    assert!(outcome.succeeded().stderr.contains("3 new, 0 changed, 0 unchanged, 0 failed"));
    assert_eq!(files(&place), ["a.txt", "b.txt", "c.txt"]);
    let place = Place::new();
    let more = ["--filename", "/title", "--sha256", "/digest"];
    let outcome = download(&place, &[&listing[..], &more].concat());
    // Without --filename, files are named after their URL; with --sha256, an entry needs a digest.
    assert_eq!(place.read("汇总 数据.txt"), b"beta", "{outcome:?}");
}

#[test]
fn accepts_compressed_listings_that_are_arrays() {
    let nginx = Nginx::start_with("gzip on; gzip_types application/json; gzip_min_length 1;");
    nginx.has("a.txt", b"alpha", THEN).lists(&["a.txt"], THEN);
    let place = Place::new();
    let (url, ca) = (nginx.url("list.json"), nginx.authority());
    download(&place, &[&url, "--ca-file", &ca, "--list", "", "--url", "/url"]).succeeded();
    assert_eq!(place.read("a.txt"), b"alpha");
    let requests = nginx.requests_after(0, 2);
    assert_eq!(
        (&requests[0]["path"], &requests[0]["encoding"]),
        (&json!("/list.json"), &json!("gzip"))
    );
    assert_eq!((&requests[1]["path"], &requests[1]["encoding"]), (&json!("/a.txt"), &json!("")));
}

#[test]
fn limits_parallel_downloads() {
    #[derive(Default)]
    struct Crowd {
        now: usize,
        most: usize,
    }
    let crowd = Arc::new((Mutex::new(Crowd::default()), Condvar::new()));
    let seen = Arc::clone(&crowd);
    let web = Web::lists(
        |_| (0..12).map(|number| json!({"url": format!("{number}.txt")})).collect(),
        move |_| {
            let (crowd, changed) = &*seen;
            let mut crowd = crowd.lock().unwrap();
            crowd.now += 1;
            crowd.most = crowd.most.max(crowd.now);
            changed.notify_all();
            // Nobody is answered before three are there.
            let waited = changed.wait_timeout_while(crowd, DEADLINE, |crowd| crowd.most < 3);
            waited.unwrap().0.now -= 1;
            Reply::ok("x")
        },
    );
    let place = Place::new();
    download(&place, &[&web.url("list.json"), "--list", "", "--url", "/url", "--jobs", "3"])
        .succeeded();
    assert_eq!(crowd.0.lock().unwrap().most, 3);
    assert_eq!(files(&place).len(), 12);
}

#[test]
fn replaces_existing_files_only_with_force() {
    let web = Web::always(Reply::ok("new"));
    let place = Place::new();
    fs::write(place.path("a.txt"), "old").unwrap();
    let url = web.url("a.txt");
    download(&place, &[&url]).failed_with(&["a.txt", "--force", "1 failed"]);
    assert_eq!(place.read("a.txt"), b"old");
    let outcome = download(&place, &[&url, "--force"]);
    assert!(outcome.succeeded().stderr.contains("0 new, 1 changed"), "{outcome:?}");
    assert_eq!(place.read("a.txt"), b"new");
    // Not asked, as it cannot be saved.
    assert_eq!(web.requests().len(), 1);
}

#[test]
fn does_not_follow_links_in_place_of_files() {
    let web = Web::always(Reply::ok("new"));
    let place = Place::new();
    fs::write(place.path("target"), "old").unwrap();
    fs::create_dir(place.path("into")).unwrap();
    symlink("../target", place.path("into/a.txt")).unwrap();
    symlink("../nowhere", place.path("into/b.txt")).unwrap();
    let urls = [web.url("a.txt"), web.url("b.txt")];
    for arguments in [&[][..], &["--update"], &["--force"]] {
        let arguments = [&[urls[0].as_str(), &urls[1], "-o", "into"], arguments].concat();
        download(&place, &arguments).failed_with(&["a.txt: ", "b.txt: ", "2 failed"]);
        assert_eq!(place.read("target"), b"old");
        assert!(!place.path("nowhere").exists());
        assert!(place.path("into/a.txt").is_symlink());
    }
}

#[test]
fn update_replaces_only_what_changed() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN).has("b.txt", b"beta", THEN);
    let place = Place::new();
    let (urls, ca) = ([nginx.url("a.txt"), nginx.url("b.txt")], nginx.authority());
    let arguments = [&urls[0], &urls[1], "--ca-file", &ca, "--update"];
    let outcome = download(&place, &arguments);
    assert!(outcome.succeeded().stderr.contains("2 new, 0 changed, 0 unchanged"), "{outcome:?}");
    nginx.requests_after(0, 2);
    nginx.has("b.txt", b"BETA", THEN + 5);
    let outcome = download(&place, &arguments);
    assert!(outcome.succeeded().stderr.contains("0 new, 1 changed, 1 unchanged"), "{outcome:?}");
    assert!(outcome.stderr.contains("a.txt: ") && outcome.stderr.contains("unchanged\n"));
    assert_eq!((place.read("a.txt"), place.read("b.txt")), (b"alpha".to_vec(), b"BETA".to_vec()));
    assert_eq!(modified(&place.path("b.txt")), THEN + 5);
    for request in nginx.requests_after(2, 2) {
        let status = if request["path"] == "/a.txt" { 304 } else { 200 };
        assert_eq!(request["status"], status, "{request}");
    }
}

#[test]
fn update_sends_the_files_time_without_a_manifest() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN);
    let place = Place::new();
    fs::write(place.path("a.txt"), b"alpha").unwrap();
    touch(&place.path("a.txt"), THEN);
    let (url, ca) = (nginx.url("a.txt"), nginx.authority());
    let outcome = download(&place, &[&url, "--ca-file", &ca, "--update"]);
    assert!(outcome.succeeded().stderr.contains("0 new, 0 changed, 1 unchanged"), "{outcome:?}");
    assert_eq!(nginx.requests_after(0, 1)[0]["status"], 304);
}

#[test]
fn update_transfers_files_that_were_changed_locally() {
    let nginx = Nginx::start();
    nginx.has("a.txt", b"alpha", THEN);
    let place = Place::new();
    let (url, ca) = (nginx.url("a.txt"), nginx.authority());
    download(&place, &[&url, "--ca-file", &ca, "--update"]).succeeded();
    for damage in ["al", "", "ALPHA"] {
        // Cut, emptied, and changed to the same length, all later than the server's.
        fs::write(place.path("a.txt"), damage).unwrap();
        download(&place, &[&url, "--ca-file", &ca, "--update"]).succeeded();
        assert_eq!(place.read("a.txt"), b"alpha", "{damage:?}");
    }
}

#[test]
fn a_dry_run_lists_files_and_writes_nothing() {
    let web = Web::lists(|_| json!([{"url": "a.txt"}, {"url": "b.txt"}]), |_| Reply::ok("x"));
    let place = Place::new();
    let url = web.url("list.json");
    let outcome = download(&place, &[&url, "--list", "", "--url", "/url", "--dry-run"]);
    outcome.succeeded();
    let said = format!("{}{}", outcome.text(), outcome.stderr);
    assert!(said.contains("a.txt") && said.contains("b.txt"), "{outcome:?}");
    assert!(place.is_empty(), "{:?}", place.names());
    assert!(web.requests_for("/a.txt").is_empty());
    // What would fail fails.
    fs::write(place.path("a.txt"), "old").unwrap();
    download(&place, &[&web.url("a.txt"), "--dry-run"]).failed_with(&["a.txt", "--force"]);
}

/// A server that redirects `/N` to `/N-1`, and has a file at `/0`.
fn staircase() -> Web {
    Web::answers(|request| match request.target[1..].parse::<usize>() {
        Ok(0) => Reply::ok("ground"),
        Ok(step) => Reply::redirect(&format!("/{}", step - 1)),
        // One that has no way out.
        Err(_) => Reply::redirect(&request.target),
    })
}

#[test]
fn follows_at_most_five_redirects() {
    let web = staircase();
    let place = Place::new();
    download(&place, &[&web.url("5")]).succeeded();
    // It is called as it was asked for.
    assert_eq!(files(&place), ["5"]);
    assert_eq!(place.read("5"), b"ground");
    is_refused("six", &[&web.url("6")], &["redirect"]);
    assert!(web.requests_for("/0").len() == 1);
    is_refused("a loop", &[&web.url("loop")], &["redirect"]);
    assert_eq!(web.requests_for("/loop").len(), 6);
}

#[test]
fn refuses_redirects_without_location() {
    for (what, reply) in [
        ("no place", Reply::status(302)),
        ("no URL", Reply::redirect("http://[")),
        ("nothing", Reply::redirect("")),
        ("another scheme", Reply::redirect("file:///etc/hostname")),
        ("and another", Reply::redirect("ftp://127.0.0.1/a.txt")),
        ("and one more", Reply::redirect("data:,alpha")),
        ("no host", Reply::redirect("http:///a.txt")),
    ] {
        is_refused(what, &[&Web::always(reply).url("a.txt")], &["a.txt"]);
    }
}

#[test]
fn redirects_and_entries_never_reach_local_addresses_in_any_spelling() {
    let elsewhere = Ipv4Addr::new(127, 0, 0, 2);
    let target = Web::forbidden(elsewhere.into());
    let v6 = Web::forbidden("::1".parse().unwrap());
    let here = Web::forbidden(Ipv4Addr::LOCALHOST.into());
    let port = target.port();
    for host in [
        format!("127.0.0.2:{port}"),
        format!("127.2:{port}"),
        format!("2130706434:{port}"),
        format!("0x7f000002:{port}"),
        format!("0x7f.0.0.2:{port}"),
        format!("0177.0.0.2:{port}"),
        format!("017700000002:{port}"),
        format!("127.0.0.2.:{port}"),
        format!("①②⑦.0.0.2:{port}"),
        format!("[::ffff:127.0.0.2]:{port}"),
        format!("[::ffff:7f00:2]:{port}"),
        format!("user:word@127.0.0.2:{port}"),
        format!("[::1]:{}", v6.port()),
        format!("[0:0:0:0:0:0:0:1]:{}", v6.port()),
        format!("localhost:{}", here.port()),
        format!("LOCALHOST.:{}", here.port()),
        format!("0.0.0.0:{}", here.port()),
        format!("[::]:{}", v6.port()),
        // No server listens there, and none may be asked.
        "169.254.169.254".to_owned(),
        "10.0.0.1:1".to_owned(),
        "192.168.0.1:1".to_owned(),
        "172.16.0.1:1".to_owned(),
        "100.64.0.1:1".to_owned(),
        "[fe80::1]:1".to_owned(),
        "[fd00::1]:1".to_owned(),
        "[64:ff9b::7f00:2]:1".to_owned(),
        "[2002:7f00:2::]:1".to_owned(),
    ] {
        let url = format!("http://{host}/a.txt");
        // Whoever asks for longer than this has tried to connect.
        let arguments = |web: &Web, path| [web.url(path), "--timeout".to_owned(), "5s".to_owned()];
        let web = Web::always(Reply::redirect(&url));
        let asked = arguments(&web, "a.txt");
        is_refused(&url, &asked.each_ref().map(String::as_str), &["a.txt: "]);
        assert_eq!(web.requests().len(), 1, "{url}: it is not tried again");
        let listed = url.clone();
        let web = Web::lists(move |_| json!([{ "url": listed }]), |_| Reply::ok("x"));
        let asked = arguments(&web, "list.json");
        let asked = [&asked.each_ref().map(String::as_str)[..], &["--list", "", "--url", "/url"]];
        is_refused(&url, &asked.concat(), &["1 failed"]);
    }
    for web in [target, v6, here] {
        assert!(web.requests().is_empty(), "{:?}", web.requests());
    }
}

#[test]
fn the_host_of_the_command_line_may_have_any_address() {
    let target = Web::always(Reply::ok("alpha"));
    // The same host; its port is its own affair.
    let web = Web::always(Reply::redirect(&target.url("b.txt")));
    let place = Place::new();
    download(&place, &[&web.url("a.txt")]).succeeded();
    assert_eq!(place.read("a.txt"), b"alpha");
    // By name, too.
    let place = Place::new();
    download(&place, &[&format!("http://localhost:{}/a.txt", target.port())]).succeeded();
    assert_eq!(place.read("a.txt"), b"alpha");
}

#[test]
fn refuses_redirects_from_https_to_http() {
    let nginx = Nginx::start_with("location /away { return 302 http://PLAIN/a.txt; }");
    let list = json!([{ "url": nginx.plain_url("a.txt") }]);
    nginx.has("a.txt", b"alpha", THEN).has("list.json", list.to_string().as_bytes(), THEN);
    let ca = nginx.authority();
    is_refused("a redirect", &[&nginx.url("away"), "--ca-file", &ca], &["away", "https"]);
    assert!(nginx.requests_after(0, 1).iter().all(|request| request["scheme"] == "https"));
    // From the clear, that is another matter.
    let place = Place::new();
    download(&place, &[&nginx.plain_url("a.txt")]).succeeded();
}

#[test]
fn follows_redirects_from_http_to_https() {
    let nginx = Nginx::start_with("location /up { return 302 https://localhost:SECURE/a.txt; }");
    nginx.has("a.txt", b"alpha", THEN);
    let place = Place::new();
    let url = nginx.plain_url("up").replace("127.0.0.1", "localhost");
    download(&place, &[&url, "--ca-file", &nginx.authority()]).succeeded();
    assert_eq!(place.read("up"), b"alpha");
    assert_eq!(nginx.requests_after(0, 2)[1]["scheme"], "https");
}

#[test]
fn an_ipv6_address_may_be_asked() {
    let web = Web::on("::1".parse().unwrap(), |_| Reply::ok("alpha"));
    let place = Place::new();
    download(&place, &[&web.url("a.txt")]).succeeded();
    assert_eq!(place.read("a.txt"), b"alpha");
}

#[test]
fn shows_bars_on_a_terminal() {
    let web = Web::answers(|request| match request.target.as_str() {
        "/bad.bin" => Reply::status(404),
        _ => Reply::ok(sample(46, 3_000_000)),
    });
    let place = Place::new();
    let urls = ["a.bin", "b.bin", "bad.bin"].map(|name| web.url(name)).join(" ");
    let line = format!("{PROGRAM} download {urls}");
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    command.current_dir(place.path("")).env("TERM", "xterm").stdin(Stdio::null());
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let shown = String::from_utf8(output.stdout).unwrap();
    // The cursor is moved, as nothing but bars does.
    assert!(shown.contains("\u{1b}["), "{shown:?}");
    for words in
        ["a.bin: ", "b.bin: ", "bad.bin: ", "404", "2 new, 0 changed, 0 unchanged, 1 failed"]
    {
        assert!(shown.contains(words), "{words}: {shown:?}");
    }
    assert_eq!(files(&place), ["a.bin", "b.bin"]);
}

#[test]
fn quiet_prints_only_failures() {
    let web = Web::answers(|request| match request.target.as_str() {
        "/bad.txt" => Reply::status(404),
        _ => Reply::ok("alpha"),
    });
    let place = Place::new();
    let outcome = download(&place, &[&web.url("a.txt"), "--quiet"]);
    assert_eq!(outcome.succeeded().stderr, "");
    let outcome = download(&place, &[&web.url("b.txt"), &web.url("bad.txt"), "--quiet"]);
    outcome.failed_with(&["bad.txt: ", "404"]);
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
}

#[test]
fn sends_headers_only_to_their_origin() {
    let target = Web::always(Reply::ok("alpha"));
    let to = target.url("b.txt");
    let web = Web::answers(move |request| match request.target.as_str() {
        "/list.json" => Reply::json(&json!([{"url": "a.txt"}, {"url": to}, {"url": "c.txt"}])),
        "/a.txt" => Reply::redirect(&to),
        _ => Reply::ok("gamma"),
    });
    let place = Place::new();
    let headers = ["--header", "X-Key: geheim", "--header", "Authorization: Bearer geheim"];
    let url = web.url("list.json");
    let listing = [&url, "--list", "", "--url", "/url"];
    download(&place, &[&listing[..], &headers].concat()).succeeded();
    assert_eq!(files(&place), ["a.txt", "b.txt", "c.txt"]);
    assert_eq!(target.requests().len(), 2);
    for request in web.requests() {
        assert_eq!(request.header("x-key"), Some("geheim"), "{request:?}");
        assert_eq!(request.header("authorization"), Some("Bearer geheim"), "{request:?}");
    }
    for request in target.requests() {
        assert!(!request.text().contains("geheim"), "{request:?}");
    }
}

#[test]
fn never_prints_the_password_of_a_url() {
    let web = Web::always(Reply::status(403));
    let place = Place::new();
    for host in [web.address(), nobody()] {
        let outcome = once(&place, &[&format!("http://user:geheim@{host}/a.txt?key=geheim")]);
        assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
        assert!(!outcome.stderr.contains("geheim"), "{outcome:?}");
        let outcome = once(&place, &[&format!("http://{host}/a.txt?key=geheim")]);
        outcome.failed_with(&["a.txt"]);
        assert!(!outcome.stderr.contains("geheim"), "{outcome:?}");
    }
}

#[test]
fn honours_retry_after() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    for (status, when) in [(429, "2".to_owned()), (503, http_date(now + 3))] {
        let web = Web::answers(move |request| match request.turn {
            0 => Reply::status(status).with("Retry-After", &when),
            _ => Reply::ok("alpha"),
        });
        let place = Place::new();
        download(&place, &[&web.url("a.txt"), "--retries", "1"]).succeeded();
        let requests = web.requests();
        assert_eq!(requests.len(), 2);
        // Without being asked to, it waits for a second at most.
        let waited = requests[1].at - requests[0].at;
        assert!(status == 503 || waited >= Duration::from_secs(2), "{status}: {waited:?}");
        let arrived = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!(status == 429 || arrived >= now + 3, "{arrived} is too early");
    }
}

#[test]
fn gives_up_on_a_long_retry_after() {
    for when in ["86400", "99999999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"] {
        let web = Web::always(Reply::status(503).with("Retry-After", when));
        download(&Place::new(), &[&web.url("a.txt")]).failed_with(&["a.txt: ", "503"]);
        assert_eq!(web.requests().len(), 1, "{when}");
    }
}

#[test]
fn retries_transient_failures() {
    for status in [408, 429, 500, 502, 503, 504] {
        let web = Web::answers(move |request| match request.turn {
            0 => Reply::status(status),
            _ => Reply::ok("alpha"),
        });
        let place = Place::new();
        download(&place, &[&web.url("a.txt"), "--retries", "1"]).succeeded();
        assert_eq!((web.requests().len(), place.read("a.txt")), (2, b"alpha".to_vec()), "{status}");
    }
    let web = Web::always(Reply::status(500));
    let place = Place::new();
    let outcome = download(&place, &[&web.url("a.txt"), "--retries", "2"]);
    outcome.failed_with(&["a.txt: ", "500", "0 new, 0 changed, 0 unchanged, 1 failed"]);
    assert_eq!(web.requests().len(), 3);
    assert!(files(&place).is_empty());
}

#[test]
fn does_not_retry_permanent_failures() {
    for status in [204, 304, 400, 401, 403, 404, 410, 501] {
        let body = if [204, 304].contains(&status) { "" } else { "Oops" };
        let web = Web::always(Reply::status(status).with_body(body));
        let place = Place::new();
        let outcome = download(&place, &[&web.url("a.txt")]);
        outcome.failed_with(&["a.txt: ", &status.to_string()]);
        assert!(files(&place).is_empty(), "{status}: {:?}", place.names());
        assert_eq!(web.requests().len(), 1, "{status}");
    }
}

#[test]
fn a_failed_file_does_not_stop_the_others() {
    let web = Web::answers(|request| match request.target.as_str() {
        "/bad.txt" => Reply::status(404),
        _ => Reply::ok("good"),
    });
    let place = Place::new();
    let urls = ["a.txt", "bad.txt", "c.txt"].map(|name| web.url(name));
    let outcome = download(&place, &urls.each_ref().map(String::as_str));
    outcome.failed_with(&["bad.txt: ", "404", "2 new, 0 changed, 0 unchanged, 1 failed"]);
    let failures = outcome.stderr.lines().filter(|line| line.starts_with("handout: "));
    assert_eq!(failures.count(), 1, "{outcome:?}");
    assert_eq!(files(&place), ["a.txt", "c.txt"]);
}

#[test]
fn names_an_unreachable_server_with_the_cause() {
    let address = nobody();
    let url = format!("http://{address}/a.txt");
    is_refused("nobody", &[&url], &["a.txt", "refused"]);
    is_refused("a listing", &[&url, "--list", "", "--url", "/url"], &[&url, "refused"]);
    is_refused("no name", &["http://handout.invalid/a.txt"], &["handout.invalid"]);
}

#[test]
fn gives_up_on_a_silent_server() {
    for (what, reply) in [
        ("before its head", None),
        ("before its body", Some(Reply::ok("alpha").cut_after(0).then_stall())),
        ("in its body", Some(Reply::ok(sample(33, 100_000)).cut_after(50_000).then_stall())),
    ] {
        // Nobody accepts what connects there, but the kernel.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let web = reply.map(Web::always);
        let url = match &web {
            Some(web) => web.url("a.txt"),
            None => format!("http://{}/a.txt", silent.local_addr().unwrap()),
        };
        is_refused(what, &[&url, "--timeout", "300ms"], &["a.txt", "300ms"]);
        let listing = [&url, "--timeout", "300ms", "--list", "", "--url", "/url"];
        is_refused(what, &listing, &["300ms"]);
    }
}

#[test]
fn discards_truncated_bodies() {
    let body = sample(34, 100_000);
    for (what, reply) in [
        ("cleanly", Reply::ok(&body[..]).cut_after(50_000)),
        ("by a reset", Reply::ok(&body[..]).cut_after(50_000).then_reset()),
        ("at its beginning", Reply::ok(&body[..]).cut_after(0)),
        ("by a byte", Reply::ok(&body[..]).cut_after(99_999)),
        (
            "in its chunks",
            Reply::ok("3\r\nabc\r\n").unannounced().with("Transfer-Encoding", "chunked"),
        ),
        ("in a chunk", Reply::ok("5\r\nabc").unannounced().with("Transfer-Encoding", "chunked")),
    ] {
        is_refused(what, &[&Web::always(reply).url("a.txt")], &["a.txt"]);
    }
}

#[test]
fn ignores_bytes_after_the_announced_end() {
    let web = Web::always(Reply::ok("alpha and more").announcing(5));
    let place = Place::new();
    let outcome = once(&place, &[&web.url("a.txt")]);
    // It may be refused, but never be taken.
    if outcome.code == Some(0) {
        assert_eq!(place.read("a.txt"), b"alpha");
    } else {
        assert!(files(&place).is_empty());
    }
    let chunked = Reply::ok("3\r\nabcdef\r\n0\r\n\r\n").unannounced();
    let web = Web::always(chunked.with("Transfer-Encoding", "chunked"));
    is_refused("a longer chunk", &[&web.url("a.txt")], &["a.txt"]);
}

#[test]
fn refuses_two_content_lengths() {
    let web = Web::always(Reply::ok("alpha").with("Content-Length", "3"));
    is_refused("two lengths", &[&web.url("a.txt")], &["a.txt"]);
}

#[test]
fn refuses_files_larger_than_max_size() {
    let web = Web::answers(|request| match request.target.as_str() {
        "/endless" => Reply::ok("").unannounced().then_repeat(vec![7; 1 << 16]),
        // Nothing of it need be waited for.
        "/announced" => Reply::ok("").announcing(1 << 40).then_stall(),
        "/just" => Reply::ok([7; 1000]),
        _ => Reply::ok([7; 1001]),
    });
    for path in ["endless", "announced", "more"] {
        is_refused(path, &[&web.url(path), "--max-size", "1kB"], &[path, "--max-size"]);
        let requests = web.requests_for(&format!("/{path}"));
        assert_eq!(requests.len(), 1, "{path}");
    }
    let place = Place::new();
    download(&place, &[&web.url("just"), "--max-size", "1kB"]).succeeded();
}

/// The peak of a client's memory while it downloads, and its exit code.
fn peak_of(place: &Place, arguments: &[&str]) -> (u64, Option<i32>, String) {
    let mut running = begin(place, arguments);
    let mut peak = 0;
    eventually("the end of the client", || {
        peak = running.peak().unwrap_or(peak);
        running.child.try_wait().unwrap().is_some()
    });
    let code = wait_for_exit(&mut running.child).code();
    (peak, code, running.stderr())
}

/// Compresses with gzip(1).
fn gzip(content: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("content");
    fs::write(&path, content).unwrap();
    let output = run(Command::new("gzip").arg("-c").arg(&path));
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn bounds_memory_for_any_response() {
    let entries = "{\"url\":\"a.txt\"},".repeat(4096).into_bytes();
    let objects = "{\"a\":0},".repeat((2 << 20) - 8) + "0";
    let bomb = gzip(&[b"[".to_vec(), vec![b' '; 300 << 20]].concat());
    assert!(bomb.len() < 1 << 20);
    let long = sample(35, 100 << 20);
    let endless =
        |first: &str, again: &[u8]| Reply::ok(first).unannounced().then_repeat(again.to_vec());
    let listing = ["--list", "", "--url", "/url"];
    for (what, reply, listed, words) in [
        ("a file", Reply::ok(long), false, None),
        ("an endless file", endless("", &[7; 1 << 16]), false, Some("--max-size")),
        ("a header", Reply::ok("").with("X-Long", &"x".repeat(50 << 20)), false, Some("a.txt")),
        ("white space", endless("[", &[b' '; 1 << 16]), true, Some("larger than")),
        ("entries", endless("[", &entries), true, Some("larger than")),
        ("a text", endless("[\"", &[b'x'; 1 << 16]), true, Some("larger than")),
        ("depth", endless("", &[b'['; 1 << 16]), true, None),
        ("objects beside", Reply::ok(format!("{{\"a\":[{objects}]}}")), true, Some("no array")),
        ("objects inside", Reply::ok(format!("[{objects}]")), true, Some("max-files")),
        ("a large entry", Reply::ok(format!("[[{objects}]]")), true, Some("larger than")),
        ("a bomb", Reply::ok(bomb).with("Content-Encoding", "gzip"), true, Some("larger than")),
    ] {
        let web = Web::always(reply);
        let place = Place::new();
        let url = web.url("a.txt");
        let mut arguments = vec![url.as_str(), "--max-size", "100MiB", "--retries", "0"];
        if listed {
            arguments.extend(listing);
        }
        let (peak, code, said) = peak_of(&place, &arguments);
        assert_eq!(code, Some(i32::from(what != "a file")), "{what}: {said}");
        assert!(words.is_none_or(|word| said.contains(word)), "{what}: {said}");
        // A listing is held whole, and has 16 MiB at most.
        let most = if listed { MOST_MEMORY + (64 << 20) } else { MOST_MEMORY };
        assert!(peak > 0 && peak < most, "{what}: {peak} bytes");
    }
}

#[test]
fn refuses_malformed_listings_with_the_reason() {
    let deep = "[".repeat(100_000);
    let many = format!("[{}]", vec!["{\"url\":\"a\"}"; 200_000].join(","));
    for (what, body, words) in [
        ("nothing", "", "JSON"),
        ("HTML", "<!DOCTYPE html><title>Oops</title>", "JSON"),
        ("half of it", "[{\"url\":\"a.txt\"}", "JSON"),
        ("something behind it", "[] []", "JSON"),
        ("too deep", &deep, "JSON"),
        ("an object", "{}", "array"),
        ("a text", "\"a.txt\"", "array"),
        ("null", "null", "array"),
        ("too many", &many, "entries"),
    ] {
        let web = Web::always(Reply::ok(body).with("Content-Type", "application/json"));
        let url = web.url("list.json");
        is_refused(what, &[&url, "--list", "", "--url", "/url"], &["list.json", words]);
        assert_eq!(web.requests().len(), 1, "{what}");
    }
    let web = Web::always(Reply::ok("[\"\\ud800\"]"));
    let url = web.url("list.json");
    is_refused("no UTF-8", &[&url, "--list", "", "--url", ""], &["entry 1", "JSON"]);
    let web = Web::always(Reply::json(&json!({"files": []})));
    let url = web.url("list.json");
    is_refused("elsewhere", &[&url, "--list", "/pictures", "--url", "/url"], &["/pictures"]);
    let wrong = Reply::ok("no gzip").with("Content-Encoding", "gzip");
    let web = Web::always(wrong);
    is_refused("no gzip", &[&web.url("list.json"), "--list", "", "--url", "/url"], &["list.json"]);
}

#[test]
fn accepts_an_empty_listing() {
    let web = Web::always(Reply::json(&json!([])));
    let place = Place::new();
    let outcome = download(&place, &[&web.url("list.json"), "--list", "", "--url", "/url"]);
    assert!(outcome.succeeded().stderr.contains("0 new, 0 changed, 0 unchanged, 0 failed"));
    assert!(files(&place).is_empty());
}

/// Downloads the entries of a listing from a server that has every file.
fn listed(place: &Place, listing: Value, arguments: &[&str]) -> (Outcome, Web) {
    let web = Web::lists(move |_| listing.clone(), |request| Reply::ok(request.target.clone()));
    let url = web.url("list.json");
    let arguments = [&[url.as_str(), "--list", "", "--url", "/url"], arguments].concat();
    (once(place, &arguments), web)
}

#[test]
fn an_invalid_entry_does_not_affect_the_others() {
    for wrong in [
        json!({}),
        json!({"url": null}),
        json!({"url": 5}),
        json!({"url": ["a.txt"]}),
        json!({"url": ""}),
        json!({"url": "http://["}),
        json!({"url": "file:///etc/hostname"}),
        json!({"url": "ftp://127.0.0.1/a.txt"}),
        json!({"url": "javascript:alert(1)"}),
        json!({"url": "data:text/plain,alpha"}),
        json!("a.txt"),
        json!(null),
        json!([]),
        json!({"url": "a.txt", "name": 5}),
        json!({"url": "a.txt", "name": {"x": 1}}),
        json!({"url": "a.txt", "digest": 5}),
        json!({"url": "a.txt", "digest": "5"}),
        json!({"url": "a.txt", "digest": "g".repeat(64)}),
    ] {
        let place = Place::new();
        let good = json!({"url": "good.txt", "name": "good.txt", "digest": hex(b"/good.txt")});
        let arguments = ["--filename", "/name", "--sha256", "/digest"];
        let (outcome, _web) = listed(&place, json!([wrong, good]), &arguments);
        outcome.failed_with(&["1 new, 0 changed, 0 unchanged, 1 failed"]);
        assert_eq!(files(&place), ["good.txt"], "{wrong}");
        is_printable(&outcome.stderr);
    }
}

#[test]
fn refuses_harmful_names_with_the_reason() {
    let long = "x".repeat(300);
    for (name, reason) in [
        ("", "empty"),
        (".", "folder"),
        ("..", "folder"),
        ("../x", ""),
        ("..\\x", ""),
        ("/etc/x", "separator"),
        ("a/b", "separator"),
        ("a\\b", "separator"),
        ("C:\\x", "separator"),
        (".hidden", "hidden"),
        (".handout-mirror.json", "hidden"),
        ("x\0", "control"),
        ("a\nb", "control"),
        ("a\rb", "control"),
        ("\u{1b}[31mx", "control"),
        ("x\u{9b}31m", "control"),
        ("gpj.\u{202e}exe", "invisible"),
        ("a\u{200b}b", "invisible"),
        (&long, "longer than 255 bytes"),
    ] {
        let place = Place::new();
        fs::create_dir(place.path("into")).unwrap();
        let list = json!([{"url": "a.txt", "name": name}]);
        for force in [&[][..], &["--force"], &["--update"]] {
            let arguments = [&["--filename", "/name", "-o", "into"], force].concat();
            let (outcome, web) = listed(&place, list.clone(), &arguments);
            outcome.failed_with(&[reason, "1 failed"]);
            is_printable(&outcome.stderr);
            assert_eq!(files(&place), ["into"], "{name:?}");
            assert!(web.requests_for("/a.txt").is_empty(), "{name:?}");
        }
    }
}

#[test]
fn refuses_harmful_names_in_urls_with_the_reason() {
    let web = Web::always(Reply::ok("alpha"));
    for path in [
        "",
        "sub/",
        "..%2fx",
        "%2e%2e%2fx",
        "..%5cx",
        "%2fetc%2fx",
        "a%2fb",
        ".hidden",
        "%2ehidden",
        "a%00b",
        "a%0ab",
        "%1b%5b31mx",
        "gpj.%e2%80%aeexe",
        &"x".repeat(300),
    ] {
        is_refused(path, &[&web.url(path)], &["1 failed"]);
    }
    assert!(web.requests().is_empty(), "{:?}", web.requests());
    // Dot segments before the last one are resolved by the URL parser.
    let place = Place::new();
    download(&place, &[&web.url("../../etc/x.txt")]).succeeded();
    assert_eq!(files(&place), ["x.txt"]);
}

#[test]
fn refuses_the_second_of_two_equal_names() {
    for list in [
        json!([{"url": "a/x.txt"}, {"url": "b/x.txt"}]),
        json!([{"url": "a/x.txt"}, {"url": "b/%78.txt"}]),
        json!([{"url": "a/x.txt"}, {"url": "a/x.txt?2"}]),
    ] {
        for force in [&[][..], &["--force"], &["--update"]] {
            let place = Place::new();
            let (outcome, _web) = listed(&place, list.clone(), force);
            outcome.failed_with(&["x.txt"]);
            assert!(outcome.stderr.contains("0 changed, 0 unchanged"), "{outcome:?}");
            // None of them, or the first.
            match &files(&place)[..] {
                [] => assert!(outcome.stderr.contains("2 failed"), "{outcome:?}"),
                names => {
                    assert!(outcome.stderr.contains("1 new, 0 changed, 0 unchanged, 1 failed"));
                    assert_eq!(names, ["x.txt"]);
                    assert_eq!(place.read("x.txt"), b"/a/x.txt");
                }
            }
        }
    }
    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    download(&place, &[&web.url("a/x.txt"), &web.url("b/x.txt")]).failed_with(&["x.txt"]);
}

#[test]
fn a_wrong_digest_keeps_the_old_file() {
    let place = Place::new();
    fs::write(place.path("a.txt"), "old").unwrap();
    let list = json!([{"url": "a.txt", "digest": hex(b"other")}]);
    for force in ["--force", "--update"] {
        let (outcome, web) = listed(&place, list.clone(), &["--sha256", "/digest", force]);
        outcome.failed_with(&["a.txt: ", "digest", "1 failed"]);
        assert_eq!(web.requests_for("/a.txt").len(), 1);
        assert_eq!(place.read("a.txt"), b"old");
    }
    let list = json!([{"url": "a.txt", "digest": hex(b"/a.txt")}]);
    let (outcome, _web) = listed(&place, list, &["--sha256", "/digest", "--force"]);
    outcome.succeeded();
    assert_eq!(place.read("a.txt"), b"/a.txt");
}

/// Downloads a file whose first response is truncated in the middle; `rest` answers the retry.
/// Returns the saved content, if any.
fn interrupted(
    body: &[u8],
    validator: (&'static str, &'static str),
    rest: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
) -> (Option<Vec<u8>>, Web, Outcome) {
    // A date is worth something only beside that of the answer, which must be later.
    let now = http_date(THEN + 3600);
    let first = Reply::ok(body).with(validator.0, validator.1).with("Date", &now);
    let first = first.cut_after(body.len() / 2);
    let web = Web::answers(move |request| match (request.turn, request.range()) {
        (0, _) => first.clone(),
        (_, Some(from)) => rest(request, from),
        (_, None) => rest(request, 0),
    });
    let place = Place::new();
    let outcome = download(&place, &[&web.url("a.bin"), "--retries", "2"]);
    let saved = place.path("a.bin").exists().then(|| place.read("a.bin"));
    assert_eq!(outcome.code == Some(0), saved.is_some(), "{outcome:?}");
    (saved, web, outcome)
}

/// Returns the `Content-Range` of a reply to a range request from this offset.
type ContentRange = fn(usize) -> String;

const ETAG: (&str, &str) = ("ETag", "\"one\"");

#[test]
fn resumes_an_interrupted_file() {
    let body = sample(36, 400_000);
    let then: &'static str = Box::leak(http_date(THEN).into_boxed_str());
    for validator in [ETAG, ("Last-Modified", then)] {
        let content = body.clone();
        let (saved, web, outcome) = interrupted(&body, validator, move |_, from| {
            assert!(from > 0);
            Reply::rest(&content, from).with(validator.0, validator.1)
        });
        assert!(saved.unwrap() == body, "{outcome:?}");
        let requests = web.requests();
        assert_eq!(requests.len(), 2, "{requests:?}");
        assert_eq!(requests[1].header("if-range"), Some(validator.1));
        assert!(requests[1].range().unwrap() <= body.len() / 2);
    }
}

#[test]
fn restarts_an_interrupted_file_that_changed() {
    let (old, new) = (sample(37, 400_000), sample(38, 400_000));
    let content = new.clone();
    let (saved, web, _) =
        interrupted(&old, ETAG, move |_, _| Reply::ok(content.clone()).with("ETag", "\"two\""));
    assert!(saved.unwrap() == new);
    assert_eq!(web.requests()[1].header("if-range"), Some("\"one\""));
    // A server that ignores the condition still sends a new validator.
    let content = new.clone();
    let (saved, _web, _) = interrupted(&old, ETAG, move |request, from| {
        if request.range().is_some() {
            Reply::rest(&content, from).with("ETag", "\"two\"")
        } else {
            Reply::ok(content.clone()).with("ETag", "\"two\"")
        }
    });
    assert!(saved.is_none_or(|saved| saved == new));
}

#[test]
fn does_not_resume_by_a_weak_validator() {
    let body = sample(39, 400_000);
    for validator in [("ETag", "W/\"one\""), ("X-Nothing", "at all")] {
        let content = body.clone();
        let (saved, web, _) = interrupted(&body, validator, move |request, _| {
            if request.range().is_some() { Reply::status(400) } else { Reply::ok(content.clone()) }
        });
        assert!(saved.unwrap() == body, "{validator:?}");
        assert!(web.requests()[1].range().is_none(), "{:?}", web.requests());
    }
}

#[test]
fn refuses_ranges_other_than_requested() {
    let body = sample(40, 400_000);
    let ranges: [(&str, ContentRange); 9] = [
        ("another beginning", |from| format!("bytes {}-399999/400000", from - 1)),
        ("the beginning", |_| "bytes 0-399999/400000".to_owned()),
        ("another size", |from| format!("bytes {from}-399999/500000")),
        ("another end", |from| format!("bytes {from}-399998/400000")),
        ("an end before its beginning", |from| format!("bytes {from}-1/400000")),
        ("no range", |_| "bytes */400000".to_owned()),
        ("another unit", |from| format!("lines {from}-399999/400000")),
        ("numbers without end", |from| format!("bytes {from}-99999999999999999999999/400000")),
        ("nonsense", |_| "good".to_owned()),
    ];
    for (what, range) in ranges {
        let content = body.clone();
        let (saved, _web, outcome) = interrupted(&body, ETAG, move |request, from| {
            if request.range().is_none() {
                return Reply::ok(content.clone()).with("ETag", "\"one\"");
            }
            // From another place of the file, so that it would be seen.
            Reply::status(206)
                .with_body(&content[..content.len() - from])
                .with("Content-Range", &range(from))
                .with("ETag", "\"one\"")
        });
        assert!(saved.is_none_or(|saved| saved == body), "{what}: {outcome:?}");
    }
    // Nor one without any word of where it belongs, nor one that is longer than it says.
    for longer in [false, true] {
        let content = body.clone();
        let (saved, _web, outcome) = interrupted(&body, ETAG, move |request, from| {
            if request.range().is_none() {
                return Reply::ok(content.clone()).with("ETag", "\"one\"");
            }
            let rest = Reply::rest(&content, from).with("ETag", "\"one\"");
            if longer {
                rest.with_body([&content[from..], b"and more"].concat())
            } else {
                Reply::status(206).with_body(&content[..content.len() - from])
            }
        });
        assert!(saved.is_none_or(|saved| saved == body), "{outcome:?}");
    }
}

#[test]
fn refuses_ranges_of_other_content_or_without_an_end() {
    let (old, new) = (sample(43, 400_000), sample(44, 500_000));
    let chunks = |body: &[u8]| [b"a\r\n", body.get(..10).unwrap(), b"\r\n0\r\n\r\n"].concat();
    for fault in ["short", "no total", "no validator", "another total"] {
        let (before, after) = (old.clone(), new.clone());
        let (saved, _web, outcome) = interrupted(&old, ETAG, move |request, from| {
            if request.range().is_none() {
                return Reply::ok(before.clone()).with("ETag", "\"one\"");
            }
            let part = Reply::status(206);
            match fault {
                "short" => part
                    .with("Content-Range", &format!("bytes {from}-399999/400000"))
                    .with("Transfer-Encoding", "chunked")
                    .with("ETag", "\"one\"")
                    .with_body(chunks(&before[from..]))
                    .unannounced(),
                "no total" => part
                    .with("Content-Range", &format!("bytes {from}-{}/*", from + 99))
                    .with("ETag", "\"one\"")
                    .with_body(&before[from..from + 100]),
                "no validator" => Reply::rest(&after, from),
                _ => Reply::rest(&after, from).with("ETag", "\"one\""),
            }
        });
        assert!(saved.is_none_or(|saved| saved == old), "{fault}: {outcome:?}");
    }
}

#[test]
fn accepts_ranges_without_repeated_headers() {
    let body = sample(45, 400_000);
    let then = http_date(THEN);
    let now = http_date(THEN + 3600);
    let whole = Reply::ok(body.clone())
        .with("ETag", "\"one\"")
        .with("Last-Modified", &then)
        .with("Content-Type", "image/png")
        .with("Date", &now);
    let content = body.clone();
    let web = Web::answers(move |request| match request.range() {
        None => whole.clone().cut_after(200_000),
        Some(from) => Reply::rest(&content, from).with("ETag", "\"one\""),
    });
    let place = Place::new();
    download(&place, &[&web.url("a.bin"), "--retries", "2"]).succeeded();
    assert!(place.read("a.bin") == body);
    assert_eq!(modified(&place.path("a.bin")), THEN);
}

#[test]
fn discarded_bytes_do_not_reset_the_retries() {
    let body = sample(46, 3 << 20);
    let web = Web::always(Reply::ok(body).cut_after(2 << 20));
    let place = Place::new();
    let outcome = download(&place, &[&web.url("a.bin"), "--retries", "2"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    // Whatever was reached first counts as progress once.
    assert!(web.requests().len() <= 4, "{}", web.requests().len());
}

#[test]
fn does_not_take_a_local_file_for_the_servers() {
    let last_modified = http_date(THEN);
    // It says so of every file that is newer than its own, as RFC 9110 wants it.
    let web = Web::answers(move |request| {
        let reply = match request.header("if-modified-since") {
            Some(_) => Reply::status(304),
            None => Reply::ok("right"),
        };
        reply.with("Last-Modified", &last_modified).with("ETag", "\"one\"")
    });
    let place = Place::new();
    fs::write(place.path("a.txt"), "wrong").unwrap();
    let later = SystemTime::UNIX_EPOCH + Duration::from_secs(THEN + 5);
    fs::File::options().write(true).open(place.path("a.txt")).unwrap().set_modified(later).unwrap();
    download(&place, &[&web.url("a.txt"), "--update"]).succeeded();
    assert_eq!(place.read("a.txt"), b"right");
}

#[test]
fn restarts_after_an_unsatisfiable_range() {
    let body = sample(41, 400_000);
    let content = body.clone();
    let (saved, web, outcome) = interrupted(&body, ETAG, move |request, _| {
        if request.range().is_some() {
            Reply::status(416).with("Content-Range", "bytes */400000")
        } else {
            Reply::ok(content.clone())
        }
    });
    assert!(saved.is_some_and(|saved| saved == body), "{outcome:?}: {:?}", web.requests());
}

#[test]
fn refuses_an_unrequested_range() {
    let web = Web::always(Reply::rest(b"alphabet", 3).with("ETag", "\"one\""));
    is_refused("a part", &[&web.url("a.txt")], &["a.txt"]);
}

/// A server that sends half of a large file quickly, and then hardly anything.
fn slow() -> (Nginx, Vec<u8>) {
    let nginx = Nginx::start_with("limit_rate_after 2m; limit_rate 20k;");
    let content = sample(42, 3_000_000);
    nginx.has("large.bin", &content, THEN);
    (nginx, content)
}

/// Waits until a hidden file in this folder has grown to a megabyte.
fn grows(folder: &Path) {
    eventually("a file that grows", || {
        let entries = fs::read_dir(folder).unwrap();
        entries.flatten().any(|entry| entry.metadata().is_ok_and(|file| file.len() > 1_000_000))
    });
}

#[test]
fn resumes_after_a_kill() {
    let (nginx, content) = slow();
    let place = Place::new();
    let (url, ca) = (nginx.url("large.bin"), nginx.authority());
    let mut running = begin(&place, &[&url, "--ca-file", &ca]);
    grows(&place.path(""));
    running.child.kill().unwrap();
    wait_for_exit(&mut running.child);
    assert!(files(&place).is_empty(), "{:?}", place.names());
    nginx.requests_after(0, 1);
    download(&place, &[&url, "--ca-file", &ca]).succeeded();
    assert!(place.read("large.bin") == content);
    assert!(leftovers(&place).is_empty(), "{:?}", place.names());
    let request = &nginx.requests_after(1, 1)[0];
    assert_eq!(request["status"], 206, "{request}");
    assert!(request["sent"].as_u64().unwrap() <= 2_000_000, "{request}");
    assert!(request["if_range"].as_str().unwrap().starts_with('"'), "{request}");
}

#[test]
fn restarts_a_file_that_changed_after_a_kill() {
    let (nginx, _) = slow();
    let place = Place::new();
    let (url, ca) = (nginx.url("large.bin"), nginx.authority());
    let mut running = begin(&place, &[&url, "--ca-file", &ca]);
    grows(&place.path(""));
    running.child.kill().unwrap();
    wait_for_exit(&mut running.child);
    let other = sample(43, 1_500_000);
    nginx.has("large.bin", &other, THEN + 1);
    download(&place, &[&url, "--ca-file", &ca]).succeeded();
    assert!(place.read("large.bin") == other);
    assert_eq!(modified(&place.path("large.bin")), THEN + 1);
}

#[test]
fn refuses_a_partial_file_that_was_tampered_with() {
    let (nginx, content) = slow();
    let place = Place::new();
    let (url, ca) = (nginx.url("large.bin"), nginx.authority());
    let list = json!([{"url": "large.bin", "digest": hex(&content)}]);
    nginx.has("list.json", list.to_string().as_bytes(), THEN);
    let list = nginx.url("list.json");
    let mut running = begin(&place, &[&url, "--ca-file", &ca]);
    grows(&place.path(""));
    running.child.kill().unwrap();
    wait_for_exit(&mut running.child);
    for entry in leftovers(&place) {
        let path = place.path(&entry);
        if fs::metadata(&path).unwrap().len() > 1_000_000 {
            // At the same length, or one beyond the file's.
            let mut file = fs::File::options().write(true).open(path).unwrap();
            file.write_all(b"tampered").unwrap();
        }
    }
    // The digest holds for the whole file, the beginning included.
    let arguments = [&list, "--ca-file", &ca, "--list", "", "--url", "/url", "--sha256", "/digest"];
    let outcome = download(&place, &arguments);
    if outcome.code == Some(0) {
        assert!(place.read("large.bin") == content);
    } else {
        assert!(files(&place).is_empty());
        download(&place, &arguments).succeeded();
        assert!(place.read("large.bin") == content, "the next time, it is taken anew");
    }
}

#[test]
fn a_signal_ends_the_download_without_a_file() {
    let (nginx, _) = slow();
    for signal in [Signal::INT, Signal::TERM] {
        let place = Place::new();
        let mut running = begin(&place, &[&nginx.plain_url("large.bin")]);
        grows(&place.path(""));
        running.signal(signal);
        assert_eq!(wait_for_exit(&mut running.child).code(), Some(1));
        let said = running.stderr();
        assert!(said.contains("handout: interrupted"), "{said}");
        assert!(files(&place).is_empty(), "{:?}", place.names());
    }
}

#[test]
fn sends_requests_to_the_proxy() {
    let proxy = Web::always(Reply::ok("by proxy"));
    let place = Place::new();
    let url = "http://files.invalid/a.txt";
    download(&place, &[url, "--proxy", &proxy.url("")]).succeeded();
    assert_eq!(place.read("a.txt"), b"by proxy");
    assert_eq!(proxy.requests()[0].target, url);
    // One that is not there is named.
    let proxy = format!("http://{}", nobody());
    let outcome = once(&Place::new(), &[url, "--proxy", &proxy]);
    outcome.failed_with(&["a.txt", "refused"]);
}

#[test]
fn names_an_unwritable_folder_with_the_cause() {
    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    for folder in ["file", "/proc", "/proc/none"] {
        let outcome = once(&place, &[&web.url("a.txt"), "-o", folder]);
        outcome.failed_with(&[folder]);
    }
    // A folder is nothing that a file replaces.
    fs::create_dir(place.path("a.txt")).unwrap();
    once(&place, &[&web.url("a.txt"), "--force"]).failed_with(&["a.txt"]);
    assert_eq!(files(&place), ["a.txt", "file"]);
    assert!(leftovers(&place).is_empty(), "{:?}", place.names());
}

#[test]
fn a_full_disk_leaves_no_files() {
    let web = Web::answers(|request| match request.target.as_str() {
        "/huge" => Reply::ok(sample(44, 3_000_000)),
        _ => Reply::ok("alpha"),
    });
    let place = Place::new();
    let script = "mount -t tmpfs -o size=1m none \"$0\" && cd \"$0\" || exit 99
        timeout 60 \"$1\" download \"$2\" \"$3\" --retries 0 --jobs 1
        code=$?
        ls
        exit $code";
    let (huge, small) = (web.url("huge"), web.url("a.txt"));
    let folder = place.path("").into_os_string();
    let Some(output) =
        with_mounts(script, &[&folder, PROGRAM.as_ref(), huge.as_ref(), small.as_ref()])
    else {
        return;
    };
    let outcome = Outcome::of(output);
    outcome.failed_with(&["huge: ", "No space left"]);
    assert_eq!(outcome.text(), "a.txt\n");
}

#[test]
fn a_file_size_limit_is_an_error_and_not_a_signal() {
    let web = Web::always(Reply::ok(sample(45, 1_000_000)));
    let place = Place::new();
    let mut command = Command::new("prlimit");
    command.args(["--fsize=100000", PROGRAM, "download", &web.url("large"), "--retries", "0"]);
    command.current_dir(place.path("")).stdin(Stdio::null());
    Outcome::of(run(&mut command)).failed_with(&["large: ", "too large"]);
    assert!(files(&place).is_empty(), "{:?}", place.names());
}

#[test]
fn files_are_created_with_the_umask() {
    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    let script = "umask 027 && \"$0\" download \"$1\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, PROGRAM, &web.url("a.txt")]).current_dir(place.path(""));
    Outcome::of(run(&mut command)).succeeded();
    let mode = fs::metadata(place.path("a.txt")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn reuses_connections() {
    let nginx = Nginx::start();
    let names: Vec<_> = (0..30).map(|number| format!("{number}.txt")).collect();
    for name in &names {
        nginx.has(name, name.as_bytes(), THEN);
    }
    nginx.lists(&names.iter().map(String::as_str).collect::<Vec<_>>(), THEN);
    let place = Place::new();
    let (url, ca) = (nginx.url("list.json"), nginx.authority());
    let listing = [&url, "--ca-file", &ca, "--list", "", "--url", "/url", "--jobs", "2"];
    download(&place, &listing).succeeded();
    let requests = nginx.requests_after(0, 31);
    let connections: BTreeSet<_> = requests.iter().map(|it| it["connection"].as_u64()).collect();
    assert!(connections.len() <= 3, "{connections:?}");
}

#[test]
fn distinguishes_usage_errors_from_failures() {
    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    let url = web.url("a.txt");
    for arguments in [
        &[][..],
        &["a.txt"],
        &["127.0.0.1"],
        &["ftp://127.0.0.1/a.txt"],
        &["file:///etc/hostname"],
        &["http://"],
        &[&url, "--list", ""],
        &[&url, "--url", "/url"],
        &[&url, "--filename", "/name"],
        &[&url, "--sha256", "/digest"],
        &[&url, "--list", "newslist", "--url", "/url"],
        &[&url, "--list", "/a~2", "--url", "/url"],
        &[&url, "--jobs", "0"],
        &[&url, "--jobs", "many"],
        &[&url, "--max-size", "1"],
        &[&url, "--timeout", "0s"],
        &[&url, "--retries", "-1"],
        &[&url, "--header", "nothing"],
        &[&url, "--header", "X: a\r\nY: b"],
        &[&url, "--header", "X Y: b"],
        &[&url, "--proxy", "nonsense"],
        &[&url, "--proxy", "ftp://127.0.0.1"],
        &[&url, "--unknown"],
    ] {
        let outcome = once(&place, arguments);
        assert_eq!(outcome.code, Some(2), "{arguments:?}: {outcome:?}");
        assert!(place.is_empty());
    }
    assert!(web.requests().is_empty());
}

#[test]
fn does_not_panic_when_the_reader_leaves() {
    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    let mut running = begin(&place, &[&web.url("a.txt"), &web.url("b.txt")]);
    drop(running.child.stderr.take());
    let code = wait_for_exit(&mut running.child).code();
    assert!(code.is_some_and(|code| code <= 1), "{code:?}");
}
