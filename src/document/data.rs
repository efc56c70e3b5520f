//! The file's data: base64 decoded as it arrives, in whole groups of four characters.

use base64::Engine as _;

use crate::document::{BASE64, ReadError, WHOLE_GROUP};

/// How many characters of base64 make one group.
const CHARACTERS: usize = 4;

/// Decodes base64 piece by piece; at most three characters wait for the rest of their group.
///
/// Every fault is found in [`Decoder::character`], one character after the other, so that it is the
/// same however the text was cut. [`Decoder::run`] is the fast way for text without any.
#[derive(Debug)]
pub(crate) struct Decoder {
    /// The group that is not whole: its first `waiting` characters.
    group: [u8; CHARACTERS],
    waiting: usize,
    /// Whether a padded group was there, which is the last.
    padded: bool,
    /// How many bytes were decoded.
    length: u64,
    /// How many bytes may be decoded.
    limit: u64,
}

impl Decoder {
    /// A decoder of at most `limit` bytes.
    pub(crate) fn new(limit: u64) -> Self {
        Self { group: [0; CHARACTERS], waiting: 0, padded: false, length: 0, limit }
    }

    /// Takes a run of characters, the first of which stands at `at`; appends what they stand for.
    pub(crate) fn run(&mut self, run: &[u8], at: u64, data: &mut Vec<u8>) -> Result<(), ReadError> {
        let missing = if self.waiting == 0 { 0 } else { CHARACTERS.saturating_sub(self.waiting) };
        let (begun, run_left) = run.split_at_checked(missing).unwrap_or((run, &[]));
        let (groups, rest) = run_left.as_chunks::<CHARACTERS>();
        let groups = groups.as_flattened();

        let at = self.characters(begun, at, data)?;
        let at = if !self.padded && self.decode(groups, data).is_some() {
            at.saturating_add(groups.len() as u64)
        } else {
            self.characters(groups, at, data)?
        };
        self.characters(rest, at, data)?;
        Ok(())
    }

    /// Takes one character after the other; returns where the next one stands.
    fn characters(&mut self, run: &[u8], at: u64, data: &mut Vec<u8>) -> Result<u64, ReadError> {
        let mut at = at;
        for byte in run {
            self.character(*byte, at, data)?;
            at = at.saturating_add(1);
        }
        Ok(at)
    }

    /// Takes one character, which stands at `at`.
    pub(crate) fn character(
        &mut self,
        byte: u8,
        at: u64,
        data: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let unexpected = |expected| Err(ReadError::Unexpected { expected, found: byte, at });
        if self.padded {
            return unexpected("the end of the data behind its padding");
        }
        let padding_begun = self.waiting == 3 && self.group.get(2) == Some(&b'=');
        match byte {
            b'=' if self.waiting >= 2 => {}
            _ if padding_begun => return unexpected("`=`"),
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'+' | b'/' => {}
            _ => return unexpected("a character of base64"),
        }
        if let Some(place) = self.group.get_mut(self.waiting) {
            *place = byte;
        }
        self.waiting = self.waiting.saturating_add(1);
        if self.waiting < CHARACTERS {
            return Ok(());
        }
        self.waiting = 0;
        let group = self.group;
        let decoded = match group {
            [_, _, b'=', _] => 1,
            [_, _, _, b'='] => 2,
            _ => WHOLE_GROUP,
        };
        if !self.has_room(decoded) {
            return Err(ReadError::TooMuchData { limit: self.limit });
        }
        self.decode(&group, data).ok_or(ReadError::StrayBits { at })
    }

    /// Decodes whole groups at once, or changes nothing if there is any fault in them.
    fn decode(&mut self, groups: &[u8], data: &mut Vec<u8>) -> Option<()> {
        let start = data.len();
        let room = (groups.len() / CHARACTERS).saturating_mul(WHOLE_GROUP);
        data.resize(start.saturating_add(room), 0);
        let decoded = data.get_mut(start..).and_then(|room| BASE64.decode_slice(groups, room).ok());
        let decoded = decoded.filter(|decoded| self.has_room(*decoded));
        data.truncate(start.saturating_add(decoded.unwrap_or(0)));
        self.length = self.length.saturating_add(decoded? as u64);
        self.padded = groups.last() == Some(&b'=');
        Some(())
    }

    /// Whether so many bytes more are within the limit.
    fn has_room(&self, more: usize) -> bool {
        self.length.checked_add(more as u64).is_some_and(|length| length <= self.limit)
    }

