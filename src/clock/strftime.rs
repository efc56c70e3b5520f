//! Strftime patterns: the output of strftime(3) in the C locale, or a configuration error.
//!
//! The crate `jiff` formats the time. It ignores flags and widths that strftime(3) obeys; [`check`]
//! refuses those, so that the output never differs from date(1).

use jiff::Timestamp;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use jiff::tz::TimeZone;

/// Formats an instant in a zone.
///
/// # Errors
/// If the pattern cannot express this instant, such as `%Q` for a zone without a name.
pub(super) fn format(
    pattern: &str,
    now: Timestamp,
    zone: &TimeZone,
) -> Result<String, jiff::Error> {
    let time = BrokenDownTime::from(&now.to_zoned(zone.clone()));
    // `%c`, `%x`, `%X` and `%r` of the C locale.
    let config = Config::new().custom(PosixCustom::new());
    let mut text = String::with_capacity(64);
    time.format_with_config(&config, pattern, &mut text)?;
    Ok(text)
}

/// Refuses conversions that jiff does not print as strftime(3) does.
///
/// # Errors
/// Names the conversion and the remedy.
pub(super) fn check(pattern: &str) -> Result<(), String> {
    let mut rest = pattern;
    while let Some((_, behind)) = rest.split_once('%') {
        let conversion = Conversion::parse(behind)
            .ok_or("a conversion is incomplete at the end: write %% for a percent sign")?;
        conversion.check().map_err(|remedy| format!("%{}: {remedy}", conversion.text))?;
        rest = behind.get(conversion.text.len()..).unwrap_or_default();
    }
    Ok(())
}

/// A conversion such as `%-d`, `%3N`, `%:z` or `%.6f`, without its percent sign.
struct Conversion<'a> {
    text: &'a str,
    flags: &'a str,
    width: &'a str,
    colons: usize,
    specifier: char,
}

impl<'a> Conversion<'a> {
    fn parse(behind: &'a str) -> Option<Self> {
        let unflagged = behind.trim_start_matches(['_', '-', '0', '^', '#', '+']);
        let flags = behind.get(..behind.len() - unflagged.len())?;
        let unsized_ = unflagged.trim_start_matches(|c: char| c.is_ascii_digit());
        let width = unflagged.get(..unflagged.len() - unsized_.len())?;
        let bare = unsized_.trim_start_matches(':');
        let colons = unsized_.len() - bare.len();
        // An extension of jiff: a fraction with its point, which is omitted without digits.
        let bare = match bare.strip_prefix('.') {
            Some(fraction) => fraction.trim_start_matches(|c: char| c.is_ascii_digit()),
            None => bare,
        };
        let specifier = bare.chars().next()?;
        let length = behind.len() - bare.len() + specifier.len_utf8();
        Some(Self { text: behind.get(..length)?, flags, width, colons, specifier })
    }

    /// Whether date(1) and the strftime(3) of glibc differ: for a width with a flag that forbids
    /// padding, and for a width below the natural one.
    fn is_ambiguous(&self) -> bool {
        let natural = match self.specifier {
            'N' | 'f' => return false,
            'j' => 3,
            'q' => 1,
            _ => 2,
        };
        let width = self.width.parse().unwrap_or(if self.width.is_empty() { natural } else { 0 });
        width < natural || (self.flags == "-" && !self.width.is_empty())
    }

