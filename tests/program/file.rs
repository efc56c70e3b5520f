//! The file service: versions of a file, files that are too large to hold, files that go.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::symlink;
use std::time::Duration;

use crate::common::{Daemon, connect, decode, eventually, read_all, replace, sample, says};

fn daemon(keys: &str, content: &[u8]) -> Daemon {
    Daemon::start_with(
        &format!("[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n{keys}"),
        &[("picture.jpg", content)],
        |_| {},
    )
}

fn served(daemon: &Daemon) -> Vec<u8> {
    let (name, data) = decode(&read_all(daemon.tcp("file.picture")));
    assert_eq!(name, "picture.jpg");
    data
}

#[test]
fn the_document_ends_with_a_newline_unless_told_otherwise() {
    assert!(read_all(daemon("", b"x").tcp("file.picture")).ends_with(b"\"}\n"));
    assert!(read_all(daemon("newline = false", b"x").tcp("file.picture")).ends_with(b"\"}"));
}

#[test]
fn an_empty_file_is_a_document_too() {
    assert_eq!(served(&daemon("", b"")), b"");
    assert_eq!(served(&daemon("cache-limit = \"0B\"", b"")), b"");
}

#[test]
fn a_file_that_is_replaced_by_rename_is_picked_up() {
    let daemon = daemon("", b"first");
    assert_eq!(served(&daemon), b"first");
    replace(&daemon.path("picture.jpg"), b"second");
    eventually("the second version", || served(&daemon) == b"second");
}

#[test]
fn a_file_that_is_rewritten_in_place_is_picked_up() {
    let daemon = daemon("", b"first");
    fs::write(daemon.path("picture.jpg"), b"again").unwrap();
    eventually("the rewritten version", || served(&daemon) == b"again");
}

#[test]
fn a_file_that_is_written_slowly_is_served_when_it_is_whole() {
    let first = sample(3, 100_000);
    let second = sample(4, 300_000);
    let daemon = daemon("", &first);
    let path = daemon.path("picture.jpg");
    // As tar, install and git do: a new file under the old name, while the old one lives on.
    fs::hard_link(&path, daemon.path("kept.jpg")).unwrap();
    fs::remove_file(&path).unwrap();
    let mut file = fs::File::create(&path).unwrap();
    for piece in second.chunks(20_000) {
        file.write_all(piece).unwrap();
        std::thread::park_timeout(Duration::from_millis(100));
        let now = served(&daemon);
        assert!(now == first || now == second, "{} bytes", now.len());
    }
    eventually("the second version", || served(&daemon) == second);
}

#[test]
fn a_link_that_is_swapped_is_picked_up() {
    let daemon = Daemon::start_with(
        "[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"mounted/picture.jpg\"",
        &[],
        |command| {
            let config = command.get_args().last().unwrap();
            let folder = std::path::Path::new(config).parent().unwrap();
            // As Kubernetes mounts a ConfigMap: the file is a link through a link to a folder.
            for version in ["1", "2"] {
                fs::create_dir(folder.join(version)).unwrap();
                fs::write(folder.join(version).join("picture.jpg"), version).unwrap();
            }
            fs::create_dir(folder.join("mounted")).unwrap();
            symlink("../1", folder.join("mounted/..data")).unwrap();
            symlink("..data/picture.jpg", folder.join("mounted/picture.jpg")).unwrap();
        },
    );
    assert_eq!(served(&daemon), b"1");
    symlink("../2", daemon.path("mounted/..new")).unwrap();
    fs::rename(daemon.path("mounted/..new"), daemon.path("mounted/..data")).unwrap();
    eventually("the second version", || served(&daemon) == b"2");
}

#[test]
fn a_file_that_disappears_goes_on_being_served_and_the_log_says_so_once() {
    let daemon = daemon("", b"first");
    fs::remove_file(daemon.path("picture.jpg")).unwrap();
    let gone = |line: &serde_json::Value| says(line, "cannot be read");
    daemon.wait_for("line about the missing file", gone);
    assert_eq!(served(&daemon), b"first");
    // Several looks later there is still one line, and a file that is back is served.
    let trouble = fs::write(daemon.path("picture.jpg.new"), b"back");
    trouble.unwrap();
    fs::rename(daemon.path("picture.jpg.new"), daemon.path("picture.jpg")).unwrap();
    eventually("the file that is back", || served(&daemon) == b"back");
    daemon.wait_for_message("picture.jpg is back");
    assert_eq!(daemon.lines().iter().filter(|line| gone(line)).count(), 1);
}

#[test]
fn a_connection_keeps_the_version_that_it_began_with() {
    let first = sample(3, 20_000_000);
    for keys in ["", "cache-limit = \"1MB\""] {
        let daemon = daemon(keys, &first);
        let mut slow = connect(daemon.tcp("file.picture"));
        let mut document = vec![0; 1000];
        slow.read_exact(&mut document).unwrap();
        replace(&daemon.path("picture.jpg"), b"second");
        eventually("the second version", || served(&daemon) == b"second");
        slow.read_to_end(&mut document).unwrap();
        assert!(decode(&document).1 == first, "{keys}");
    }
}

#[test]
fn a_file_above_the_cache_limit_is_sent_in_little_memory() {
    let content = sample(4, 100_000_000);
    let daemon = daemon("cache-limit = \"1MiB\"", &content);
    let (before, _) = daemon.usage();
    assert!(before < 40_000_000, "{before}");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(served(&daemon) == content));
        }
    });
    let (after, _) = daemon.usage();
    assert!(after < before + 20_000_000, "{before} {after}");
}

#[test]
fn a_file_that_changes_while_it_is_sent_ends_in_a_reset() {
    let content = sample(5, 20_000_000);
    let changes: [fn(&fs::File); 3] = [
        |file| file.set_len(10_000_000).unwrap(),
        |file| file.set_len(30_000_000).unwrap(),
        |file| {
            std::os::unix::fs::FileExt::write_all_at(file, b"other", 19_000_000).unwrap();
        },
    ];
    for change in changes {
        let daemon = daemon("cache-limit = \"1MB\"", &content);
        let mut slow = connect(daemon.tcp("file.picture"));
        slow.read_exact(&mut [0; 1000]).unwrap();
        let file = fs::OpenOptions::new().write(true).open(daemon.path("picture.jpg")).unwrap();
        change(&file);
        let error = slow.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let line = daemon.wait_for_connections(1).remove(0);
        assert_eq!(line["outcome"], "failed");
        assert!(line["cause"].is_string(), "{line}");
    }
}

#[test]
fn a_name_that_json_must_escape_arrives_as_it_is() {
    let name = "süß \"quoted\"\\ \u{202e}gpj.汇总";
    let daemon = Daemon::start_with(
        &format!("[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = '{name}'"),
        &[(name, b"data")],
        |_| {},
    );
    let document = read_all(daemon.tcp("file.picture"));
    assert_eq!(decode(&document), (name.to_owned(), b"data".to_vec()));
}
