//! The folder protocol: one line asks, one line answers, and nothing leaves the folder.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::common::{Daemon, connect, eventually, read_all, refuse, replace, sample};

fn daemon(keys: &str) -> Daemon {
    daemon_run(keys, |_| {})
}

fn daemon_run(keys: &str, prepare: impl FnOnce(&mut Command)) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("files/sub/deep")).unwrap();
    for (name, content) in [
        ("files/a.txt", "alpha"),
        ("files/sub/b.txt", "beta"),
        ("files/sub/deep/c.txt", ""),
        ("files/.hidden", "hidden"),
        ("outside.txt", "outside"),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
    }
    let config = format!("[file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n{keys}");
    Daemon::start_in(folder, &config, prepare)
}

/// Takes root's right to read everything from the program.
fn without_override(command: &mut Command) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut bounded = Command::new("setpriv");
    bounded.arg("--bounding-set=-dac_override,-dac_read_search");
    bounded.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bounded.env(name, value),
            None => bounded.env_remove(name),
        };
    }
    bounded.stdin(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    *command = bounded;
}

#[test]
fn names_unreadable_files_and_folders_once_and_counts_what_a_list_leaves_out() {
    let mut daemon = daemon_run("", without_override);
    let files = daemon.path("files");
    let mode = |path: &str, mode| {
        fs::set_permissions(files.join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    fs::write(files.join("bad\u{1b}[31m"), "secret").unwrap();
    mode("bad\u{1b}[31m", 0);
    mode("sub/deep", 0);
    symlink("../outside.txt", files.join("link")).unwrap();
    symlink("sub", files.join("folder")).unwrap();
    fs::write(files.join(std::ffi::OsStr::from_bytes(b"\xff")), "").unwrap();
    let mut conversation = Conversation::with(&daemon);
    for _ in 0..2 {
        conversation.ask("\n");
        let refusal = conversation.ask("bad\u{1b}[31m\n");
        assert_eq!(refusal["error"], "the file cannot be read");
    }
    let named = "file.files: cannot read bad\\u{1b}[31m: Permission denied";
    let line = daemon.wait_for_message(named);
    assert_eq!(line["level"], "WARN");
    daemon.wait_for_message("file.files: cannot read sub/deep: Permission denied");
    let line = daemon.wait_for_message("file.files: list leaves out 5 entries");
    let reasons = "(1 hidden, 1 with a name that is not UTF-8, 1 not regular, \
                   1 linked to nothing or out of the folder, 1 unreadable)";
    assert!(line["message"].as_str().unwrap().ends_with(reasons), "{line}");
    mode("bad\u{1b}[31m", 0o600);
    assert_eq!(data(&conversation.ask("bad\u{1b}[31m\n")), b"secret");
    daemon.wait_for_message("file.files: can read bad\\u{1b}[31m again");
    mode("sub/deep", 0o700);
    drop(conversation);
    assert!(daemon.stop().success());
    let lines = daemon.lines();
    let count = |text: &str| lines.iter().filter(|line| crate::common::says(line, text)).count();
    assert_eq!((count("cannot read "), count("list leaves out ")), (2, 1));
}

/// Tries it where the kernel keeps names inside the folder, and where it is not let.
fn with_and_without_openat2(attempt: impl Fn(&Daemon)) {
    attempt(&daemon(""));
    // As older kernels and systemd say it, and as other filters do.
    for error in ["ENOSYS", "EPERM"] {
        let refusals = tempfile::NamedTempFile::new().unwrap();
        attempt(&daemon_run("", |command| refuse(command, "openat2", error, refusals.path())));
        let refusals = fs::read_to_string(refusals.path()).unwrap();
        assert!(refusals.contains("(INJECTED)"), "{refusals}");
    }
}

/// A conversation with the folder service.
struct Conversation {
    stream: TcpStream,
    replies: BufReader<TcpStream>,
}

impl Conversation {
    fn with(daemon: &Daemon) -> Self {
        let stream = connect(daemon.tcp("file.files"));
        let replies = BufReader::new(stream.try_clone().unwrap());
        Self { stream, replies }
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.replies.read_line(&mut line).unwrap();
        if line.is_empty() {
            return None;
        }
        assert!(line.ends_with('\n'));
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")))
    }

    fn ask(&mut self, line: impl AsRef<[u8]>) -> Value {
        self.send(line);
        self.next().unwrap()
    }
}

fn data(reply: &Value) -> Vec<u8> {
    let data = STANDARD.decode(reply["filedata"].as_str().unwrap()).unwrap();
    assert_eq!(reply["size"], data.len());
    let digest = <sha2::Sha256 as sha2::Digest>::digest(&data);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(reply["sha256"], digest);
    data
}

#[test]
fn a_name_gets_one_line_with_everything_about_the_file() {
    let daemon = daemon("");
    let mut line = String::new();
    let mut stream = connect(daemon.tcp("file.files"));
    stream.write_all(b"a.txt\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stream.read_to_string(&mut line).unwrap();
    let metadata = fs::metadata(daemon.path("files/a.txt")).unwrap();
    let modified = jiff::Timestamp::try_from(metadata.modified().unwrap()).unwrap();
    let modified = jiff::Timestamp::from_second(modified.as_second()).unwrap();
    let digest = "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8";
    assert_eq!(
        line,
        format!(
            "{{\"filename\":\"a.txt\",\"size\":5,\"modified\":\"{modified}\",\
             \"filedata\":\"YWxwaGE=\",\"sha256\":\"{digest}\"}}\n"
        )
    );
    let line = daemon.wait_for_connections(1).remove(0);
    assert_eq!(line["outcome"], "complete");
}

#[test]
fn requests_may_be_pipelined_and_are_answered_in_order() {
    let daemon = daemon("");
    let mut conversation = Conversation::with(&daemon);
    // The last has no end of line; the half-close ends it.
    conversation.send("a.txt\r\nsub/b.txt\nnone\nsub/deep/c.txt\na.txt");
    conversation.stream.shutdown(Shutdown::Write).unwrap();
    let replies: Vec<_> = std::iter::from_fn(|| conversation.next()).collect();
    let names: Vec<_> = replies.iter().map(|reply| reply["filename"].as_str().unwrap()).collect();
    assert_eq!(names, ["a.txt", "sub/b.txt", "none", "sub/deep/c.txt", "a.txt"]);
    assert_eq!(replies[2]["error"], "no such file");
    assert_eq!(data(&replies[0]), b"alpha");
    assert_eq!(data(&replies[3]), b"");
    assert_eq!(data(&replies[4]), b"alpha");
}

#[test]
fn an_empty_line_gets_the_list_sorted_and_without_what_is_hidden() {
    with_and_without_openat2(|daemon| {
        symlink("a.txt", daemon.path("files/link.txt")).unwrap();
        symlink("../outside.txt", daemon.path("files/out.txt")).unwrap();
        symlink(".", daemon.path("files/loop")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            daemon.path("files/fifo"),
            rustix::fs::FileType::Fifo,
            0o644.into(),
            0,
        )
        .unwrap();
        for line in ["\n", "\r\n"] {
            let list = Conversation::with(daemon).ask(line);
            let names: Vec<_> = list["files"]
                .as_array()
                .unwrap()
                .iter()
                .map(|entry| entry["filename"].as_str().unwrap())
                .collect();
            assert_eq!(names, ["a.txt", "link.txt", "sub/b.txt", "sub/deep/c.txt"]);
            assert_eq!(list["files"][0]["size"], 5);
        }
    });
}

#[test]
fn the_list_has_its_keys_in_the_order_of_the_contract() {
    let daemon = daemon("");
    let mut conversation = Conversation::with(&daemon);
    conversation.send("\n");
    let mut line = String::new();
    conversation.replies.read_line(&mut line).unwrap();
    let start = "{\"files\":[{\"filename\":\"a.txt\",\"size\":5,\"modified\":\"20";
    assert!(line.starts_with(start), "{line}");
}

#[test]
fn a_list_that_is_too_long_is_refused_and_the_log_says_so() {
    let daemon = daemon("max-files = 2");
    let mut conversation = Conversation::with(&daemon);
    assert_eq!(conversation.ask("\n")["error"], "the list is too long");
    assert_eq!(data(&conversation.ask("a.txt\n")), b"alpha");
    daemon.wait_for_message("max-files");
}

#[test]
fn nothing_outside_the_folder_and_nothing_hidden_exists() {
    with_and_without_openat2(|daemon| {
        let outside = daemon.path("outside.txt");
        symlink("../outside.txt", daemon.path("files/out.txt")).unwrap();
        symlink(&outside, daemon.path("files/absolute.txt")).unwrap();
        symlink("..", daemon.path("files/up")).unwrap();
        symlink("/proc/self/environ", daemon.path("files/environ")).unwrap();
        fs::create_dir(daemon.path("files/.secret")).unwrap();
        fs::write(daemon.path("files/.secret/x"), "x").unwrap();
        let mut conversation = Conversation::with(daemon);
        for name in [
            "../outside.txt",
            "sub/../../outside.txt",
            "sub/../a.txt",
            "./a.txt",
            "/a.txt",
            outside.to_str().unwrap(),
            "/etc/passwd",
            "out.txt",
            "absolute.txt",
            "up/outside.txt",
            "environ",
            ".hidden",
            ".secret/x",
            "sub",
            "sub/",
            "a.txt/",
            "sub//b.txt",
            "..",
            "a.txt\0",
            "\0",
            " a.txt",
            "\u{202e}txt.a",
        ] {
            let reply = conversation.ask(format!("{name}\n"));
            assert_eq!(reply["error"], "no such file", "{name:?}");
            assert_eq!(reply["filename"], name);
        }
    });
}

#[test]
fn a_link_that_stays_inside_works_also_through_hidden_names() {
    with_and_without_openat2(|daemon| {
        // As Kubernetes mounts a ConfigMap.
        fs::create_dir(daemon.path("files/..2026")).unwrap();
        fs::write(daemon.path("files/..2026/mapped.txt"), "mapped").unwrap();
        symlink("..2026", daemon.path("files/..data")).unwrap();
        symlink("..data/mapped.txt", daemon.path("files/mapped.txt")).unwrap();
        symlink("sub", daemon.path("files/linked")).unwrap();
        let mut conversation = Conversation::with(daemon);
        assert_eq!(data(&conversation.ask("mapped.txt\n")), b"mapped");
        assert_eq!(data(&conversation.ask("linked/b.txt\n")), b"beta");
    });
}

#[test]
fn a_fifo_or_a_device_does_not_exist_and_keeps_nobody_waiting() {
    with_and_without_openat2(|daemon| {
        let fifo = daemon.path("files/fifo");
        rustix::fs::mknodat(rustix::fs::CWD, fifo, rustix::fs::FileType::Fifo, 0o644.into(), 0)
            .unwrap();
        let mut conversation = Conversation::with(daemon);
        assert_eq!(conversation.ask("fifo\n")["error"], "no such file");
        assert_eq!(data(&conversation.ask("a.txt\n")), b"alpha");
    });
}

#[test]
fn junk_gets_an_error_and_the_conversation_goes_on() {
    let daemon = daemon("");
    let mut conversation = Conversation::with(&daemon);
    // What a telnet client may say of itself, and bytes that are no text.
    for junk in [&b"\xff\xfd\x03\xff\xfb\x18\r\n"[..], b"caf\xe9\n", b"\xc0\x80\n"] {
        assert_eq!(conversation.ask(junk)["error"], "the name is not UTF-8", "{junk:?}");
    }
    assert_eq!(data(&conversation.ask("a.txt\n")), b"alpha");
}

#[test]
fn an_overlong_line_gets_an_error_and_ends_the_connection() {
    let daemon = daemon("");
    let mut conversation = Conversation::with(&daemon);
    conversation.send("a.txt\n");
    let longest = "x".repeat(4096);
    conversation.send(format!("{longest}\n"));
    conversation.send(vec![b'y'; 1_000_000]);
    assert_eq!(data(&conversation.next().unwrap()), b"alpha");
    assert_eq!(conversation.next().unwrap()["filename"], longest);
    assert_eq!(conversation.next().unwrap()["error"], "a request is longer than 4096 bytes");
    assert!(conversation.next().is_none());
}

#[test]
fn idle_and_total_deadlines_hold_between_requests() {
    for (keys, outcome) in
        [("idle-timeout = \"200ms\"", "idle-timeout"), ("max-duration = \"200ms\"", "max-duration")]
    {
        let daemon = daemon(keys);
        let mut conversation = Conversation::with(&daemon);
        assert_eq!(data(&conversation.ask("a.txt\n")), b"alpha");
        conversation.send("half a na");
        let error = conversation.replies.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(daemon.wait_for_connections(1)[0]["outcome"], outcome);
    }
}

#[test]
fn a_file_that_is_replaced_is_seen_by_the_next_request() {
    for keys in ["", "cache-limit = \"0B\""] {
        let daemon = daemon(keys);
        let mut conversation = Conversation::with(&daemon);
        assert_eq!(data(&conversation.ask("a.txt\n")), b"alpha");
        replace(&daemon.path("files/a.txt"), b"other");
        assert_eq!(data(&conversation.ask("a.txt\n")), b"other");
        // And a folder that takes the place of the other.
        fs::rename(daemon.path("files"), daemon.path("before")).unwrap();
        fs::create_dir(daemon.path("files")).unwrap();
        fs::write(daemon.path("files/a.txt"), b"third").unwrap();
        assert_eq!(data(&conversation.ask("a.txt\n")), b"third");
    }
}

#[test]
fn a_file_that_changes_while_it_is_sent_ends_in_a_reset() {
    let changes: [fn(&fs::File); 2] =
        [|file| file.set_len(1_000).unwrap(), |file| file.set_len(30_000_000).unwrap()];
    for change in changes {
        let daemon = daemon("cache-limit = \"1MB\"");
        let path = daemon.path("files/large");
        fs::write(&path, sample(11, 20_000_000)).unwrap();
        let mut conversation = Conversation::with(&daemon);
        conversation.send("large\n");
        conversation.replies.read_exact(&mut [0; 1000]).unwrap();
        change(&fs::OpenOptions::new().write(true).open(&path).unwrap());
        let error = conversation.replies.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(daemon.wait_for_connections(1)[0]["outcome"], "failed");
    }
}

#[test]
fn a_large_file_to_four_clients_at_a_time_costs_little_memory() {
    let daemon = daemon("");
    let content = sample(12, 50_000_000);
    fs::write(daemon.path("files/large"), &content).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut conversation = Conversation::with(&daemon);
                // Twice, the second time with the digest known.
                for _ in 0..2 {
                    assert!(data(&conversation.ask("large\n")) == content);
                }
            });
        }
    });
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 32 * 1024, "{peak} KiB");
}

