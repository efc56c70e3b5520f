//! Syntax of JSON pointers (RFC 6901), which [`serde_json::Value::pointer`] evaluates.

/// Accepts a valid pointer. An invalid one would silently match no value.
pub fn parse(text: &str) -> Result<String, String> {
    let expected = "expected a JSON pointer (RFC 6901), as \"/pictures\" or \"/data/0/url\"";
    if !text.is_empty() && !text.starts_with('/') {
        return Err(expected.to_owned());
    }
    if text.split('~').skip(1).any(|rest| !rest.starts_with(['0', '1'])) {
        return Err(format!("{expected}; \"~\" is written \"~0\""));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_the_syntax_of_rfc_6901() {
        for valid in ["", "/", "/a~1b/m~0n/~01"] {
            assert_eq!(parse(valid).unwrap(), valid);
        }
        for invalid in ["a", "a/b", "/~", "/~2", "/a~"] {
            assert!(
                parse(invalid).unwrap_err().starts_with("expected a JSON pointer"),
                "{invalid}"
            );
        }
    }
}
