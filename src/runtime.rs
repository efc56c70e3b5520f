//! Event loops: one single-threaded runtime per available core. A connection is served by the loop
//! that accepted it, so loops neither share work nor wake each other.

use std::io;
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Blocking threads of all loops together, for the file writes and name lookups of mirrors and
/// clients. Services use [`crate::fs::blocking_pool`].
const MAX_BLOCKING_THREADS: usize = 256;

/// Maximum delay of the shutdown of a loop by a thread that hangs in the file system.
pub(crate) const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// Creates a runtime that runs on the calling thread.
pub(crate) fn event_loop() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads((MAX_BLOCKING_THREADS / cores()).max(8))
        .build()
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// The event loops that serve connections. Dropping it ends the loops that it started.
#[derive(Debug)]
pub(crate) struct Workers {
    loops: Vec<Handle>,
    _started: Vec<EventLoop>,
}

impl Workers {
    /// Starts a loop for each core but one: the first loop is the caller's.
    pub(crate) fn start() -> io::Result<Self> {
        let started = (1..cores()).map(|number| EventLoop::start(&format!("worker-{number}")));
        let started = started.collect::<io::Result<Vec<_>>>()?;
        let others = started.iter().map(|other| other.handle.clone());
        Ok(Self {
            loops: [Handle::current()].into_iter().chain(others).collect(),
            _started: started,
        })
    }

    /// Returns all loops; the first is that of the caller of [`Workers::start`].
    pub(crate) fn loops(&self) -> &[Handle] {
        &self.loops
    }
}

/// A thread that runs an event loop until this handle is dropped.
#[derive(Debug)]
pub(crate) struct EventLoop {
    pub handle: Handle,
    _end: DropGuard,
}

impl EventLoop {
    /// Starts the thread `name`.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = event_loop()?;
        let (end, handle) = (CancellationToken::new(), runtime.handle().clone());
        let ended = end.clone();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(ended.cancelled());
            runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
        })?;
        Ok(Self { handle, _end: end.drop_guard() })
    }
}

/// Waits until each loop has run a task.
pub(crate) async fn turn(loops: &[Handle]) {
    for event_loop in loops {
        // An error means that the process is ending.
        let _ = event_loop.spawn(async {}).await;
    }
}
