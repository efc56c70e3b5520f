//! Decodes base64 that arrives in pieces.

use base64::Engine as _;

use super::{BASE64, ReadError, WHOLE_GROUP};
use crate::text::counted;

/// Characters per group of base64.
const GROUP: usize = 4;

/// Decodes whole groups at once and keeps the characters of an incomplete one.
///
/// The first faulty group decides the error, so the result does not depend on the pieces.
#[derive(Debug)]
pub(crate) struct Decoder {
    incomplete: Vec<u8>,
    /// A padded group was decoded, which must be the last.
    is_padded: bool,
    /// Decoded bytes so far.
    length: u64,
    /// Maximum number of decoded bytes.
    limit: u64,
}

impl Decoder {
    pub(crate) fn new(limit: u64) -> Self {
        Self { incomplete: Vec::with_capacity(GROUP), is_padded: false, length: 0, limit }
    }

    /// Appends the decoded bytes of `text` to `data`: at most two more bytes than `text` has.
    pub(crate) fn push(&mut self, text: &[u8], data: &mut Vec<u8>) -> Result<(), ReadError> {
        let missing = (GROUP - self.incomplete.len()) % GROUP;
        let (head, text) = text.split_at(missing.min(text.len()));
        self.incomplete.extend_from_slice(head);
        if let Some(&group) = self.incomplete.as_array::<GROUP>() {
            self.incomplete.clear();
            self.decode(&group, data)?;
        }
        let (groups, rest) = text.as_chunks::<GROUP>();
        if self.decode(groups.as_flattened(), data).is_err() {
            groups.iter().try_for_each(|group| self.decode(group, data))?;
        }
        self.incomplete.extend_from_slice(rest);
        Ok(())
    }

    /// Decodes whole groups, or changes nothing if any of them is faulty.
    fn decode(&mut self, groups: &[u8], data: &mut Vec<u8>) -> Result<(), ReadError> {
        if groups.is_empty() {
            return Ok(());
        }
        if self.is_padded {
            return Err(self.invalid("data after the padding"));
        }
        let start = data.len();
        data.resize(start + groups.len() / GROUP * WHOLE_GROUP, 0);
        let (_, room) = data.split_at_mut(start);
        let decoded = BASE64.decode_slice(groups, room);
        let length = decoded.as_ref().map_or(0, |decoded| *decoded as u64);
        let result = if decoded.is_err() {
            Err(self.invalid("not canonical base64"))
        } else if length > self.limit - self.length {
            Err(ReadError::TooMuchData { limit: self.limit })
        } else {
            self.length += length;
            self.is_padded = groups.last() == Some(&b'=');
            Ok(())
        };
        data.truncate(start + if result.is_ok() { decoded.unwrap_or(0) } else { 0 });
        result
    }

    /// Ends the text and returns the number of decoded bytes.
    pub(crate) fn finish(&self) -> Result<u64, ReadError> {
        if self.incomplete.is_empty() {
            return Ok(self.length);
        }
        Err(self.invalid("an incomplete group of base64 at the end"))
    }

    fn invalid(&self, problem: &str) -> ReadError {
        ReadError::Invalid(format!(
            "filedata: {problem}, after {} of data",
            counted(self.length, "byte")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `text` with a limit of six bytes, whole and byte by byte.
    fn decode(text: &str) -> Result<Vec<u8>, ReadError> {
        let decode = |pieces: &mut dyn Iterator<Item = &[u8]>| {
            let mut decoder = Decoder::new(6);
            let mut data = Vec::new();
            for piece in pieces {
                decoder.push(piece, &mut data)?;
            }
            assert_eq!(decoder.finish()?, data.len() as u64);
            Ok(data)
        };
        let whole = decode(&mut std::iter::once(text.as_bytes()));
        assert_eq!(whole, decode(&mut text.as_bytes().chunks(1)));
        whole
    }

    #[test]
    fn decodes_groups() {
        assert_eq!(decode("").unwrap(), b"");
        assert_eq!(decode("+/+/").unwrap(), b"\xfb\xff\xbf");
        assert_eq!(decode("AAAAYQ==").unwrap(), b"\0\0\0a");
        assert_eq!(decode("AAAAYWI=").unwrap(), b"\0\0\0ab");
        assert_eq!(decode("AAAAYWJj").unwrap(), b"\0\0\0abc");
    }

    #[test]
    fn accepts_only_the_standard_alphabet() {
        for text in ["AA-A", "AA_A", "AA A", "AA\nA", "AAéA"] {
            let message = decode(text).unwrap_err().to_string();
            assert!(message.contains("filedata: not canonical base64, after 0 bytes"), "{message}");
        }
    }

    #[test]
    fn requires_whole_padding_at_the_end() {
        for (text, problem) in [
            ("YQ==YQ==", "data after the padding, after 1 byte"),
            ("YWI=AAAAAAAA", "data after the padding, after 2 bytes"),
            ("YWI==", "an incomplete group"),
            ("YQ=", "an incomplete group"),
            ("AAAAYQ", "an incomplete group"),
            ("YQ=A", "not canonical base64"),
            ("====", "not canonical base64"),
            ("AAAAY===", "not canonical base64, after 3 bytes"),
        ] {
            let message = decode(text).unwrap_err().to_string();
            assert!(message.contains(problem), "{text}: {message}");
        }
    }

    #[test]
    fn refuses_unused_bits_that_are_set() {
        assert!(decode("YR==").unwrap_err().to_string().contains("not canonical base64"));
        assert!(decode("AAAAYWJ=").unwrap_err().to_string().contains("not canonical base64"));
    }

    #[test]
    fn limits_the_decoded_bytes_exactly() {
        assert_eq!(decode("AAAAAAAA").unwrap().len(), 6);
        let too_much = Err(ReadError::TooMuchData { limit: 6 });
        assert_eq!(decode("AAAAAAAAAA=="), too_much);
        assert_eq!(decode("AAAAAAAAAAAA????"), too_much);
    }

    #[test]
    fn writes_at_most_two_bytes_more_than_it_read() {
        for waiting in 0..4 {
            for length in 0..200 {
                let mut decoder = Decoder::new(u64::MAX);
                let mut data = Vec::new();
                decoder.push(&b"AAA"[..waiting], &mut data).unwrap();
                decoder.push(&vec![b'A'; length], &mut data).unwrap();
                assert!(data.len() <= length + 2);
            }
        }
    }
}
