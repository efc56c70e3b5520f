//! Time formats, and the state of the kernel's clock.
//!
//! Formatting is pure, except for [`Health::read`]. Nothing here knows sockets.

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

pub(crate) use loop_guard::LoopGuard;
pub(crate) use zone::{current_zone, find_zone};

/// Maximum output of a strftime pattern, in bytes, so that every reply fits into one datagram.
const MAX_TEXT: usize = 512;

/// Maximum length of a reply in any format, in bytes: text and newline.
pub(crate) const MAX_REPLY: usize = MAX_TEXT + 1;

/// Seconds from 1900, the epoch of RFC 868, to 1970.
pub(crate) const SECONDS_1900_TO_1970: i64 = 2_208_988_800;

/// Days from the start of the Modified Julian Date, 1858-11-17, to 1970-01-01.
const MODIFIED_JULIAN_1970: i64 = 40_587;

const SECONDS_PER_DAY: i64 = 86_400;

/// A format of the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// The output of Python's `str(datetime.now())`, always with six digits.
    Python,
    /// RFC 3339, with microseconds and the zone's offset.
    Rfc3339,
    /// The format of the example in RFC 867: `Tuesday, February 22, 1982 17:37:43-PST`.
    Daytime,
    /// The line of NIST's daytime servers, always UTC.
    Nist,
    /// RFC 868: seconds since 1900 in 32 bits, big-endian; it wraps in 2036.
    Time,
    /// Seconds since 1970, with microseconds.
    Unix,
    /// A JSON object with the time and the state of the clock.
    Json,
    /// A validated strftime pattern.
    Strftime(String),
}

