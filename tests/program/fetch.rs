//! `handout fetch`: what a file service hands out is saved whole or not at all.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::common::{Daemon, PROGRAM, eventually, sample, wait_for_exit};
use crate::servers::{Place, Python, Server, document, nobody, with_mounts};

/// What a client may use; the code of a debug build is larger.
const MOST_MEMORY: u64 = if cfg!(debug_assertions) { 32 << 20 } else { 16 << 20 };

const NO_ARGUMENTS: [&str; 0] = [];

/// A daemon that pushes a picture and has a folder.
fn daemon() -> (Daemon, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("files/sub/deep")).unwrap();
    let picture = sample(21, 186_068);
    for (name, content) in [
        ("guido.jpg", &picture[..]),
        ("files/a.txt", b"alpha"),
        ("files/sub/b.txt", b"beta"),
        ("files/sub/deep/c.txt", b""),
        ("files/large", &sample(22, 1_000_000)),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
    }
    let config = "[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"guido.jpg\"\n\
                  [file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"";
    (Daemon::start_in(folder, config, |_| {}), picture)
}

const EVERYTHING: [&str; 6] = ["a.txt", "large", "sub", "sub/b.txt", "sub/deep", "sub/deep/c.txt"];

#[test]
fn what_is_pushed_is_saved_under_its_own_name_or_where_o_says() {
    let (daemon, picture) = daemon();
    let server = daemon.tcp("file.picture");
    let place = Place::new();
    let outcome = place.fetch(server, NO_ARGUMENTS);
    assert!(outcome.succeeded().stderr.contains("guido.jpg: "), "{outcome:?}");
    assert!(outcome.stdout.is_empty());
    fs::create_dir(place.path("folder")).unwrap();
    place.fetch(server, ["-o", "other.jpg"]).succeeded();
    place.fetch(server, ["-o", "folder"]).succeeded();
    assert_eq!(place.names(), ["folder", "folder/guido.jpg", "guido.jpg", "other.jpg"]);
    for name in ["guido.jpg", "other.jpg", "folder/guido.jpg"] {
        assert!(place.read(name) == picture, "{name}");
    }
}

#[test]
fn what_is_pushed_goes_to_standard_output_on_demand() {
    let (daemon, picture) = daemon();
    let place = Place::new();
    let outcome = place.fetch(daemon.tcp("file.picture"), ["-o", "-"]);
    assert!(outcome.succeeded().stdout == picture);
    assert!(place.is_empty());
}

#[test]
fn quiet_says_nothing_of_success() {
    let (daemon, _) = daemon();
    let outcome = Place::new().fetch(daemon.tcp("file.picture"), ["--quiet"]);
    assert_eq!(outcome.succeeded().stderr, "");
}

#[test]
fn a_file_that_is_there_is_kept_without_force_and_replaced_with_it() {
    let (daemon, picture) = daemon();
    let place = Place::new();
    for (server, arguments, name, content) in [
        ("file.picture", &[][..], "guido.jpg", &picture[..]),
        ("file.picture", &["-o", "other.jpg"], "other.jpg", &picture),
        ("file.files", &["a.txt"], "a.txt", b"alpha"),
    ] {
        let server = daemon.tcp(server);
        fs::write(place.path(name), "mine").unwrap();
        let outcome = place.fetch(server, arguments);
        outcome.failed_with(&[name, "is there already", "--force"]);
        assert_eq!(place.read(name), b"mine");
        place.fetch(server, [arguments, &["--force"]].concat()).succeeded();
        assert!(place.read(name) == content);
    }
    assert_eq!(place.names(), ["a.txt", "guido.jpg", "other.jpg"]);
}

#[test]
fn a_link_in_the_place_is_not_written_through() {
    let (daemon, picture) = daemon();
    let server = daemon.tcp("file.picture");
    let place = Place::new();
    // It leads nowhere, yet.
    symlink("victim", place.path("guido.jpg")).unwrap();
    place.fetch(server, NO_ARGUMENTS).failed_with(&["is there already"]);
    fs::write(place.path("victim"), "mine").unwrap();
    place.fetch(server, ["--force"]).succeeded();
    assert_eq!(place.read("victim"), b"mine");
    assert!(place.read("guido.jpg") == picture);
    assert!(!fs::symlink_metadata(place.path("guido.jpg")).unwrap().is_symlink());
}

#[test]
fn a_folder_in_the_place_is_never_replaced() {
    let (daemon, _) = daemon();
    let place = Place::new();
    fs::create_dir(place.path("guido.jpg")).unwrap();
    for arguments in [&[][..], &["--force"]] {
        place.fetch(daemon.tcp("file.picture"), arguments).failed_with(&["guido.jpg"]);
        assert_eq!(place.names(), ["guido.jpg"]);
    }
}

#[test]
fn a_file_gets_the_permissions_that_any_new_file_gets() {
    let (daemon, _) = daemon();
    let place = Place::new();
    place.fetch(daemon.tcp("file.picture"), NO_ARGUMENTS).succeeded();
    fs::write(place.path("ordinary"), "").unwrap();
    let mode = |name| fs::metadata(place.path(name)).unwrap().mode();
    assert_eq!(mode("guido.jpg"), mode("ordinary"));
}

