//! Wording shared by log messages, the status line and command output.

use std::error::Error;
use std::fmt::Write as _;

/// Returns the message of an error with its causes, joined by colons.
pub(crate) fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Returns the bytes as lower-case hexadecimal digits.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

/// Parses exactly `N` bytes in hexadecimal digits of either case.
pub(crate) fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let byte = |[high, low]: &[u8; 2]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok();
    pairs.iter().map(byte).collect::<Option<Vec<u8>>>()?.try_into().ok()
}

/// Returns `count` with the singular or plural of `noun`: `1 file`, `2 addresses`, `0 entries`.
/// Knows the regular English plurals.
pub(crate) fn counted(count: impl TryInto<u64>, noun: &str) -> String {
    // A count above 64 bits is also plural.
    let count = count.try_into().unwrap_or(u64::MAX);
    if count == 1 { format!("1 {noun}") } else { format!("{count} {}", plural(noun)) }
}

/// Returns `singular` for a count of one, else `plural`, for verbs and pronouns.
pub(crate) fn agree<'a>(count: u64, singular: &'a str, plural: &'a str) -> &'a str {
    if count == 1 { singular } else { plural }
}

/// Returns counts by outcome: `1 service added, 2 removed, 3 unchanged`. Omits counts of zero; if
/// all are zero, states the last one.
pub(crate) fn tally<T: TryInto<u64> + Copy>(noun: &str, parts: &[(T, &str)]) -> String {
    let mut text = String::new();
    for (position, (count, outcome)) in parts.iter().enumerate() {
        let count = (*count).try_into().unwrap_or(u64::MAX);
        let is_last = position + 1 == parts.len();
        // Writing to a string does not fail.
        let _ = match (count, text.is_empty()) {
            (0, false) => Ok(()),
            (0, true) if !is_last => Ok(()),
            (_, true) => write!(text, "{} {outcome}", counted(count, noun)),
            (_, false) => write!(text, ", {count} {outcome}"),
        };
    }
    text
}

fn plural(noun: &str) -> String {
    let after_consonant =
        |stem: &str| stem.chars().last().is_some_and(|letter| !"aeiou".contains(letter));
    match noun.strip_suffix('y') {
        Some(stem) if after_consonant(stem) => format!("{stem}ies"),
        _ if ["s", "x", "ch", "sh"].iter().any(|end| noun.ends_with(end)) => format!("{noun}es"),
        _ => format!("{noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_hexadecimal_digits_of_either_case() {
        assert_eq!(to_hex(&[0, 0xff, 0x0a]), "00ff0a");
        assert_eq!(from_hex("00fF0a"), Some([0, 0xff, 0x0a]));
        for text in ["", "00f", "00ff", "00ff0a00", "+0ff0a", "00ffég"] {
            assert_eq!(from_hex::<3>(text), None, "{text}");
        }
    }

    #[test]
    fn inflects_nouns_by_their_count() {
        let cases = [
            (0, "file", "0 files"),
            (1, "file", "1 file"),
            (2, "address", "2 addresses"),
            (1, "entry", "1 entry"),
            (3, "entry", "3 entries"),
            (2, "reply", "2 replies"),
            (2, "day", "2 days"),
            (2, "batch", "2 batches"),
        ];
        for (count, noun, expected) in cases {
            assert_eq!(counted(count, noun), expected);
        }
        assert_eq!(counted(1_usize, "log line"), "1 log line");
        assert_eq!((agree(1, "was", "were"), agree(0, "was", "were")), ("was", "were"));
    }

    #[test]
    fn omits_outcomes_with_a_count_of_zero() {
        let services = |added, removed, unchanged| {
            tally("service", &[(added, "added"), (removed, "removed"), (unchanged, "unchanged")])
        };
        assert_eq!(services(1, 1, 2), "1 service added, 1 removed, 2 unchanged");
        assert_eq!(services(2, 0, 1), "2 services added, 1 unchanged");
        assert_eq!(services(0, 0, 1), "1 service unchanged");
        assert_eq!(services(0, 2, 0), "2 services removed");
        assert_eq!(services(0, 0, 0), "0 services unchanged");
    }
}
