//! Replies of web servers, usual and unusual, byte by byte. curl is asked for each of them, too: what
//! it accepts is accepted, and what it rejects is rejected.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::run;
use crate::servers::{Outcome, Place, Server, bounded, end};
use crate::web::{Reply, Web};

/// A web server that answers every request with these bytes, and counts them.
struct RawServer {
    server: Server,
    requests: Arc<AtomicUsize>,
}

impl RawServer {
    fn start(reply: Vec<u8>) -> Self {
        let requests = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&requests);
        let server = Server::answers(move |mut stream| {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                match stream.read(&mut byte) {
                    Ok(1) => request.extend_from_slice(&byte),
                    _ => return,
                }
            }
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(&reply);
            end(stream);
        });
        Self { server, requests }
    }

    fn url(&self) -> String {
        format!("http://{}/a.txt", self.server.address)
    }

    /// The file that curl makes of the reply, if it accepts it.
    fn curl(&self, place: &Place) -> Option<Vec<u8>> {
        let path = place.path("curl");
        let _ = fs::remove_file(&path);
        let mut command = Command::new("curl");
        command.args(["-sS", "-f", "-o"]).arg(&path).arg(self.url()).stdin(Stdio::null());
        let output = run(&mut command);
        output.status.success().then(|| fs::read(&path).unwrap_or_default())
    }

    /// The same of `handout download`, with one retry.
    fn handout(&self, place: &Place) -> (Option<Vec<u8>>, Outcome) {
        let _ = fs::remove_dir_all(place.path("out"));
        self.requests.store(0, Ordering::SeqCst);
        let mut command = bounded();
        command.args(["download", &self.url(), "-o", "out", "--retries", "1"]);
        let outcome = Outcome::of(run(command.current_dir(place.path(""))));
        (fs::read(place.path("out/a.txt")).ok(), outcome)
    }
}