/// The reason why a format is invalid, with the expected values.
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

    /// Appends `now` in `zone` to `reply`. `newline` adds `\n`, unless the standard of the format
    /// defines its end.
    ///
    /// # Errors
    /// If the pattern cannot express this instant, such as `%Q` for a zone without a name, or its
    /// output is too long for a datagram.
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
                // RFC 868 clients expect the wrap in 2036.
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                let seconds = now.as_second().wrapping_add(SECONDS_1900_TO_1970) as u32;
                reply.extend_from_slice(&seconds.to_be_bytes());
            }
            Format::Unix => unix(now, reply)?,
            Format::Json => json(now, zone, Health::read().ok(), reply)?,
            Format::Strftime(text) => pattern(text, now, zone, reply)?,
        }
        if newline && !self.has_fixed_end() {
            reply.push(b'\n');
        }
        Ok(())
    }

    /// Whether the format contains the state of the kernel's clock.
    pub fn includes_health(&self) -> bool {
        matches!(self, Format::Nist | Format::Json)
    }

    /// Whether the standard of the format defines its end, so that `newline` does not apply.
    fn has_fixed_end(&self) -> bool {
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
        // The longest output: a Wednesday in September, nine digits of fraction, and the zone with
        // the longest name. A pattern that works for this sample works at any time.
        let sample = Timestamp::new(1_790_164_800, 123_456_789).unwrap_or_default();
        let zone = TimeZone::get("America/Argentina/ComodRivadavia").unwrap_or(TimeZone::UTC);
        let invalid =
            |problem: String| FormatError(format!("expected a strftime pattern: {problem}"));
        strftime::check(text).map_err(invalid)?;
        match strftime::format(text, sample, &zone) {
            Err(error) => Err(invalid(error.to_string())),
            Ok(output) if output.len() > MAX_TEXT => {
                Err(FormatError(format!("expected a pattern that prints at most {MAX_TEXT} bytes")))
            }
            Ok(output) if output.is_empty() => {
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

/// The state of the kernel's clock, from adjtimex(2). The daemon that disciplines the clock
/// (chrony, ntpd, systemd-timesyncd) reports it to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Health {
    /// Whether a daemon disciplines the clock.
    pub synchronized: bool,
    /// The maximum error in microseconds, which grows while the clock is not corrected.
    pub max_error_us: i64,
    /// The leap second at the end of the current UTC day.
    pub leap: Leap,
}

/// The leap second at the end of a day, if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leap {
    /// The day has 86,400 seconds.
    None,
    /// A second is inserted.
    Insert,
    /// A second is omitted.
    Delete,
}

impl Health {
    /// Reads the state from the kernel.
    ///
    /// # Errors
    /// If a system call filter forbids it.
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
    let output = strftime::format(text, now, zone).map_err(io::Error::other)?;
    if output.len() > MAX_TEXT {
        return Err(io::Error::other(format!("the pattern prints more than {MAX_TEXT} bytes")));
    }
    reply.extend_from_slice(output.as_bytes());
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

/// Appends the line of NIST's daytime service:
/// `\nJJJJJ YR-MO-DA HH:MM:SS TT L H msADV UTC(NIST) * \n`.
///
/// The advance is 0.0 ms, because the network delay is unknown. The health digit is never 2 (known
/// to be wrong by more than five seconds), because the kernel cannot know that.
fn nist(now: Timestamp, health: Option<Health>, reply: &mut Vec<u8>) -> io::Result<()> {
    let day = MODIFIED_JULIAN_1970 + now.as_second().div_euclid(SECONDS_PER_DAY);
    let leap = match health.map(|health| health.leap) {
        None | Some(Leap::None) => 0,
        Some(Leap::Insert) => 1,
        Some(Leap::Delete) => 2,
    };
    let digit = match health {
        Some(Health { synchronized: true, .. }) => 0,
        // Wrong by up to five seconds.
        Some(Health { max_error_us: ..=5_000_000, .. }) => 1,
        // Hardware or software failure; the error is unknown.
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

/// Returns the field `TT` of NIST: 00 for standard time and 50 for daylight saving time in the
/// United States.
///
/// In the month of a change it counts down the days, to 01 (standard time begins) or 51 (daylight
/// saving time begins) on the day itself.
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

    fn format_at(format: &str, zone: &str, instant: &str) -> String {
        let mut reply = Vec::new();
        let zone = TimeZone::get(zone).unwrap();
        format.parse::<Format>().unwrap().write(at(instant), &zone, true, &mut reply).unwrap();
        String::from_utf8(reply).unwrap()
    }

    const NOW: &str = "2026-11-22T05:46:01.123456789Z";

    #[test]
    fn formats_follow_their_standards() {
        assert_eq!(format_at("python", "Asia/Shanghai", NOW), "2026-11-22 13:46:01.123456\n");
        assert_eq!(
            format_at("rfc3339", "Asia/Shanghai", NOW),
            "2026-11-22T13:46:01.123456+08:00\n"
        );
        assert_eq!(format_at("rfc3339", "UTC", NOW), "2026-11-22T05:46:01.123456Z\n");
        assert_eq!(
            format_at("daytime", "Asia/Shanghai", NOW),
            "Sunday, November 22, 2026 13:46:01-CST\r\n"
        );
        assert_eq!(format_at("unix", "UTC", NOW), "1795326361.123456\n");
        assert_eq!(format_at("%H h %M", "Asia/Shanghai", NOW), "13 h 46\n");
    }

    #[test]
    fn python_keeps_six_digits_when_the_fraction_is_zero() {
        let text = format_at("python", "UTC", "2026-01-02T03:04:05Z");
        assert_eq!(text, "2026-01-02 03:04:05.000000\n");
    }

    #[test]
    fn rfc868_counts_from_1900_and_wraps_in_2036() {
        let reply_at = |instant| {
            let mut reply = Vec::new();
            Format::Time.write(at(instant), &TimeZone::UTC, true, &mut reply).unwrap();
            reply
        };
        // Examples from RFC 868.
        assert_eq!(reply_at("1970-01-01T00:00:00Z"), 2_208_988_800_u32.to_be_bytes());
        assert_eq!(reply_at("1976-01-01T00:00:00Z"), 2_398_291_200_u32.to_be_bytes());
        assert_eq!(reply_at("2036-02-07T06:28:16Z"), [0, 0, 0, 0]);
    }

    #[test]
    fn unix_time_before_1970_is_negative_to_the_microsecond() {
        assert_eq!(format_at("unix", "UTC", "1969-12-31T23:59:59.5Z"), "-0.500000\n");
    }

    #[test]
    fn json_contains_the_state_of_the_clock() {
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
    fn the_nist_line_contains_the_health_of_the_clock() {
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
    fn reads_the_health_from_the_status_bits_of_the_kernel() {
        let health = |state, status| Health::from(sys::Timex { state, status, max_error: 5 });
        assert!(health(libc::TIME_OK, 0).synchronized);
        assert!(!health(libc::TIME_ERROR, libc::STA_UNSYNC).synchronized);
        assert_eq!(health(libc::TIME_INS, libc::STA_INS).leap, Leap::Insert);
        assert_eq!(health(libc::TIME_DEL, libc::STA_DEL).leap, Leap::Delete);
    }

    #[test]
    fn refuses_unknown_formats_with_the_expected_values() {
        let refused = |text: &str| text.parse::<Format>().unwrap_err().to_string();
        assert!(refused("pyhton").starts_with("expected python, rfc3339"));
        assert!(refused("%").contains("strftime"));
        assert!(refused("%H %!").contains("strftime"));
        assert!(refused(&"%A".repeat(300)).contains("512 bytes"));
        assert!(refused("").starts_with("expected python"));
    }

    #[test]
    fn named_formats_display_as_their_names() {
        for (name, format) in Format::NAMED {
            assert_eq!(format.to_string(), name);
        }
        assert_eq!(Format::Strftime("%H".to_owned()).to_string(), "%H");
    }
}
