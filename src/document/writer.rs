//! The document as the server writes it: its opening, the file's data piece by piece, its closing.

use std::fmt::Write as _;

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::Value;

use crate::document::BASE64;

/// What stands before the file's data.
#[must_use]
pub(crate) fn opening(filename: &str) -> String {
    // A `Value` is the one thing that serde_json prints without any way to fail.
    let name = Value::from(filename);
    format!("{{\"filename\":{name},\"filedata\":\"")
}

/// What stands behind the file's data.
#[must_use]
pub(crate) fn closing(newline: bool) -> &'static str {
    if newline { "\"}\n" } else { "\"}" }
}

/// What stands before the data of a file out of a folder: with it go its size in bytes and the time
/// of its last change.
pub(crate) fn file_opening(filename: &str, size: u64, modified: Timestamp) -> String {
    let name = Value::from(filename);
    format!("{{\"filename\":{name},\"size\":{size},\"modified\":\"{modified}\",\"filedata\":\"")
}

/// What stands behind the data of a file out of a folder: the digest of what was sent.
pub fn file_closing(sha256: &[u8; 32]) -> String {
    let mut closing = String::from("\",\"sha256\":\"");
    for byte in sha256 {
        // Writing to a string does not fail.
        let _ = write!(closing, "{byte:02x}");
    }
    closing.push_str("\"}\n");
    closing
}

/// What is sent instead of a document, with the name that was asked for, if there was one.
pub(crate) fn refusal(problem: &str, filename: Option<&str>) -> String {
    let problem = Value::from(problem);
    match filename.map(Value::from) {
        Some(name) => format!("{{\"error\":{problem},\"filename\":{name}}}\n"),
        None => format!("{{\"error\":{problem}}}\n"),
    }
}

/// The length of `size` bytes in base64, or `None` if that is more than memory could hold.
#[must_use]
pub(crate) fn encoded_len(size: usize) -> Option<usize> {
    base64::encoded_len(size, true)
}

/// Appends `data` to `document` in base64.
///
/// A file may be encoded piece by piece if every piece but the last is a multiple of
/// [`WHOLE_GROUP`] bytes long.
pub(crate) fn append_encoded(data: &[u8], document: &mut Vec<u8>) {
    let start = document.len();
    let length = encoded_len(data.len()).unwrap_or(usize::MAX);
    document.resize(start.saturating_add(length), 0);
    let written = match document.get_mut(start..) {
        Some(room) => BASE64.encode_slice(data, room).unwrap_or(0),
        None => 0,
    };
    debug_assert_eq!(written, length);
}

/// Base64 turns three bytes into four characters: pieces of whole groups need no padding.
pub(crate) const WHOLE_GROUP: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    fn document(filename: &str, data: &[u8]) -> Vec<u8> {
        let mut document = opening(filename).into_bytes();
        append_encoded(data, &mut document);
        document.extend_from_slice(closing(true).as_bytes());
        document
    }

    #[test]
    fn keys_and_order_are_fixed() {
        assert_eq!(
            document("guido.jpg", b"\xff\xd8\xff"),
            b"{\"filename\":\"guido.jpg\",\"filedata\":\"/9j/\"}\n"
        );
        assert_eq!(document("empty", b""), b"{\"filename\":\"empty\",\"filedata\":\"\"}\n");
    }

    proptest! {
        #[test]
        fn any_name_and_any_bytes_come_back(name: String, data: Vec<u8>) {
            let value: serde_json::Value = serde_json::from_slice(&document(&name, &data)).unwrap();
            prop_assert_eq!(value["filename"].as_str(), Some(name.as_str()));
            let decoded = STANDARD.decode(value["filedata"].as_str().unwrap()).unwrap();
            prop_assert_eq!(decoded, data);
        }

        #[test]
        fn pieces_of_whole_groups_encode_like_the_whole(data: Vec<u8>, groups in 1usize..20) {
            let mut whole = Vec::new();
            append_encoded(&data, &mut whole);
            let mut pieces = Vec::new();
            for piece in data.chunks(groups * WHOLE_GROUP) {
                append_encoded(piece, &mut pieces);
            }
            prop_assert_eq!(pieces, whole);
        }
    }
}
