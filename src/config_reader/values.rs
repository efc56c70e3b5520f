//! Values that are written as strings: durations, sizes and names.

use std::time::Duration;

use bytesize::ByteSize;
use jiff::SignedDuration;

/// Maximum duration. It also keeps deadlines computable.
const MAX_DURATION: Duration = Duration::from_hours(366 * 24);

/// Maximum length of a name that the operator chooses.
const MAX_NAME: usize = 64;

/// Parses a positive duration such as `30s`, `10m` or `1h 30m`. The error names the expected value.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<SignedDuration>().ok().and_then(|parsed| parsed.try_into().ok());
    match parsed {
        Some(duration) if duration > Duration::ZERO && duration <= MAX_DURATION => Ok(duration),
        Some(_) => Err("expected a duration above 0 and at most one year".to_owned()),
        None => Err("expected a duration with a unit, such as \"30s\" or \"1h\"".to_owned()),
    }
}

/// Parses a size such as `64MiB` or `1GB` in bytes. The error names the expected value.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let expected = || "expected a size with a unit, such as \"64MiB\" or \"500kB\"".to_owned();
    // The unit of a bare number is unclear.
    if !text.ends_with(|last: char| last.is_ascii_alphabetic()) {
        return Err(expected());
    }
    text.parse::<ByteSize>().map(|size| size.as_u64()).map_err(|_| expected())
}

/// Checks a name that the operator chooses. The error names the expected value.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let is_name = name.len() <= MAX_NAME
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    if is_name {
        return Ok(());
    }
    Err(format!(
        "expected a name of at most {MAX_NAME} letters, digits, '-' and '_', \
         beginning with a letter or a digit"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requires_a_unit_for_durations() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("10m"), Ok(Duration::from_mins(10)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_mins(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "30", "s", "-3s", "0s", "3 lightyears", "9000000000h", "30s garbage"] {
            assert!(duration(bad).unwrap_err().starts_with("expected a duration"), "{bad}");
        }
    }

    #[test]
    fn requires_a_unit_for_sizes() {
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("1kB"), Ok(1000));
        assert_eq!(size("0B"), Ok(0));
        for bad in ["", "64", "MiB", "-1MiB", "1 parsec"] {
            assert!(size(bad).unwrap_err().starts_with("expected a size"), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn refuses_junk_without_a_panic(text in "[^.a-z]{0,40}") {
            let _ = duration(&text);
            let _ = size(&text);
        }
    }
}
