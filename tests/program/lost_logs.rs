//! Logs that nobody takes: no service waits for them, the stop comes in time, and what is lost is
//! counted.

use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{DEADLINE, eventually, program, wait_for_exit};
use crate::mounts::{empty, with_own_mounts};

/// A daemon of which the log is not read here.
struct Silent {
    child: Child,
    folder: TempDir,
}

impl Silent {
    /// Starts it with a log of this format, and waits until it serves.
    fn start(format: &str, prepare: impl FnOnce(&mut Command, &Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("handout.toml");
        let text = format!(
            "[log]\nformat = \"{format}\"\n[time.clock]\nlisten = [\"unix:clock.sock\"]\n\
             [metrics]\nlisten = [\"unix:metrics.sock\"]\n"
        );
        fs::write(&config, text).unwrap();
        let mut command = program();
        command.args(["serve", "--config"]).arg(&config).env("TZ", "UTC").stderr(Stdio::null());
        prepare(&mut command, folder.path());
        let child = command.spawn().unwrap();
        let silent = Self { child, folder };
        eventually("the socket", || silent.connect("metrics").is_ok());
        silent
    }

    fn connect(&self, service: &str) -> std::io::Result<UnixStream> {
        let stream = UnixStream::connect(self.folder.path().join(format!("{service}.sock")))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(stream)
    }

    /// Asks for the time so often, which is a line each.
    fn ask(&self, times: u32) {
        for _ in 0..times {
            let mut reply = Vec::new();
            self.connect("clock").unwrap().read_to_end(&mut reply).unwrap();
            assert_eq!(reply.len(), 27);
        }
    }

    /// How many lines it says were lost.
    fn lost(&self) -> u64 {
        self.metric("handout_log_lines_lost_total")
    }

    fn metric(&self, name: &str) -> u64 {
        let mut stream = self.connect("metrics").unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        let mut lines = reply.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap().parse().unwrap()
    }

    /// Reloads it five times, with clients in between.
    fn reload_five_times(&self) {
        const DONE: &str = "handout_reloads_total{outcome=\"done\"}";
        for number in 1..=5 {
            kill_process(Pid::from_child(&self.child), Signal::HUP).unwrap();
            eventually("the end of the reload", || self.metric(DONE) == number);
            self.ask(20);
        }
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(wait_for_exit(&mut self.child).success());
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_full_disk_costs_lines_and_nothing_else_and_the_log_goes_on_when_there_is_room() {
    with_own_mounts(|| {
        let disk = tempfile::tempdir().unwrap();
        empty(disk.path(), c"size=1m");
        let others = disk.path().join("others");
        fs::write(&others, vec![b'x'; 960 << 10]).unwrap();
        let log = disk.path().join("log");
        let daemon = Silent::start("json", |command, _| {
            command.stderr(File::options().append(true).create(true).open(&log).unwrap());
        });
        daemon.ask(1_500);
        eventually("lines to be lost", || daemon.lost() > 0);
        fs::remove_file(&others).unwrap();
        eventually("the log to go on", || {
            daemon.ask(1);
            fs::read_to_string(&log)
                .is_ok_and(|text| text.contains("lost: the log's reader is too slow or gone"))
        });
        daemon.stop();
        // Every line is whole, also where it was interrupted.
        for line in fs::read_to_string(&log).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            assert!(line["message"].is_string());
        }
    });
}

#[test]
fn a_reader_of_the_log_that_goes_away_takes_nobody_with_it() {
    let mut daemon = Silent::start("text", |command, _| {
        command.stderr(Stdio::piped());
    });
    drop(daemon.child.stderr.take());
    daemon.ask(1_000);
    eventually("lines to be lost", || daemon.lost() > 0);
    daemon.stop();
}

#[test]
fn a_closed_standard_error_is_no_fault() {
    let daemon = Silent::start("text", |command, folder| {
        let mut closing = Command::new("sh");
        closing.args(["-c", "exec \"$0\" \"$@\" <&- >&- 2>&-"]).arg(command.get_program());
        closing.args(command.get_args()).env("TZ", "UTC").env_remove("NOTIFY_SOCKET");
        closing.current_dir(folder);
        *command = closing;
    });
    daemon.ask(100);
    daemon.stop();
}

#[test]
fn a_journal_that_hangs_keeps_no_service_waiting_and_gets_every_field_when_it_answers() {
    with_own_mounts(|| {
        empty("/run", c"");
        fs::create_dir_all("/run/systemd/journal").unwrap();
        let journal = UnixDatagram::bind("/run/systemd/journal/socket").unwrap();
        journal.set_read_timeout(Some(DEADLINE)).unwrap();
        let daemon = Silent::start("journald", |_, _| {});
        // Of these, it takes as many as the kernel queues: ten, or some hundreds.
        daemon.ask(2_000);
        let mut entry = vec![0; 64 << 10];
        let line = loop {
            let length = journal.recv(&mut entry).unwrap();
            let line = String::from_utf8_lossy(&entry[..length]).into_owned();
            if line.contains("time.clock: unix") {
                break line;
            }
        };
        for (name, value) in [
            ("PRIORITY", "6"),
            ("SYSLOG_IDENTIFIER", "handout"),
            ("SERVICE", "time.clock"),
            ("BYTES", "27"),
            ("OUTCOME", "complete"),
        ] {
            let length = char::from(u8::try_from(value.len()).unwrap());
            let field = format!("{name}\n{length}\0\0\0\0\0\0\0{value}\n");
            assert!(line.contains(&field), "{name}: {line:?}");
        }
        daemon.stop();
    });
}

/// A pipe that takes nothing more, as its reader does not read.
fn full_pipe() -> (PipeReader, OwnedFd) {
    let (reader, mut writer) = io::pipe().unwrap();
    ioctl_fionbio(&writer, true).unwrap();
    for piece in [4096, 1] {
        while writer.write(&vec![b'x'; piece]).is_ok() {}
    }
    ioctl_fionbio(&writer, false).unwrap();
    (reader, writer.into())
}

#[test]
fn serves_reloads_and_stops_while_standard_error_and_output_are_full() {
    let (_reader, full) = full_pipe();
    let daemon = Silent::start("text", |command, _| {
        command.stdout(full.try_clone().unwrap()).stderr(full);
    });
    daemon.reload_five_times();
    // More than waits: the stop finds a full queue.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| daemon.ask(3_000));
        }
    });
    daemon.stop();
}

#[test]
fn serves_reloads_and_stops_while_the_journal_is_not_read() {
    with_own_mounts(|| {
        empty("/run", c"");
        fs::create_dir_all("/run/systemd/journal").unwrap();
        let _journal = UnixDatagram::bind("/run/systemd/journal/socket").unwrap();
        let daemon = Silent::start("journald", |_, _| {});
        daemon.ask(1_000);
        daemon.reload_five_times();
        daemon.stop();
    });
}

#[test]
fn a_failed_start_ends_while_standard_error_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("handout.toml");
    for (text, code) in
        [("[time.clock]\nlisten = 1\n", 78), ("[time.clock]\nlisten = [\"unix:no/x\"]\n", 1)]
    {
        fs::write(&config, text).unwrap();
        let (_reader, full) = full_pipe();
        let mut command = program();
        let mut child =
            command.args(["serve", "--config"]).arg(&config).stderr(full).spawn().unwrap();
        assert_eq!(wait_for_exit(&mut child).code(), Some(code), "{text}");
    }
}
