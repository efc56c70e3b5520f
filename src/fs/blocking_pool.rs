//! Threads that read files, apart from the event loops: whoever reads can be kept waiting, for ever if
//! a network file system hangs.
//!
//! Each service has its own, so that one whose files hang takes no thread from another; and of these,
//! those that read one file are few, so that it takes none from the others. A thread that cannot be
//! had is an error of who wanted it, and of nobody else.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

/// How many threads one service may have. More would only wait for each other, or for a file system
/// that hangs.
const MAX_THREADS: usize = 64;

/// How many of them may read under one name.
const MAX_FOR_ONE: usize = 8;

/// How long a thread without work stays. Those that wait take turns: with seconds, the looks at the
/// file, one a second, would keep for ever what one busy moment has started.
const IDLE: Duration = Duration::from_millis(200);

/// A reading that takes longer may never end.
const SLOW: Duration = Duration::from_secs(5);

/// What is told of a path whose reading does not end.
pub(crate) const UNANSWERED: &str = "its file system does not answer";

/// Something that is to be done.
struct Work {
    act: Box<dyn FnOnce() + Send>,
    /// Gone when nobody waits for it any more.
    wanted: Weak<()>,
}

impl Work {
    fn is_wanted(&self) -> bool {
        self.wanted.strong_count() > 0
    }
}

/// Whether a queue has grown so that it is worth to look for what nobody waits for any more: so it is
/// never longer than twice what is wanted, and each look is paid by as many that came.
fn has_doubled<T>(queue: &VecDeque<T>) -> bool {
    queue.len().is_power_of_two()
}

/// The threads that read for one service. They are started when there is work, and end without.
#[derive(Default)]
pub(crate) struct Readers(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is work, for one thread.
    work: Condvar,
}

#[derive(Default)]
struct State {
    /// What the next thread does, with the name that it is done for.
    ready: VecDeque<(Arc<str>, Work)>,
    /// Names that are read, or are about to be.
    names: HashMap<Arc<str>, Name>,
    threads: usize,
    /// How many of the threads wait for work.
    idle: usize,
}

/// What is done for one name.
#[derive(Default)]
struct Name {
    /// How much of it is being done, or ready to be.
    begun: usize,
    /// What waits until some of that has ended.
    waiting: VecDeque<Work>,
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").field("threads", &self.0.state().threads).finish()
    }
}

impl Readers {
    /// Does `work` in a thread that may be kept waiting. If nobody waits for it any more before it
    /// has begun, it is not done.
    ///
    /// # Errors
    /// If there is no thread and none can be had, or the work panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (tell, told) = oneshot::channel();
        let waits = Arc::new(());
        let act = Box::new(move || {
            // Who has gone meanwhile does not want to know.
            let _ = tell.send(work());
        });
        self.0.add(name, Work { act, wanted: Arc::downgrade(&waits) })?;
        let told = told.await;
        drop(waits);
        told.map_err(|_| io::Error::other("the reading was given up"))
    }
}

