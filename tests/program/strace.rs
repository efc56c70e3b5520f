//! A tracer that is attached to a daemon that runs: it counts the daemon's system calls, or makes
//! the kernel refuse them.

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
    /// Attaches it to every thread of the daemon, with these arguments.
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
        // strace reports new threads, too; a full pipe would stop it.
        thread::spawn(move || messages.for_each(drop));
        Self { child, trace }
    }

    /// What it has seen so far, a line for each call.
    pub fn seen(&self) -> String {
        fs::read_to_string(&self.trace).unwrap_or_default()
    }

    /// Lets the daemon go on as before, and returns what was seen.
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