#[test]
fn documents_in_memory_are_bounded_by_the_cache_limit() {
    let daemon = daemon("cache-limit = \"4MiB\"");
    for number in 0..64 {
        fs::write(daemon.path(&format!("files/{number}")), sample(number, 1_000_000)).unwrap();
    }
    let (before, _) = daemon.usage();
    // Every client holds another file, and reads only its beginning.
    let clients: Vec<_> = (0..64)
        .map(|number| {
            let mut conversation = Conversation::with(&daemon);
            conversation.send(format!("{number}\n"));
            conversation.replies.read_exact(&mut [0; 100]).unwrap();
            conversation
        })
        .collect();
    let (after, _) = daemon.usage();
    assert!(after < before + 30_000_000, "{before} {after}");
    for (number, mut conversation) in clients.into_iter().enumerate() {
        conversation.stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        conversation.replies.read_to_end(&mut rest).unwrap();
        assert!(rest.ends_with(b"\"}\n"), "{number}");
    }
    eventually("an end of all connections", || daemon.usage().1 < 40);
}

#[test]
fn a_client_that_half_closes_without_a_word_gets_a_clean_end() {
    let mut daemon = daemon("");
    let mut conversation = Conversation::with(&daemon);
    conversation.stream.shutdown(Shutdown::Write).unwrap();
    assert!(conversation.next().is_none());
    drop(conversation);
    assert!(daemon.stop().success());
    // The client took nothing, so the connection has no line.
    let line = daemon.wait_for_message("ended before the client took anything (1 complete");
    assert_eq!(line["unserved"], 1);
}