/// Waits for a reading to end, and calls `tell` once if it takes so long that it may not.
pub(crate) async fn if_slow<T>(reading: impl Future<Output = T>, tell: impl FnOnce()) -> T {
    let mut reading = pin!(reading);
    if let Ok(read) = timeout(SLOW, &mut reading).await {
        return read;
    }
    tell();
    reading.await
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds this lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>, name: &str, work: Work) -> io::Result<()> {
        let mut state = self.state();
        let name: Arc<str> = name.into();
        let of_name = state.names.entry(Arc::clone(&name)).or_default();
        if of_name.begun >= MAX_FOR_ONE {
            if has_doubled(&of_name.waiting) {
                of_name.waiting.retain(Work::is_wanted);
            }
            of_name.waiting.push_back(work);
            return Ok(());
        }
        of_name.begun += 1;
        if has_doubled(&state.ready) {
            state.forget_unwanted();
        }
        state.ready.push_back((Arc::clone(&name), work));
        if state.idle >= state.ready.len() {
            self.work.notify_one();
        } else if state.threads < MAX_THREADS {
            let shared = Arc::clone(self);
            let started = thread::Builder::new().name("reader".to_owned());
            match started.spawn(move || shared.read()) {
                Ok(_) => state.threads += 1,
                // Another will do it when it has done what it does.
                Err(_) if state.threads > 0 => {}
                Err(error) => {
                    state.ready.pop_back();
                    state.end(&name);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// What a thread does.
    fn read(&self) {
        let mut state = self.state();
        loop {
            let Some((name, work)) = state.ready.pop_front() else {
                state.idle += 1;
                let (woken, waited) =
                    self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
                state = woken;
                state.idle -= 1;
                if waited.timed_out() && state.ready.is_empty() {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            drop(state);
            // A panic is that work's alone: who waits for it is told, and its message is in the log.
            if work.is_wanted() {
                let _ = catch_unwind(AssertUnwindSafe(work.act));
            }
            state = self.state();
            state.end(&name);
        }
    }
}

impl State {
    /// Drops what is ready and nobody waits for any more. What follows it in its name's turn is looked
    /// at, too.
    fn forget_unwanted(&mut self) {
        for _ in 0..self.ready.len() {
            match self.ready.pop_front() {
                Some((name, work)) if !work.is_wanted() => self.end(&name),
                Some(wanted) => self.ready.push_back(wanted),
                None => {}
            }
        }
    }

    /// Some of what is done for a name has ended: the next may begin.
    fn end(&mut self, name: &Arc<str>) {
        let Some(of_name) = self.names.get_mut(name) else { return };
        if let Some(next) = of_name.waiting.pop_front() {
            self.ready.push_back((Arc::clone(name), next));
        } else {
            of_name.begun -= 1;
            if of_name.begun == 0 {
                self.names.remove(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Work that hangs until the sender of the channel is dropped.
    fn hangs(until: mpsc::Receiver<()>) -> impl FnOnce() + Send + 'static {
        move || until.recv().unwrap_or_default()
    }

    async fn turn() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_takes_no_memory() {
        let readers = Arc::new(Readers::default());
        let mut ends = Vec::new();
        for number in 0..MAX_THREADS {
            let (end, until) = mpsc::channel();
            ends.push(end);
            let readers = Arc::clone(&readers);
            let name = (number / MAX_FOR_ONE).to_string();
            tokio::spawn(async move { readers.run(&name, hangs(until)).await });
        }
        turn().await;
        // Of a name that has its threads, and of others, for which there are none.
        for name in ["0", "other"] {
            for number in 0..1000 {
                let name = if name == "0" { name.to_owned() } else { number.to_string() + name };
                let waits = timeout(Duration::ZERO, readers.run(&name, || ()));
                assert!(waits.await.is_err());
            }
        }
        let state = readers.0.state();
        let waiting: usize = state.names.values().map(|name| name.waiting.len()).sum();
        assert!(state.ready.len() + waiting < 10, "{} {waiting}", state.ready.len());
        assert!(state.names.len() < 20);
    }

    #[tokio::test]
    async fn however_many_wait_for_one_name_another_is_read() {
        let readers = Arc::new(Readers::default());
        let mut ends = Vec::new();
        let mut tasks = Vec::new();
        for _ in 0..MAX_THREADS * 2 {
            let (end, until) = mpsc::channel();
            ends.push(end);
            let readers = Arc::clone(&readers);
            tasks.push(tokio::spawn(async move { readers.run("stuck", hangs(until)).await }));
        }
        turn().await;
        assert_eq!(readers.run("other", || 7).await.unwrap(), 7);
        assert!(readers.0.state().threads <= MAX_FOR_ONE + 1);
        // What hung goes on, in order, and leaves nothing behind.
        drop(ends);
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        let all_rest = || {
            let state = readers.0.state();
            (state.idle == state.threads).then(|| state.names.len())
        };
        let names = loop {
            match all_rest() {
                Some(names) => break names,
                None => tokio::task::yield_now().await,
            }
        };
        assert_eq!(names, 0);
    }

    #[tokio::test]
    async fn there_are_never_more_threads_than_the_bound_and_all_is_done() {
        let readers = Arc::new(Readers::default());
        let tasks: Vec<_> = (0..1000)
            .map(|number| {
                let readers = Arc::clone(&readers);
                tokio::spawn(async move {
                    let name = format!("{}", number % 50);
                    readers.run(&name, move || number).await.unwrap()
                })
            })
            .collect();
        for (number, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await.unwrap(), number);
            assert!(readers.0.state().threads <= MAX_THREADS);
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_next_work_is_done() {
        let readers = Readers::default();
        for _ in 0..MAX_THREADS * 2 {
            readers.run("name", || panic!("the work's own")).await.unwrap_err();
        }
        assert_eq!(readers.run("name", || 7).await.unwrap(), 7);
        assert!(readers.0.state().names.len() <= 1);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_begun() {
        let readers = Arc::new(Readers::default());
        let (end, until) = mpsc::channel::<()>();
        let until = Arc::new(Mutex::new(until));
        let busy: Vec<_> = (0..MAX_FOR_ONE)
            .map(|_| {
                let (readers, until) = (Arc::clone(&readers), Arc::clone(&until));
                let work = move || until.lock().unwrap().recv().unwrap_or_default();
                tokio::spawn(async move { readers.run("name", work).await })
            })
            .collect();
        turn().await;
        let given_up = readers.run("name", || panic!("begun"));
        tokio::time::timeout(Duration::from_millis(1), given_up).await.unwrap_err();
        drop(end);
        for task in busy {
            task.await.unwrap().unwrap();
        }
        assert_eq!(readers.run("name", || 7).await.unwrap(), 7);
    }
}
