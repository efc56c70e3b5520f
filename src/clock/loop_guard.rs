//! Which datagrams look like the reply of a time service, so that two of them, set on each other by a
//! forged datagram, do not answer each other for ever.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::clock::{Format, MAX_REPLY};

/// What the replies of time services look like.
///
/// Replies in a named format are known to all. What another's pattern prints is known to nobody but
/// its own service; so two patterns might take each other's replies for questions. They do not go on
/// for long, as an answer to one always [outranks](Self::outranks) it.
#[derive(Debug)]
pub(crate) struct ReplyShapes {
    shapes: Vec<Vec<u8>>,
    /// RFC 868 replies are four bytes of any value.
    four_bytes: bool,
    pattern: bool,
}

impl ReplyShapes {
    /// The replies of every named format, and those of `own`, which may be a pattern, as told in
    /// `zone`.
    pub(crate) fn new(own: &Format, zone: &TimeZone) -> Self {
        let mut shapes: Vec<Vec<u8>> = Vec::new();
        let utc = TimeZone::UTC;
        let named = Format::NAMED.iter().map(|(_, format)| (format, &utc));
        // Four bytes have no shape.
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
        let pattern = matches!(own, Format::Strftime(_));
        Self { shapes, four_bytes: pattern || *own == Format::Time, pattern }
    }

    /// Whether `datagram` looks like the reply of a time service.
    pub(crate) fn match_datagram(&self, datagram: &[u8]) -> bool {
        // Nothing longer is a reply of ours.
        if datagram.len() > MAX_REPLY {
            return false;
        }
        (self.four_bytes && datagram.len() == 4)
            || self.shapes.iter().any(|known| shape(datagram).eq(known.iter().copied()))
    }

    /// Whether `reply` may follow `datagram`. A pattern's must have more digits, or as many and more
    /// bytes. So answers to answers, if there are any, grow until they end; and a question, which has
    /// few digits, is answered.
    pub(crate) fn outranks(&self, reply: &[u8], datagram: &[u8]) -> bool {
        !self.pattern || rank(datagram) < rank(reply)
    }
}

fn rank(text: &[u8]) -> (usize, usize) {
    (text.iter().filter(|byte| byte.is_ascii_digit()).count(), text.len())
}

/// Instants at which formats say things of different shapes: a zone may be called differently in
/// summer and in winter, and where a clock begins; a fraction may be left out if it is zero.
/// 1 January 1970; 1 January and 1 July 2026, with a fraction and without.
const SAMPLES: [(i64, i32); 6] = [
    (0, 0),
    (0, 123_456_789),
    (1_767_225_600, 0),
    (1_767_225_600, 123_456_789),
    (1_782_864_000, 0),
    (1_782_864_000, 123_456_789),
];

/// Replies whose shape depends on more than the format: on the zone, or on the kernel.
const OTHER_REPLIES: [&[u8]; 9] = [
    b"1970-01-01T00:00:00.000000+00:00",
    b"Thursday, January 1, 1970 00:00:00-+00",
    b"{\"time\":\"1970-01-01T00:00:00.0+00:00\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":0}",
    b"{\"time\":\"1970-01-01T00:00:00.0Z\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":null}",
    b"{\"time\":\"1970-01-01T00:00:00.0+00:00\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":null}",
    b"1970-01-01 00:00:00",
    // Liberia's time was off by half a minute until 1972, where a clock without a battery begins.
    b"1970-01-01T00:00:00.000000-00:44:30",
    b"{\"time\":\"1970-01-01T00:00:00.0-00:44:30\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":0}",
    b"{\"time\":\"1970-01-01T00:00:00.0-00:44:30\",\"unix\":0.0,\"synchronized\":true,\"max-error-us\":null}",
];

