//! JSON (RFC 8259) read as it arrives: pieces of any size in, the parts of one object out.
//!
//! Strict, and in memory that does not grow: of what is around a byte only the nesting is known, in
//! a bit for each level. This file knows JSON and nothing of documents.

use memchr::memchr2;

use crate::document::ReadError;
use crate::document::string::{Escape, Progress};

/// How many objects and arrays may be in one another, the outermost included.
pub(crate) const MAX_DEPTH: u32 = u64::BITS;

/// The byte order mark in UTF-8, which a reader of JSON may ignore in front of it (RFC 8259, 8.1).
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Text without the byte order mark in front of it, if there is one.
pub(crate) fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// One part of the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// A key begins.
    KeyStart,
    /// A string begins that is a value.
    StringStart,
    /// Text of a key or string as it stands in the input, never empty, without quote and backslash.
    /// Whether it is UTF-8 without control characters is for the receiver to check: the one long
    /// string there is allows so little that it needs no check of its own.
    Run(&'a [u8]),
    /// A character of a key or string that was escaped.
    Char(char),
    /// The end of a key or string.
    StringEnd,
    /// A number, and its value if it is written as a whole one and below 2⁶⁴.
    Number(Option<u64>),
    /// `true`, `false` or `null`.
    Literal,
    /// An object or an array begins that is a value.
    Open,
    /// An object or an array ends.
    Close,
}

