//! Cores and processes, with their processor time and memory.

use std::fmt;
use std::fs;
use std::io;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::ClockId;
use nix::unistd::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::Result;

/// Interval between two checks of a running process.
const LOOK: Duration = Duration::from_millis(5);

/// The cores of servers and clients; the same one on a machine with a single core.
pub struct Cores {
    all: CpuSet,
    server: Option<usize>,
    clients: Option<usize>,
}

impl Cores {
    /// Gives the servers the last core, because the first usually handles interrupts, and this
    /// thread the core of the clients.
    pub fn choose() -> io::Result<Self> {
        let all = sched_getaffinity(None)?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| all.is_set(*core));
        let (first, last) = (cores.next(), cores.next_back());
        let cores = Self { all, server: last, clients: last.and(first) };
        pin(cores.clients)?;
        Ok(cores)
    }

    /// Runs `action` on the core of the servers, which started processes and threads inherit.
    pub fn as_server<T>(&self, act: impl FnOnce() -> T) -> io::Result<T> {
        pin(self.server)?;
        let done = act();
        pin(self.clients)?;
        Ok(done)
    }

    /// Moves this thread to the core of the clients.
    pub fn join_clients(&self) -> io::Result<()> {
        pin(self.clients)
    }

    /// Runs `action` on any core.
    pub fn anywhere<T>(&self, act: impl FnOnce() -> T) -> io::Result<T> {
        sched_setaffinity(None, &self.all)?;
        let done = act();
        pin(self.clients)?;
        Ok(done)
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.server, self.clients) {
            (Some(server), Some(clients)) => {
                write!(f, "servers on core {server}, clients on core {clients}")
            }
            _ => f.write_str("servers and clients on the same core"),
        }
    }
}

/// Pins this thread and everything started later to one core.
fn pin(core: Option<usize>) -> io::Result<()> {
    let Some(core) = core else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

/// A process that is killed on drop.
pub struct Server(pub Child);

impl Server {
    pub fn start(command: &mut Command) -> io::Result<Self> {
        command.spawn().map(Self)
    }

    /// Returns the processor time including ended threads.
    pub fn processor_time(&self) -> io::Result<Duration> {
        let id = Pid::from_raw(self.0.id().cast_signed());
        read(ClockId::pid_cpu_clock_id(id)?)
    }

    /// Returns a memory field of `/proc/PID/status`, in bytes.
    pub fn memory(&self, field: &str) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        kibibytes(&status, field).map(|size| size * 1024.0).ok_or("no such memory".into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails if the process has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The cost of a process.
pub struct Taken {
    pub wall: Duration,
    pub processor: Duration,
    /// Peak resident memory in bytes, without child processes.
    pub peak: f64,
}

pub fn finish(command: &mut Command) -> Result<Taken> {
    let before = time_of_children()?;
    let start = Instant::now();
    let mut child = command.spawn()?;
    let status_file = format!("/proc/{}/status", child.id());
    let mut peak = 0.0;
    let status = loop {
        // The peak cannot be read after the end.
        let status = fs::read_to_string(&status_file).unwrap_or_default();
        peak = kibibytes(&status, "VmHWM").map_or(0.0, |size| size * 1024.0).max(peak);
        match child.try_wait()? {
            Some(status) => break status,
            None => thread::sleep(LOOK),
        }
    };
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    let processor = time_of_children()?.saturating_sub(before);
    Ok(Taken { wall: start.elapsed(), processor, peak })
}

fn time_of_children() -> io::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros).unwrap_or(0)))
}

fn kibibytes(status: &str, field: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Returns the processor time of this process including ended threads.
pub fn own_processor_time() -> io::Result<Duration> {
    read(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// Returns the processor time of `action` in this thread.
pub fn time_of_thread<T>(act: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let before = read(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    std::hint::black_box(act()?);
    Ok(read(ClockId::CLOCK_THREAD_CPUTIME_ID)?.saturating_sub(before))
}

fn read(clock: ClockId) -> io::Result<Duration> {
    Ok(clock.now()?.into())
}
