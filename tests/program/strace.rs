//! Attaches strace(1) to a running daemon to count its system calls or let them fail.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Daemon, wait_for_exit};

pub struct Strace {
    child: Child,
    trace: PathBuf,
}

impl Strace {
    /// Attaches strace to every thread of the daemon.
    pub fn attach<A: AsRef<std::ffi::OsStr>>(
        daemon: &Daemon,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        let (pid, trace) = (daemon.child.id().to_string(), daemon.path("trace"));
        let mut child = Command::new("strace")
            .args(["-f", "-e", "quiet=exit,personality", "-e", "signal=none", "-o"])
            .arg(&trace)
            .args(arguments)
            .args(["-p", &pid])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // strace reports this after it has interrupted every thread. `TracerPid` in /proc is set
        // before: a thread may still make system calls that strace does not see.
        let mut messages = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let attached = messages.find(|line| line.contains(" attached"));
        assert!(attached.is_some(), "strace ended");
        // strace reports new threads, and a full pipe would block it.
        thread::spawn(move || messages.for_each(drop));
        Self { child, trace }
    }

    /// Returns the trace so far, one line per call.
    pub fn seen(&self) -> String {
        fs::read_to_string(&self.trace).unwrap_or_default()
    }

    /// Detaches from the daemon and returns the trace.
    pub fn detach(mut self) -> String {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        wait_for_exit(&mut self.child);
        self.seen()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
