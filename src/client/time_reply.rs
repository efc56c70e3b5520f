//! Parser for the replies of time services, in all common formats.

use jiff::civil::DateTime;
use jiff::tz::{Offset, TimeZone};
use jiff::{SignedDuration, Timestamp};

use crate::clock::SECONDS_1900_TO_1970;

/// A time with its resolution, parsed from a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParsedTime {
    /// The instant as written; omitted digits are zero.
    pub instant: Timestamp,
    /// The unit of the last digit of the reply.
    pub resolution: SignedDuration,
}

impl ParsedTime {
    /// Returns the range of instants with this representation.
    ///
    /// Whole seconds come from time(2) or strftime(3), which truncate. Fractions may come from
    /// printf(3), which rounds.
    pub fn range(&self) -> (Timestamp, Timestamp) {
        let rounding = match self.resolution {
            SECOND => SignedDuration::ZERO,
            fraction => fraction / 2,
        };
        let earliest = self.instant.checked_sub(rounding).unwrap_or(self.instant);
        (earliest, self.instant.checked_add(self.resolution).unwrap_or(self.instant))
    }
}

const SECOND: SignedDuration = SignedDuration::from_secs(1);

/// Returns the first line of a reply that is not blank, trimmed.
pub(crate) fn first_line(reply: &[u8]) -> &[u8] {
    let mut lines = reply.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    lines.find(|line| !line.is_empty()).unwrap_or_default()
}

/// Returns the unit of the last digit of a fraction.
fn resolution_of(fraction: &str) -> SignedDuration {
    let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
    let parts = u32::try_from(digits).ok().and_then(|digits| 10_i32.checked_pow(digits));
    parts.map_or(SignedDuration::from_nanos(1), |parts| SECOND / parts)
}

/// Returns the unit of the last digit of an ISO 8601 date and time, if it includes seconds.
fn iso_resolution(text: &str) -> Option<SignedDuration> {
    let (_, time) = text.split_once(['T', 't', ' '])?;
    let end = time.find(|c: char| !(c.is_ascii_digit() || c == ':')).unwrap_or(time.len());
    let (clock, rest) = time.split_at(end);
    let has_seconds = clock.bytes().filter(u8::is_ascii_digit).count() == 6;
    let fraction = rest.strip_prefix(['.', ',']).unwrap_or_default();
    has_seconds.then(|| resolution_of(fraction))
}

/// Parses a text in any known format. `zone` applies to formats without a zone.
pub fn read_text(text: &str, zone: &TimeZone) -> Option<ParsedTime> {
    let text = text.trim();
    // No text is valid in two formats with different results.
    json(text)
        .or_else(|| rfc3339(text))
        .or_else(|| civil(text, zone))
        .or_else(|| unix(text))
        .or_else(|| daytime(text, zone))
        .or_else(|| nist(text))
}

/// Parses the four bytes of RFC 868. The counter wraps in 2036: values below 1970 mean a time after
/// the wrap.
pub fn read_rfc868(reply: &[u8]) -> Option<ParsedTime> {
    let seconds = u32::from_be_bytes(reply.try_into().ok()?);
    let since_1970 = i64::from(seconds) - SECONDS_1900_TO_1970;
    let since_1970 = if since_1970 < 0 { since_1970 + (1 << 32) } else { since_1970 };
    Some(ParsedTime { instant: Timestamp::from_second(since_1970).ok()?, resolution: SECOND })
}

fn json(text: &str) -> Option<ParsedTime> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    rfc3339(value.as_object()?.get("time")?.as_str()?)
}

fn rfc3339(text: &str) -> Option<ParsedTime> {
    Some(ParsedTime { instant: text.parse().ok()?, resolution: iso_resolution(text)? })
}

/// Parses `str(datetime.now())` of Python and similar formats.
///
/// Python omits a fraction of zero, so whole seconds may be exact or truncated; the range covers
/// both.
fn civil(text: &str, zone: &TimeZone) -> Option<ParsedTime> {
    let time: DateTime = text.parse().ok()?;
    let instant = zone.to_timestamp(time).ok()?;
    Some(ParsedTime { instant, resolution: iso_resolution(text)? })
}

fn unix(text: &str) -> Option<ParsedTime> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let magnitude = seconds.strip_prefix('-').unwrap_or(seconds);
    if magnitude.is_empty() || !digits(magnitude) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let nanoseconds: i32 = format!("{fraction:0<9}").parse().ok()?;
    let sign = if seconds.starts_with('-') { -1 } else { 1 };
    let instant = Timestamp::new(seconds.parse().ok()?, nanoseconds * sign).ok()?;
    Some(ParsedTime { instant, resolution: resolution_of(fraction) })
}

