//! The log: text and JSON, one line for each connection, nothing that a terminal would obey.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Daemon, PROGRAM, connect};

#[test]
fn a_connection_leaves_one_flat_line_with_its_five_fields() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\"]");
    let mut stream = connect(daemon.tcp("time.clock"));
    let peer = stream.local_addr().unwrap().to_string();
    stream.read_to_end(&mut Vec::new()).unwrap();
    drop(stream);
    let line = daemon.wait_for_connections(1).remove(0);
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["service"], "time.clock");
    assert_eq!(line["peer"], peer.as_str());
    assert_eq!(line["bytes"], 27);
    assert_eq!(line["outcome"], "complete");
    assert!(line["duration"].as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds)));
    assert!(line["timestamp"].is_string());
}

#[test]
fn text_lines_escape_control_characters() {
    let name = "pic\n\x1b[31mture\u{9b}.jpg";
    let mut daemon = Daemon::start_with(
        &format!(
            "[log]\nformat = \"text\"\n[file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = {}",
            serde_json::Value::from(name)
        ),
        &[(name, b"x")],
        |_| {},
    );
    std::fs::remove_file(daemon.path(name)).unwrap();
    daemon.wait_for("line about the file", |line| {
        line.as_str().is_some_and(|line| line.contains("cannot be read"))
    });
    assert!(daemon.stop().success());
    for line in daemon.lines() {
        let line = line.as_str().unwrap().to_owned();
        assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
    }
}

#[test]
fn text_lines_escape_control_characters_of_addresses_too() {
    let daemon = Daemon::start_with(
        "[log]\nformat = \"text\"\n[time.clock]\nlisten = [\"unix:a\\u001b[31mb\\nc.sock\"]",
        &[],
        |_| {},
    );
    for line in daemon.lines() {
        let line = line.as_str().unwrap().to_owned();
        assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
    }
}

#[test]
fn a_log_that_nobody_reads_keeps_no_service_waiting() {
    let mut daemon = Daemon::start_with(
        "[log]\nformat = \"text\"\n[time.clock]\nlisten = [\"unix:clock.sock\", \"127.0.0.1:0\"]",
        &[],
        |_| {},
    );
    // The same once more, with a standard error that takes little and is never read.
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    assert!(daemon.stop().success());
    let mut command = crate::common::program();
    command.args(["serve", "--config"]).arg(folder.path().join("handout.toml"));
    let mut child = command.env("TZ", "UTC").stderr(Stdio::piped()).spawn().unwrap();
    let socket = folder.path().join("clock.sock");
    crate::common::eventually("the socket", || UnixStream::connect(&socket).is_ok());
    // A pipe takes 64 KiB: some hundreds of lines.
    for _ in 0..2_000 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(crate::common::DEADLINE)).unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        assert_eq!(reply.len(), 27);
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(crate::common::wait_for_exit(&mut child).success());
}

/// What a daemon logs to a terminal until it is ready.
fn shown_on_a_terminal(no_color: Option<&str>) -> String {
    // The shell says which process it becomes, so that it can be ended.
    let line = format!("echo $$; exec {PROGRAM} serve --time 127.0.0.1:0");
    let mut command = Command::new("script");
    command
        .args(["--quiet", "--command", &line, "/dev/null"])
        .env("TERM", "xterm")
        .env("TZ", "UTC");
    command.env_remove("NO_COLOR").env_remove("JOURNAL_STREAM").env_remove("NOTIFY_SOCKET");
    command.envs(no_color.map(|value| ("NO_COLOR", value)));
    let mut terminal = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(terminal.stdout.take().unwrap()).lines().map(Result::unwrap);
    let process: i32 = lines.next().unwrap().trim().parse().unwrap();
    let mut shown = String::new();
    for line in lines.by_ref() {
        shown += &line;
        if line.contains("ready: ") {
            break;
        }
    }
    kill_process(Pid::from_raw(process).unwrap(), Signal::TERM).unwrap();
    lines.for_each(drop);
    terminal.wait().unwrap();
    shown
}

#[test]
fn on_a_terminal_there_is_colour_unless_it_is_not_wanted() {
    assert!(shown_on_a_terminal(None).contains("\u{1b}["));
    // An empty value is none.
    assert!(shown_on_a_terminal(Some("")).contains("\u{1b}["));
    let shown = shown_on_a_terminal(Some("1"));
    assert!(shown.contains("listening on") && !shown.contains('\u{1b}'), "{shown:?}");
}

#[test]
fn text_is_for_people_and_without_colour_where_nobody_looks() {
    let daemon = Daemon::start_with(
        "[log]\nformat = \"auto\"\n[time.clock]\nlisten = [\"127.0.0.1:0\"]",
        &[],
        |_| {},
    );
    let line = daemon
        .wait_for("listening", |line| line.as_str().is_some_and(|line| line.contains("listening")));
    let line = line.as_str().unwrap();
    assert!(line.contains(" INFO time.clock: listening on 127.0.0.1:"), "{line}");
}

#[test]
fn a_level_silences_what_is_below_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("handout.toml");
    let socket = folder.path().join("clock.sock");
    std::fs::write(
        &config,
        "[log]\nlevel = \"error\"\n[time.clock]\nlisten = [\"unix:clock.sock\"]",
    )
    .unwrap();
    let mut command = crate::common::program();
    command.args(["serve", "--config"]).arg(config).stderr(Stdio::piped());
    let mut child = command.env("TZ", "UTC").spawn().unwrap();
    crate::common::eventually("the socket", || {
        std::os::unix::net::UnixStream::connect(&socket).is_ok()
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(crate::common::wait_for_exit(&mut child).success());
    let mut log = String::new();
    child.stderr.unwrap().read_to_string(&mut log).unwrap();
    assert_eq!(log, "");
}