#[test]
fn a_client_that_never_stops_asking_holds_nobody_up_and_is_ended_in_time() {
    // One event loop, which it could keep to itself.
    let daemon = Daemon::start_with(
        "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n\
         [file.folder]\nlisten = [\"127.0.0.1:0\"]\npath = \".\"\nmax-duration = \"2s\"\n",
        &[],
        |command| {
            let mut one_core = std::process::Command::new("taskset");
            one_core.args(["-c", "0"]).arg(command.get_program()).args(command.get_args());
            one_core.env("TZ", "UTC").stderr(std::process::Stdio::piped());
            *command = one_core;
        },
    );
    let address = daemon.tcp("file.folder");
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = connect(address);
            let mut replies = stream.try_clone().unwrap();
            let reader = std::thread::spawn(move || {
                let mut buffer = [0; 65536];
                while replies.read(&mut buffer).is_ok_and(|read| read > 0) {}
            });
            let writer = std::thread::spawn(move || {
                let requests = b"\xff\n".repeat(32_000);
                while stream.write_all(&requests).is_ok() {}
            });
            (reader, writer)
        })
        .collect();
    while !clients.iter().all(|(reader, writer)| reader.is_finished() && writer.is_finished()) {
        assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    }
    let ended = daemon.wait_for_connections(4);
    assert!(ended.iter().any(|line| line["outcome"] == "max-duration"), "{ended:?}");
}