    /// The end of the text, before the byte `found` at `at`; returns how many bytes were decoded.
    pub(crate) fn end(&self, found: u8, at: u64) -> Result<u64, ReadError> {
        let expected = "the rest of a group of four base64 characters";
        match self.waiting {
            0 => Ok(self.length),
            _ => Err(ReadError::Unexpected { expected, found, at }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a decoder of at most six bytes makes of `text`: in one run, then byte by byte.
    fn decode(text: &str) -> Result<Vec<u8>, String> {
        let decode = |pieces: &mut dyn Iterator<Item = &[u8]>| {
            let mut decoder = Decoder::new(6);
            let mut data = Vec::new();
            let mut at = 0;
            for piece in pieces {
                decoder.run(piece, at, &mut data)?;
                at += piece.len() as u64;
            }
            assert_eq!(decoder.end(b'"', at)?, data.len() as u64);
            Ok(data)
        };
        let whole = decode(&mut std::iter::once(text.as_bytes()));
        assert_eq!(whole, decode(&mut text.as_bytes().chunks(1)));
        whole.map_err(|error: ReadError| error.to_string())
    }

    #[test]
    fn groups_are_decoded() {
        assert_eq!(decode("").unwrap(), b"");
        assert_eq!(decode("+/+/").unwrap(), b"\xfb\xff\xbf");
        assert_eq!(decode("AAAAYQ==").unwrap(), b"\0\0\0a");
        assert_eq!(decode("AAAAYWI=").unwrap(), b"\0\0\0ab");
        assert_eq!(decode("AAAAYWJj").unwrap(), b"\0\0\0abc");
    }

    #[test]
    fn only_the_standard_alphabet() {
        for (text, found) in
            [("AA-A", "-"), ("AA_A", "_"), ("AA A", " "), ("AA\nA", "\\n"), ("AAéA", "\\xc3")]
        {
            assert_eq!(
                decode(text).unwrap_err(),
                format!("expected a character of base64 at offset 2, found '{found}'")
            );
        }
    }

    #[test]
    fn padding_is_whole_and_at_the_end() {
        let behind = "expected the end of the data behind its padding at offset 4, found";
        assert_eq!(decode("YQ==YQ==").unwrap_err(), format!("{behind} 'Y'"));
        assert_eq!(decode("YWI=AAAAAAAA").unwrap_err(), format!("{behind} 'A'"));
        assert_eq!(decode("YWI==").unwrap_err(), format!("{behind} '='"));
        let rest = "expected the rest of a group of four base64 characters at offset";
        assert_eq!(decode("YQ=").unwrap_err(), format!(r#"{rest} 3, found '\"'"#));
        assert_eq!(decode("AAAAYQ").unwrap_err(), format!(r#"{rest} 6, found '\"'"#));
        assert_eq!(decode("YQ=A").unwrap_err(), "expected `=` at offset 3, found 'A'");
        let character = "expected a character of base64 at offset";
        assert_eq!(decode("====").unwrap_err(), format!("{character} 0, found '='"));
        assert_eq!(decode("AAAAY===").unwrap_err(), format!("{character} 5, found '='"));
    }

    #[test]
    fn unused_bits_are_zero() {
        let message = "expected the unused bits of the last base64 character to be zero, at offset";
        assert_eq!(decode("YR==").unwrap_err(), format!("{message} 3"));
        assert_eq!(decode("AAAAYWJ=").unwrap_err(), format!("{message} 7"));
    }

    #[test]
    fn the_limit_is_of_bytes_and_exact() {
        assert_eq!(decode("AAAAAAAA").unwrap().len(), 6);
        let message = "the file is larger than the limit of 6 bytes";
        assert_eq!(decode("AAAAAAAAAA==").unwrap_err(), message);
        assert_eq!(decode("AAAAAAAAAAAA????").unwrap_err(), message);
    }

    #[test]
    fn no_more_is_written_than_two_bytes_above_what_was_read() {
        for waiting in 0..4 {
            for length in 0..200 {
                let mut decoder = Decoder::new(u64::MAX);
                let mut data = Vec::new();
                decoder.run(&b"AAA"[..waiting], 0, &mut data).unwrap();
                decoder.run(&vec![b'A'; length], 0, &mut data).unwrap();
                assert!(data.len() <= length + 2);
            }
        }
    }
}
