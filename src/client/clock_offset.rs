//! How far a server's clock is ahead of this machine's, with the bound of the measurement.
//!
//! The server read its clock at some moment between the question and the reply. Which one is not
//! known, nor are the digits that its reply leaves out; so the offset is an interval.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use crate::client::time_reply::Told;

/// Digits printed of an offset: finer ones are below what a network lets measure.
const MAX_DIGITS: u32 = 6;

/// The offset of a server's clock. Displayed as `+0.4 s ± 0.6 s, round trip 0.000129 s`: the middle
/// of the interval, and a bound that is rounded up, so that what is printed contains the interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClockOffset {
    lowest: SignedDuration,
    highest: SignedDuration,
    round_trip: SignedDuration,
    /// The unit of the last digit of the server's reply.
    resolution: SignedDuration,
}

impl ClockOffset {
    /// The offset of a server that told `told` to a client which asked at `asked_at` and had the
    /// reply at `received_at`, by its own clock.
    pub(crate) fn new(told: Told, asked_at: Timestamp, received_at: Timestamp) -> Self {
        let (earliest, latest) = told.range();
        Self {
            lowest: earliest.duration_since(received_at),
            highest: latest.duration_since(asked_at),
            round_trip: received_at.duration_since(asked_at),
            resolution: told.resolution,
        }
    }

    /// Digits behind the point: one more than the reply has, as the middle of the interval is
    /// finer than the reply.
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

/// The number of units that contain `nanoseconds`.
fn units_above(nanoseconds: i128, unit: i128) -> u128 {
    nanoseconds.unsigned_abs().div_ceil(unit.unsigned_abs())
}

/// A number of units of which 10 to the power of the second make one.
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

    /// Nanoseconds in a printed number, with its sign.
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

    /// The printed offset and its bound.
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

    /// An instant with this many digits of a fraction, cut off or rounded.
    fn shown(at: Timestamp, digits: u32, rounds: bool) -> String {
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
        /// When the client asks, how far the server is ahead, and the two ways, in nanoseconds.
        fn exchange()(
            asked in 1_000_000_000..4_000_000_000_i64,
            part in 0..1_000_000_000_i32,
            ahead in prop_oneof![
                -1_000_000_000..1_000_000_000_i64,
                -3_000..3_000_i64,
                -100_000_000_000_000..100_000_000_000_000_i64,
            ],
            ways in prop_oneof![
                (0..2_000_i64, 0..2_000_i64),
                (0..2_000_000_000_i64, 0..2_000_000_000_i64),
                (Just(0_i64), 0..60_000_000_000_i64),
            ],
        ) -> (Timestamp, i64, (i64, i64)) {
            (Timestamp::new(asked, part).unwrap(), ahead, ways)
        }
    }

    proptest! {
        #[test]
        fn the_printed_bound_contains_the_true_offset(
            (asked_at, ahead, (there, back)) in exchange(),
            name in prop::sample::select(vec![
                "python", "rfc3339", "daytime", "nist", "time", "unix", "json", "%F %T", "%s",
            ]),
        ) {
            let received_at = after(asked_at, there + back);
            let server = after(after(asked_at, there), ahead);
            let mut reply = Vec::new();
            let format: Format = name.parse().unwrap();
            format.write(server, &TimeZone::UTC, true, &mut reply).unwrap();
            let told = if name == "time" {
                read_rfc868(&reply)
            } else {
                read_text(str::from_utf8(first_line(&reply)).unwrap(), &TimeZone::UTC)
            };
            let offset = ClockOffset::new(told.unwrap(), asked_at, received_at);
            prop_assert!(contains(offset, ahead), "{offset}");
        }

        #[test]
        fn the_printed_bound_holds_for_fractions_of_any_length_cut_off_or_rounded(
            (asked_at, ahead, (there, back)) in exchange(),
            digits in 1..=9_u32,
            rounds: bool,
        ) {
            let server = after(after(asked_at, there), ahead);
            let told = read_text(&shown(server, digits, rounds), &TimeZone::UTC).unwrap();
            let offset = ClockOffset::new(told, asked_at, after(asked_at, there + back));
            prop_assert!(contains(offset, ahead), "{offset}");
        }
    }

    #[test]
    fn whole_seconds_are_printed_with_one_digit_and_zero_has_no_minus() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let read = |text| read_text(text, &TimeZone::UTC).unwrap();
        let asked_at = at("2026-11-22T05:46:01.1Z");
        let received_at = at("2026-11-22T05:46:01.1001Z");
        let offset = |text| ClockOffset::new(read(text), asked_at, received_at).to_string();
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