/// A text with every number and every word reduced to one letter, and white space trimmed, also
/// before numbers, which it may fill up.
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

    /// A time service of this daemon or of another, on whatever port, with whatever clock.
    #[derive(Debug)]
    struct OneOfOurs {
        format: Format,
        zone: TimeZone,
        newline: bool,
        shapes: ReplyShapes,
    }

    impl OneOfOurs {
        fn new(format: Format, zone: TimeZone, newline: bool) -> Self {
            let shapes = ReplyShapes::new(&format, &zone);
            Self { format, zone, newline, shapes }
        }

        /// What it says at `now` if its kernel says so much of its clock.
        fn reply(&self, now: Timestamp, health: Option<Health>) -> Vec<u8> {
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

        /// What it answers to a datagram, if anything.
        fn answer(&self, datagram: &[u8], (now, health): Moment) -> Option<Vec<u8>> {
            let reply = self.reply(now, health);
            (!self.shapes.match_datagram(datagram) && self.shapes.outranks(&reply, datagram))
                .then_some(reply)
        }

        fn is_a_pattern(&self) -> bool {
            matches!(self.format, Format::Strftime(_))
        }
    }

    type Moment = (Timestamp, Option<Health>);

    fn moment() -> impl Strategy<Value = Moment> {
        // From 1970, where a clock without a battery begins, to 2200; any fraction of a second.
        let time = (0..7_258_118_400_i64, 0..1_000_000_000_i32)
            .prop_map(|(second, nanosecond)| Timestamp::new(second, nanosecond).unwrap());
        let leap = prop::sample::select(vec![Leap::None, Leap::Insert, Leap::Delete]);
        let health = (any::<bool>(), 0..20_000_000_i64, leap).prop_map(
            |(synchronized, max_error_us, leap)| Health { synchronized, max_error_us, leap },
        );
        (time, prop::option::of(health))
    }

    fn pattern() -> impl Strategy<Value = Format> {
        // Words, marks and numbers of all lengths, and those that change from moment to moment.
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
        parts.prop_filter_map("no pattern", |parts| {
            let format: Format = parts.concat().parse().ok()?;
            matches!(format, Format::Strftime(_)).then_some(format)
        })
    }

    fn one_of_ours() -> impl Strategy<Value = OneOfOurs> {
        let named: Vec<_> = Format::NAMED.map(|(_, format)| format).into();
        let format = prop_oneof![prop::sample::select(named), pattern()];
        let zones: Vec<_> = jiff::tz::db().available().map(|name| name.to_string()).collect();
        (format, prop::sample::select(zones), any::<bool>()).prop_map(|(format, zone, newline)| {
            OneOfOurs::new(format, TimeZone::get(&zone).unwrap(), newline)
        })
    }

    proptest! {
        #[test]
        fn a_reply_of_ours_is_answered_by_none_of_ours_unless_a_pattern_makes_it(
            said in one_of_ours(), asked in one_of_ours(), before in moment(), now in moment(),
        ) {
            let reply = said.reply(before.0, before.1);
            let answer = asked.answer(&reply, now);
            match said.format {
                // Four bytes, which may be anything: see the next law for what comes of it.
                Format::Time if asked.format != Format::Time && !asked.is_a_pattern() => {}
                Format::Strftime(_) => {
                    if asked.is_a_pattern() {
                        prop_assert!(answer.is_none_or(|answer| rank(&answer) > rank(&reply)));
                    }
                }
                _ => prop_assert_eq!(answer, None, "{:?} answered {:?}", asked, reply),
            }
        }

        #[test]
        fn answers_to_answers_of_any_of_ours_come_to_an_end(
            ours in prop::collection::vec(one_of_ours(), 2..4),
            forged in prop_oneof![Just(Vec::new()), prop::collection::vec(any::<u8>(), 0..64)],
            moments in prop::collection::vec(moment(), 64),
            turns in prop::collection::vec(any::<prop::sample::Index>(), 64),
        ) {
            let mut datagram = forged;
            for (turn, moment) in turns.iter().zip(moments) {
                match turn.get(&ours).answer(&datagram, moment) {
                    Some(answer) => datagram = answer,
                    None => return Ok(()),
                }
            }
            prop_assert!(false, "64 answers, the last of them {datagram:?}");
        }

        #[test]
        fn no_reply_is_longer_than_the_longest(one in one_of_ours(), (now, health) in moment()) {
            prop_assert!(one.reply(now, health).len() <= MAX_REPLY);
        }
    }

    #[test]
    fn a_reply_in_a_named_format_is_known_to_all_whatever_its_zone() {
        // To those who have no zone and no pattern of their own to know it by.
        let known = ReplyShapes::new(&Format::Python, &TimeZone::UTC);
        // A second, half a year and half a century apart, from 1970 on.
        let seconds = [0, 86_399, 15_552_000, 1_767_225_600, 1_782_864_000, 4_102_444_800];
        for name in jiff::tz::db().available() {
            let zone = TimeZone::get(name.as_str()).unwrap();
            for (_, format) in Format::NAMED.into_iter().filter(|(_, named)| *named != Format::Time)
            {
                let one = OneOfOurs::new(format, zone.clone(), true);
                for now in seconds.map(|second| Timestamp::from_second(second).unwrap()) {
                    let reply = one.reply(now, None);
                    assert!(known.match_datagram(&reply), "{name}: {}", reply.escape_ascii());
                }
            }
        }
    }

    #[test]
    fn a_pattern_that_would_make_more_than_fits_tells_nothing() {
        let now = Timestamp::new(1_790_164_800, 123_456_789).unwrap();
        let zone = TimeZone::get("America/Argentina/ComodRivadavia").unwrap();
        // Each is no longer than the longest in another zone, at the beginning of another second.
        for part in ["%Q", "%f"] {
            let format = Format::Strftime(part.repeat(MAX_REPLY / 3));
            let mut reply = Vec::new();
            assert!(format.write(now, &zone, true, &mut reply).is_err(), "{part}");
            assert_eq!(reply, b"");
            assert!(format.to_string().parse::<Format>().is_err(), "{part}");
        }
    }

    #[test]
    fn what_people_send_is_answered_also_by_a_pattern() {
        let pattern: Format = "%H:%M".parse().unwrap();
        let one = OneOfOurs::new(pattern, TimeZone::UTC, true);
        for request in [&b""[..], b"\n", b"time?\n", b"what time is it\r\n", b"\0", b"1"] {
            assert!(one.answer(request, (Timestamp::UNIX_EPOCH, None)).is_some(), "{request:?}");
        }
    }

    #[test]
    fn what_people_send_does_not_resemble_a_reply() {
        let asked = [Format::Python, Format::Time, Format::Json];
        for request in [&b""[..], b"\n", b"time?\n", b"what time is it\r\n", b"\0", b"1"] {
            for format in &asked {
                assert!(
                    !ReplyShapes::new(format, &TimeZone::UTC).match_datagram(request),
                    "{request:?} {format}"
                );
            }
        }
    }
}
