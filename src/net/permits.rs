//! The places of a service: one for each connection that it may have at one time. How many there are
//! can change while they are taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{AcquireError, Semaphore};

/// The places of a service.
#[derive(Debug)]
pub(crate) struct Places {
    permits: Semaphore,
    /// So many of the permits go when they are met with, before anybody gets one, as there are fewer
    /// places than there were. Whoever waited before that gets none of them.
    surplus: AtomicUsize,
}

/// A place for one connection, which is given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
}

impl Places {
    /// So many places, all of them free.
    pub(crate) fn new(count: u32) -> Self {
        Self { permits: Semaphore::new(number(count)), surplus: AtomicUsize::new(0) }
    }

    /// Makes so many places of those that were `before`. Those that are taken stay so until they are
    /// given back.
    pub(crate) fn change(&self, before: u32, now: u32) {
        let (before, now) = (number(before), number(now));
        let more = now.saturating_sub(before);
        // Those that would have gone are the first to stay.
        let stay = |surplus: usize| surplus.saturating_sub(more);
        let surplus = self.surplus.update(Ordering::AcqRel, Ordering::Acquire, stay);
        self.permits.add_permits(more.saturating_sub(surplus));
        self.surplus.fetch_add(before.saturating_sub(now), Ordering::AcqRel);
    }

    /// Whether the permit that was met with is one of those that go.
    fn one_goes(&self) -> bool {
        let one_less = |surplus: usize| surplus.checked_sub(1);
        self.surplus.try_update(Ordering::AcqRel, Ordering::Acquire, one_less).is_ok()
    }

    /// How many are free.
    pub(crate) fn free(&self) -> usize {
        self.permits.available_permits().saturating_sub(self.surplus.load(Ordering::Acquire))
    }

    /// Takes one, if one is free.
    pub(crate) fn try_take(self: &Arc<Self>) -> Option<Place> {
        loop {
            self.permits.try_acquire().ok()?.forget();
            if !self.one_goes() {
                return Some(Place { places: Arc::clone(self) });
            }
        }
    }

    /// Waits for one.
    ///
    /// # Errors
    /// None: the places are never closed.
    pub(crate) async fn take(self: &Arc<Self>) -> Result<Place, AcquireError> {
        loop {
            self.permits.acquire().await?.forget();
            if !self.one_goes() {
                return Ok(Place { places: Arc::clone(self) });
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.permits.add_permits(1);
    }
}

fn number(places: u32) -> usize {
    usize::try_from(places).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn who_waited_before_there_were_fewer_gets_no_place_that_goes() {
        let places = Arc::new(Places::new(3));
        let mut taken: Vec<_> = std::iter::from_fn(|| places.try_take()).collect();
        let mut waiting = Box::pin(places.take());
        let mut context = Context::from_waker(Waker::noop());
        let mut look = || waiting.as_mut().poll(&mut context);
        assert!(look().is_pending());
        // To two by way of one.
        places.change(3, 1);
        places.change(1, 2);
        assert!(look().is_pending());
        taken.pop();
        assert!(look().is_pending(), "two are taken");
        taken.pop();
        assert!(matches!(look(), Poll::Ready(Ok(_))));
    }
}
