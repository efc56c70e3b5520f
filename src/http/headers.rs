//! Checks the request headers that an operator adds.

use reqwest::header::{HeaderName, HeaderValue};

/// Headers that handout sets itself, with all conditions (`If-*`).
const RESERVED: [&str; 10] = [
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "range",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Parses a header. Its value may be a secret, so errors do not contain it.
pub(crate) fn parse(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    let shown = name.escape_default();
    let name = HeaderName::try_from(name)
        .map_err(|_| format!("{shown}: expected the name of a header, such as Accept"))?;
    if RESERVED.contains(&name.as_str()) || name.as_str().starts_with("if-") {
        return Err(format!("{name}: is set by handout itself"));
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
    fn refuses_reserved_names_and_hides_values() {
        let (name, value) = parse("X-Key", "hush").unwrap();
        assert_eq!((name.as_str(), value.to_str().unwrap()), ("x-key", "hush"));
        assert!(!format!("{value:?}").contains("hush"));
        for (bad, value) in [
            ("", "x"),
            ("a b", "x"),
            ("Host", "x"),
            ("range", "x"),
            ("If-Match", "x"),
            ("X", "a\nb"),
        ] {
            assert!(parse(bad, value).is_err(), "{bad}");
        }
    }
}
