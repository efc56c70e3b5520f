//! Recognition of datagrams that could be replies of a time service.
//!
//! Without it, a datagram with a forged source address could make two time services answer each
//! other for ever.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::clock::{Format, MAX_REPLY};

/// The shapes of the replies of time services.
///
/// Every service recognizes replies in the named formats, but only its own strftime pattern: two
/// services with different patterns may take each other's replies for requests. Such a loop ends
/// soon, because the reply of a pattern must [rank higher](Self::breaks_loop) than the datagram.
#[derive(Debug)]
pub(crate) struct LoopGuard {
    shapes: Vec<Vec<u8>>,
    /// Whether datagrams of four bytes count as RFC 868 replies, which have any value.
    matches_rfc868: bool,
    is_pattern: bool,
}

impl LoopGuard {
    /// Creates a guard that recognizes the named formats, and `own` in `zone`.
    pub(crate) fn new(own: &Format, zone: &TimeZone) -> Self {
        let mut shapes: Vec<Vec<u8>> = Vec::new();
        let utc = TimeZone::UTC;
        let named = Format::NAMED.iter().map(|(_, format)| (format, &utc));
        // RFC 868 replies are binary.
        let with_shape = |(format, _): &(&Format, &TimeZone)| **format != Format::Time;
        for (format, zone) in named.chain([(own, zone)]).filter(with_shape) {
            for instant in SAMPLES.iter().flat_map(|(at, nanos)| Timestamp::new(*at, *nanos)) {
                let mut sample = Vec::new();
                if format.write(instant, zone, false, &mut sample).is_ok() {
                    shapes.push(shape(&sample).collect());
                }
            }
        }
        shapes.extend(OTHER_REPLIES.iter().map(|sample| shape(sample).collect()));
        shapes.sort();
        shapes.dedup();
        let is_pattern = matches!(own, Format::Strftime(_));
        Self { shapes, matches_rfc868: is_pattern || *own == Format::Time, is_pattern }
    }

    /// Whether `datagram` could be the reply of a time service.
    pub(crate) fn resembles_reply(&self, datagram: &[u8]) -> bool {
        if datagram.len() > MAX_REPLY {
            return false;
        }
        (self.matches_rfc868 && datagram.len() == 4)
            || self.shapes.iter().any(|known| shape(datagram).eq(known.iter().copied()))
    }

    /// Whether `reply` may answer `datagram` without an endless loop.
    ///
    /// The reply of a pattern must have more digits than the datagram, or as many digits and more
    /// bytes. In a loop the replies would grow until they reach their maximum length; requests have
    /// few digits and are answered.
    pub(crate) fn breaks_loop(&self, reply: &[u8], datagram: &[u8]) -> bool {
        !self.is_pattern || rank(datagram) < rank(reply)
    }
}

/// Returns the number of digits and the length.
fn rank(text: &[u8]) -> (usize, usize) {
    (text.iter().filter(|byte| byte.is_ascii_digit()).count(), text.len())
}

/// Instants at which a format may print different shapes.
///
/// Abbreviations of zones differ between summer, winter and 1970, and a fraction of zero may be
/// omitted: 1 January 1970, 1 January 2026 and 1 July 2026, each with and without a fraction.
const SAMPLES: [(i64, i32); 6] = [
    (0, 0),
    (0, 123_456_789),
    (1_767_225_600, 0),
    (1_767_225_600, 123_456_789),
    (1_782_864_000, 0),
    (1_782_864_000, 123_456_789),
];

/// Replies whose shape also depends on the zone or on the state of the kernel's clock.
const OTHER_REPLIES: [&[u8]; 9] = [
    b"1970-01-01T00:00:00.000000+00:00",
    b"Thursday, January 1, 1970 00:00:00-+00",
    b"{\"time\":\"1970-01-01T00:00:00.0+00:00\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":0}",
    b"{\"time\":\"1970-01-01T00:00:00.0Z\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":null}",
    b"{\"time\":\"1970-01-01T00:00:00.0+00:00\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":null}",
    b"1970-01-01 00:00:00",
    // The offset of Liberia had seconds until 1972. A clock without a battery starts in 1970.
    b"1970-01-01T00:00:00.000000-00:44:30",
    b"{\"time\":\"1970-01-01T00:00:00.0-00:44:30\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":0}",
    b"{\"time\":\"1970-01-01T00:00:00.0-00:44:30\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":null}",
];

