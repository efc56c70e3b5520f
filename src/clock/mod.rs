//! The forms in which the time is told, and how well the kernel says that its clock is kept.
//!
//! Pure but for [`Health::read`]: an instant goes in, bytes come out. Nothing of sockets.

mod loop_guard;
mod strftime;
pub(crate) mod watch;
mod zone;

use std::fmt;
use std::io;
use std::io::Write as _;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::{Offset, TimeZone};

use crate::sys;

pub(crate) use loop_guard::ReplyShapes;
pub(crate) use zone::{current_zone, find_zone};

/// The longest text that a strftime pattern may make: a reply fits one datagram with ease.
const MAX_TEXT: usize = 512;

/// The longest reply in any format: the longest text and its newline.
pub(crate) const MAX_REPLY: usize = MAX_TEXT + 1;

/// Seconds from 1900, where RFC 868 begins to count, to 1970.
pub(crate) const SECONDS_1900_TO_1970: i64 = 2_208_988_800;

/// Days from the start of the Modified Julian Date, 1858-11-17, to 1970-01-01.
const MODIFIED_JULIAN_1970: i64 = 40_587;

const SECONDS_PER_DAY: i64 = 86_400;

/// A form in which the time is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// What Python's `str(datetime.now())` prints, always with six digits.
    Python,
    /// RFC 3339, with microseconds and the zone's offset.
    Rfc3339,
    /// The example of RFC 867: `Tuesday, February 22, 1982 17:37:43-PST`.
    Daytime,
    /// The line of NIST's daytime servers, always UTC.
    Nist,
    /// RFC 868: seconds since 1900 in 32 bits, big-endian; it begins anew in 2036.
    Time,
    /// Seconds since 1970, with microseconds.
    Unix,
    /// A JSON object that also says how far the clock is to be trusted.
    Json,
    /// A strftime pattern, which is known to work.
    Strftime(String),
}

/// Why a format was refused; says what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FormatError(String);

impl Format {
    const NAMED: [(&str, Format); 7] = [
        ("python", Format::Python),
        ("rfc3339", Format::Rfc3339),
        ("daytime", Format::Daytime),
        ("nist", Format::Nist),
        ("time", Format::Time),
        ("unix", Format::Unix),
        ("json", Format::Json),
    ];

    /// Appends the time `now`, as told in `zone`, to `reply`, with the end of line of the format's
    /// own document or, where it has none and `newline` is true, `\n`.
    ///
    /// # Errors
    /// If the pattern cannot tell this instant, as `%Q` for a zone without a name, or would make
    /// more of it than [`MAX_REPLY`].
    pub fn write(
        &self,
        now: Timestamp,
        zone: &TimeZone,
        newline: bool,
        reply: &mut Vec<u8>,
    ) -> io::Result<()> {
        match self {
            Format::Python => pattern("%Y-%m-%d %H:%M:%S.%6f", now, zone, reply)?,
            Format::Rfc3339 => rfc3339(now, zone, reply)?,
            Format::Daytime => {
                pattern("%A, %B %-d, %Y %H:%M:%S-%Z\r\n", now, zone, reply)?;
            }
            Format::Nist => nist(now, Health::read().ok(), reply)?,
            Format::Time => {
                // The wrap in 2036 is what RFC 868 clients live with.
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                let seconds = now.as_second().wrapping_add(SECONDS_1900_TO_1970) as u32;
                reply.extend_from_slice(&seconds.to_be_bytes());
            }
            Format::Unix => unix(now, reply)?,
            Format::Json => json(now, zone, Health::read().ok(), reply)?,
            Format::Strftime(text) => pattern(text, now, zone, reply)?,
        }
        if newline && !self.has_its_own_end() {
            reply.push(b'\n');
        }
        Ok(())
    }

    /// Whether it tells how the kernel's clock is kept.
    pub fn tells_health(&self) -> bool {
        matches!(self, Format::Nist | Format::Json)
    }

