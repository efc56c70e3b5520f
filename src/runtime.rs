//! The event loops: one for each processor core that this process may use, each in a thread of its
//! own. A connection stays with the loop that accepted it, so that nothing is handed from core to
//! core and no loop wakes another.

use std::io;
use std::num::NonZeroUsize;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How many threads may do what keeps a thread waiting, for all loops together: for mirrors and
/// clients, which write files and look up names. Services have their own ([`crate::fs::blocking_pool`]).
const MAX_WAITING: usize = 256;

/// How long one that hangs in the file system may delay the end of a loop.
pub(crate) const END_TIME: Duration = Duration::from_millis(100);

/// A runtime that is one event loop.
///
/// # Errors
/// If the kernel gives it none.
pub(crate) fn event_loop() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads((MAX_WAITING / cores()).max(8))
        .build()
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Every event loop. Dropped, it ends those that it has started.
#[derive(Debug)]
pub(crate) struct Workers {
    loops: Vec<Handle>,
    _started: Vec<EventLoop>,
}

impl Workers {
    /// Starts a loop for each core but one: the first is the caller's.
    ///
    /// # Errors
    /// If a thread or its loop cannot be had.
    pub(crate) fn start() -> io::Result<Self> {
        let started = (1..cores()).map(|number| EventLoop::start(&format!("worker-{number}")));
        let started = started.collect::<io::Result<Vec<_>>>()?;
        let others = started.iter().map(|other| other.handle.clone());
        Ok(Self {
            loops: [Handle::current()].into_iter().chain(others).collect(),
            _started: started,
        })
    }

    /// The loops; the first is that of the thread that has started the others.
    pub(crate) fn loops(&self) -> &[Handle] {
        &self.loops
    }
}

/// A thread with an event loop of its own. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct EventLoop {
    /// Where tasks are started.
    pub handle: Handle,
    _end: DropGuard,
}

impl EventLoop {
    /// Starts a thread with this name.
    ///
    /// # Errors
    /// If the thread or its loop cannot be had.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = event_loop()?;
        let (end, handle) = (CancellationToken::new(), runtime.handle().clone());
        let ended = end.clone();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(ended.cancelled());
            runtime.shutdown_timeout(END_TIME);
        })?;
        Ok(Self { handle, _end: end.drop_guard() })
    }
}

/// Returns when each of these loops has turned.
pub(crate) async fn turn(loops: &[Handle]) {
    for event_loop in loops {
        // It fails only at the end of the process.
        let _ = event_loop.spawn(async {}).await;
    }
}