#[test]
fn files_by_name_are_saved_under_their_last_part() {
    let (daemon, _) = daemon();
    let server = daemon.tcp("file.files");
    let place = Place::new();
    place.fetch(server, ["sub/b.txt"]).succeeded();
    assert_eq!(place.names(), ["b.txt"]);
    place.fetch(server, ["a.txt", "sub/deep/c.txt", "large"]).succeeded();
    assert_eq!(place.names(), ["a.txt", "b.txt", "c.txt", "large"]);
    assert_eq!(place.read("a.txt"), b"alpha");
    assert_eq!(place.read("b.txt"), b"beta");
    assert_eq!(place.read("c.txt"), b"");
    assert!(place.read("large") == sample(22, 1_000_000));
    place.fetch(server, ["sub/b.txt", "-o", "mine.txt"]).succeeded();
    assert_eq!(place.read("mine.txt"), b"beta");
    assert_eq!(place.fetch(server, ["sub/b.txt", "-o", "-"]).succeeded().stdout, b"beta");
}

#[test]
fn two_files_with_the_same_last_part_do_not_take_each_other_s_place() {
    let (daemon, _) = daemon();
    fs::write(daemon.path("files/b.txt"), "other").unwrap();
    for force in [&[][..], &["--force"]] {
        let place = Place::new();
        let arguments = [&["sub/b.txt", "b.txt"], force].concat();
        // Both cannot be saved, so it must not look as if they were.
        place.fetch(daemon.tcp("file.files"), arguments).failed_with(&["b.txt"]);
        assert_eq!(place.names(), ["b.txt"]);
    }
}

#[test]
fn two_hundred_small_files_come_in_one_go() {
    let (daemon, _) = daemon();
    let names: Vec<_> = (0..200).map(|number| format!("{number}.txt")).collect();
    for name in &names {
        fs::write(daemon.path("files").join(name), name).unwrap();
    }
    let place = Place::new();
    place.fetch(daemon.tcp("file.files"), &names).succeeded();
    assert_eq!(place.names().len(), 200);
    assert!(names.iter().all(|name| place.read(name) == name.as_bytes()));
    // Over one connection.
    assert_eq!(daemon.wait_for_connections(1).len(), 1);
}

#[test]
fn what_can_be_saved_is_saved_and_everything_else_is_named() {
    let (daemon, _) = daemon();
    let place = Place::new();
    fs::write(place.path("large"), "mine").unwrap();
    let names = ["none-1", "a.txt", "large", "none-2", "sub/b.txt", ".hidden", "sub/deep/c.txt"];
    let outcome = place.fetch(daemon.tcp("file.files"), names);
    outcome.failed_with(&[
        "none-1: the server says: no such file",
        "none-2: the server says: no such file",
        "large: ",
        "is there already",
        ".hidden: ",
    ]);
    assert_eq!(outcome.stderr.lines().filter(|line| line.starts_with("handout: ")).count(), 4);
    assert_eq!(place.names(), ["a.txt", "b.txt", "c.txt", "large"]);
    assert_eq!(place.read("large"), b"mine");
    assert_eq!(place.read("b.txt"), b"beta");
}

#[test]
fn the_list_says_size_time_and_name_of_every_file() {
    let (daemon, _) = daemon();
    let outcome = Place::new().fetch(daemon.tcp("file.files"), ["--list"]);
    let lines: Vec<Vec<_>> =
        outcome.succeeded().text().lines().map(|line| line.split_whitespace().collect()).collect();
    let sizes_and_names: Vec<_> = lines.iter().map(|line| (line[0], line[2])).collect();
    let expected =
        [("5", "a.txt"), ("1000000", "large"), ("4", "sub/b.txt"), ("0", "sub/deep/c.txt")];
    assert_eq!(sizes_and_names, expected);
    assert!(lines.iter().all(|line| line[1].parse::<jiff::Timestamp>().is_ok()), "{lines:?}");
}

#[test]
fn a_list_is_printed_without_what_a_terminal_obeys() {
    let server = Server::replies(|_| {
        r#"{"files":[{"filename":"a\nb\u001b[31m\u202ex","size":7,"modified":"\u0007now"}]}"#
            .to_owned()
            + "\n"
    });
    let outcome = Place::new().fetch(server.address, ["--list"]);
    assert_eq!(outcome.succeeded().text(), "           7 \\u{7}now a\\nb\\u{1b}[31m\\u{202e}x\n");
}

#[test]
fn what_is_no_list_is_refused() {
    for reply in ["", "{}\n", "garbage\n", "{\"files\":3}\n", "[]\n", "{\"files\":[{}]}\n"] {
        let server = Server::sends(reply);
        for arguments in [&["--list"][..], &["--all"]] {
            let place = Place::new();
            place.fetch(server.address, arguments).failed_with(&["no list"]);
            assert!(place.is_empty());
        }
    }
    let server = Server::replies(|_| "{\"error\":\"the list is\\nlong\"}\n".to_owned());
    let outcome = Place::new().fetch(server.address, ["--list"]);
    outcome.failed_with(&["the server says: the list is\\nlong"]);
}