    fn check(&self) -> Result<(), &'static str> {
        let (flags, width, colons) = match self.specifier {
            'd' | 'e' | 'g' | 'G' | 'H' | 'I' | 'j' | 'k' | 'l' | 'm' | 'M' | 'q' | 'S' | 'U'
            | 'V' | 'W' | 'y' | 'Y' => ("_-0^#", usize::MAX, 0),
            'C' | 'c' | 'F' | 'n' | 'p' | 'r' | 'R' | 's' | 't' | 'T' | 'u' | 'w' | 'x' | 'X'
            | 'Z' => ("_-0^#", 0, 0),
            'a' | 'A' | 'b' | 'B' | 'h' => ("_-0^", 0, 0),
            'P' => ("_-0#", 0, 0),
            'D' => ("0^#", 0, 0),
            'z' => ("0^#", 0, 3),
            'N' | 'f' => ("0", 1, 0),
            'Q' => ("", 0, 1),
            '%' => ("", 0, 0),
            'E' | 'O' => return Err("leave out E and O, which change nothing in the C locale"),
            _ => return Err("there is no such conversion"),
        };
        if self.flags.len() > 1 {
            Err("more than one flag is not supported: leave one")
        } else if !flags.contains(self.flags) {
            Err("this flag is not supported here: leave it out")
        } else if self.width.len() > width || self.is_ambiguous() {
            Err("this width is not supported here: leave it out")
        } else if self.colons > colons {
            Err("colons are not supported here: leave them out")
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Format;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    /// Every conversion of strftime(3) but `%E*`, `%O*` and `%+`.
    const PLAIN: &str = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%";

    /// Returns instants from 1970 to 2199 with various fractions.
    fn instants() -> Vec<Timestamp> {
        let instant = |n: i64| {
            let nanosecond = i32::try_from(n * 7_654_321_987 % 1_000_000_000).unwrap();
            Timestamp::new(n * 1_333_331_333 % 7_258_118_400, nanosecond).unwrap()
        };
        (0..80).map(instant).collect()
    }

    /// Returns the output of date(1) for each pattern at each instant.
    fn date(patterns: &[String], instants: &[Timestamp], zone: &str) -> Vec<Vec<String>> {
        let mut command = Command::new("date");
        command.args(["-f", "-"]).arg(format!("+{}\u{1e}", patterns.join("\u{1f}")));
        command.env("LC_ALL", "C").env("TZ", zone).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let lines = instants
            .iter()
            .map(|at| format!("@{}.{:09}\n", at.as_second(), at.subsec_nanosecond()));
        let lines: String = lines.collect();
        let writing = std::thread::spawn(move || input.write_all(lines.as_bytes()).unwrap());
        let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        writing.join().unwrap();
        let records = output.split_terminator("\u{1e}\n");
        records.map(|record| record.split('\u{1f}').map(str::to_owned).collect()).collect()
    }

    #[test]
    fn prints_the_output_of_date_or_refuses_the_pattern() {
        let mut patterns = Vec::new();
        for specifier in PLAIN.chars().chain("NqvLfJiK+EO".chars()) {
            for flag in ["", "_", "-", "0", "^", "#", "+", "-0", "_^", "^#"] {
                for width in ["", "1", "2", "3", "4", "9", "10", "20"] {
                    for modifier in ["", ":", "::", ":::", "E", "O"] {
                        patterns.push(format!("%{flag}{width}{modifier}{specifier}"));
                    }
                }
            }
        }
        // `%f` and `%Q` are extensions of jiff.
        patterns.retain(|pattern| !pattern.ends_with('f') && pattern.parse::<Format>().is_ok());
        for specifier in PLAIN.chars() {
            assert!(patterns.contains(&format!("%{specifier}")), "{specifier}");
        }
        let instants = instants();
        for name in ["UTC", "Asia/Shanghai", "America/St_Johns"] {
            let zone = TimeZone::get(name).unwrap();
            let printed = date(&patterns, &instants, name);
            assert_eq!(printed.len(), instants.len());
            for (at, expected) in instants.iter().zip(&printed) {
                for (pattern, expected) in patterns.iter().zip(expected) {
                    assert_eq!(&format(pattern, *at, &zone).unwrap(), expected, "{pattern} {at}");
                }
            }
        }
    }

    #[test]
    fn names_the_refused_conversion_and_the_remedy() {
        for (pattern, message) in [
            ("%H:%M %Ec", "%E: leave out E and O, which change nothing in the C locale"),
            ("%5a", "%5a: this width is not supported here: leave it out"),
            ("%-5d", "%-5d: this width is not supported here: leave it out"),
            ("%1H", "%1H: this width is not supported here: leave it out"),
            ("%#A", "%#A: this flag is not supported here: leave it out"),
            ("%-05d", "%-05d: more than one flag is not supported: leave one"),
            ("%::H", "%::H: colons are not supported here: leave them out"),
            ("%d %+", "a conversion is incomplete at the end: write %% for a percent sign"),
            ("100 %", "a conversion is incomplete at the end: write %% for a percent sign"),
            ("%d %v", "%v: there is no such conversion"),
        ] {
            let error = pattern.parse::<Format>().unwrap_err().to_string();
            assert_eq!(error, format!("expected a strftime pattern: {message}"), "{pattern}");
        }
    }
}
