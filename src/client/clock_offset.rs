//! The offset of a server's clock from the local clock, with an error bound.
//!
//! The server reads its clock at an unknown moment between request and reply, and its reply omits
//! digits. So the offset is an interval.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use crate::client::time_reply::ParsedTime;

/// Maximum number of printed digits; a network does not permit finer measurements.
const MAX_DIGITS: u32 = 6;

/// The offset of a server's clock, positive if it is ahead.
///
/// Displays as `+0.4 s ± 0.6 s, round trip 0.000129 s`: the middle of the interval and a bound,
/// which is rounded up so that the printed interval contains the true one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClockOffset {
    lowest: SignedDuration,
    highest: SignedDuration,
    round_trip: SignedDuration,
    /// The unit of the last digit of the server's reply.
    resolution: SignedDuration,
}

impl ClockOffset {
    /// Computes the offset from the time in the reply and the local times of request and reply.
    pub(crate) fn new(parsed: ParsedTime, sent_at: Timestamp, received_at: Timestamp) -> Self {
        let (earliest, latest) = parsed.range();
        Self {
            lowest: earliest.duration_since(received_at),
            highest: latest.duration_since(sent_at),
            round_trip: received_at.duration_since(sent_at),
            resolution: parsed.resolution,
        }
    }

    /// Returns the number of printed digits after the point: one more than in the reply, because
    /// the middle of the interval is finer.
    fn digits(&self) -> u32 {
        let mut digits = 1;
        let mut unit = SignedDuration::from_secs(1);
        while unit > self.resolution && digits < MAX_DIGITS {
            digits += 1;
            unit /= 10;
        }
        digits
    }
}

impl fmt::Display for ClockOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.digits();
        let unit = 10_i128.pow(9 - digits);
        let (lowest, highest) = (self.lowest.as_nanos(), self.highest.as_nanos());
        let middle = (lowest + highest + unit).div_euclid(2 * unit);
        let bound = (highest - middle * unit).max(middle * unit - lowest);
        write!(
            f,
            "{}{} s ± {} s, round trip {} s",
            if middle < 0 { '-' } else { '+' },
            Decimal(middle.unsigned_abs(), digits),
            Decimal(units_above(bound, unit), digits),
            Decimal(units_above(self.round_trip.as_nanos(), 1000), MAX_DIGITS),
        )
    }
}

/// Converts nanoseconds to units, rounded up.
fn units_above(nanoseconds: i128, unit: i128) -> u128 {
    nanoseconds.unsigned_abs().div_ceil(unit.unsigned_abs())
}