    /// Whether the format's document says how it ends, so that `newline` does not apply.
    fn has_its_own_end(&self) -> bool {
        matches!(self, Format::Daytime | Format::Nist | Format::Time)
    }
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        if let Some((_, format)) = Self::NAMED.iter().find(|(name, _)| *name == text) {
            return Ok(format.clone());
        }
        if !text.contains('%') {
            let names = Self::NAMED.map(|(name, _)| name).join(", ");
            return Err(FormatError(format!("expected {names}, or a strftime pattern with %")));
        }
        // Tried on a Wednesday in September, in a fraction of a second that has all nine digits, and
        // in the zone with the longest name: what works there works at any time.
        let sample = Timestamp::new(1_790_164_800, 123_456_789).unwrap_or_default();
        let zone = TimeZone::get("America/Argentina/ComodRivadavia").unwrap_or(TimeZone::UTC);
        let wrong =
            |problem: String| FormatError(format!("expected a strftime pattern: {problem}"));
        strftime::check(text).map_err(wrong)?;
        match strftime::format(text, sample, &zone) {
            Err(error) => Err(wrong(error.to_string())),
            Ok(told) if told.len() > MAX_TEXT => {
                Err(FormatError(format!("expected a pattern of at most {MAX_TEXT} bytes of text")))
            }
            Ok(told) if told.is_empty() => {
                Err(FormatError("expected a pattern that prints something".to_owned()))
            }
            Ok(_) => Ok(Format::Strftime(text.to_owned())),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Strftime(pattern) => f.write_str(pattern),
            named => match Self::NAMED.iter().find(|(_, format)| format == named) {
                Some((name, _)) => f.write_str(name),
                None => Ok(()),
            },
        }
    }
}

/// How well the kernel's clock is kept, from adjtimex(2): whoever disciplines the clock (chrony,
/// ntpd, systemd-timesyncd) tells the kernel, and the kernel tells us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Health {
    /// Whether the clock is disciplined by somebody.
    pub synchronized: bool,
    /// The maximum error in microseconds; the kernel lets it grow while nobody corrects it.
    pub max_error_us: i64,
    /// What happens at the end of this day, UTC.
    pub leap: Leap,
}

/// The leap second that is due at the end of the day, if one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leap {
    /// The day has 86,400 seconds.
    None,
    /// A second is inserted.
    Insert,
    /// A second is left out.
    Delete,
}

impl Health {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If a filter on system calls forbids to ask.
    pub(crate) fn read() -> io::Result<Self> {
        Ok(Self::from(sys::read_timex()?))
    }
}

impl From<sys::Timex> for Health {
    fn from(timex: sys::Timex) -> Self {
        let leap = if timex.status & libc::STA_INS != 0 {
            Leap::Insert
        } else if timex.status & libc::STA_DEL != 0 {
            Leap::Delete
        } else {
            Leap::None
        };
        Self {
            synchronized: timex.state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0,
            max_error_us: timex.max_error,
            leap,
        }
    }
}

fn pattern(text: &str, now: Timestamp, zone: &TimeZone, reply: &mut Vec<u8>) -> io::Result<()> {
    let told = strftime::format(text, now, zone).map_err(io::Error::other)?;
    if told.len() > MAX_TEXT {
        return Err(io::Error::other(format!("the pattern makes more than {MAX_TEXT} bytes")));
    }
    reply.extend_from_slice(told.as_bytes());
    Ok(())
}

