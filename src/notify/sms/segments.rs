//! SMS segments: the number of network messages that a text takes (3GPP TS 23.038 and 23.040).

/// Maximum length of a single segment, in characters of the GSM alphabet.
const SINGLE: usize = 160;

/// Non-ASCII characters of the GSM 7-bit default alphabet.
const GSM: &str = "£¥èéùìòÇØøÅåΔΦΓΛΩΠΨΣΘΞÆæßÉ¤¡ÄÖÑÜ§¿äöñüà";

pub(super) struct Segments {
    pub(super) count: usize,
    /// Maximum number of characters per segment.
    pub(super) size: usize,
    pub(super) alphabet: &'static str,
}

/// Returns the septets of a character with its escape, or `None` outside of the GSM alphabet.
fn septets(character: char) -> Option<usize> {
    match character {
        '^' | '{' | '}' | '\\' | '[' | ']' | '~' | '|' | '€' => Some(2),
        '`' | '\t' => None,
        '\n' | '\r' | ' '..='~' => Some(1),
        other => GSM.contains(other).then_some(1),
    }
}

impl Segments {
    pub(super) fn of(text: &str) -> Self {
        let gsm = text.chars().map(septets).collect::<Option<Vec<_>>>();
        let (single, several, alphabet) = match gsm {
            Some(_) => (SINGLE, 153, "GSM 7 bit"),
            None => (70, 67, "UCS-2, as it is not all GSM 7 bit"),
        };
        let lengths = gsm.unwrap_or_else(|| text.chars().map(char::len_utf16).collect());
        if lengths.iter().sum::<usize>() <= single {
            return Self { count: 1, size: single, alphabet };
        }
        // An escaped character or a surrogate pair is not split.
        let (mut count, mut room) = (1, several);
        for length in lengths {
            if length > room {
                (count, room) = (count + 1, several);
            }
            room -= length;
        }
        Self { count, size: several, alphabet }
    }
}

/// Shortens a text to `max` segments and replaces control characters.
pub(super) fn shorten(text: &str, max: usize) -> String {
    let visible = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
    let fits = |text: &str| Segments::of(text).count <= max;
    let longest = max * SINGLE + 1;
    let mut short: String = text.trim().chars().map(visible).take(longest).collect();
    if fits(&short) {
        return short;
    }
    loop {
        short.pop();
        // An ellipsis is not in the GSM alphabet and would halve the segments.
        let is_gsm = short.chars().all(|c| septets(c).is_some());
        let marked = format!("{short}{}", if is_gsm { "..." } else { "…" });
        if fits(&marked) || short.is_empty() {
            return marked;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts_segments() {
        let count = |text: &str| Segments::of(text).count;
        assert_eq!(count(&"a".repeat(160)), 1);
        assert_eq!(count(&"a".repeat(161)), 2);
        assert_eq!(count(&"{".repeat(80)), 1);
        assert_eq!(count(&"{".repeat(81)), 2);
        assert_eq!(count(&"汇".repeat(70)), 1);
        assert_eq!(count(&"汇".repeat(71)), 2);
        assert_eq!(count(&"\u{1f600}".repeat(36)), 2);
    }

    #[test]
    fn keeps_pairs_in_one_segment() {
        let count = |text: &str| Segments::of(text).count;
        let euros = |between: usize| format!("{}€", "a".repeat(between));
        assert_eq!(count(&"a".repeat(612)), 4);
        assert_eq!(count(&(euros(152) + &euros(151) + &euros(151) + &"a".repeat(152))), 5);
        assert_eq!(count(&(euros(151) + &euros(151) + &euros(151) + &euros(151))), 4);
        assert_eq!(count(&"\u{1f600}".repeat(66)), 2);
        assert_eq!(count(&"\u{1f600}".repeat(67)), 3);
    }

    /// Splits a text like a telephone does.
    fn divided(text: &str) -> Vec<String> {
        let gsm = text.chars().all(|c| septets(c).is_some());
        let length = |text: &str| {
            if gsm { text.chars().filter_map(septets).sum() } else { text.encode_utf16().count() }
        };
        let (single, several) = if gsm { (160, 153) } else { (70, 67) };
        if length(text) <= single {
            return vec![text.to_owned()];
        }
        let mut segments = vec![String::new()];
        for character in text.chars() {
            let last = segments.last_mut().unwrap();
            last.push(character);
            if length(last) > several {
                last.pop();
                segments.push(character.into());
            }
        }
        segments
    }

    #[test]
    fn shortened_texts_use_all_segments() {
        let long = |text: &str| text.repeat(1000);
        assert_eq!(shorten(&long("a"), 4), "a".repeat(609) + "...");
        assert_eq!(shorten(&long("a"), 1), "a".repeat(157) + "...");
        assert_eq!(shorten(&long("汇"), 4), "汇".repeat(267) + "…");
        // The alphabet depends on the remaining text only.
        assert_eq!(shorten(&(long("a") + "汇"), 2), "a".repeat(303) + "...");
        assert_eq!(shorten("  a汇 ", 4), "a汇");
    }

    proptest! {
        #[test]
        fn shortened_texts_fit(
            text in prop_oneof!["\\PC{0,900}", "[a-z€{}]{0,900}", "[\u{1f600}汇a]{0,400}"],
            max_segments in 1_usize..4,
        ) {
            let short = shorten(&text, max_segments);
            prop_assert!(divided(&short).len() <= max_segments);
            prop_assert!(short == text.trim() || short.ends_with("...") || short.ends_with('…'));
            prop_assert_eq!(Segments::of(&text).count, divided(&text).len().max(1));
        }
    }
}