/// A decimal number: the digits as an integer, and how many of them follow the point.
struct Decimal(u128, u32);

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = 10_u128.pow(self.1);
        write!(f, "{}.{:0width$}", self.0 / one, self.0 % one, width = self.1 as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::time_reply::{first_line, read_rfc868, read_text};
    use crate::clock::Format;
    use jiff::tz::TimeZone;
    use proptest::prelude::*;

    /// Parses a printed number of seconds.
    fn nanoseconds(text: &str) -> i128 {
        let (sign, text) = match text.split_at(1) {
            ("-", rest) => (-1, rest),
            ("+", rest) => (1, rest),
            _ => (1, text),
        };
        let (seconds, fraction) = text.split_once('.').unwrap();
        let fraction: i128 = format!("{fraction:0<9}").parse().unwrap();
        sign * (seconds.parse::<i128>().unwrap() * 1_000_000_000 + fraction)
    }

    /// Returns the printed offset and bound in nanoseconds.
    fn printed(offset: ClockOffset) -> (i128, i128) {
        let text = offset.to_string();
        let (middle, rest) = text.split_once(" s ± ").unwrap();
        let (bound, rest) = rest.split_once(" s, round trip ").unwrap();
        assert_eq!(nanoseconds(rest.strip_suffix(" s").unwrap()) % 1000, 0);
        assert!(
            !middle.starts_with('-') || middle.contains(|c| ('1'..='9').contains(&c)),
            "{text}"
        );
        (nanoseconds(middle), nanoseconds(bound))
    }

    fn after(at: Timestamp, nanoseconds: i64) -> Timestamp {
        at.checked_add(SignedDuration::from_nanos(nanoseconds)).unwrap()
    }

    /// Formats an instant with this many digits of a fraction, truncated or rounded.
    fn with_digits(at: Timestamp, digits: u32, rounds: bool) -> String {
        let unit = 10_i128.pow(9 - digits);
        let units = (at.as_nanosecond() + if rounds { unit / 2 } else { 0 }).div_euclid(unit);
        let (seconds, part) = (units / 10_i128.pow(digits), units % 10_i128.pow(digits));
        format!("{seconds}.{part:0width$}", width = digits as usize)
    }

    fn contains(offset: ClockOffset, ahead: i64) -> bool {
        let (middle, bound) = printed(offset);
        (middle - i128::from(ahead)).abs() <= bound
    }

    prop_compose! {
        /// The time of the request, the offset of the server, and the delays of request and reply,
        /// in nanoseconds.
        fn exchange()(
            second in 1_000_000_000..4_000_000_000_i64,
            nanosecond in 0..1_000_000_000_i32,
            ahead in prop_oneof![
                -1_000_000_000..1_000_000_000_i64,
                -3_000..3_000_i64,
                -100_000_000_000_000..100_000_000_000_000_i64,
            ],
            delays in prop_oneof![
                (0..2_000_i64, 0..2_000_i64),
                (0..2_000_000_000_i64, 0..2_000_000_000_i64),
                (Just(0_i64), 0..60_000_000_000_i64),
            ],
        ) -> (Timestamp, i64, (i64, i64)) {
            (Timestamp::new(second, nanosecond).unwrap(), ahead, delays)
        }
    }

    proptest! {
        #[test]
        fn the_printed_bound_contains_the_true_offset(
            (sent_at, ahead, (there, back)) in exchange(),
            name in prop::sample::select(vec![
                "python", "rfc3339", "daytime", "nist", "time", "unix", "json", "%F %T", "%s",
            ]),
        ) {
            let received_at = after(sent_at, there + back);
            let server = after(after(sent_at, there), ahead);
            let mut reply = Vec::new();
            let format: Format = name.parse().unwrap();
            format.write(server, &TimeZone::UTC, true, &mut reply).unwrap();
            let parsed = if name == "time" {
                read_rfc868(&reply)
            } else {
                read_text(str::from_utf8(first_line(&reply)).unwrap(), &TimeZone::UTC)
            };
            let offset = ClockOffset::new(parsed.unwrap(), sent_at, received_at);
            prop_assert!(contains(offset, ahead), "{offset}");
        }

        #[test]
        fn the_printed_bound_holds_for_truncated_and_rounded_fractions(
            (sent_at, ahead, (there, back)) in exchange(),
            digits in 1..=9_u32,
            rounds: bool,
        ) {
            let server = after(after(sent_at, there), ahead);
            let parsed = read_text(&with_digits(server, digits, rounds), &TimeZone::UTC).unwrap();
            let offset = ClockOffset::new(parsed, sent_at, after(sent_at, there + back));
            prop_assert!(contains(offset, ahead), "{offset}");
        }
    }

    #[test]
    fn prints_whole_seconds_with_one_digit_and_zero_without_minus() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let parse = |text| read_text(text, &TimeZone::UTC).unwrap();
        let sent_at = at("2026-11-22T05:46:01.1Z");
        let received_at = at("2026-11-22T05:46:01.1001Z");
        let offset = |text| ClockOffset::new(parse(text), sent_at, received_at).to_string();
        assert_eq!(offset("2026-11-22 05:46:01"), "+0.4 s ± 0.6 s, round trip 0.000100 s");
        assert_eq!(
            offset("2026-11-22 05:46:01.100050"),
            "+0.000000 s ± 0.000051 s, round trip 0.000100 s"
        );
        assert_eq!(
            offset("2026-11-22 05:46:00.100050"),
            "-1.000000 s ± 0.000051 s, round trip 0.000100 s"
        );
    }
}