/// Parses the format of RFC 867, `Tuesday, February 22, 1982 17:37:43-PST`.
///
/// Abbreviations of zones are ambiguous: all but those of UTC and numeric offsets mean `zone`.
fn daytime(text: &str, zone: &TimeZone) -> Option<ParsedTime> {
    let (head, seconds_and_zone) = text.rsplit_once(':')?;
    let (seconds, abbreviation) = seconds_and_zone.split_once('-')?;
    let time = DateTime::strptime("%A, %B %d, %Y %H:%M:%S", format!("{head}:{seconds}")).ok()?;
    let zone = match abbreviation {
        "UTC" | "GMT" | "Z" => TimeZone::UTC,
        _ => numeric_offset(abbreviation).map_or_else(|| zone.clone(), TimeZone::fixed),
    };
    Some(ParsedTime { instant: zone.to_timestamp(time).ok()?, resolution: SECOND })
}

/// Parses an offset such as `+08` or `-0330`, the abbreviation of zones without letters.
fn numeric_offset(text: &str) -> Option<Offset> {
    let sign = match text.get(..1)? {
        "+" => 1,
        "-" => -1,
        _ => return None,
    };
    let digits = text.get(1..)?;
    let (hours, minutes) = match digits.len() {
        2 => (digits, "0"),
        4 => digits.split_at_checked(2)?,
        _ => return None,
    };
    let seconds = hours.parse::<i32>().ok()? * 3600 + minutes.parse::<i32>().ok()? * 60;
    Offset::from_seconds(seconds * sign).ok()
}

/// Parses `JJJJJ YR-MO-DA HH:MM:SS …` of NIST. The two digits of the year mean 2000 to 2099.
fn nist(text: &str) -> Option<ParsedTime> {
    let mut fields = text.split_ascii_whitespace();
    let (day, date, time) = (fields.next()?, fields.next()?, fields.next()?);
    let _: u32 = day.parse().ok()?;
    let instant = format!("20{date}T{time}Z").parse().ok()?;
    Some(ParsedTime { instant, resolution: SECOND })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Format;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Option<(String, SignedDuration)> {
        let zone = TimeZone::get("Asia/Shanghai").unwrap();
        read_text(text, &zone).map(|time| (time.instant.to_string(), time.resolution))
    }

    #[test]
    fn parses_the_python_format_with_and_without_fraction() {
        let micros = SignedDuration::from_micros(1);
        let with = Some(("2026-11-22T05:46:01.123456Z".to_owned(), micros));
        assert_eq!(parsed("2026-11-22 13:46:01.123456\n"), with);
        let without = Some(("2026-11-22T05:46:01Z".to_owned(), SECOND));
        assert_eq!(parsed("2026-11-22 13:46:01"), without);
    }

    #[test]
    fn refuses_texts_without_a_time() {
        for text in [
            "",
            "hello",
            "13:46",
            "2026-13-01 00:00:00",
            "{}",
            "{\"time\":3}",
            "1.2.3",
            "-",
            "2026-11-22",
            "2026-11-22 13:46",
            "2026-11-22T13:46Z",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
        assert_eq!(read_rfc868(b"abc"), None);
        assert_eq!(read_rfc868(b"abcde"), None);
    }

    #[test]
    fn parses_rfc868_after_the_wrap_in_2036() {
        let read = |seconds: u32| read_rfc868(&seconds.to_be_bytes()).unwrap().instant.to_string();
        assert_eq!(read(2_208_988_800), "1970-01-01T00:00:00Z");
        assert_eq!(read(u32::MAX), "2036-02-07T06:28:15Z");
        assert_eq!(read(0), "2036-02-07T06:28:16Z");
    }

    proptest! {
        #[test]
        fn parses_every_format_of_the_daemon(
            seconds in 946_684_800i64..4_102_444_800,
            micros in 0i32..1_000_000,
            zone in prop::sample::select(vec!["UTC", "Asia/Shanghai", "America/Sao_Paulo"]),
        ) {
            let zone = TimeZone::get(zone).unwrap();
            let now = Timestamp::new(seconds, micros * 1000).unwrap();
            for name in ["python", "rfc3339", "daytime", "nist", "unix", "json"] {
                let mut reply = Vec::new();
                let format: Format = name.parse().unwrap();
                format.write(now, &zone, true, &mut reply).unwrap();
                let text = String::from_utf8(reply).unwrap();
                let time = read_text(&text, &zone).unwrap();
                let whole = Timestamp::from_second(seconds).unwrap();
                let expected = if time.resolution == SECOND { whole } else { now };
                // A local time that occurs twice, when clocks are set back, is ambiguous.
                let is_ambiguous = time.instant.duration_since(expected).abs()
                    == SignedDuration::from_hours(1);
                prop_assert!(time.instant == expected || is_ambiguous, "{name} {text}");
            }
        }
    }
}