/// What the scanner is in, or what it expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The outermost object.
    Start,
    /// In the byte order mark: the part that is missing.
    ByteOrderMark(&'static [u8]),
    /// Behind `{`: a key, or the end.
    FirstKey,
    /// Behind `,` in an object.
    Key,
    /// Behind a key.
    Colon,
    /// Behind `[`: a value, or the end.
    FirstItem,
    /// Behind `:`, or behind `,` in an array.
    Value,
    /// Behind a value: a comma, or the end.
    Next,
    /// In a string.
    String {
        is_key: bool,
        escape: Option<Escape>,
    },
    Number(Number),
    /// In `true`, `false` or `null`: what is still to come of it.
    Literal(&'static [u8]),
    /// Behind the outermost object.
    End,
}

/// Reads one JSON object.
#[derive(Debug)]
pub(crate) struct Scanner {
    state: State,
    nesting: Nesting,
    offset: u64,
}

impl Scanner {
    /// A scanner before the first byte.
    pub(crate) fn new() -> Self {
        Self { state: State::Start, nesting: Nesting::default(), offset: 0 }
    }

    /// How many bytes were taken.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// How many objects and arrays are open.
    pub(crate) fn depth(&self) -> u32 {
        self.nesting.depth
    }

    /// Whether the object has begun.
    pub(crate) fn is_begun(&self) -> bool {
        !matches!(self.state, State::Start | State::ByteOrderMark(_))
    }

    /// Whether the object has ended. Then nothing more is taken.
    pub(crate) fn is_at_end(&self) -> bool {
        self.state == State::End
    }

    /// Takes from the front of `input` what makes the next event; `None` if all of it was taken
    /// without making one, or if the object has ended.
    pub(crate) fn next<'a>(
        &mut self,
        input: &mut &'a [u8],
    ) -> Result<Option<Event<'a>>, ReadError> {
        while let Some(&byte) = input.first() {
            let event = match self.state {
                State::End => break,
                State::String { is_key, escape: None } => self.text(is_key, input),
                State::String { is_key, escape: Some(escape) } => {
                    self.escape(is_key, escape, byte, input)?
                }
                State::Number(number) => self.number(number, byte, input)?,
                State::Literal(rest) => self.literal(rest, byte, input)?,
                State::Start if self.offset == 0 && BYTE_ORDER_MARK.first() == Some(&byte) => {
                    self.state = State::ByteOrderMark(BYTE_ORDER_MARK);
                    None
                }
                State::ByteOrderMark(rest) => {
                    self.byte_order_mark(rest, byte, input)?;
                    None
                }
                _ if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') => {
                    self.take(input, 1);
                    None
                }
                _ => self.structure(byte, input)?,
            };
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }

    /// Takes `length` bytes from the front of `input`.
    fn take<'a>(&mut self, input: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (taken, rest) = input.split_at_checked(length).unwrap_or((input, &[]));
        *input = rest;
        self.offset = self.offset.saturating_add(taken.len() as u64);
        taken
    }

    /// A byte between strings, numbers and literals, or the first of one of them.
    fn structure(
        &mut self,
        byte: u8,
        input: &mut &[u8],
    ) -> Result<Option<Event<'static>>, ReadError> {
        let in_array = self.nesting.in_array();
        let (state, event) = match (self.state, byte) {
            (State::Start, b'{') => {
                self.open(false)?;
                (State::FirstKey, None)
            }
            (State::FirstKey | State::Key, b'"') => {
                (State::String { is_key: true, escape: None }, Some(Event::KeyStart))
            }
            (State::Colon, b':') => (State::Value, None),
            (State::Next, b',') if in_array => (State::Value, None),
            (State::Next, b',') => (State::Key, None),
            (State::FirstKey, b'}') | (State::FirstItem, b']') => self.close(),
            (State::Next, b'}') if !in_array => self.close(),
            (State::Next, b']') if in_array => self.close(),
            (State::FirstItem | State::Value, _) => self.value(byte)?,
            _ => return Err(self.unexpected(byte)),
        };
        self.state = state;
        self.take(input, 1);
        Ok(event)
    }

    /// The first byte of a value.
    fn value(&mut self, byte: u8) -> Result<(State, Option<Event<'static>>), ReadError> {
        Ok(match byte {
            b'"' => (State::String { is_key: false, escape: None }, Some(Event::StringStart)),
            b'{' => {
                self.open(false)?;
                (State::FirstKey, Some(Event::Open))
            }
            b'[' => {
                self.open(true)?;
                (State::FirstItem, Some(Event::Open))
            }
            b't' => (State::Literal(b"rue"), None),
            b'f' => (State::Literal(b"alse"), None),
            b'n' => (State::Literal(b"ull"), None),
            _ => match Number::START.next(byte) {
                Some(number) => (State::Number(number), None),
                None => return Err(self.unexpected(byte)),
            },
        })
    }

    fn open(&mut self, is_array: bool) -> Result<(), ReadError> {
        let too_deep = ReadError::TooDeep { limit: MAX_DEPTH, at: self.offset };
        self.nesting.open(is_array).ok_or(too_deep)
    }

    fn close(&mut self) -> (State, Option<Event<'static>>) {
        self.nesting.close();
        let state = if self.nesting.depth == 0 { State::End } else { State::Next };
        (state, Some(Event::Close))
    }

    /// Text of a string up to what is no text, or else what is none.
    fn text<'a>(&mut self, is_key: bool, input: &mut &'a [u8]) -> Option<Event<'a>> {
        let length = memchr2(b'"', b'\\', input).unwrap_or(input.len());
        if length > 0 {
            return Some(Event::Run(self.take(input, length)));
        }
        if self.take(input, 1) == b"\"" {
            self.state = if is_key { State::Colon } else { State::Next };
            return Some(Event::StringEnd);
        }
        self.state = State::String { is_key, escape: Some(Escape::default()) };
        None
    }

    fn escape(
        &mut self,
        is_key: bool,
        escape: Escape,
        byte: u8,
        input: &mut &[u8],
    ) -> Result<Option<Event<'static>>, ReadError> {
        let (escape, event) = match escape.next(byte, self.offset)? {
            Progress::More(escape) => (Some(escape), None),
            Progress::Done(character) => (None, Some(Event::Char(character))),
        };
        self.state = State::String { is_key, escape };
        self.take(input, 1);
        Ok(event)
    }

    /// A byte of a number, or the first behind it, which is not taken.
    fn number(
        &mut self,
        number: Number,
        byte: u8,
        input: &mut &[u8],
    ) -> Result<Option<Event<'static>>, ReadError> {
        if let Some(number) = number.next(byte) {
            self.state = State::Number(number);
            self.take(input, 1);
            return Ok(None);
        }
        if !number.may_end() {
            return Err(self.unexpected(byte));
        }
        self.state = State::Next;
        Ok(Some(Event::Number(number.value)))
    }

    fn literal(
        &mut self,
        rest: &'static [u8],
        byte: u8,
        input: &mut &[u8],
    ) -> Result<Option<Event<'static>>, ReadError> {
        let Some((expected, rest)) = rest.split_first() else { return Ok(None) };
        if byte != *expected {
            return Err(self.unexpected(byte));
        }
        self.take(input, 1);
        if rest.is_empty() {
            self.state = State::Next;
            return Ok(Some(Event::Literal));
        }
        self.state = State::Literal(rest);
        Ok(None)
    }

    fn byte_order_mark(
        &mut self,
        rest: &'static [u8],
        byte: u8,
        input: &mut &[u8],
    ) -> Result<(), ReadError> {
        let (expected, rest) = rest.split_first().unwrap_or((&b'{', &[]));
        if byte != *expected {
            return Err(self.unexpected(byte));
        }
        self.take(input, 1);
        self.state = if rest.is_empty() { State::Start } else { State::ByteOrderMark(rest) };
        Ok(())
    }

    fn unexpected(&self, found: u8) -> ReadError {
        let expected = match self.state {
            State::Start | State::ByteOrderMark(_) => "`{`",
            State::FirstKey => "a key or `}`",
            State::Key => "a key",
            State::Colon => "`:`",
            State::FirstItem => "a value or `]`",
            State::Value => "a value",
            State::Next if self.nesting.in_array() => "`,` or `]`",
            State::Next => "`,` or `}`",
            State::String { .. } => "text",
            State::Number(_) => "a digit",
            State::Literal(_) => "`true`, `false` or `null`",
            State::End => "nothing more",
        };
        ReadError::Unexpected { expected, found, at: self.offset }
    }
}

