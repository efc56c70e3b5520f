//! What stands between the quotes of a JSON string: escapes, and text that is checked as it
//! arrives and kept as far as somebody wants it.

use std::str;

use crate::document::ReadError;

/// An escape, from behind its backslash on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Escape {
    /// The backslash was there.
    #[default]
    Started,
    /// In `\uXXXX`; behind `high`, if this is the second escape of a surrogate pair.
    Digits {
        /// The first half of the pair.
        high: Option<u16>,
        /// The digits so far.
        value: u16,
        /// How many digits are to come.
        missing: u8,
    },
    /// Behind the first half of a surrogate pair: the second's backslash must follow.
    Half(u16),
    /// Behind the second half's backslash: its `u` must follow.
    HalfStarted(u16),
}

/// What one more byte made of an escape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It goes on.
    More(Escape),
    /// It stands for this character.
    Done(char),
}

impl Escape {
    /// Takes the next byte of the escape, which stands at `at`.
    pub(crate) fn next(self, byte: u8, at: u64) -> Result<Progress, ReadError> {
        match self {
            Escape::Started => Escape::named(byte, at),
            Escape::Half(high) if byte == b'\\' => Ok(Progress::More(Escape::HalfStarted(high))),
            Escape::HalfStarted(high) if byte == b'u' => Ok(Escape::digits(Some(high))),
            Escape::Half(_) | Escape::HalfStarted(_) => Err(ReadError::LoneSurrogate { at }),
            Escape::Digits { high, value, missing } => {
                let expected = "a hexadecimal digit";
                let Some(digit) = hex_digit(byte) else {
                    return Err(ReadError::Unexpected { expected, found: byte, at });
                };
                let value = value << 4 | u16::from(digit);
                if missing > 1 {
                    return Ok(Progress::More(Escape::Digits {
                        high,
                        value,
                        missing: missing - 1,
                    }));
                }
                Escape::unit(high, value).ok_or(ReadError::LoneSurrogate { at })
            }
        }
    }

    /// The byte behind the backslash.
    fn named(byte: u8, at: u64) -> Result<Progress, ReadError> {
        Ok(Progress::Done(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => return Ok(Escape::digits(None)),
            found => return Err(ReadError::Unexpected { expected: "an escape", found, at }),
        }))
    }

    /// Behind a `u`.
    fn digits(high: Option<u16>) -> Progress {
        Progress::More(Escape::Digits { high, value: 0, missing: 4 })
    }

    /// What a whole `\uXXXX` makes: a character, half of one, or nothing that there is.
    fn unit(high: Option<u16>, value: u16) -> Option<Progress> {
        match (high, value) {
            (None, 0xD800..=0xDBFF) => Some(Progress::More(Escape::Half(value))),
            (None, _) => char::from_u32(value.into()).map(Progress::Done),
            (Some(high), low) => char::decode_utf16([high, low]).next()?.ok().map(Progress::Done),
        }
    }
}

/// The value of a hexadecimal digit of either case.
pub(crate) fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// The text of one string: all of it is checked, its beginning is kept.
#[derive(Debug, Default)]
pub(crate) struct Text {
    kept: Vec<u8>,
    limit: usize,
    /// The key whose value must not be longer than the limit, if there is one.
    bounded: Option<&'static str>,
    /// The bytes of a character that has not arrived whole: at most three.
    partial: Vec<u8>,
}

