//! What is tried again, and when: exponential back-off with jitter, `Retry-After` obeyed.

use std::time::{Duration, SystemTime};

/// How long is waited before the first retry, at most.
const FIRST: Duration = Duration::from_secs(1);

/// How long is waited before any retry, unless the server says more.
const LONGEST: Duration = Duration::from_secs(30);

/// How long a server may make us wait within a run. Who asks for more is not asked again in it.
pub(crate) const LONGEST_ASKED_FOR: Duration = Duration::from_mins(5);

/// Whether a reply with this status (RFC 9110) may be another one a little later.
pub(crate) fn is_temporary(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// How long to wait for the retry of this number, counted from 0; `None` if there is none.
///
/// `random` is between 0 and 1: at least half of the time is waited, so that many who failed
/// together do not come back together.
pub(crate) fn wait(
    retry: u32,
    retries: u32,
    asked_for: Option<Duration>,
    random: f64,
) -> Option<Duration> {
    if retry >= retries || asked_for.is_some_and(|asked_for| asked_for > LONGEST_ASKED_FOR) {
        return None;
    }
    let longest = FIRST.saturating_mul(2_u32.saturating_pow(retry)).min(LONGEST);
    let own = longest.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0);
    Some(asked_for.map_or(own, |asked_for| own.max(asked_for)))
}

/// What a `Retry-After` asks for: seconds, or a date (RFC 9110, 10.2.3).
pub(crate) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // Too large a number is very long.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::from(u32::MAX))));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// A time around `every`, so that many who were started together do not come together: from nine
/// tenths to eleven tenths of it; `random` is between 0 and 1.
pub(crate) fn around(every: Duration, random: f64) -> Duration {
    every.mul_f64(0.9 + 0.2 * random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waits_double_up_to_a_limit() {
        let longest = |retry| wait(retry, 100, None, 1.0).unwrap();
        assert_eq!([0, 1, 2, 3].map(longest).map(|wait| wait.as_secs()), [1, 2, 4, 8]);
        assert_eq!(longest(99), LONGEST);
        assert_eq!(wait(0, 1, None, 0.0), Some(FIRST / 2));
    }

    #[test]
    fn there_are_so_many_retries_and_no_more() {
        assert!(wait(3, 4, None, 0.5).is_some());
        assert_eq!(wait(4, 4, None, 0.5), None);
        assert_eq!(wait(0, 0, None, 0.5), None);
    }

    #[test]
    fn a_server_that_asks_for_time_gets_it_or_is_left_alone() {
        assert_eq!(wait(0, 1, Some(Duration::from_secs(7)), 0.0), Some(Duration::from_secs(7)));
        assert_eq!(wait(0, 1, Some(LONGEST_ASKED_FOR + Duration::from_secs(1)), 0.0), None);
    }

    #[test]
    fn it_asks_in_seconds_or_by_a_date() {
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
        fn no_wait_is_longer_than_the_longest(
            retry: u32, retries: u32, asked_for in prop::option::of(0_u64..), random in 0.0..=1.0,
        ) {
            let asked_for = asked_for.map(Duration::from_secs);
            if let Some(wait) = wait(retry, retries, asked_for, random) {
                prop_assert!(wait <= LONGEST_ASKED_FOR);
                prop_assert!(wait >= FIRST / 2);
                prop_assert!(wait >= asked_for.unwrap_or_default());
            }
        }

        #[test]
        fn around_is_near(seconds in 1_u64..=31_622_400, random in 0.0..=1.0) {
            let every = Duration::from_secs(seconds);
            let near = around(every, random);
            prop_assert!(near >= every.mul_f64(0.89) && near <= every.mul_f64(1.11));
        }
    }
}
