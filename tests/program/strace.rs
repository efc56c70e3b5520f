//! A tracer that is attached to a daemon that runs: it counts the daemon's system calls, or makes
//! the kernel refuse them.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Daemon, eventually, wait_for_exit};

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
        let child = Command::new("strace")
            .args(["-f", "-qq", "-e", "signal=none", "-o"])
            .arg(&trace)
            .args(arguments)
            .args(["-p", &pid])
            .spawn()
            .unwrap();
        let tasks = format!("/proc/{pid}/task");
        let traced = |task: fs::DirEntry| {
            // One that has ended meanwhile is not missed.
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        };
        eventually("strace to be attached to every thread", || {
            fs::read_dir(&tasks).unwrap().flatten().all(traced)
        });
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