#[test]
fn all_fetches_every_file_with_its_sub_folders() {
    let (daemon, _) = daemon();
    let place = Place::new();
    place.fetch(daemon.tcp("file.files"), ["--all"]).succeeded();
    assert_eq!(place.names(), EVERYTHING);
    assert_eq!(place.read("sub/b.txt"), b"beta");
    assert!(place.read("large") == sample(22, 1_000_000));
    // Also into a folder that is not there yet.
    place.fetch(daemon.tcp("file.files"), ["--all", "-o", "new"]).succeeded();
    assert_eq!(place.read("new/sub/b.txt"), b"beta");
}

#[test]
fn all_leaves_alone_what_is_there_already_and_the_same() {
    let (daemon, _) = daemon();
    let server = daemon.tcp("file.files");
    let place = Place::new();
    place.fetch(server, ["--all"]).succeeded();
    let identity = |name| {
        let metadata = fs::metadata(place.path(name)).unwrap();
        (metadata.ino(), metadata.mtime(), metadata.mtime_nsec())
    };
    let before = EVERYTHING[..2].iter().map(|name| identity(name)).collect::<Vec<_>>();
    for force in [&["--all"][..], &["--all", "--force"]] {
        let outcome = place.fetch(server, force);
        let unchanged = outcome.succeeded().stderr.matches("unchanged").count();
        assert_eq!(unchanged, 4, "{outcome:?}");
        let after = EVERYTHING[..2].iter().map(|name| identity(name)).collect::<Vec<_>>();
        assert_eq!(before, after);
        assert_eq!(place.names(), EVERYTHING);
    }
}

#[test]
fn all_replaces_what_was_changed_here_only_with_force() {
    let (daemon, _) = daemon();
    let server = daemon.tcp("file.files");
    let place = Place::new();
    place.fetch(server, ["--all"]).succeeded();
    // Of the same size, and of another.
    for mine in ["BETA", "mine"] {
        fs::write(place.path("sub/b.txt"), mine).unwrap();
        let outcome = place.fetch(server, ["--all"]);
        outcome.failed_with(&["sub/b.txt: ", "is there already"]);
        assert_eq!(outcome.stderr.matches("unchanged").count(), 3, "{outcome:?}");
        assert_eq!(place.read("sub/b.txt"), mine.as_bytes());
        place.fetch(server, ["--all", "--force"]).succeeded();
        assert_eq!(place.read("sub/b.txt"), b"beta");
        assert_eq!(place.names(), EVERYTHING);
    }
}

#[test]
fn all_takes_no_name_that_leaves_the_folder_and_saves_the_rest() {
    let bad = [
        "../x",
        "/tmp/x",
        "sub/../../x",
        "sub//x",
        "",
        "..",
        ".hidden",
        "sub/.hidden/x",
        "a\\\\b",
        "a\\u0000",
        "\\u202ex",
        "x\\ny",
    ];
    let entries = bad.map(|name| format!("{{\"filename\":\"{name}\",\"size\":1}}")).join(",");
    let list = format!(
        "{{\"files\":[{entries},{{\"filename\":\"sub/good\",\"size\":1,\"modified\":null}}]}}\n"
    );
    let server = Server::replies(move |line| match line {
        "" => list.clone(),
        name => document(name, b"content") + "\n",
    });
    let place = Place::new();
    fs::create_dir(place.path("in")).unwrap();
    let outcome = place.fetch(server.address, ["--all", "-o", "in"]);
    outcome.failed_with(&["\"../x\"", "unsafe file name"]);
    let complaints = outcome.stderr.lines().filter(|line| line.starts_with("handout: "));
    assert_eq!(complaints.count(), bad.len(), "{outcome:?}");
    assert_eq!(place.names(), ["in", "in/sub", "in/sub/good"]);
}

#[test]
fn all_leaves_no_folder_behind_for_a_file_that_was_not_saved() {
    let server = Server::replies(|line| match line {
        "" => "{\"files\":[{\"filename\":\"sub/deep/x\",\"size\":1}]}\n".to_owned(),
        _ => "{\"error\":\"no such file\"}\n".to_owned(),
    });
    let place = Place::new();
    place.fetch(server.address, ["--all"]).failed_with(&["sub/deep/x: ", "no such file"]);
    assert_eq!(place.names(), [""; 0]);
}

#[test]
fn a_reply_with_another_name_than_was_asked_for_is_refused() {
    let server = Server::replies(|_| document("evil.txt", b"evil") + "\n");
    let place = Place::new();
    place.fetch(server.address, ["a.txt"]).failed_with(&["a.txt: ", "evil.txt"]);
    place.fetch(server.address, ["a.txt", "-o", "a.txt"]).failed_with(&["evil.txt"]);
    assert!(place.is_empty());
    // And by a server that never reads what it is asked.
    let server = Server::sends(document("evil.txt", b"evil"));
    place.fetch(server.address, ["a.txt", "b.txt"]).failed_with(&["a.txt: ", "b.txt: "]);
    assert!(place.is_empty());
}

