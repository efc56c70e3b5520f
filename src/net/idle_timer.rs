//! The idle time-out: resets a peer only if it made no progress while this process ran.
//!
//! An expired timer alone proves little. A socket on a slow link stays unwritable for minutes while
//! its peer acknowledges bytes, and after a pause of the process (SIGSTOP, a virtual machine's
//! snapshot) every timer has expired. A wait is therefore divided into checks, each of which
//! compares the number of unacknowledged bytes with that of the check before.

use std::pin::{Pin, pin};
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};

/// Checks per time-out. A peer that stops is given up within the time-out and one check.
const CHECKS: u32 = 4;

/// Minimum time between two checks: the resolution of tokio's timers.
const MIN_INTERVAL: Duration = Duration::from_millis(1);

/// Returns the time between two checks of a time-out of `limit`.
fn interval(limit: Duration) -> Duration {
    (limit / CHECKS).max(MIN_INTERVAL)
}

/// Waits for `io`, at most for `time`.
///
/// # Errors
/// If `io` is not ready in time, the part of `time` that counts against the peer: zero if the timer
/// fired later than twice `time`, because the process was paused.
pub(crate) async fn ready_within<T>(
    time: Duration,
    io: impl Future<Output = T>,
) -> Result<T, Duration> {
    let mut io = pin!(io);
    let lateness = tokio::select! {
        biased;
        output = &mut io => return Ok(output),
        // The clock is not even read if `io` is ready at once.
        lateness = async {
            let due = Instant::now() + time;
            sleep_until(due).await;
            due.elapsed()
        } => lateness,
    };
    // Timers can fire before the reactor has reported events that happened during a pause.
    tokio::select! {
        biased;
        output = &mut io => return Ok(output),
        () = yield_now() => {}
    }
    Err(if lateness > time { Duration::ZERO } else { time })
}

/// Waits for `io`, at most for `limit`, without counting pauses of the process. Returns `None` if it
/// is not ready in time.
///
/// `io` is pinned by the caller: each async function that takes a future by value stores it twice.
pub(crate) async fn timeout_while_running<T>(
    limit: Duration,
    mut io: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    let mut waited = Duration::ZERO;
    loop {
        match ready_within(interval(limit), &mut io).await {
            Ok(output) => return Some(output),
            Err(counted) => waited += counted,
        }
        if waited >= limit {
            return None;
        }
    }
}

/// The idle time-out of one wait for a peer.
#[derive(Debug)]
pub(crate) struct IdleTimer {
    limit: Duration,
    /// Time since the last acknowledged byte, as of the last check.
    idle: Duration,
    /// The unacknowledged bytes at the last check.
    unacknowledged: Option<u64>,
}

impl IdleTimer {
    /// Starts without a value to compare with: the first check provides it and expires nothing.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, idle: Duration::ZERO, unacknowledged: None }
    }

    /// Returns the time between two checks.
    pub(crate) fn interval(&self) -> Duration {
        interval(self.limit)
    }

    /// Records a check after a wait of `waited`. True if the peer has acknowledged no byte for the
    /// whole time-out.
    pub(crate) fn is_expired_after(&mut self, waited: Duration, unacknowledged: u64) -> bool {
        if self.unacknowledged.replace(unacknowledged) == Some(unacknowledged) {
            self.idle += waited;
        } else {
            self.idle = Duration::ZERO;
        }
        self.idle >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::time::advance;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test(start_paused = true)]
    async fn times_out_exactly_if_the_process_runs() {
        let start = Instant::now();
        assert_eq!(timeout_while_running(LIMIT, pin!(pending::<()>())).await, None);
        assert_eq!(start.elapsed(), LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_count_pauses_of_the_process() {
        let start = Instant::now();
        let never = pin!(pending::<()>());
        let mut waiting = pin!(timeout_while_running(LIMIT, never));
        assert!(poll_once(waiting.as_mut()).await.is_none());
        advance(LIMIT * 10).await;
        assert_eq!(waiting.await, None);
        assert_eq!(start.elapsed(), LIMIT * 11);
    }

    #[tokio::test(start_paused = true)]
    async fn prefers_readiness_to_an_expired_timer() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let receiver = pin!(receiver);
        let mut waiting = pin!(timeout_while_running(LIMIT, receiver));
        assert!(poll_once(waiting.as_mut()).await.is_none());
        advance(LIMIT * 10).await;
        sender.send(7).unwrap();
        assert_eq!(waiting.await, Some(Ok(7)));
    }

    #[test]
    fn expires_only_if_nothing_is_acknowledged_for_the_whole_limit() {
        let mut timer = IdleTimer::new(LIMIT);
        let check = timer.interval();
        assert!(!timer.is_expired_after(check, 100));
        for unacknowledged in [100, 100, 100, 99, 99, 99, 99] {
            assert!(!timer.is_expired_after(check, unacknowledged));
        }
        // A pause of the process does not count.
        assert!(!timer.is_expired_after(Duration::ZERO, 99));
        assert!(timer.is_expired_after(check, 99));
    }

    async fn poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = &mut future => Some(output),
            () = std::future::ready(()) => None,
        }
    }
}
