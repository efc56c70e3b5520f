//! Connection permits: how many connections a service serves at the same time.
//!
//! A listener acquires a permit before it accepts, so excess clients wait in the kernel's accept
//! queue. The limit can change while permits are held; nothing here knows sockets or configuration.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Semaphore;

/// The resizable pool of permits of one service.
#[derive(Debug)]
pub(crate) struct ConnectionPermits {
    semaphore: Semaphore,
    /// Permits of the semaphore above the limit, because it was lowered; each is discarded when it
    /// is next acquired, so that none reaches a task that waited before.
    excess: AtomicUsize,
}

/// The right to serve one connection; returned on drop.
#[derive(Debug)]
pub(crate) struct Permit {
    permits: Arc<ConnectionPermits>,
}

impl ConnectionPermits {
    pub(crate) fn new(limit: usize) -> Self {
        Self { semaphore: Semaphore::new(limit), excess: AtomicUsize::new(0) }
    }

    /// Waits for a free permit, in order of arrival.
    pub(crate) async fn acquire(self: &Arc<Self>) -> Permit {
        loop {
            self.semaphore.acquire().await.expect("the semaphore is never closed").forget();
            if !self.discard_excess() {
                return Permit { permits: Arc::clone(self) };
            }
        }
    }

    pub(crate) fn try_acquire(self: &Arc<Self>) -> Option<Permit> {
        loop {
            self.semaphore.try_acquire().ok()?.forget();
            if !self.discard_excess() {
                return Some(Permit { permits: Arc::clone(self) });
            }
        }
    }

    pub(crate) fn available(&self) -> usize {
        self.semaphore.available_permits().saturating_sub(self.excess.load(Ordering::Acquire))
    }

    /// Raises the limit by `count`. Permits above the old limit are kept first.
    pub(crate) fn grow(&self, count: usize) {
        let keep = |excess: usize| excess.saturating_sub(count);
        let excess = self.excess.update(Ordering::AcqRel, Ordering::Acquire, keep);
        self.semaphore.add_permits(count.saturating_sub(excess));
    }

    /// Lowers the limit by `count`. Held permits stay until they are returned.
    pub(crate) fn shrink(&self, count: usize) {
        self.excess.fetch_add(count, Ordering::AcqRel);
    }

    /// Counts the permit just acquired as discarded if there is one too many.
    fn discard_excess(&self) -> bool {
        let one_less = |excess: usize| excess.checked_sub(1);
        self.excess.try_update(Ordering::AcqRel, Ordering::Acquire, one_less).is_ok()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.permits.semaphore.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn never_hands_excess_permits_to_waiting_tasks() {
        let permits = Arc::new(ConnectionPermits::new(3));
        let mut held: Vec<_> = std::iter::from_fn(|| permits.try_acquire()).collect();
        let mut waiting = Box::pin(permits.acquire());
        let mut context = Context::from_waker(Waker::noop());
        let mut poll = || waiting.as_mut().poll(&mut context);
        assert!(poll().is_pending());
        permits.shrink(2);
        permits.grow(1);
        assert!(poll().is_pending());
        held.pop();
        assert!(poll().is_pending(), "two are held");
        held.pop();
        assert!(matches!(poll(), Poll::Ready(_)));
    }

    #[test]
    fn discards_held_permits_on_release_after_the_limit_was_lowered() {
        let permits = Arc::new(ConnectionPermits::new(3));
        let held: Vec<_> = std::iter::from_fn(|| permits.try_acquire()).collect();
        permits.shrink(2);
        drop(held);
        assert_eq!(permits.available(), 1);
    }

    #[test]
    fn keeps_excess_permits_when_the_limit_is_raised() {
        let permits = Arc::new(ConnectionPermits::new(3));
        let held: Vec<_> = std::iter::from_fn(|| permits.try_acquire()).collect();
        permits.shrink(2);
        permits.grow(1);
        drop(held);
        assert_eq!(permits.available(), 2);
    }
}