impl Text {
    /// Text of any length, of which `limit` bytes are kept.
    pub(crate) fn beginning(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    /// The value of `key`: text that is refused beyond `limit` bytes.
    pub(crate) fn bounded(key: &'static str, limit: usize) -> Self {
        Self { limit, bounded: Some(key), ..Self::default() }
    }

    /// Takes a run of bytes without quote and backslash, the first of which stands at `at`.
    pub(crate) fn run(&mut self, run: &[u8], at: u64) -> Result<(), ReadError> {
        // In two steps, so that of two faults the first is told, however the run was cut.
        let (fits, excess) = self.split(run);
        self.check(fits, at)?;
        self.kept.extend_from_slice(fits);
        let at = at.saturating_add(fits.len() as u64);
        self.refuse_excess(excess, at)?;
        self.check(excess, at)
    }

    /// Takes the character of an escape, the last byte of which stands at `at`.
    pub(crate) fn char(&mut self, character: char, at: u64) -> Result<(), ReadError> {
        self.end(at)?;
        let mut buffer = [0; 4];
        let (fits, excess) = self.split(character.encode_utf8(&mut buffer).as_bytes());
        self.kept.extend_from_slice(fits);
        self.refuse_excess(excess, at)
    }

    /// Checks that the text may end here, before the byte at `at`.
    pub(crate) fn end(&self, at: u64) -> Result<(), ReadError> {
        if self.partial.is_empty() { Ok(()) } else { Err(ReadError::NotUtf8 { at }) }
    }

    /// What was kept.
    pub(crate) fn kept(&self) -> &[u8] {
        &self.kept
    }

    /// How much memory the text takes.
    #[cfg(test)]
    pub(crate) fn capacity(&self) -> usize {
        self.kept.capacity() + self.partial.capacity()
    }

    /// The whole text, which leaves nothing here.
    pub(crate) fn take(&mut self, at: u64) -> Result<String, ReadError> {
        self.end(at)?;
        let kept = std::mem::take(&mut self.kept);
        String::from_utf8(kept).map_err(|_| ReadError::NotUtf8 { at })
    }

    /// What of `bytes` there is still room for, and what not.
    fn split<'a>(&self, bytes: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        let room = self.limit.saturating_sub(self.kept.len());
        bytes.split_at_checked(room).unwrap_or((bytes, &[]))
    }

    fn refuse_excess(&self, excess: &[u8], at: u64) -> Result<(), ReadError> {
        match self.bounded {
            Some(key) if !excess.is_empty() => {
                Err(ReadError::TooLong { key, limit: self.limit, at })
            }
            _ => Ok(()),
        }
    }

    /// Checks that `run` goes on as UTF-8 without control characters.
    fn check(&mut self, run: &[u8], at: u64) -> Result<(), ReadError> {
        let control = run.iter().position(|byte| *byte < b' ').unwrap_or(run.len());
        let (text, rest) = run.split_at_checked(control).unwrap_or((run, &[]));
        self.check_utf8(text, at)?;
        let expected = "an escape in place of a control character";
        let at = at.saturating_add(text.len() as u64);
        match rest.first() {
            Some(&found) => Err(ReadError::Unexpected { expected, found, at }),
            None => Ok(()),
        }
    }