/// Reduces a text to its shape: each number and each word becomes one character.
///
/// White space is trimmed, also before numbers, which may be padded with it.
fn shape(text: &[u8]) -> impl Iterator<Item = u8> {
    let (mut last, mut space) = (None, false);
    let classes = text.trim_ascii().iter().flat_map(move |byte| {
        let class = match byte {
            b'0'..=b'9' => b'0',
            b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => b'a',
            b'+' => b'-',
            byte if byte.is_ascii_whitespace() => {
                space = true;
                return [None, None];
            }
            other => *other,
        };
        let before = (std::mem::take(&mut space) && class != b'0').then_some(b' ');
        let repeated = before.is_none() && last == Some(class) && matches!(class, b'0' | b'a');
        last = Some(class);
        [before, (!repeated).then_some(class)]
    });
    classes.flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Health, Leap, MAX_REPLY, json, nist};
    use proptest::prelude::*;

    /// A simulated time service.
    #[derive(Debug)]
    struct SimulatedService {
        format: Format,
        zone: TimeZone,
        newline: bool,
        guard: LoopGuard,
    }

    impl SimulatedService {
        fn new(format: Format, zone: TimeZone, newline: bool) -> Self {
            let guard = LoopGuard::new(&format, &zone);
            Self { format, zone, newline, guard }
        }

        /// Returns the time `now` with the given state of the clock.
        fn time_reply(&self, now: Timestamp, health: Option<Health>) -> Vec<u8> {
            let mut reply = Vec::new();
            match self.format {
                Format::Json => json(now, &self.zone, health, &mut reply).unwrap(),
                Format::Nist => nist(now, health, &mut reply).unwrap(),
                _ => self.format.write(now, &self.zone, self.newline, &mut reply).unwrap(),
            }
            if self.newline && self.format == Format::Json {
                reply.push(b'\n');
            }
            reply
        }

        /// Returns the reply to a datagram, unless it is ignored.
        fn answer(&self, datagram: &[u8], (now, health): Moment) -> Option<Vec<u8>> {
            let reply = self.time_reply(now, health);
            (!self.guard.resembles_reply(datagram) && self.guard.breaks_loop(&reply, datagram))
                .then_some(reply)
        }

        fn is_pattern(&self) -> bool {
            matches!(self.format, Format::Strftime(_))
        }
    }

    type Moment = (Timestamp, Option<Health>);

    fn moment() -> impl Strategy<Value = Moment> {
        // From 1970, the start of a clock without a battery, to 2200.
        let time = (0..7_258_118_400_i64, 0..1_000_000_000_i32)
            .prop_map(|(second, nanosecond)| Timestamp::new(second, nanosecond).unwrap());
        let leap = prop::sample::select(vec![Leap::None, Leap::Insert, Leap::Delete]);
        let health = (any::<bool>(), 0..20_000_000_i64, leap).prop_map(
            |(synchronized, max_error_us, leap)| Health { synchronized, max_error_us, leap },
        );
        (time, prop::option::of(health))
    }

    fn pattern() -> impl Strategy<Value = Format> {
        // Includes parts whose length differs between instants.
        let part = prop_oneof![
            4 => "%[AaBbcDdeFfHIjklMmNnPpRrSsTtUuVWwXxYyZz%]",
            1 => "%[-_^#]?[0-9]?[dHjMSY]",
            1 => Just("%.f".to_owned()),
            1 => Just("%6f".to_owned()),
            1 => Just("%:z".to_owned()),
            1 => Just("%Q".to_owned()),
            2 => "[ -$&-~]{1,6}",
        ];
        let parts = prop::collection::vec(part, 1..12);
        parts.prop_filter_map("invalid pattern", |parts| {
            let format: Format = parts.concat().parse().ok()?;
            matches!(format, Format::Strftime(_)).then_some(format)
        })
    }

    fn service() -> impl Strategy<Value = SimulatedService> {
        let named: Vec<_> = Format::NAMED.map(|(_, format)| format).into();
        let format = prop_oneof![prop::sample::select(named), pattern()];
        let zones: Vec<_> = jiff::tz::db().available().map(|name| name.to_string()).collect();
        (format, prop::sample::select(zones), any::<bool>()).prop_map(|(format, zone, newline)| {
            SimulatedService::new(format, TimeZone::get(&zone).unwrap(), newline)
        })
    }

    proptest! {
        #[test]
        fn ignores_replies_of_time_services_except_those_of_patterns(
            sender in service(), receiver in service(), before in moment(), now in moment(),
        ) {
            let reply = sender.time_reply(before.0, before.1);
            let answer = receiver.answer(&reply, now);
            match sender.format {
                // Four bytes of any value may be answered; the next test checks that the loop ends.
                Format::Time if receiver.format != Format::Time && !receiver.is_pattern() => {}
                Format::Strftime(_) => {
                    if receiver.is_pattern() {
                        prop_assert!(answer.is_none_or(|answer| rank(&answer) > rank(&reply)));
                    }
                }
                _ => prop_assert_eq!(answer, None, "{:?} answered {:?}", receiver, reply),
            }
        }

        #[test]
        fn reply_loops_between_time_services_end(
            services in prop::collection::vec(service(), 2..4),
            forged in prop_oneof![Just(Vec::new()), prop::collection::vec(any::<u8>(), 0..64)],
            moments in prop::collection::vec(moment(), 64),
            turns in prop::collection::vec(any::<prop::sample::Index>(), 64),
        ) {
            let mut datagram = forged;
            for (turn, moment) in turns.iter().zip(moments) {
                match turn.get(&services).answer(&datagram, moment) {
                    Some(answer) => datagram = answer,
                    None => return Ok(()),
                }
            }
            prop_assert!(false, "64 answers, the last of them {datagram:?}");
        }

        #[test]
        fn replies_are_at_most_the_maximum_length(service in service(), (now, health) in moment()) {
            prop_assert!(service.time_reply(now, health).len() <= MAX_REPLY);
        }
    }

    #[test]
    fn recognizes_replies_in_named_formats_in_every_zone() {
        // The receiver has neither the zone nor a pattern.
        let guard = LoopGuard::new(&Format::Python, &TimeZone::UTC);
        let seconds = [0, 86_399, 15_552_000, 1_767_225_600, 1_782_864_000, 4_102_444_800];
        for name in jiff::tz::db().available() {
            let zone = TimeZone::get(name.as_str()).unwrap();
            for (_, format) in Format::NAMED.into_iter().filter(|(_, named)| *named != Format::Time)
            {
                let service = SimulatedService::new(format, zone.clone(), true);
                for now in seconds.map(|second| Timestamp::from_second(second).unwrap()) {
                    let reply = service.time_reply(now, None);
                    assert!(guard.resembles_reply(&reply), "{name}: {}", reply.escape_ascii());
                }
            }
        }
    }

    #[test]
    fn patterns_with_too_long_output_are_refused() {
        let now = Timestamp::new(1_790_164_800, 123_456_789).unwrap();
        let zone = TimeZone::get("America/Argentina/ComodRivadavia").unwrap();
        // The output of each part fits in zones with shorter names, or at the start of a second.
        for part in ["%Q", "%f"] {
            let format = Format::Strftime(part.repeat(MAX_REPLY / 3));
            let mut reply = Vec::new();
            assert!(format.write(now, &zone, true, &mut reply).is_err(), "{part}");
            assert_eq!(reply, b"");
            assert!(format.to_string().parse::<Format>().is_err(), "{part}");
        }
    }

    #[test]
    fn patterns_answer_typical_requests() {
        let pattern: Format = "%H:%M".parse().unwrap();
        let service = SimulatedService::new(pattern, TimeZone::UTC, true);
        for request in [&b""[..], b"\n", b"time?\n", b"what time is it\r\n", b"\0", b"1"] {
            let answer = service.answer(request, (Timestamp::UNIX_EPOCH, None));
            assert!(answer.is_some(), "{request:?}");
        }
    }

    #[test]
    fn typical_requests_do_not_resemble_replies() {
        let formats = [Format::Python, Format::Time, Format::Json];
        for request in [&b""[..], b"\n", b"time?\n", b"what time is it\r\n", b"\0", b"1"] {
            for format in &formats {
                assert!(
                    !LoopGuard::new(format, &TimeZone::UTC).resembles_reply(request),
                    "{request:?} {format}"
                );
            }
        }
    }
}
