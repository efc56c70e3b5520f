//! Retry delays: exponential backoff with jitter that respects `Retry-After`.

use std::time::{Duration, SystemTime};

/// Maximum delay before the first retry.
const INITIAL_BACKOFF: Duration = Duration::from_secs(1);

/// Maximum delay before any retry, unless the server asks for more.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Longest `Retry-After` that is waited for. A longer one ends the retries.
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);

/// Whether a status (RFC 9110) reports a transient failure.
pub(crate) fn is_temporary(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// Returns the longest delay after `failures` failures in a row, counted from 0: it doubles from
/// `first` to `max`.
pub(crate) fn backoff(failures: u32, first: Duration, max: Duration) -> Duration {
    first.saturating_mul(2_u32.saturating_pow(failures)).min(max)
}

/// The retries of one request.
#[derive(Debug)]
pub(crate) struct Retries {
    used: u32,
    max: u32,
}

impl Retries {
    pub(crate) fn new(max: u32) -> Self {
        Self { used: 0, max }
    }

    /// Returns the delay before the next retry, or `None` if none is left or the server asks for a
    /// longer one than [`MAX_RETRY_AFTER`].
    pub(crate) fn next_delay(&mut self, retry_after: Option<Duration>) -> Option<Duration> {
        let delay = delay(self.used, self.max, retry_after, fastrand::f64());
        self.used += u32::from(delay.is_some());
        delay
    }

    /// Allows all retries again, as after progress.
    pub(crate) fn reset(&mut self) {
        self.used = 0;
    }
}

/// Returns the delay before retry number `used`, counted from 0. `random`, between 0 and 1, spreads
/// clients that failed together over half of the backoff.
fn delay(used: u32, max: u32, retry_after: Option<Duration>, random: f64) -> Option<Duration> {
    if used >= max || retry_after.is_some_and(|delay| delay > MAX_RETRY_AFTER) {
        return None;
    }
    let longest = backoff(used, INITIAL_BACKOFF, MAX_BACKOFF);
    let own = longest.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0);
    Some(own.max(retry_after.unwrap_or_default()))
}

/// Parses `Retry-After`: seconds or a date (RFC 9110, 10.2.3).
pub(crate) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::from(u32::MAX))));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// Spreads a period by ±10 %, to keep instances that started together apart. `random` is between 0
/// and 1.
pub(crate) fn around(every: Duration, random: f64) -> Duration {
    every.mul_f64(0.9 + 0.2 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn doubles_delays_up_to_a_limit() {
        let longest = |used| delay(used, 100, None, 1.0).unwrap();
        assert_eq!([0, 1, 2, 3].map(longest).map(|delay| delay.as_secs()), [1, 2, 4, 8]);
        assert_eq!(longest(99), MAX_BACKOFF);
        assert_eq!(delay(0, 1, None, 0.0), Some(INITIAL_BACKOFF / 2));
    }

    #[test]
    fn limits_the_number_of_retries() {
        assert!(delay(3, 4, None, 0.5).is_some());
        assert_eq!(delay(4, 4, None, 0.5), None);
        assert_eq!(delay(0, 0, None, 0.5), None);
    }

    #[test]
    fn counts_retries_until_a_reset() {
        let mut retries = Retries::new(2);
        let mut left = || std::iter::from_fn(|| retries.next_delay(None)).count();
        assert_eq!((left(), left()), (2, 0));
        retries.reset();
        assert_eq!(std::iter::from_fn(|| retries.next_delay(None)).count(), 2);
    }

    #[test]
    fn waits_for_retry_after_or_gives_up() {
        assert_eq!(delay(0, 1, Some(Duration::from_secs(7)), 0.0), Some(Duration::from_secs(7)));
        assert_eq!(delay(0, 1, Some(MAX_RETRY_AFTER + Duration::from_secs(1)), 0.0), None);
    }

    #[test]
    fn parses_seconds_and_dates() {
        let now = httpdate::parse_http_date("Sun, 22 Nov 2026 13:46:01 GMT").unwrap();
        let seconds = |value| retry_after(value, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("3"), Some(3));
        assert_eq!(seconds(" 0 "), Some(0));
        assert_eq!(seconds("99999999999999999999999"), Some(u64::from(u32::MAX)));
        assert_eq!(seconds("Sun, 22 Nov 2026 13:46:31 GMT"), Some(30));
        assert_eq!(seconds("Sunday, 22-Nov-26 13:46:31 GMT"), Some(30));
        assert_eq!(seconds("Sun Nov 22 13:46:31 2026"), Some(30));
        assert_eq!(seconds("Sun, 22 Nov 2020 13:46:31 GMT"), Some(0));
        for bad in ["", "-3", "soon", "3.5", "+3"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn keeps_delays_within_their_bounds(
            used: u32, max: u32, retry_after in prop::option::of(0_u64..), random in 0.0..=1.0,
        ) {
            let retry_after = retry_after.map(Duration::from_secs);
            if let Some(delay) = delay(used, max, retry_after, random) {
                prop_assert!(delay <= MAX_RETRY_AFTER);
                prop_assert!(delay >= INITIAL_BACKOFF / 2);
                prop_assert!(delay >= retry_after.unwrap_or_default());
            }
        }

        #[test]
        fn spreads_periods_by_ten_percent(seconds in 1_u64..=31_622_400, random in 0.0..=1.0) {
            let every = Duration::from_secs(seconds);
            let near = around(every, random);
            prop_assert!(near >= every.mul_f64(0.89) && near <= every.mul_f64(1.11));
        }
    }
}