fn rfc3339(now: Timestamp, zone: &TimeZone, reply: &mut Vec<u8>) -> io::Result<()> {
    let time = now.to_zoned(zone.clone());
    if time.offset() == Offset::UTC {
        write!(reply, "{}", time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ"))
    } else {
        write!(reply, "{}", time.strftime("%Y-%m-%dT%H:%M:%S.%6f%:z"))
    }
}

fn unix(now: Timestamp, reply: &mut Vec<u8>) -> io::Result<()> {
    let microseconds = now.as_microsecond();
    let sign = if microseconds < 0 { "-" } else { "" };
    let magnitude = microseconds.unsigned_abs();
    write!(reply, "{sign}{}.{:06}", magnitude / 1_000_000, magnitude % 1_000_000)
}

fn json(
    now: Timestamp,
    zone: &TimeZone,
    health: Option<Health>,
    reply: &mut Vec<u8>,
) -> io::Result<()> {
    reply.extend_from_slice(b"{\"time\":\"");
    rfc3339(now, zone, reply)?;
    reply.extend_from_slice(b"\",\"unix\":");
    unix(now, reply)?;
    match health {
        Some(Health { synchronized, max_error_us, .. }) => {
            write!(reply, ",\"synchronized\":{synchronized},\"max-error-us\":{max_error_us}}}")
        }
        None => write!(reply, ",\"synchronized\":false,\"max-error-us\":null}}"),
    }
}

/// `\nJJJJJ YR-MO-DA HH:MM:SS TT L H msADV UTC(NIST) * \n`, as NIST describes its daytime service.
///
/// Nothing is known of the way to the client, so that the advance is 0.0 ms. There is a health
/// digit 2 for a clock that is known to be wrong by more than five seconds; a kernel never knows
/// that of itself.
fn nist(now: Timestamp, health: Option<Health>, reply: &mut Vec<u8>) -> io::Result<()> {
    let day = MODIFIED_JULIAN_1970 + now.as_second().div_euclid(SECONDS_PER_DAY);
    let leap = match health.map(|health| health.leap) {
        None | Some(Leap::None) => 0,
        Some(Leap::Insert) => 1,
        Some(Leap::Delete) => 2,
    };
    let digit = match health {
        // Healthy.
        Some(Health { synchronized: true, .. }) => 0,
        // In error by up to five seconds.
        Some(Health { max_error_us: ..=5_000_000, .. }) => 1,
        // Something failed, the error is not known.
        Some(_) | None => 3,
    };
    let time = now.to_zoned(TimeZone::UTC);
    writeln!(
        reply,
        "\n{:05} {} {:02} {leap} {digit}   0.0 UTC(NIST) * ",
        day.rem_euclid(100_000),
        time.strftime("%y-%m-%d %H:%M:%S"),
        us_daylight_saving_code(now),
    )
}

/// NIST's `TT`: 00 for standard time and 50 for daylight saving time in the United States; in the
/// month of a change it counts the days down to it, reaching 01 (to standard time) or 51 (to
/// daylight saving time) on the day itself.
fn us_daylight_saving_code(now: Timestamp) -> i64 {
    let Ok(zone) = TimeZone::get("America/New_York") else { return 0 };
    let saving = zone.to_offset_info(now).dst().is_dst();
    let base = if saving { 50 } else { 0 };
    let Some(change) = zone.following(now).next() else { return base };
    let today = now.to_zoned(zone.clone()).date();
    let change = change.timestamp().to_zoned(zone.clone()).date();
    if (today.year(), today.month()) != (change.year(), change.month()) {
        return base;
    }
    i64::from(change.day() - today.day()) + 1 + if saving { 0 } else { 50 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn told(format: &str, zone: &str, instant: &str) -> String {
        let mut reply = Vec::new();
        let zone = TimeZone::get(zone).unwrap();
        format.parse::<Format>().unwrap().write(at(instant), &zone, true, &mut reply).unwrap();
        String::from_utf8(reply).unwrap()
    }

    const NOW: &str = "2026-11-22T05:46:01.123456789Z";

    #[test]
    fn every_format_reads_as_its_document_says() {
        assert_eq!(told("python", "Asia/Shanghai", NOW), "2026-11-22 13:46:01.123456\n");
        assert_eq!(told("rfc3339", "Asia/Shanghai", NOW), "2026-11-22T13:46:01.123456+08:00\n");
        assert_eq!(told("rfc3339", "UTC", NOW), "2026-11-22T05:46:01.123456Z\n");
        assert_eq!(
            told("daytime", "Asia/Shanghai", NOW),
            "Sunday, November 22, 2026 13:46:01-CST\r\n"
        );
        assert_eq!(told("unix", "UTC", NOW), "1795326361.123456\n");
        assert_eq!(told("%H h %M", "Asia/Shanghai", NOW), "13 h 46\n");
    }

    #[test]
    fn python_keeps_six_digits_when_the_fraction_is_zero() {
        assert_eq!(told("python", "UTC", "2026-01-02T03:04:05Z"), "2026-01-02 03:04:05.000000\n");
    }

    #[test]
    fn rfc868_counts_from_1900_and_begins_anew_in_2036() {
        let told = |instant| {
            let mut reply = Vec::new();
            Format::Time.write(at(instant), &TimeZone::UTC, true, &mut reply).unwrap();
            reply
        };
        // The examples of RFC 868 itself.
        assert_eq!(told("1970-01-01T00:00:00Z"), 2_208_988_800_u32.to_be_bytes());
        assert_eq!(told("1976-01-01T00:00:00Z"), 2_398_291_200_u32.to_be_bytes());
        assert_eq!(told("2036-02-07T06:28:16Z"), [0, 0, 0, 0]);
    }

    #[test]
    fn unix_time_before_1970_is_negative_to_the_microsecond() {
        assert_eq!(told("unix", "UTC", "1969-12-31T23:59:59.5Z"), "-0.500000\n");
    }

    #[test]
    fn json_is_json_and_says_how_far_to_trust_the_clock() {
        let health = Health { synchronized: true, max_error_us: 1234, leap: Leap::None };
        let mut reply = Vec::new();
        json(at(NOW), &TimeZone::get("Asia/Shanghai").unwrap(), Some(health), &mut reply).unwrap();
        assert_eq!(
            String::from_utf8(reply).unwrap(),
            "{\"time\":\"2026-11-22T13:46:01.123456+08:00\",\"unix\":1795326361.123456,\
             \"synchronized\":true,\"max-error-us\":1234}"
        );
        let mut reply = Vec::new();
        json(at(NOW), &TimeZone::UTC, None, &mut reply).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&reply).unwrap();
        assert_eq!(value["synchronized"], false);
        assert!(value["max-error-us"].is_null());
    }

    #[test]
    fn the_nist_line_tells_the_health_of_the_clock() {
        let line = |health| {
            let mut reply = Vec::new();
            nist(at(NOW), health, &mut reply).unwrap();
            String::from_utf8(reply).unwrap()
        };
        let health = |synchronized, max_error_us| {
            Some(Health { synchronized, max_error_us, leap: Leap::None })
        };
        assert_eq!(
            line(health(true, 900)),
            "\n61366 26-11-22 05:46:01 00 0 0   0.0 UTC(NIST) * \n"
        );
        assert!(line(health(false, 700_000)).contains(" 00 0 1 "));
        assert!(line(health(false, 16_000_000)).contains(" 00 0 3 "));
        assert!(line(None).contains(" 00 0 3 "));
        let leap = Some(Health { synchronized: true, max_error_us: 1, leap: Leap::Insert });
        assert!(line(leap).contains(" 00 1 0 "));
    }

    #[test]
    fn the_nist_line_counts_down_to_daylight_saving_time() {
        let code = |instant| us_daylight_saving_code(at(instant));
        assert_eq!(code("2026-02-20T12:00:00Z"), 0);
        // Daylight saving time begins on 8 March 2026.
        assert_eq!(code("2026-03-01T12:00:00Z"), 58);
        assert_eq!(code("2026-03-08T06:00:00Z"), 51);
        assert_eq!(code("2026-03-08T12:00:00Z"), 50);
        assert_eq!(code("2026-07-01T12:00:00Z"), 50);
        // It ends on 1 November 2026.
        assert_eq!(code("2026-11-01T05:00:00Z"), 1);
        assert_eq!(code("2026-11-01T12:00:00Z"), 0);
    }

    #[test]
    fn the_kernel_s_status_bits_decide_the_health() {
        let health = |state, status| Health::from(sys::Timex { state, status, max_error: 5 });
        assert!(health(libc::TIME_OK, 0).synchronized);
        assert!(!health(libc::TIME_ERROR, libc::STA_UNSYNC).synchronized);
        assert_eq!(health(libc::TIME_INS, libc::STA_INS).leap, Leap::Insert);
        assert_eq!(health(libc::TIME_DEL, libc::STA_DEL).leap, Leap::Delete);
    }

    #[test]
    fn a_format_that_is_none_is_refused_with_what_was_expected() {
        let refused = |text: &str| text.parse::<Format>().unwrap_err().to_string();
        assert!(refused("pyhton").starts_with("expected python, rfc3339"));
        assert!(refused("%").contains("strftime"));
        assert!(refused("%H %!").contains("strftime"));
        assert!(refused(&"%A".repeat(300)).contains("512 bytes"));
        assert!(refused("").starts_with("expected python"));
    }

    #[test]
    fn named_formats_print_as_they_are_written() {
        for (name, format) in Format::NAMED {
            assert_eq!(format.to_string(), name);
        }
        assert_eq!(Format::Strftime("%H".to_owned()).to_string(), "%H");
    }
}
