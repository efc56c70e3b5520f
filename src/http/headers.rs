//! Which headers an operator may add to requests.

use reqwest::header::{HeaderName, HeaderValue};

/// What handout says itself: these would break what it relies on.
const OWN: [&str; 15] = [
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "range",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Takes a name and a value for a header. The value may be a secret, and is not printed.
///
/// # Errors
/// Says what was expected.
pub(crate) fn read(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let shown = name.escape_default();
    let name = HeaderName::try_from(name)
        .map_err(|_| format!("{shown}: expected the name of a header, as Accept"))?;
    if OWN.contains(&name.as_str()) {
        return Err(format!("{name}: is said by handout itself"));
    }
    let mut value = HeaderValue::try_from(value)
        .map_err(|_| format!("{name}: expected a value of one line, without control characters"))?;
    value.set_sensitive(true);
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_a_name_of_the_operator_s_and_a_value_that_is_not_printed() {
        let (name, value) = read("X-Key", "hush").unwrap();
        assert_eq!((name.as_str(), value.to_str().unwrap()), ("x-key", "hush"));
        assert!(!format!("{value:?}").contains("hush"));
        for (bad, value) in [("", "x"), ("a b", "x"), ("Host", "x"), ("range", "x"), ("X", "a\nb")]
        {
            assert!(read(bad, value).is_err(), "{bad}");
        }
    }
}