/// Replies with `hello`, of which each is unusual in one way.
fn replies() -> Vec<(&'static str, Vec<u8>)> {
    let head = |line: &str| format!("HTTP/1.1 200 OK\r\n{line}Content-Length: 5\r\n\r\nhello");
    let text = |reply: &str| reply.as_bytes().to_vec();
    let chunked = |coding: &str, body: &str| {
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n{body}").into_bytes()
    };
    let length = |value: &str| {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {value}\r\n\r\nhello").into_bytes()
    };
    let status = |line: &str| format!("{line}\r\nContent-Length: 5\r\n\r\nhello").into_bytes();
    let many = |count| head(&"Set-Cookie: a=b\r\n".repeat(count)).into_bytes();
    let body = "5\r\nhello\r\n0\r\n\r\n";
    vec![
        ("folded", text(&head("X: a\r\n  b\r\n"))),
        ("folded by a tab", text(&head("X: a\r\n\tb\r\n"))),
        ("folded twice", text(&head("X: a\r\n b\r\n c\r\n"))),
        ("folded, empty before", text(&head("X:\r\n b\r\n"))),
        ("folded, empty behind", text(&head("X: a\r\n \r\n"))),
        ("space before the colon", text(&head("X-Old : 1\r\n"))),
        ("tab before the colon", text(&head("X-Old\t: 1\r\n"))),
        (
            "length with a space before the colon",
            text("HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello"),
        ),
        ("120 headers", many(120)),
        ("1000 headers", many(1000)),
        ("4900 headers", many(4900)),
        ("a header of 90 kB", text(&head(&format!("X: {}\r\n", "a".repeat(90_000))))),
        ("value in UTF-8", text(&head("X: ä\r\n"))),
        ("no colon", text(&head("Garbage\r\n"))),
        ("NUL in a value", text(&head("X: a\0b\r\n"))),
        ("NUL in a name", text(&head("X\0: a\r\n"))),
        ("length twice", length("5\r\nContent-Length: 5")),
        ("length as a list", length("5, 5")),
        ("length with zeros", length("0005")),
        ("two lengths", length("5\r\nContent-Length: 6")),
        ("negative length", length("-5")),
        ("length in words", length("five")),
        ("no length", length("")),
        ("quoted length", length("\"5\"")),
        ("LF", text("HTTP/1.1 200 OK\nContent-Length: 5\n\nhello")),
        ("CR", text("HTTP/1.1 200 OK\rContent-Length: 5\r\rhello")),
        ("no reason", status("HTTP/1.1 200")),
        ("empty reason", status("HTTP/1.1 200 ")),
        ("reason in Chinese", status("HTTP/1.1 200 成功")),
        ("HTTP/1.0", status("HTTP/1.0 200 OK")),
        ("HTTP/1.0 without length", text("HTTP/1.0 200 OK\r\n\r\nhello")),
        ("HTTP/1.1 without length", text("HTTP/1.1 200 OK\r\n\r\nhello")),
        ("HTTP/0.9", text("hello")),
        ("HTTP/1.2", status("HTTP/1.2 200 OK")),
        ("HTTP/3", status("HTTP/3 200 OK")),
        ("ICY", status("ICY 200 OK")),
        ("status of two digits", status("HTTP/1.1 20 OK")),
        ("status of four digits", status("HTTP/1.1 2000 OK")),
        ("status 000", status("HTTP/1.1 000 OK")),
        ("status 203", status("HTTP/1.1 203 OK")),
        ("status in words", status("HTTP/1.1 okay OK")),
        ("100 before", [&b"HTTP/1.1 100 Continue\r\n\r\n"[..], head("").as_bytes()].concat()),
        ("103 before", [&b"HTTP/1.1 103 Early\r\nX: y\r\n\r\n"[..], head("").as_bytes()].concat()),
        ("chunked", chunked("chunked", body)),
        ("Chunked", chunked("Chunked", body)),
        ("identity, chunked", chunked("identity, CHUNKED", body)),
        ("chunked and a length", chunked("chunked\r\nContent-Length: 3", body)),
        ("identity", text(&head("Transfer-Encoding: identity\r\n"))),
        ("chunk extensions", chunked("chunked", "5;a=\"b\"\r\nhello\r\n0;c\r\n\r\n")),
        ("spaces behind the size", chunked("chunked", "5  \r\nhello\r\n0\r\n\r\n")),
        ("zeros before the size", chunked("chunked", "0005\r\nhello\r\n00\r\n\r\n")),
        ("trailers", chunked("chunked", "5\r\nhello\r\n0\r\nX: y\r\n\r\n")),
        ("wrong trailer", chunked("chunked", "5\r\nhello\r\n0\r\nGarbage\r\n\r\n")),
        ("no size", chunked("chunked", "\r\nhello\r\n0\r\n\r\n")),
        ("negative size", chunked("chunked", "-5\r\nhello\r\n0\r\n\r\n")),
        ("no hexadecimal size", chunked("chunked", "xyz\r\nhello\r\n0\r\n\r\n")),
        ("chunk beyond its size", chunked("chunked", "3\r\nhello\r\n0\r\n\r\n")),
        ("size beyond 64 bits", chunked("chunked", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n")),
        ("unknown transfer coding", chunked("xyz", "hello")),
        ("gzip as transfer coding", chunked("gzip", "hello")),
        ("parameter of chunked", chunked("chunked;q=1", body)),
        ("content coding Identity", text(&head("Content-Encoding: Identity\r\n"))),
        ("empty content coding", text(&head("Content-Encoding:\r\n"))),
        ("empty list of content codings", text(&head("Content-Encoding: , ,\r\n"))),
        ("no content coding", text(&head("Content-Encoding: utf-8\r\n"))),
        ("Content-Type with charset", text(&head("Content-Type: text/plain; charset=\"x\"\r\n"))),
    ]
}

#[test]
fn accepts_and_rejects_replies_as_curl_does_and_retries_no_malformed_one() {
    let place = Place::new();
    for (name, reply) in replies() {
        let server = RawServer::start(reply);
        let curl = server.curl(&place);
        let (file, outcome) = server.handout(&place);
        assert_eq!(file, curl, "{name}: {outcome:?}");
        assert_eq!(server.requests.load(Ordering::SeqCst), 1, "{name}: {outcome:?}");
    }
}

#[test]
fn retries_replies_that_end_early() {
    let place = Place::new();
    for reply in [
        "",
        "HTTP/1.1 200 OK",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ] {
        let server = RawServer::start(reply.into());
        let (file, outcome) = server.handout(&place);
        assert_eq!(file, None, "{reply:?}");
        assert_eq!(server.requests.load(Ordering::SeqCst), 2, "{reply:?}: {outcome:?}");
    }
}

/// Follows a `Location` with these bytes by curl and by `handout download`; returns the target of the
/// second request.
fn follow(location: &[u8]) -> [Option<String>; 2] {
    let place = Place::new();
    let reply = [
        b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: ",
        location,
        b"\r\n\r\n",
    ]
    .concat();
    let targets = [(); 2].map(|()| Arc::<std::sync::Mutex<Vec<String>>>::default());
    let mut commands = [Command::new("curl"), bounded()];
    commands[0].args(["-sSL", "-o", "curl"]);
    commands[1].args(["download", "-o", "out", "--retries", "0"]);
    for (command, targets) in commands.iter_mut().zip(&targets) {
        let (reply, known) = (reply.clone(), Arc::clone(targets));
        let server = Server::answers(move |mut stream| {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                let Ok(1) = stream.read(&mut byte) else { return };
                request.extend_from_slice(&byte);
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let mut known = known.lock().unwrap();
            known.push(request.split(' ').nth(1).unwrap().to_owned());
            let second = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
            let _ = stream.write_all(if known.len() == 1 { &reply } else { second });
            drop(known);
            end(stream);
        });
        command.arg(format!("http://{}/a.txt", server.address));
        run(command.current_dir(place.path("")).stdin(Stdio::null()));
    }
    targets.map(|targets| targets.lock().unwrap().get(1).cloned())
}

#[test]
fn follows_locations_that_are_not_ascii_as_curl_does() {
    for (location, expected) in [
        (&b"/b.txt"[..], "/b.txt"),
        ("/größe.txt".as_bytes(), "/gr%C3%B6%C3%9Fe.txt"),
        (b"/gr\xf6\xdfe.txt", "/gr%F6%DFe.txt"),
        ("/图片.jpg".as_bytes(), "/%E5%9B%BE%E7%89%87.jpg"),
        (b"/a b.txt", "/a%20b.txt"),
        (b"b.txt#part", "/b.txt"),
        (b"./x/../b.txt?q=1", "/b.txt?q=1"),
        ("?q=ö".as_bytes(), "/a.txt?q=%C3%B6"),
        (b"/b%20c.txt", "/b%20c.txt"),
        (b"/fold\r\n ed.txt", "/fold%20ed.txt"),
    ] {
        let [curl, handout] = follow(location);
        assert_eq!(handout.as_deref(), Some(expected), "{location:?}, curl: {curl:?}");
        // curl joins the lines in another way, and writes digits of hexadecimal numbers in small.
        if location != b"/fold\r\n ed.txt" {
            let small = |target: Option<String>| target.map(|target| target.to_lowercase());
            assert_eq!(small(handout), small(curl), "{location:?}");
        }
    }
}

/// Downloads the entries of this listing: the names of the files, and the outcome.
fn downloads(listing: Vec<u8>, headers: &[(&str, &str)]) -> (Vec<String>, Outcome) {
    let reply =
        headers.iter().fold(Reply::ok(listing), |reply, (name, value)| reply.with(name, value));
    let web = Web::answers(move |request| match request.target.as_str() {
        "/list.json" => reply.clone(),
        _ => Reply::ok("content"),
    });
    let place = Place::new();
    let mut command = bounded();
    command.args(["download", &web.url("list.json"), "--list", "", "--url", "/url"]);
    command.args(["--filename", "/name", "-o", "out", "--retries", "0"]);
    let outcome = Outcome::of(run(command.current_dir(place.path(""))));
    let mut names: Vec<_> = fs::read_dir(place.path("out")).map_or_else(
        |_| Vec::new(),
        |files| files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect(),
    );
    names.sort();
    (names, outcome)
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut child = Command::new("gzip");
    let mut child = child.arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(content).unwrap();
    child.wait_with_output().unwrap().stdout
}

#[test]
fn a_blank_url_in_a_listing_is_a_fault_of_its_entry_alone() {
    for blank in ["null", "\"\"", "\" \"", "\"\\t\\n\"", "\"#\"", "\"#top\"", "\"list.json\""] {
        let listing = format!(r#"[{{"url":{blank},"name":"a"}},{{"url":"/b","name":"b"}}]"#);
        let (names, outcome) = downloads(listing.into_bytes(), &[]);
        outcome.failed_with(&["handout: a: the entry", "1 failed"]);
        assert_eq!(names, ["b"], "{blank}");
    }
}

#[test]
fn reads_listings_in_any_case_and_list_of_content_codings() {
    let json = br#"[{"url":"/a","name":"a"}]"#;
    for (coding, body) in [
        ("", json.to_vec()),
        (",", json.to_vec()),
        ("Identity", json.to_vec()),
        ("GZIP", gzip(json)),
        ("x-GZip", gzip(json)),
        (", gzip,", gzip(json)),
        ("identity, gzip", gzip(json)),
        ("gzip, gzip", gzip(&gzip(json))),
    ] {
        let (names, outcome) = downloads(body, &[("Content-Encoding", coding)]);
        outcome.succeeded();
        assert_eq!(names, ["a"], "{coding}");
    }
    let (_, outcome) = downloads(json.to_vec(), &[("Content-Encoding", "gzip, Br")]);
    outcome.failed_with(&["gzip, Br"]);
}

#[test]
fn ignores_a_byte_order_mark_in_front_of_json() {
    let json = "\u{feff}[{\"url\":\"/a\",\"name\":\"a\"}]";
    let (names, outcome) = downloads(json.into(), &[]);
    outcome.succeeded();
    assert_eq!(names, ["a"]);
    let place = Place::new();
    let pushed = Server::sends("\u{feff}{\"filename\":\"a\",\"filedata\":\"aGVsbG8=\"}\n");
    let mut command = bounded();
    command.args(["fetch", &pushed.address.to_string()]).current_dir(place.path(""));
    Outcome::of(run(&mut command)).succeeded();
    assert_eq!(fs::read(place.path("a")).unwrap(), b"hello");
    let listed = Server::replies(|_| "\u{feff}{\"files\":[]}\n".to_owned());
    let mut command = bounded();
    command.args(["fetch", &listed.address.to_string(), "--list"]);
    Outcome::of(run(&mut command)).succeeded();
}
