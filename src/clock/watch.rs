//! Detection of steps and of lost synchronization of the system clock; logs each once.

use std::time::SystemTime;

use rustix::time::{ClockId, clock_gettime};

use crate::clock::Health;

/// Minimum step that is logged, in nanoseconds. Slewing moves both clocks alike, and the boot
/// clock advances during suspend, so only a step makes them differ.
const MIN_STEP: i128 = 100_000_000;

/// Maximum time for reading both clocks, in nanoseconds. A slower measurement is discarded.
const MAX_READ: i128 = 10_000_000;

/// The state of the clock at the last check.
#[derive(Debug, Default)]
pub(crate) struct ClockWatch {
    /// The wall clock minus the boot clock, in nanoseconds.
    offset: Option<i128>,
    synchronized: Option<bool>,
}

impl ClockWatch {
    /// Reads the clocks and logs changes since the last call. Synchronization is checked only if
    /// `serves_time`, and only where the sandbox permits it.
    pub(crate) fn check(&mut self, serves_time: bool) {
        if let Some(step) = read_offset().and_then(|offset| self.update_offset(offset)) {
            #[expect(clippy::cast_precision_loss, reason = "only logged")]
            let step = step as f64 / 1e9;
            tracing::warn!(step, "the system clock was stepped by {step:+.3} s");
        }
        let health = if serves_time { Health::read().ok() } else { None };
        match health.and_then(|health| self.update_synchronized(health.synchronized)) {
            Some(true) => tracing::info!("the system clock is synchronized again"),
            Some(false) => tracing::warn!(
                "the system clock is not synchronized: clients may get a wrong time: check \
                 `timedatectl` or `chronyc tracking`"
            ),
            None => {}
        }
    }

    /// Returns the step since the last call, if there was one.
    fn update_offset(&mut self, offset: i128) -> Option<i128> {
        let step = offset - self.offset.replace(offset)?;
        (step.abs() >= MIN_STEP).then_some(step)
    }

    /// Returns the state if it has changed since the last call.
    fn update_synchronized(&mut self, synchronized: bool) -> Option<bool> {
        let before = self.synchronized.replace(synchronized)?;
        (before != synchronized).then_some(synchronized)
    }
}

/// Returns the wall clock minus the boot clock, unless reading both took longer than [`MAX_READ`].
fn read_offset() -> Option<i128> {
    let boot = || {
        let time = clock_gettime(ClockId::Boottime);
        i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
    };
    let before = boot();
    let now = SystemTime::now();
    let after = boot();
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let wall = i128::try_from(since_1970.as_nanos()).ok()?;
    (after - before <= MAX_READ).then_some(wall - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_steps_once_and_ignores_jitter() {
        let mut watch = ClockWatch::default();
        let hour = 3_600_000_000_000;
        let offsets = [1_000, 9_000_000, hour, hour + 5_000_000, 0];
        let steps = offsets.map(|offset| watch.update_offset(offset));
        assert_eq!(steps, [None, None, Some(hour - 9_000_000), None, Some(-hour - 5_000_000)]);
    }

    #[test]
    fn reports_lost_and_regained_synchronization_once() {
        let mut watch = ClockWatch::default();
        let changes =
            [true, false, false, true, true].map(|state| watch.update_synchronized(state));
        assert_eq!(changes, [None, Some(false), None, Some(true), None]);
    }

    #[test]
    fn measures_a_steady_offset() {
        let mut watch = ClockWatch::default();
        let mut offsets = (0..100).filter_map(|_| read_offset());
        assert!(offsets.all(|offset| watch.update_offset(offset).is_none()));
    }
}
