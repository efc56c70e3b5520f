//! The parts of a document as services send them: opening, data in pieces, closing.

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::Value;

use super::BASE64;
use crate::text::to_hex;

/// Bytes per group of base64: pieces of whole groups need no padding.
pub(crate) const WHOLE_GROUP: usize = 3;

/// Returns the text before the data of a single file.
pub(crate) fn opening(filename: &str) -> String {
    format!("{{\"filename\":{},\"filedata\":\"", Value::from(filename))
}

/// Returns the text after the data of a single file.
pub(crate) fn closing(newline: bool) -> &'static str {
    if newline { "\"}\n" } else { "\"}" }
}

/// Returns the text before the data of a file in a folder; `size` is in bytes.
pub(crate) fn file_opening(filename: &str, size: u64, modified: Timestamp) -> String {
    let name = Value::from(filename);
    format!("{{\"filename\":{name},\"size\":{size},\"modified\":\"{modified}\",\"filedata\":\"")
}

/// Returns the text after the data of a file in a folder. The digest follows the data, so that a
/// large file is read only once.
pub fn file_closing(sha256: &[u8; 32]) -> String {
    format!("\",\"sha256\":\"{}\"}}\n", to_hex(sha256))
}

/// Returns the reply to a request that cannot be served.
pub(crate) fn refusal(problem: &str, filename: Option<&str>) -> String {
    let problem = Value::from(problem);
    match filename.map(Value::from) {
        Some(name) => format!("{{\"error\":{problem},\"filename\":{name}}}\n"),
        None => format!("{{\"error\":{problem}}}\n"),
    }
}

/// Returns the length of `size` bytes in base64, or `None` if it exceeds the address space.
pub(crate) fn encoded_len(size: usize) -> Option<usize> {
    base64::encoded_len(size, true)
}

/// Appends `data` as base64. Every piece of a file but the last must be a multiple of
/// [`WHOLE_GROUP`] bytes long.
pub(crate) fn append_encoded(data: &[u8], document: &mut Vec<u8>) {
    let start = document.len();
    let length = encoded_len(data.len()).expect("data in memory is at most isize::MAX bytes");
    document.resize(start + length, 0);
    let (_, room) = document.split_at_mut(start);
    BASE64.encode_slice(data, room).expect("the room has the encoded length");
}

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
    fn writes_the_keys_in_fixed_order() {
        assert_eq!(
            document("guido.jpg", b"\xff\xd8\xff"),
            b"{\"filename\":\"guido.jpg\",\"filedata\":\"/9j/\"}\n"
        );
        assert_eq!(document("empty", b""), b"{\"filename\":\"empty\",\"filedata\":\"\"}\n");
    }

    proptest! {
        #[test]
        fn names_and_data_round_trip(name: String, data: Vec<u8>) {
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
