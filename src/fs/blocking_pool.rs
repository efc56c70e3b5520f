//! Threads for file operations, which may block for ever if a network file system hangs.
//!
//! Each service has its own pool, and each name within it a share, so a hanging file takes no
//! thread from other services and few from other files. Without threads the operation fails, and
//! only that one; tokio's pool would panic.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

/// Maximum number of threads per pool.
const MAX_THREADS: usize = 64;

/// Maximum number of threads per name.
const MAX_PER_NAME: usize = 8;

/// Time after which an idle thread ends. Longer than a second, the checks of files, one per second,
/// would keep the threads of one busy moment for ever.
const IDLE: Duration = Duration::from_millis(200);

/// Time after which an operation is reported as slow.
const SLOW: Duration = Duration::from_secs(5);

/// Cause in messages about an operation that does not return.
pub(crate) const UNANSWERED: &str = "its file system does not answer";

type Job = Box<dyn FnOnce() + Send>;

/// The threads of one service. They start on demand and end when idle.
#[derive(Debug)]
pub(crate) struct BlockingPool {
    permits: Arc<Semaphore>,
    /// Permits by name; unused ones are removed when the map has doubled.
    names: Mutex<HashMap<Arc<str>, Arc<Semaphore>>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    job_added: Condvar,
}

#[derive(Default)]
struct State {
    /// Jobs with permits, so at most [`MAX_THREADS`].
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Default for BlockingPool {
    fn default() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(MAX_THREADS)),
            names: Mutex::default(),
            shared: Arc::default(),
        }
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl BlockingPool {
    /// Runs `operation` in a thread. It is cancelled if this future is dropped before it starts.
    ///
    /// # Errors
    /// If there is no thread and none can be created, or the operation panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        name: &str,
        operation: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let acquire = async |semaphore: Arc<Semaphore>| {
            semaphore.acquire_owned().await.expect("the semaphore is never closed")
        };
        // Held until the operation returns, which may be after this future was dropped.
        let permits = (acquire(self.name_permits(name)).await, acquire(self.permits.clone()).await);
        let (sender, receiver) = oneshot::channel();
        self.shared.add(Box::new(move || {
            let _permits = permits;
            let _ = sender.send(operation());
        }))?;
        receiver.await.map_err(|_| io::Error::other("the file operation panicked"))
    }

    fn name_permits(&self, name: &str) -> Arc<Semaphore> {
        let mut names = self.names.lock();
        if let Some(permits) = names.get(name) {
            return Arc::clone(permits);
        }
        // At each doubling, so that removal costs each new name a constant time.
        if names.len().is_power_of_two() {
            names.retain(|_, permits| Arc::strong_count(permits) > 1);
        }
        let permits = Arc::new(Semaphore::new(MAX_PER_NAME));
        names.insert(name.into(), Arc::clone(&permits));
        permits
    }
}

impl Shared {
    fn add(self: &Arc<Self>, job: Job) -> io::Result<()> {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        // A job returns its permits just before its thread is idle: with all threads started, one
        // of them is about to take this job.
        if state.idle >= state.jobs.len() || state.threads == MAX_THREADS {
            self.job_added.notify_one();
            return Ok(());
        }
        let shared = Arc::clone(self);
        match thread::Builder::new().name("reader".to_owned()).spawn(move || shared.work()) {
            Ok(_) => state.threads += 1,
            // An existing thread takes the job later.
            Err(_) if state.threads > 0 => {}
            Err(error) => {
                state.jobs.pop_back();
                return Err(error);
            }
        }
        Ok(())
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // The caller gets an error; the panic hook has logged the message.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.state.lock();
                continue;
            }
            state.idle += 1;
            let wait = self.job_added.wait_for(&mut state, IDLE);
            state.idle -= 1;
            if wait.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

/// Waits for an operation, and calls `report` if it takes longer than [`SLOW`].
pub(crate) async fn if_slow<T>(operation: impl Future<Output = T>, report: impl FnOnce()) -> T {
    let mut operation = pin!(operation);
    if let Ok(output) = timeout(SLOW, &mut operation).await {
        return output;
    }
    report();
    operation.await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// An operation that blocks until the sender of the channel is dropped.
    fn blocks(until: mpsc::Receiver<()>) -> impl FnOnce() + Send + 'static {
        move || until.recv().unwrap_or_default()
    }

    /// Occupies `count` threads for `name` until the returned senders are dropped.
    fn occupy(
        pool: &Arc<BlockingPool>,
        name: &str,
        count: usize,
    ) -> (Vec<mpsc::Sender<()>>, Vec<tokio::task::JoinHandle<io::Result<()>>>) {
        (0..count)
            .map(|_| {
                let (end, until) = mpsc::channel();
                let (pool, name) = (Arc::clone(pool), name.to_owned());
                (end, tokio::spawn(async move { pool.run(&name, blocks(until)).await }))
            })
            .unzip()
    }

    async fn yield_often() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn cancelled_operations_take_no_memory() {
        let pool = Arc::new(BlockingPool::default());
        let names = MAX_THREADS / MAX_PER_NAME;
        let busy: Vec<_> =
            (0..names).map(|name| occupy(&pool, &name.to_string(), MAX_PER_NAME)).collect();
        yield_often().await;
        for number in 0..1000 {
            for name in ["0".to_owned(), format!("{number}other")] {
                let run = timeout(Duration::ZERO, pool.run(&name, || ()));
                assert!(run.await.is_err());
            }
        }
        assert!(pool.shared.state.lock().jobs.is_empty());
        assert!(pool.names.lock().len() < 1 << 8);
        drop(busy);
    }

    #[tokio::test]
    async fn leaves_threads_for_other_names_than_a_blocked_one() {
        let pool = Arc::new(BlockingPool::default());
        let (ends, tasks) = occupy(&pool, "blocked", MAX_THREADS * 2);
        yield_often().await;
        assert_eq!(pool.run("other", || 7).await.unwrap(), 7);
        assert!(pool.shared.state.lock().threads <= MAX_PER_NAME + 1);
        drop(ends);
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(pool.permits.available_permits(), MAX_THREADS);
    }

    #[tokio::test]
    async fn runs_everything_with_a_bounded_number_of_threads() {
        let pool = Arc::new(BlockingPool::default());
        let tasks: Vec<_> = (0..1000)
            .map(|number| {
                let pool = Arc::clone(&pool);
                tokio::spawn(async move {
                    pool.run(&(number % 50).to_string(), move || number).await.unwrap()
                })
            })
            .collect();
        for (number, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await.unwrap(), number);
            assert!(pool.shared.state.lock().threads <= MAX_THREADS);
        }
    }

    #[tokio::test]
    async fn reports_panics_as_errors_and_runs_the_next_operation() {
        let pool = BlockingPool::default();
        for _ in 0..MAX_THREADS * 2 {
            pool.run("name", || panic!("in the operation")).await.unwrap_err();
        }
        assert_eq!(pool.run("name", || 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn cancelled_operations_do_not_start() {
        let pool = Arc::new(BlockingPool::default());
        let (ends, tasks) = occupy(&pool, "name", MAX_PER_NAME);
        yield_often().await;
        let cancelled = pool.run("name", || panic!("started"));
        timeout(Duration::from_millis(1), cancelled).await.unwrap_err();
        drop(ends);
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(pool.run("name", || 7).await.unwrap(), 7);
    }
}
