//! JSON pointers (RFC 6901): their syntax, and the search for an array in a large document.
//! [`serde_json::Value::pointer`] evaluates them in small ones.

use std::fmt;

use serde::Deserializer;
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Checks the syntax of a pointer. An invalid one would silently match no value.
pub fn parse(text: &str) -> Result<String, String> {
    let expected = "expected a JSON pointer (RFC 6901), such as \"/pictures\" or \"/data/0/url\"";
    if !text.is_empty() && !text.starts_with('/') {
        return Err(expected.to_owned());
    }
    if text.split('~').skip(1).any(|rest| !rest.starts_with(['0', '1'])) {
        return Err(format!("{expected}; \"~\" is written \"~0\""));
    }
    Ok(text.to_owned())
}

/// Returns the elements of the array at a pointer, but not more than `max + 1`.
///
/// Nothing else of the document is kept: a [`serde_json::Value`] of 16 MiB of small objects takes
/// 1.4 GiB.
pub(crate) fn find_array<'a>(
    document: &'a RawValue,
    pointer: &str,
    max: usize,
) -> Option<Vec<&'a RawValue>> {
    let mut value = document;
    for token in pointer.split('/').skip(1) {
        let token = token.replace("~1", "/").replace("~0", "~");
        value = serde_json::Deserializer::from_str(value.get())
            .deserialize_any(Member { token: &token })
            .ok()?;
    }
    serde_json::Deserializer::from_str(value.get()).deserialize_seq(Elements { max }).ok()
}

/// Keeps the member or element that a token of a pointer names.
struct Member<'a> {
    token: &'a str,
}

impl<'de> Visitor<'de> for Member<'_> {
    type Value = &'de RawValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object or array with {}", self.token)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            // The last one of equal keys, as in `Value`.
            if key == self.token {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        found.ok_or_else(|| A::Error::custom("no such member"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let is_index = self.token == "0" || !self.token.starts_with(['0', '+']);
        let index: Option<usize> = self.token.parse().ok().filter(|_| is_index);
        let index = index.ok_or_else(|| A::Error::custom("no index"))?;
        for _ in 0..index {
            if seq.next_element::<IgnoredAny>()?.is_none() {
                break;
            }
        }
        let found = seq.next_element()?;
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        found.ok_or_else(|| A::Error::custom("no such element"))
    }
}

/// Keeps the first `max + 1` elements of an array.
struct Elements {
    max: usize,
}

impl<'de> Visitor<'de> for Elements {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while elements.len() <= self.max {
            match seq.next_element()? {
                Some(element) => elements.push(element),
                None => return Ok(elements),
            }
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(elements)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn finds_the_array_that_a_pointer_names() {
        let json = r#"{"a": [{"b": []}, {"b": [1, 2]}], "a/b": {"~": [3]}, "c": [4], "c": [5, 6]}"#;
        let document: Value = serde_json::from_str(json).unwrap();
        for pointer in [
            "", "/a", "/a/0/b", "/a/1/b", "/a/01/b", "/a/+1/b", "/a/2/b", "/a/1/b/0", "/a~1b/~0",
            "/c", "/d", "/c/0/a",
        ] {
            let expected = document.pointer(pointer).and_then(Value::as_array);
            let found = find_array(serde_json::from_str(json).unwrap(), pointer, 9).map(|list| {
                let parse = |raw: &RawValue| serde_json::from_str(raw.get()).unwrap();
                list.into_iter().map(parse).collect::<Vec<Value>>()
            });
            assert_eq!(found.as_ref(), expected, "{pointer}");
        }
    }

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