/// Which of the open objects and arrays are arrays.
#[derive(Debug, Default)]
struct Nesting {
    /// A bit for each level, the innermost lowest.
    arrays: u64,
    depth: u32,
}

impl Nesting {
    fn open(&mut self, is_array: bool) -> Option<()> {
        if self.depth >= MAX_DEPTH {
            return None;
        }
        self.depth = self.depth.saturating_add(1);
        self.arrays = self.arrays << 1 | u64::from(is_array);
        Some(())
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        self.arrays >>= 1;
    }

    fn in_array(&self) -> bool {
        self.arrays & 1 == 1
    }
}

/// A number as far as it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Number {
    part: Part,
    /// Its value while it is a whole number below 2⁶⁴.
    value: Option<u64>,
}

/// What was last in a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Nothing,
    Minus,
    /// A zero that begins the number, behind which no digit may stand.
    Zero,
    Whole,
    Point,
    Fraction,
    E,
    ExponentSign,
    Exponent,
}

impl Number {
    const START: Self = Self { part: Part::Nothing, value: Some(0) };

    /// The number with one more byte, if that belongs to it.
    fn next(self, byte: u8) -> Option<Self> {
        let part = match (self.part, byte) {
            (Part::Nothing, b'-') => Part::Minus,
            (Part::Nothing | Part::Minus, b'0') => Part::Zero,
            (Part::Nothing | Part::Minus, b'1'..=b'9') | (Part::Whole, b'0'..=b'9') => Part::Whole,
            (Part::Zero | Part::Whole, b'.') => Part::Point,
            (Part::Point | Part::Fraction, b'0'..=b'9') => Part::Fraction,
            (Part::Zero | Part::Whole | Part::Fraction, b'e' | b'E') => Part::E,
            (Part::E, b'+' | b'-') => Part::ExponentSign,
            (Part::E | Part::ExponentSign | Part::Exponent, b'0'..=b'9') => Part::Exponent,
            _ => return None,
        };
        let value = match part {
            Part::Zero | Part::Whole => self.value.and_then(|value| {
                value.checked_mul(10)?.checked_add(u64::from(byte.wrapping_sub(b'0')))
            }),
            _ => None,
        };
        Some(Self { part, value })
    }