    fn check_utf8(&mut self, mut text: &[u8], mut at: u64) -> Result<(), ReadError> {
        while !self.partial.is_empty()
            && let Some((byte, rest)) = text.split_first()
        {
            self.partial.push(*byte);
            match str::from_utf8(&self.partial) {
                Ok(_) => self.partial.clear(),
                Err(error) if error.error_len().is_none() => {}
                Err(_) => {
                    let before = (self.partial.len() as u64).saturating_sub(1);
                    return Err(ReadError::NotUtf8 { at: at.saturating_sub(before) });
                }
            }
            text = rest;
            at = at.saturating_add(1);
        }
        if let Err(error) = str::from_utf8(text) {
            let valid = error.valid_up_to();
            if error.error_len().is_some() {
                return Err(ReadError::NotUtf8 { at: at.saturating_add(valid as u64) });
            }
            self.partial.extend(text.get(valid..).unwrap_or_default());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an escape stands for; `text` begins behind the backslash.
    fn unescape(text: &str) -> Result<char, ReadError> {
        let mut escape = Escape::default();
        for (at, byte) in (0..).zip(text.bytes()) {
            match escape.next(byte, at)? {
                Progress::More(more) => escape = more,
                Progress::Done(character) => {
                    assert_eq!(at, text.len() as u64 - 1, "{text}");
                    return Ok(character);
                }
            }
        }
        panic!("{text} goes on")
    }

    #[test]
    fn every_escape_is_its_character() {
        for (text, character) in [
            ("\"", '"'),
            ("\\", '\\'),
            ("/", '/'),
            ("b", '\x08'),
            ("f", '\x0c'),
            ("n", '\n'),
            ("r", '\r'),
            ("t", '\t'),
            ("u0000", '\0'),
            ("u00e9", 'é'),
            ("uD7FF", '\u{d7ff}'),
            ("ue000", '\u{e000}'),
            ("uFfFf", '\u{ffff}'),
            ("ud800\\udc00", '\u{10000}'),
            ("uD83D\\uDE00", '😀'),
            ("udbff\\udfff", '\u{10ffff}'),
        ] {
            assert_eq!(unescape(text), Ok(character), "{text}");
        }
    }

    #[test]
    fn lone_surrogates_are_refused() {
        for (text, at) in [
            ("udc00", 4),
            ("udfff\\ud800", 4),
            ("ud800x", 5),
            ("ud800\"", 5),
            ("ud800\\n", 6),
            ("ud800\\u0041", 10),
            ("ud800\\ud800", 10),
            ("udbff\\ue000", 10),
        ] {
            assert_eq!(unescape(text), Err(ReadError::LoneSurrogate { at }), "{text}");
        }
    }

    #[test]
    fn other_escapes_are_refused() {
        for text in ["a", "'", "0", "x41", "U0041", "\n"] {
            let message = unescape(text).unwrap_err().to_string();
            assert!(message.starts_with("expected an escape at offset 0, found "), "{message}");
        }
        for text in ["u00g0", "u+041", "u00 0", "u00\""] {
            let message = unescape(text).unwrap_err().to_string();
            assert!(message.starts_with("expected a hexadecimal digit at offset "), "{message}");
        }
    }

    /// What is kept of `pieces` by a text that may be eight bytes long.
    fn text(pieces: &[&[u8]]) -> Result<String, ReadError> {
        let mut text = Text::bounded("key", 8);
        let mut at = 0;
        for piece in pieces {
            text.run(piece, at)?;
            at += piece.len() as u64;
        }
        text.take(at)
    }

    #[test]
    fn characters_are_whole_however_they_were_cut() {
        let whole = "é€😀".as_bytes();
        let expected = Err(ReadError::TooLong { key: "key", limit: 8, at: 8 });
        assert_eq!(text(&[whole]), expected);
        assert_eq!(text(&[&whole[2..]]), Ok("€😀".to_owned()));
        for cut in 2..whole.len() {
            assert_eq!(text(&[&whole[2..cut], &whole[cut..]]), Ok("€😀".to_owned()));
        }
        assert_eq!(text(&[b"\xf0", b"\x9f", b"\x98", b"\x80"]), Ok("😀".to_owned()));
    }

    #[test]
    fn what_is_no_utf8_is_refused_however_it_was_cut() {
        for (bytes, at) in [
            (&b"a\x80"[..], 1),
            (b"a\xff", 1),
            (b"a\xc0\x80", 1),
            (b"\xe2\x82a", 0),
            (b"\xed\xa0\x80", 0),
            (b"ab\xf0\x80\x80\x80", 2),
            (b"\xf4\x90\x80\x80", 0),
            (b"a\xe2\x82", 3),
        ] {
            let expected = Err(ReadError::NotUtf8 { at });
            assert_eq!(text(&[bytes]), expected, "{bytes:x?}");
            let pieces: Vec<_> = bytes.chunks(1).collect();
            assert_eq!(text(&pieces), expected, "{bytes:x?}");
        }
        let mut text = Text::beginning(0);
        text.run(b"\xe2", 0).unwrap();
        assert_eq!(text.char('a', 2), Err(ReadError::NotUtf8 { at: 2 }));
    }

    #[test]
    fn raw_control_characters_are_refused() {
        for control in 0..=0x1f {
            let expected = "an escape in place of a control character";
            assert_eq!(
                text(&[b"ab", &[b'c', control]]),
                Err(ReadError::Unexpected { expected, found: control, at: 3 })
            );
        }
        assert_eq!(text(&[b"\x20\x7f"]), Ok(" \x7f".to_owned()));
    }

    #[test]
    fn the_first_fault_is_told_however_the_text_was_cut() {
        let too_long = Err(ReadError::TooLong { key: "key", limit: 8, at: 8 });
        assert_eq!(text(&[b"12345678\xff"]), too_long);
        assert_eq!(text(&[b"12345678", b"\xff"]), too_long);
        let no_utf8 = Err(ReadError::NotUtf8 { at: 7 });
        assert_eq!(text(&[b"1234567\xff9"]), no_utf8);
    }

    #[test]
    fn a_beginning_is_kept_of_text_that_is_still_checked() {
        let mut text = Text::beginning(3);
        text.run(b"ab", 0).unwrap();
        text.char('é', 7).unwrap();
        text.run("é€".as_bytes(), 8).unwrap();
        assert_eq!(text.kept(), b"ab\xc3");
        assert!(text.run(b"\n", 13).is_err());
    }
}
