//! The oracle for the document reader: `serde_json` and `base64` on the whole input, and the rules
//! that handout adds.

use std::collections::HashMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{File, Head, Refusal};

/// Limit of the data in bytes; small, so that generated documents exceed it.
pub const LIMIT: u64 = 48;

const MAX_DEPTH: u32 = 64;

pub const KEYS: [&str; 6] = ["filename", "filedata", "size", "modified", "sha256", "error"];

/// A JSON value that keeps repeated members.
#[derive(Debug, Clone)]
pub enum Json {
    Literal(&'static str),
    Whole(u64),
    Number(String),
    Text(String),
    Array(Vec<Json>),
    Object(Members),
}

pub type Members = Vec<(String, Json)>;

impl Json {
    fn depth(&self) -> u32 {
        match self {
            Json::Array(items) => 1 + items.iter().map(Json::depth).max().unwrap_or(0),
            Json::Object(members) => 1 + members.iter().map(|m| m.1.depth()).max().unwrap_or(0),
            _ => 0,
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Json;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E: de::Error>(self) -> Result<Json, E> {
                Ok(Json::Literal("null"))
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Json, E> {
                Ok(Json::Literal(if value { "true" } else { "false" }))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Json, E> {
                Ok(Json::Whole(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Json, E> {
                Ok(Json::Number(value.to_string()))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Json, E> {
                Ok(Json::Number(value.to_string()))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Json, E> {
                Ok(Json::Text(value.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Json::Array(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Json::Object(members))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// The expected result of the reader.
#[derive(Debug)]
pub enum Verdict {
    Accept(Head, Vec<u8>, usize),
    Refuse,
    /// `serde_json` refuses a value, such as a number out of range or a lone surrogate, that the
    /// reader accepts in an unknown member. Only the form is known.
    HasForm(bool),
}

pub fn verdict(whole: &[u8]) -> Verdict {
    // Nothing but the types comes from `super`: the fuzz target includes this file, too.
    let input = whole.strip_prefix(b"\xef\xbb\xbf").unwrap_or(whole);
    let bom = whole.len() - input.len();
    let mut stream = serde_json::Deserializer::from_slice(input).into_iter::<Json>();
    let document = match stream.next() {
        Some(Ok(document)) => document,
        Some(Err(_)) => {
            let mut stream = serde_json::Deserializer::from_slice(input).into_iter::<IgnoredAny>();
            let has_form = matches!(stream.next(), Some(Ok(_)));
            let text = input.get(..stream.byte_offset()).unwrap_or_default();
            return Verdict::HasForm(has_form && std::str::from_utf8(text).is_ok());
        }
        None => return Verdict::Refuse,
    };
    let is_too_deep = document.depth() > MAX_DEPTH;
    match document {
        Json::Object(members) if !is_too_deep => match head(members) {
            Some((head, data)) => Verdict::Accept(head, data, bom + stream.byte_offset()),
            None => Verdict::Refuse,
        },
        _ => Verdict::Refuse,
    }
}

fn head(members: Members) -> Option<(Head, Vec<u8>)> {
    let mut known = HashMap::new();
    for (key, value) in members {
        if KEYS.contains(&key.as_str()) && known.insert(key, value).is_some() {
            return None;
        }
    }
    let mut text = |key: &str, limit: usize| match known.remove(key) {
        Some(Json::Text(text)) if text.len() <= limit => Some(Some(text)),
        Some(_) => None,
        None => Some(None),
    };
    let filename = text("filename", 4096)?;
    let error = text("error", 4096)?;
    let modified = text("modified", 64)?.map(|time| time.parse()).transpose().ok()?;
    let sha256 = match text("sha256", 64)? {
        Some(digits) if digits.len() == 64 => {
            let byte = |at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
            if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return None;
            }
            let bytes: Option<Vec<u8>> = (0..64).step_by(2).map(byte).collect();
            Some(bytes?.try_into().ok()?)
        }
        Some(_) => return None,
        None => None,
    };
    let data = text("filedata", usize::MAX)?.map(|data| STANDARD.decode(data)).transpose().ok()?;
    let size = match known.remove("size") {
        Some(Json::Whole(size)) => Some(size),
        Some(_) => return None,
        None => None,
    };
    match (error, filename, data) {
        (Some(error), filename, None) => {
            Some((Head::Refusal(Refusal { error, filename }), Vec::new()))
        }
        (None, Some(filename), Some(data)) if data.len() as u64 <= LIMIT => {
            let length = data.len() as u64;
            Some((Head::File(File { filename, size, modified, sha256, length }), data))
        }
        _ => None,
    }
}