    fn may_end(self) -> bool {
        matches!(self.part, Part::Zero | Part::Whole | Part::Fraction | Part::Exponent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of `text` up to its end, as a reader would note them down.
    fn events(text: &str) -> Result<String, ReadError> {
        let mut scanner = Scanner::new();
        let mut input = text.as_bytes();
        let mut notes = Vec::new();
        while let Some(event) = scanner.next(&mut input)? {
            notes.push(match event {
                Event::KeyStart => "key".to_owned(),
                Event::StringStart => "string".to_owned(),
                Event::Run(run) => String::from_utf8_lossy(run).into_owned(),
                Event::Char(character) => format!("+{character}"),
                Event::StringEnd => "end".to_owned(),
                Event::Number(value) => format!("{value:?}"),
                Event::Literal => "literal".to_owned(),
                Event::Open => "open".to_owned(),
                Event::Close => "close".to_owned(),
            });
        }
        assert_eq!(scanner.offset(), (text.len() - input.len()) as u64);
        let rest = if scanner.is_at_end() { "." } else { "..." };
        Ok(notes.join(" ") + rest)
    }

    /// The events of a value.
    fn value(text: &str) -> Result<String, ReadError> {
        let events = events(&format!("{{\"\":{text}}}"))?;
        Ok(events.trim_start_matches("key end ").trim_end_matches(" close.").to_owned())
    }

    #[test]
    fn an_object_is_its_events() {
        assert_eq!(events("{}").unwrap(), "close.");
        assert_eq!(
            events(r#"{"a":"b\nc","d":[true,{"e":null},[]],"f":12}, not taken"#).unwrap(),
            "key a end string b +\n c end key d end open literal open key e end literal close \
             open close close key f end Some(12) close."
        );
        assert_eq!(events(r#"{"a":1"#).unwrap(), "key a end...");
    }

    #[test]
    fn white_space_stands_between_all_of_its_parts() {
        let spread = " { \t\"a\"\n : \r [ 1 , false ] , \"b\" : { } } ";
        let close = r#"{"a":[1,false],"b":{}}"#;
        assert_eq!(events(spread).unwrap(), events(close).unwrap());
        for other in ['\x0b', '\x0c', '\u{a0}', '\u{feff}', '\0'] {
            assert_eq!(events(&format!("{other}{{}}")).is_err(), other != '\u{feff}');
            assert!(events(&format!("{{{other}}}")).is_err());
        }
    }

    #[test]
    fn what_is_out_of_place_is_refused() {
        for (text, message) in [
            ("[]", "expected `{` at offset 0, found '['"),
            ("1", "expected `{` at offset 0, found '1'"),
            ("{,", "expected a key or `}` at offset 1, found ','"),
            ("{a:1}", "expected a key or `}` at offset 1, found 'a'"),
            (r#"{"a" 1"#, "expected `:` at offset 5, found '1'"),
            (r#"{"a":}"#, "expected a value at offset 5, found '}'"),
            (r#"{"a":1 2"#, "expected `,` or `}` at offset 7, found '2'"),
            (r#"{"a":1]"#, "expected `,` or `}` at offset 6, found ']'"),
            (r#"{"a":1,}"#, "expected a key at offset 7, found '}'"),
            (r#"{"a":[,"#, "expected a value or `]` at offset 6, found ','"),
            (r#"{"a":[1,]"#, "expected a value at offset 8, found ']'"),
            (r#"{"a":[1}"#, "expected `,` or `]` at offset 7, found '}'"),
            (r#"{"a":{]"#, "expected a key or `}` at offset 6, found ']'"),
            (r#"{"a":[{}}"#, "expected `,` or `]` at offset 8, found '}'"),
            (r#"{"a":'b'"#, r"expected a value at offset 5, found '\''"),
        ] {
            assert_eq!(events(text).unwrap_err().to_string(), message, "{text}");
        }
    }

    #[test]
    fn literals_are_exact() {
        for text in ["true", "false", "null"] {
            assert_eq!(value(text).unwrap(), "literal");
        }
        for text in ["True", "tru", "truee", "nul", "nil", "fals e", "NaN", "Infinity"] {
            assert!(value(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_exact() {
        for (text, whole) in [
            ("0", Some(0)),
            ("10", Some(10)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("99999999999999999999999999", None),
            ("-0", None),
            ("-12", None),
            ("0.0", None),
            ("1.50", None),
            ("1e5", None),
            ("0E+05", None),
            ("-1.25e-3", None),
            ("1e99999999", None),
        ] {
            assert_eq!(value(text).unwrap(), format!("{whole:?}"), "{text}");
        }
        for text in [
            "-", "+1", "01", "-01", "00", "1.", ".5", "1.e5", "1e", "1e+", "1e+-5", "1e5.5", "--1",
            "0x10", "1_000", "1..5", "-a",
        ] {
            assert!(value(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| {
            let inner = depth - 1;
            let (open, close): (String, String) = (0..inner)
                .map(|level| if level % 3 == 0 { ("{\"\":", '}') } else { ("[", ']') })
                .map(|(open, close)| (open, close.to_string()))
                .unzip();
            let close: String = close.chars().rev().collect();
            events(&format!("{{\"\":{open}0{close}}}"))
        };
        assert!(nested(64).unwrap().ends_with("close."));
        let message = "expected at most 64 objects and arrays in one another, at offset 130";
        assert_eq!(nested(65).unwrap_err().to_string(), message);
    }
}