#[test]
fn a_refusal_is_printed_as_one_line() {
    let server = Server::sends("{\"error\":\"no\\u001b[31m\\n\\u202eway\"}\n");
    let place = Place::new();
    let outcome = place.fetch(server.address, NO_ARGUMENTS);
    outcome.failed_with(&["the server says: no\\u{1b}[31m\\n\\u{202e}way\n"]);
    assert_eq!(outcome.stderr.lines().count(), 1);
    assert!(place.is_empty());
}

#[test]
fn documents_are_taken_however_they_are_written() {
    for (text, name, content) in [
        // PHP escapes the slashes of base64; what stands for itself may be escaped, too.
        (r#"{"filename":"a.bin","filedata":"\/\/\/\/"}"#, "a.bin", &b"\xff\xff\xff"[..]),
        (r#"{"filename":"a.bin","filedata":"\u0059WJj"}"#, "a.bin", b"abc"),
        (" {\n \"filedata\" :\t\"YQ==\",\r\n \"filename\":\"a\" }\n", "a", b"a"),
        (r#"{"x":{"y":[1,"{"]},"filename":"a","z":null,"filedata":""}"#, "a", b""),
        (r#"{"filename":"r\u00e9sum\u00e9 \ud83d\ude00","filedata":"YQ=="}"#, "résumé 😀", b"a"),
    ] {
        let server = Server::sends(text);
        let place = Place::new();
        place.fetch(server.address, NO_ARGUMENTS).succeeded();
        assert_eq!(place.names(), [name]);
        assert_eq!(place.read(name), content);
    }
}

#[test]
fn a_document_in_single_bytes_is_taken() {
    let text = document("a.txt", b"some content");
    let server = Server::answers(move |mut stream| {
        stream.set_nodelay(true).unwrap();
        text.bytes().for_each(|byte| stream.write_all(&[byte]).unwrap());
        crate::servers::end(stream);
    });
    let place = Place::new();
    place.fetch(server.address, NO_ARGUMENTS).succeeded();
    assert_eq!(place.read("a.txt"), b"some content");
}

#[test]
fn a_server_that_forgets_to_close_is_not_waited_for() {
    let server = Server::stalls_after(document("a.txt", b"content"));
    let place = Place::new();
    place.fetch(server.address, NO_ARGUMENTS).succeeded();
    assert_eq!(place.read("a.txt"), b"content");
}

#[test]
fn the_tutorial_s_servers_are_understood() {
    let content = sample(23, 100_000);
    let place = Place::new();
    fs::write(place.path("source"), &content).unwrap();
    let source = place.path("source");
    // As it is usually written: the whole document at once, then close.
    for (dump, sending) in [
        ("json.dumps(document).encode()", "conn.sendall(data)"),
        ("json.dumps(document, indent=4).encode('utf-8')", "conn.sendall(data)"),
        ("json.dumps(document).replace('/', '\\\\/').encode()", "conn.sendall(data)"),
    ] {
        let script = format!(
            "
import base64, json, socket
with open({source:?}, 'rb') as f:
    document = {{'filename': 'guido.jpg', 'filedata': base64.b64encode(f.read()).decode()}}
data = {dump}
s = socket.socket()
s.bind(('127.0.0.1', 0))
s.listen()
print(s.getsockname()[1], flush=True)
conn, address = s.accept()
{sending}
conn.close()
"
        );
        let (_python, address) = Python::server(&script);
        place.fetch(address, ["--force"]).succeeded();
        assert!(place.read("guido.jpg") == content, "{dump}");
        fs::remove_file(place.path("guido.jpg")).unwrap();
    }
}

/// Fetches from a server, which must fail with these words and leave nothing behind.
#[track_caller]
fn is_refused(what: &str, server: &Server, arguments: &[&str], words: &[&str]) {
    let place = Place::new();
    for output in [&[][..], &["-o", "mine"]] {
        let outcome = place.fetch(server.address, [arguments, output].concat());
        assert_eq!(outcome.code, Some(1), "{what}: {outcome:?}");
        assert!(outcome.stderr.starts_with("handout: "), "{what}: {outcome:?}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{what}: {outcome:?}");
        assert!(outcome.stderr.len() < 1000, "{what}: {outcome:?}");
        for word in words {
            assert!(outcome.stderr.contains(word), "{what}: no {word:?} in {outcome:?}");
        }
        assert!(place.is_empty(), "{what}: {:?}", place.names());
    }
}

#[test]
fn a_document_that_is_cut_anywhere_is_refused_and_leaves_nothing() {
    let whole = r#"{"filename":"a.txt","size":3,"filedata":"YWJj"}"#;
    let cuts =
        ["", "{", "{\"filena", "\"filename\":", "a.tx", "\"size\":3", "filedata\":\"YWJ", "YWJj\""];
    for cut in cuts {
        let end = whole.find(cut).unwrap() + cut.len();
        let end = if cut.is_empty() { 0 } else { end };
        let words: &[&str] = if end == 0 { &["no document"] } else { &["ends early"] };
        is_refused(cut, &Server::sends(&whole[..end]), &[], words);
        is_refused(cut, &Server::sends_and_resets(&whole[..end]), &[], &[]);
    }
    // Within much data, when a part of it has been written.
    let whole = document("a.txt", &sample(24, 3_000_000));
    for length in [1_000, 262_144, 1_000_001, whole.len() - 2, whole.len() - 1] {
        is_refused("much", &Server::sends(&whole[..length]), &[], &["ends early"]);
        is_refused("much", &Server::sends_and_resets(&whole[..length]), &[], &[]);
    }
}

#[test]
fn a_document_that_is_wrong_is_refused_and_leaves_nothing() {
    let digest_of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let wrong_digest =
        format!(r#"{{"filename":"a","filedata":"YWJj","sha256":"{digest_of_nothing}"}}"#);
    let deep = format!("{{\"x\":{}", "[".repeat(100_000));
    let deep_objects = format!("{{\"x\":{}", "{\"a\":".repeat(100_000));
    for (text, words) in [
        ("hello, world\n", "found 'h'"),
        ("HTTP/1.1 400 Bad Request\r\n\r\n", "found 'H'"),
        ("2026-11-22 13:46:01.123456\n", "found '2'"),
        ("[]", "found '['"),
        ("\u{1b}[31m", "\\x1b"),
        ("{}", "is missing"),
        (r#"{"filename":"a"}"#, "filedata"),
        (r#"{"filedata":"YWJj"}"#, "filename"),
        (r#"{"filename":3,"filedata":"YWJj"}"#, "filename"),
        (r#"{"filename":"a","filedata":null}"#, "filedata"),
        (r#"{"filename":"a","size":4,"filedata":"YWJj"}"#, "promised 4 bytes and sent 3"),
        (r#"{"filename":"a","filedata":"YWJj","size":2}"#, "promised 2 bytes and sent 3"),
        (r#"{"filename":"a","size":-3,"filedata":"YWJj"}"#, "size"),
        (r#"{"filename":"a","size":3.0,"filedata":"YWJj"}"#, "size"),
        (wrong_digest.as_str(), "digest"),
        (r#"{"filename":"a","filedata":"YWJj","sha256":"00"}"#, "sha256"),
        (r#"{"filename":"a","filedata":"YWK"}"#, "incomplete group of base64"),
        (r#"{"filename":"a","filedata":"YR=="}"#, "not canonical base64"),
        (r#"{"filename":"a","filedata":"YQ"}"#, "incomplete group of base64"),
        (r#"{"filename":"a","filedata":"YQ==YQ=="}"#, "after the padding"),
        (r#"{"filename":"a","filedata":"YW\nJj"}"#, "base64"),
        (r#"{"filename":"a","filedata":"YW-_"}"#, "base64"),
        (r#"{"filename":"a","filename":"b","filedata":"YWJj"}"#, "duplicate field"),
        (r#"{"filename":"a","filedata":"YWJj","filedata":"YWJj"}"#, "duplicate field"),
        (r#"{"filename":"a","fi\u006cename":"b","filedata":"YWJj"}"#, "duplicate field"),
        (r#"{"filename":"a","filedata":"YWJj","error":"no"}"#, "error"),
        (r#"{"filename":"\ud800","filedata":"YWJj"}"#, "hex escape"),
        (r#"{"filename":"a","filedata":"YWJj",}"#, "trailing comma"),
        ("{\"filename\":\"a\",\"filedata\":\"YWJj\"}\n\n", "behind the document"),
        ("{\"filename\":\"a\",\"filedata\":\"YWJj\"}\nx", "behind the document"),
        (
            "{\"filename\":\"a\",\"filedata\":\"YWJj\"}\n{\"filename\":\"a\",\"filedata\":\"\"}\n",
            "behind the document",
        ),
        (&deep, "too many nested"),
        (&deep_objects, "too many nested"),
    ] {
        let what = &text[..text.len().min(100)];
        is_refused(what, &Server::sends(text), &[], &[words]);
    }
    is_refused("no UTF-8", &Server::sends(*b"{\"filename\":\"\xff\"}"), &[], &["UTF-8"]);
}

#[test]
fn what_stands_behind_the_document_later_is_refused_too() {
    let server = Server::answers(|mut stream| {
        let _ = stream.write_all(document("a", b"abc").as_bytes());
        thread::park_timeout(Duration::from_millis(300));
        let _ = stream.write_all(b"\n\n");
        crate::servers::end(stream);
    });
    is_refused("later", &server, &[], &["behind the document"]);
}

#[test]
fn a_name_that_would_harm_is_refused_with_the_reason_unless_another_is_chosen() {
    let long = "x".repeat(300);
    for (name, reason) in [
        ("../x", "separator"),
        ("/etc/x", "separator"),
        ("a/b", "separator"),
        ("a\\\\b", "separator"),
        ("", "empty"),
        (".", "folder"),
        ("..", "folder"),
        (".hidden", "hidden"),
        ("x\\u0000", "control"),
        ("a\\nb", "control"),
        ("\\u001b[31mx", "control"),
        ("x\\u009b31m", "control"),
        ("gpj.\\u202eexe", "invisible"),
        ("a\u{200b}b", "invisible"),
        (&long, "longer than 255 bytes"),
    ] {
        // The name before the data, and behind it.
        for text in [
            document(name, b"content"),
            format!("{{\"filedata\":\"Y29udGVudA==\",\"filename\":\"{name}\"}}"),
        ] {
            let server = Server::sends(text);
            let place = Place::new();
            for arguments in [&[][..], &["--force"], &["-o", "."]] {
                let outcome = place.fetch(server.address, arguments);
                // A file called `.x` that leaves the folder may be refused for either.
                if name == "../x" {
                    outcome.failed_with(&["-o"]);
                } else {
                    outcome.failed_with(&[reason, "-o"]);
                }
                let stderr = outcome.stderr.strip_suffix('\n').unwrap();
                assert!(!stderr.chars().any(char::is_control), "{outcome:?}");
                assert!(!stderr.contains(['\u{202e}', '\u{200b}']), "{outcome:?}");
                assert!(place.is_empty(), "{name}: {:?}", place.names());
            }
            place.fetch(server.address, ["-o", "mine"]).succeeded();
            assert_eq!(place.names(), ["mine"]);
            assert_eq!(place.read("mine"), b"content");
        }
    }
}

#[test]
fn a_name_is_printed_so_that_it_can_be_recognised() {
    let server = Server::sends(document("a\\nb\\u202e", b""));
    let outcome = Place::new().fetch(server.address, NO_ARGUMENTS);
    // Escaped once, not twice.
    outcome.failed_with(&["\"a\\nb\\u{202e}\""]);
}

#[test]
fn explains_a_server_that_waits_for_requests_after_two_seconds() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    let config =
        "[file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\nidle-timeout = \"4s\"";
    let daemon = Daemon::start_in(folder, config, |_| {});
    let address = daemon.tcp("file.files");
    let place = Place::new();
    let mut said = place.begin_fetch(address, &[]);
    let mut quiet = place.begin_fetch(address, &["-q"]);
    let notice = format!(
        "handout: {address} sent nothing for 2 s: a folder service waits for requests: try --list \
         or --all\n"
    );
    let (said, quiet) = (said.stderr(), quiet.stderr());
    let error = said.strip_prefix(&notice).unwrap_or_else(|| panic!("{said}"));
    for error in [error, &quiet] {
        assert!(error.starts_with(&format!("handout: {address} sent nothing: ")), "{error}");
        assert!(error.contains("reset") && error.ends_with("try --list or --all\n"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    // A request that is not answered has another cause, and so has an end after some bytes.
    let silent = Server::stalls_after("");
    let begun = Server::stalls_after("{");
    for (server, arguments) in [(&silent, &["--list"][..]), (&silent, &["a.txt"]), (&begun, &[])] {
        let arguments = [arguments, &["--idle-timeout", "3s"]].concat();
        let outcome = place.fetch(server.address, arguments);
        assert!(!outcome.stderr.contains("folder service"), "{outcome:?}");
    }
}

#[test]
fn a_server_that_falls_silent_is_left() {
    let half = &document("a.txt", &[7; 1000])[..500];
    for beginning in ["", half] {
        let server = Server::stalls_after(beginning);
        is_refused("silent", &server, &["--idle-timeout", "300ms"], &["--idle-timeout", "300ms"]);
        is_refused("silent", &server, &["--timeout", "300ms"], &["--timeout", "300ms"]);
    }
    let server = Server::stalls_after("");
    let place = Place::new();
    let outcome = place.fetch(server.address, ["a.txt", "--idle-timeout", "300ms"]);
    outcome.failed_with(&["a.txt: ", "--idle-timeout"]);
    let outcome = place.fetch(server.address, ["--list", "--idle-timeout", "300ms"]);
    outcome.failed_with(&["--idle-timeout"]);
    let outcome = place.fetch(server.address, ["a", "b", "c", "--timeout", "300ms"]);
    outcome.failed_with(&["a: ", "b: ", "c: ", "--timeout"]);
    assert!(place.is_empty());
}

#[test]
fn a_server_that_trickles_for_ever_is_left() {
    let server = Server::answers(|mut stream| {
        stream.set_nodelay(true).unwrap();
        let mut alive = stream.write_all(b"{\"filename\":\"a\",\"filedata\":\"").is_ok();
        while alive {
            thread::park_timeout(Duration::from_millis(50));
            alive = stream.write_all(b"A").is_ok();
        }
    });
    let arguments = ["--timeout", "1s", "--idle-timeout", "30s"];
    is_refused("trickle", &server, &arguments, &["longer than 1s (--timeout)"]);
}

#[test]
fn a_file_that_is_larger_than_max_size_is_refused() {
    let large = document("a", &[0; 1001]);
    for server in
        [Server::sends(large), Server::repeats("{\"filedata\":\"", vec![b'A'; 1 << 20], 1000)]
    {
        is_refused("large", &server, &["--max-size", "1kB"], &["1000"]);
    }
    let server = Server::sends(document("a", &[0; 1000]));
    let place = Place::new();
    place.fetch(server.address, ["--max-size", "1kB"]).succeeded();
    assert_eq!(place.read("a").len(), 1000);
    // What is promised already is too much, and is not waited for.
    let server = Server::stalls_after("{\"filename\":\"a\",\"size\":1001,\"filedata\":\"");
    is_refused("promised", &server, &["--max-size", "1kB"], &["1000"]);
}

/// The peak of a client's memory while it fetches, which must fail.
fn peak_of(server: &Server, arguments: &[&str]) -> u64 {
    let place = Place::new();
    let mut running = place.begin_fetch(server.address, arguments);
    let mut peak = 0;
    eventually("the end of the client", || {
        peak = running.peak().unwrap_or(peak);
        running.child.try_wait().unwrap().is_some()
    });
    assert_eq!(wait_for_exit(&mut running.child).code(), Some(1), "{}", running.stderr());
    assert!(place.is_empty());
    peak
}

#[test]
fn memory_is_bounded_however_much_a_server_sends() {
    let chunk = |text: &str| text.repeat((1 << 20) / text.len()).into_bytes();
    // In MiB. A debug build takes its time for some, so it gets less of them, yet enough to show.
    let mut looked_at = 0;
    let (much, less, least) = if cfg!(debug_assertions) { (200, 30, 8) } else { (200, 200, 200) };
    for (what, beginning, again, times, arguments) in [
        ("a key", "{\"", "k", much, &[][..]),
        ("a name", "{\"filename\":\"", "n", much, &[]),
        ("an escaped name", "{\"filename\":\"", "\\u00e9", much, &[]),
        ("an unknown key's value", "{\"x\":\"", "v", much, &[]),
        ("unknown keys", "{", "\"x\":1,", least, &[]),
        ("an array", "{\"x\":[", "[1,2],", least, &[]),
        ("a number", "{\"size\":", "1", less, &[]),
        ("white space", "", " ", less, &[]),
        ("an error", "{\"error\":\"", "e", much, &[]),
        ("data", "{\"filename\":\"a\",\"filedata\":\"", "AAAA", much, &["--max-size", "100MiB"]),
        ("nameless data", "{\"filedata\":\"", "AAAA", much, &["--max-size", "100MiB"]),
        ("a tail", "{\"filename\":\"a\",\"filedata\":\"\"}", "\n", much, &[]),
    ] {
        let server = Server::repeats(beginning, chunk(again), times);
        let peak = peak_of(&server, arguments);
        assert!(peak < MOST_MEMORY, "{what}: {peak} bytes");
        // One that refuses at once may have gone before anybody looked.
        looked_at += usize::from(peak > 0);
    }
    assert!(looked_at >= 10, "only {looked_at} were seen alive");
}

#[test]
fn memory_is_bounded_however_long_a_list_is() {
    let entries = "{\"filename\":\"a\",\"size\":1},".repeat(40_000).into_bytes();
    let server = Server::repeats("{\"files\":[", entries, 200);
    for arguments in [["--list"], ["--all"]] {
        let peak = peak_of(&server, &arguments);
        // The longest list that is taken has 16 MiB.
        assert!(peak > 0 && peak < MOST_MEMORY + (32 << 20), "{arguments:?}: {peak} bytes");
    }
}

#[test]
fn a_large_file_is_saved_in_little_memory() {
    let (daemon, _) = daemon();
    let content = sample(25, 50_000_000);
    fs::write(daemon.path("files/huge"), &content).unwrap();
    let place = Place::new();
    let mut running = place.begin_fetch(daemon.tcp("file.files"), &["huge"]);
    let mut peak = 0;
    eventually("the end of the client", || {
        peak = running.peak().unwrap_or(peak);
        running.child.try_wait().unwrap().is_some()
    });
    assert_eq!(wait_for_exit(&mut running.child).code(), Some(0), "{}", running.stderr());
    assert!(place.read("huge") == content);
    assert!(peak > 0 && peak < MOST_MEMORY, "{peak} bytes");
}

#[test]
fn a_signal_in_the_middle_leaves_nothing_behind() {
    let half = document("a.txt", &sample(26, 1_000_000));
    let server = Server::stalls_after(&half[..half.len() / 2]);
    for (signal, code, said) in [
        (Signal::INT, Some(1), "handout: interrupted\n"),
        (Signal::TERM, Some(1), "handout: interrupted\n"),
        (Signal::KILL, None, ""),
    ] {
        let place = Place::new();
        let mut running = place.begin_fetch(server.address, &[]);
        // It may have no name in the folder.
        let open = format!("/proc/{}/fd", running.child.id());
        eventually("a file that grows", || {
            let files = fs::read_dir(&open).unwrap().flatten();
            let mut sizes = files.filter_map(|file| Some(fs::metadata(file.path()).ok()?.len()));
            sizes.any(|size| size > 100_000)
        });
        running.signal(signal);
        assert_eq!(wait_for_exit(&mut running.child).code(), code);
        assert_eq!(running.stderr(), said);
        assert!(place.is_empty(), "{:?}", place.names());
    }
}

#[test]
fn a_signal_ends_it_also_when_nobody_reads_its_output() {
    let (daemon, _) = daemon();
    let place = Place::new();
    // A pipe that is full, as with a pager that waits.
    let mut running = place.begin_fetch(daemon.tcp("file.files"), &["large", "-o", "-"]);
    let threads = format!("/proc/{}/task", running.child.id());
    eventually("a pipe that is full", || {
        let waits = |thread: &Path| {
            fs::read_to_string(thread.join("wchan")).is_ok_and(|place| place.contains("pipe"))
        };
        fs::read_dir(&threads).unwrap().any(|thread| waits(&thread.unwrap().path()))
    });
    running.signal(Signal::TERM);
    assert_eq!(wait_for_exit(&mut running.child).code(), Some(1));
}

#[test]
fn a_reader_that_leaves_is_a_failure_and_no_panic() {
    let (daemon, _) = daemon();
    let place = Place::new();
    let mut running = place.begin_fetch(daemon.tcp("file.files"), &["large", "-o", "-"]);
    drop(running.child.stdout.take());
    assert_eq!(wait_for_exit(&mut running.child).code(), Some(1));
    assert!(running.stderr().contains("cannot write standard output"));
}

#[test]
fn a_limit_on_the_size_of_files_leaves_nothing_behind() {
    let (daemon, _) = daemon();
    let place = Place::new();
    let mut command = std::process::Command::new("prlimit");
    command.args(["--fsize=100000", PROGRAM, "fetch"]);
    command.arg(daemon.tcp("file.files").to_string()).args(["large", "a.txt"]);
    command.current_dir(place.path(".")).stdin(std::process::Stdio::null());
    let output = crate::common::run(&mut command);
    assert_eq!(output.status.code(), Some(1), "{output:?}, left behind: {:?}", place.names());
    let outcome = crate::servers::Outcome::of(output);
    outcome.failed_with(&["large: cannot write", "too large"]);
    assert_eq!(place.names(), ["a.txt"]);
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let (daemon, _) = daemon();
    fs::write(daemon.path("files/huge"), sample(27, 3_000_000)).unwrap();
    let place = Place::new();
    let script = "mount -t tmpfs -o size=1m none \"$0\" && cd \"$0\" || exit 99
        timeout 60 \"$1\" fetch \"$2\" huge a.txt
        code=$?
        ls -A
        exit $code";
    let server = daemon.tcp("file.files").to_string();
    let arguments = [place.path("").into_os_string(), PROGRAM.into(), server.into()];
    let arguments: Vec<&OsStr> = arguments.iter().map(AsRef::as_ref).collect();
    let Some(output) = with_mounts(script, &arguments) else { return };
    let outcome = crate::servers::Outcome::of(output);
    outcome.failed_with(&["huge: cannot write", "No space left"]);
    assert_eq!(outcome.text(), "a.txt\n");
}

#[test]
fn a_folder_that_is_not_there_or_not_writable_is_named() {
    let (daemon, _) = daemon();
    let place = Place::new();
    for output in ["none/", "none/file", "/proc/"] {
        let outcome = place.fetch(daemon.tcp("file.picture"), ["-o", output]);
        let folder = output.split('/').find(|part| !part.is_empty()).unwrap();
        outcome.failed_with(&["cannot write", folder]);
    }
    assert!(place.is_empty());
}

#[test]
fn a_server_that_is_not_there_is_named_with_the_cause() {
    let address = nobody();
    let place = Place::new();
    for arguments in [&[][..], &["a.txt"], &["--list"], &["--all"]] {
        let outcome = place.fetch(address, arguments);
        outcome.failed_with(&["cannot connect", &address.to_string(), "refused"]);
        assert!(place.is_empty());
    }
    // Every file that was asked for is named.
    place.fetch(address, ["a.txt", "b.txt"]).failed_with(&["a.txt: ", "b.txt: "]);
}

#[test]
fn a_connection_that_is_lost_costs_one_file_and_not_the_rest() {
    let server = Server::replies(|line| match line {
        // Cut, and the same connection goes on with what cannot be read.
        "bad" => "{\"filename\":\"bad\",\"filedata\":\"YQ=\n".to_owned(),
        name => document(name, name.as_bytes()) + "\n",
    });
    let place = Place::new();
    let outcome = place.fetch(server.address, ["a", "bad", "b", "c"]);
    outcome.failed_with(&["bad: "]);
    assert_eq!(place.names(), ["a", "b", "c"]);
    assert_eq!(place.read("c"), b"c");
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    let address = nobody();
    let place = Place::new();
    for arguments in [
        &["a", "b", "-o", "file"][..],
        &["a", "b", "-o", "-"],
        &["--all", "-o", "-"],
        &["--all", "a"],
        &["--list", "a"],
        &["--list", "--force"],
        &["--max-size", "1"],
        &["--timeout", "0s"],
        &["--timeout", "soon"],
        &["--unknown"],
    ] {
        let outcome = place.fetch(address, arguments);
        assert_eq!(outcome.code, Some(2), "{arguments:?}: {outcome:?}");
        assert!(place.is_empty());
    }
}
