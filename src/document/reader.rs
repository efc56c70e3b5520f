//! Reads a document that arrives in pieces from an untrusted server.
//!
//! The reader decodes the data as it arrives and keeps everything else, with an empty string in
//! place of the data, for `serde_json`: once when the data begins, to know the name and size early,
//! and once at the end. Memory is bounded by [`MAX_TEXT`]. The claimed name, size and digest are
//! not judged here.

use memchr::memchr2;

use super::decoder::Decoder;
use super::head::{Head, Members};
use crate::text::counted;

/// Maximum length of a document without its data, in bytes.
const MAX_TEXT: usize = 1 << 20;

/// Maximum nesting of objects and arrays.
const MAX_DEPTH: u32 = 64;

/// Maximum length of `"filedata"` with all its characters escaped.
const MAX_KEY: usize = "\"\"".len() + "filedata".len() * "\\u0000".len();

/// Maximum length of the description of an error, in characters: it may quote the server.
const MAX_DESCRIPTION: usize = 300;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The reason why a document is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The input ended before a document began.
    #[error("there is no document: the input ends before its `{{`")]
    Empty,
    /// The input ended inside the document.
    #[error("the document ends early, after {}", counted(*length, "byte"))]
    Truncated {
        /// Received length in bytes.
        length: u64,
    },
    /// The input is not a document; the description is printable.
    #[error("{0}")]
    Invalid(String),
    /// The file is larger than the caller allows.
    #[error("the file is larger than the limit of {}", counted(*limit, "byte"))]
    TooMuchData {
        /// The limit in bytes.
        limit: u64,
    },
}

/// Reads one document.
///
/// Members may come in any order and unknown ones are ignored. Everything else is as strict as JSON
/// (RFC 8259) and canonical base64 (RFC 4648).
#[derive(Debug)]
pub struct Reader {
    state: State,
    /// The document without its data.
    text: Vec<u8>,
    /// Open objects and arrays.
    depth: u32,
    /// Start of the latest string in `text`.
    string: usize,
    decoder: Decoder,
    /// Members read so far; complete in [`State::End`].
    members: Members,
    /// Received length in bytes.
    length: u64,
    failure: Option<ReadError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the opening brace.
    Start,
    /// Between strings, in the rest of the document.
    Structure,
    /// In a string other than the data; after a backslash if `escaped`.
    String {
        escaped: bool,
    },
    Data,
    /// In an escape sequence of the data, which began at this position of `text`.
    DataEscape(usize),
    End,
}

impl Reader {
    /// Creates a reader that accepts at most `max_data` bytes of decoded data.
    #[must_use]
    pub fn new(max_data: u64) -> Self {
        Self {
            state: State::Start,
            text: Vec::new(),
            depth: 0,
            string: 0,
            decoder: Decoder::new(max_data),
            members: Members::default(),
            length: 0,
            failure: None,
        }
    }

    /// Reads from `input` and appends decoded data to `data`: at most two more bytes than `input`
    /// has. Returns the number of bytes taken, which is less than all only if the document ends.
    ///
    /// # Errors
    /// The first fault, which every later call returns again. `data` must be discarded then.
    pub fn feed(&mut self, input: &[u8], data: &mut Vec<u8>) -> Result<usize, ReadError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let mut rest = input;
        while self.state != State::End
            && let Some(&byte) = rest.first()
        {
            let step = match self.state {
                State::Data => self.take_data(rest, data),
                _ => self.take_byte(byte, data).map(|()| 1),
            };
            let taken = step.inspect_err(|error| self.failure = Some(error.clone()))?;
            rest = rest.split_at(taken).1;
            self.length += taken as u64;
        }
        Ok(input.len() - rest.len())
    }

    /// Returns whether the end of the document was read.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.state == State::End
    }

    /// Returns the file's name, if it comes before the data or the document is complete.
    #[must_use]
    pub fn filename(&self) -> Option<&str> {
        self.members.filename.as_deref()
    }

    /// Returns the announced length in bytes, if it comes before the data or the document is
    /// complete.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.members.size
    }

    /// Returns the content of the document.
    ///
    /// # Errors
    /// If the document is incomplete or was refused before.
    pub fn finish(self) -> Result<Head, ReadError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        match self.state {
            State::End => {}
            State::Start => return Err(ReadError::Empty),
            _ => return Err(ReadError::Truncated { length: self.length }),
        }
        let length = self.decoder.finish()?;
        self.members.into_head(length).map_err(|problem| ReadError::Invalid(problem.to_owned()))
    }

    /// Takes data up to its closing quote, the next escape sequence or the end of `input`.
    fn take_data(&mut self, input: &[u8], data: &mut Vec<u8>) -> Result<usize, ReadError> {
        let length = memchr2(b'"', b'\\', input).unwrap_or(input.len());
        let (run, rest) = input.split_at(length);
        self.decoder.push(run, data)?;
        match rest.first() {
            None => return Ok(length),
            Some(b'"') => {
                self.decoder.finish()?;
                self.state = State::Structure;
            }
            Some(_) => self.state = State::DataEscape(self.text.len()),
        }
        self.text.extend(rest.first());
        Ok(length + 1)
    }

    /// Takes a byte of anything but data.
    fn take_byte(&mut self, byte: u8, data: &mut Vec<u8>) -> Result<(), ReadError> {
        if self.state == State::Start {
            return self.start(byte);
        }
        if self.text.len() >= MAX_TEXT {
            return Err(self.invalid(&format!("more than {MAX_TEXT} bytes besides the data")));
        }
        self.text.push(byte);
        match (self.state, byte) {
            (State::String { escaped: false }, b'"') => self.state = State::Structure,
            (State::String { escaped }, _) => {
                self.state = State::String { escaped: byte == b'\\' && !escaped };
            }
            (State::DataEscape(start), _) => self.take_data_escape(start, data)?,
            (_, b'"') => self.start_string()?,
            (_, b'{' | b'[') => {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return Err(self.invalid("too many nested objects and arrays"));
                }
            }
            (_, b'}' | b']') => {
                self.depth -= 1;
                if self.depth == 0 {
                    self.members = self.parse("")?;
                    self.state = State::End;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn start(&mut self, byte: u8) -> Result<(), ReadError> {
        let is_mark = BYTE_ORDER_MARK.get(self.text.len()) == Some(&byte)
            && self.length == self.text.len() as u64;
        let after_mark_began = (1..BYTE_ORDER_MARK.len()).contains(&self.text.len());
        match byte {
            _ if is_mark => self.text.push(byte),
            b'{' if !after_mark_began => {
                self.text.clear();
                self.text.push(byte);
                self.depth = 1;
                self.state = State::Structure;
            }
            b' ' | b'\t' | b'\n' | b'\r' if !after_mark_began => {}
            _ => {
                let found = byte.escape_ascii();
                return Err(self.invalid(&format!("expected `{{`, found '{found}'")));
            }
        }
        Ok(())
    }

    /// Takes the opening quote of a string and decides whether it is the data.
    fn start_string(&mut self) -> Result<(), ReadError> {
        let quote = self.text.len() - 1;
        let (before, _) = self.text.split_at(quote);
        let (_, latest) = before.split_at(self.string);
        let key = latest.trim_ascii_end().strip_suffix(b":").map(<[u8]>::trim_ascii_end);
        let is_data = self.depth == 1
            && key.is_some_and(|key| {
                key.len() <= MAX_KEY
                    && serde_json::from_slice::<String>(key).is_ok_and(|key| key == "filedata")
            });
        if is_data {
            self.members = self.parse("\"}")?;
            self.state = State::Data;
        } else {
            self.string = quote;
            self.state = State::String { escaped: false };
        }
        Ok(())
    }

    /// Decodes an escape sequence of the data once it is complete: PHP writes `\/`.
    fn take_data_escape(&mut self, start: usize, data: &mut Vec<u8>) -> Result<(), ReadError> {
        let (_, escape) = self.text.split_at(start);
        if escape.get(1) == Some(&b'u') && escape.len() < "\\u0000".len() {
            return Ok(());
        }
        let quoted = [b"\"", escape, b"\""].concat();
        let Ok(character) = serde_json::from_slice::<String>(&quoted) else {
            return Err(self.invalid("invalid escape sequence"));
        };
        self.text.truncate(start);
        self.state = State::Data;
        self.decoder.push(character.as_bytes(), data)
    }

    /// Parses the text so far, completed by `end`.
    fn parse(&mut self, end: &str) -> Result<Members, ReadError> {
        let length = self.text.len();
        self.text.extend_from_slice(end.as_bytes());
        let parsed = str::from_utf8(&self.text).map(serde_json::from_str);
        self.text.truncate(length);
        let parsed = parsed.map_err(|_| self.invalid("not UTF-8"))?;
        parsed.map_err(|error: serde_json::Error| {
            let text = error.to_string();
            let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
            self.invalid(problem)
        })
    }

    fn invalid(&self, problem: &str) -> ReadError {
        let problem: String = problem.chars().take(MAX_DESCRIPTION).collect();
        ReadError::Invalid(format!(
            "{problem}, within the first {}",
            counted(self.length + 1, "byte")
        ))
    }
}

/// The bytes after the last document: one newline, LF or CRLF, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Tail {
    #[default]
    Nothing,
    CarriageReturn,
    Newline,
}

impl Tail {
    pub(crate) fn feed(&mut self, input: &[u8]) -> Result<(), ReadError> {
        for &found in input {
            *self = match (*self, found) {
                (Self::Nothing, b'\r') => Self::CarriageReturn,
                (Self::Nothing | Self::CarriageReturn, b'\n') => Self::Newline,
                (Self::CarriageReturn, _) => return Err(Self::excess(b'\r')),
                _ => return Err(Self::excess(found)),
            };
        }
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<(), ReadError> {
        if self == Self::CarriageReturn { Err(Self::excess(b'\r')) } else { Ok(()) }
    }

    fn excess(found: u8) -> ReadError {
        let found = found.escape_ascii();
        ReadError::Invalid(format!("expected nothing behind the document, found '{found}'"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{File, Refusal};

    fn read(document: &str) -> Result<(Head, Vec<u8>), ReadError> {
        let mut reader = Reader::new(1000);
        let mut data = Vec::new();
        reader.feed(document.as_bytes(), &mut data)?;
        Ok((reader.finish()?, data))
    }

    fn file(document: &str) -> File {
        match read(document).unwrap().0 {
            Head::File(file) => file,
            Head::Refusal(refusal) => panic!("{refusal:?}"),
        }
    }

    /// Returns the message of the error.
    fn fault(document: &str) -> String {
        read(document).unwrap_err().to_string()
    }

    #[test]
    fn reads_a_pushed_document() {
        let (head, data) = read(r#"{"filename":"guido.jpg","filedata":"/9j/"}"#).unwrap();
        assert_eq!(data, b"\xff\xd8\xff");
        let filename = "guido.jpg".to_owned();
        let file = File { filename, size: None, modified: None, sha256: None, length: 3 };
        assert_eq!(head, Head::File(file));
    }

    #[test]
    fn reads_a_document_of_a_folder() {
        let file = file(&format!(
            r#"{{"filename":"guido.jpg","size":18446744073709551615,
            "modified":"2026-11-22T05:46:01Z","filedata":"","sha256":"{}"}}"#,
            "00ff".repeat(15) + "aBcD"
        ));
        assert_eq!((file.size, file.length), (Some(u64::MAX), 0));
        assert_eq!(file.modified.unwrap().as_second(), 1_795_326_361);
        let digest = file.sha256.unwrap();
        assert_eq!((digest[0], digest[1], digest[30], digest[31]), (0, 0xff, 0xab, 0xcd));
    }

    #[test]
    fn reads_a_refusal() {
        let refused = |error: &str, filename: Option<&str>| {
            let filename = filename.map(str::to_owned);
            Head::Refusal(Refusal { error: error.to_owned(), filename })
        };
        let (head, data) = read(r#"{"error":"no such file","filename":"x"}"#).unwrap();
        assert_eq!((head, data), (refused("no such file", Some("x")), Vec::new()));
        assert_eq!(read(r#"{"error":""}"#).unwrap().0, refused("", None));
    }

    #[test]
    fn accepts_data_before_the_name_and_between_unknown_members() {
        let (head, data) = read(
            r#" { "x" : {"filename":[1,{"filedata":"?"}]} , "filedata" : "aGk=", "" : null,
                "filenamed" : -1.5e+300, "filename" : "a", "filenam" : "\u00e9", "Size" : [] } "#
                .trim_end(),
        )
        .unwrap();
        assert_eq!(data, b"hi");
        assert!(matches!(head, Head::File(File { filename, length: 2, .. }) if filename == "a"));
    }

    #[test]
    fn recognises_escaped_keys() {
        assert_eq!(file(r#"{"\u0066ile\u006Eame":"a","file\u0064ata":""}"#).filename, "a");
        let unknown = r#"{"filename\u0000":1,"filenameé":2,"filename\u00e9":3,"filename\n":4,
            "filename":"a","filedata":""}"#;
        assert_eq!(file(unknown).filename, "a");
    }

    #[test]
    fn reads_consecutive_documents() {
        let mut input: &[u8] =
            b"{\"filename\":\"a\",\"filedata\":\"YQ==\"}\n{\"error\":\"b\"}\r\n{\"error\":\"c\"}\n";
        let mut data = Vec::new();
        let mut heads = Vec::new();
        for _ in 0..3 {
            let mut reader = Reader::new(1000);
            let taken = reader.feed(input, &mut data).unwrap();
            input = &input[taken..];
            assert!(reader.is_complete());
            assert_eq!(reader.feed(input, &mut data), Ok(0));
            heads.push(reader.finish().unwrap());
        }
        assert_eq!((input, data.as_slice()), (&b"\n"[..], &b"a"[..]));
        assert!(matches!(&heads[2], Head::Refusal(Refusal { error, .. }) if error == "c"));
    }

    fn assert_fault(document: &str, problem: &str) {
        let message = fault(document);
        assert!(message.contains(problem), "{message}");
    }

    #[test]
    fn decodes_escaped_data() {
        let (_, data) = read(r#"{"filename":"a","filedata":"\/9\u006A\/\/9g\u003d"}"#).unwrap();
        assert_eq!(data, b"\xff\xd8\xff\xff\xd8");
        for data in [r"AA\nAA", r"AAAA\u20acA==", r"AAAA\ud800", r"\x"] {
            let document = format!(r#"{{"filename":"a","filedata":"{data}"}}"#);
            assert!(matches!(read(&document), Err(ReadError::Invalid(_))), "{document}");
        }
    }

    #[test]
    fn refuses_repeated_known_members() {
        let sha256 = format!(r#""sha256":"{}""#, "0".repeat(64));
        for member in [
            r#""filename":"a""#,
            r#""filedata":"""#,
            r#""size":1"#,
            r#""modified":"2026-11-22T05:46:01Z""#,
            r#""error":"e""#,
            &sha256,
        ] {
            let document = format!("{{{member},\"x\":1,\"x\":2,{member}}}");
            assert_fault(&document, "duplicate field");
        }
    }

    #[test]
    fn requires_a_name_and_either_data_or_an_error() {
        assert_fault(r#"{"filedata":""}"#, "filename is missing");
        assert_fault(r#"{"filename":""}"#, "filedata is missing");
        assert_fault(r#"{"files":[]}"#, "filename is missing");
        assert_fault("{}", "filename is missing");
        assert_fault(r#"{"error":"","filedata":""}"#, "both filedata and error");
        assert_fault(r#"{"filedata":"","error":""}"#, "both filedata and error");
    }

    #[test]
    fn checks_the_types_of_known_members() {
        for key in ["filename", "filedata", "modified", "sha256", "error"] {
            for value in ["null", "true", "5", "[]", "{}"] {
                let message = fault(&format!("{{\"{key}\":{value}}}"));
                assert!(message.starts_with(&format!("{key}: ")), "{message}");
                assert!(message.contains("expected a string"), "{message}");
            }
        }
        for size in ["-0", "-1", "1.0", "1e3", "18446744073709551616", "\"1\"", "null", "[1]"] {
            assert_fault(&format!("{{\"size\":{size}}}"), "expected u64");
        }
    }

    #[test]
    fn refuses_malformed_times_and_digests() {
        assert_fault("{\"modified\":\"\u{202e}now\\n\"}", "modified: expected a time such as ");
        for digest in ["", "ab", &"0".repeat(63), &"g".repeat(64), &"é".repeat(32)] {
            assert_fault(
                &format!("{{\"sha256\":\"{digest}\"}}"),
                "sha256: expected 64 hexadecimal digits",
            );
        }
    }

    #[test]
    fn limits_the_length_of_names_and_errors() {
        let name = "n".repeat(4096);
        assert_eq!(file(&format!(r#"{{"filename":"{name}","filedata":""}}"#)).filename, name);
        for key in ["filename", "error"] {
            assert_fault(&format!(r#"{{"{key}":"{name}n"}}"#), "longer than 4096 bytes");
        }
    }

    #[test]
    fn limits_the_data() {
        let read = |limit, data: &str| {
            let mut reader = Reader::new(limit);
            let document = format!(r#"{{"filename":"","filedata":"{data}"}}"#);
            reader.feed(document.as_bytes(), &mut Vec::new())
        };
        assert!(read(4, "AAAAAA==").is_ok());
        assert!(read(0, "").is_ok());
        assert_eq!(read(3, "AAAAAA=="), Err(ReadError::TooMuchData { limit: 3 }));
        let message = read(0, "AA==").unwrap_err().to_string();
        assert_eq!(message, "the file is larger than the limit of 0 bytes");
    }

    #[test]
    fn reports_truncated_documents() {
        for document in ["", " \n", "\u{feff}"] {
            assert_eq!(read(document).unwrap_err(), ReadError::Empty);
        }
        for document in ["{", r#"{"filen"#, r#"{"filename":"","filedata":"AAA"#, r#"{"size":1"#] {
            let length = document.len() as u64;
            assert_eq!(read(document).unwrap_err(), ReadError::Truncated { length });
        }
    }

    #[test]
    fn returns_name_and_size_when_the_data_begins() {
        let mut reader = Reader::new(1000);
        let mut data = Vec::new();
        reader.feed(br#"{"filename":"a","size":10"#, &mut data).unwrap();
        assert_eq!((reader.filename(), reader.size()), (None, None));
        reader.feed(br#"0,"filedata":""#, &mut data).unwrap();
        assert_eq!((reader.filename(), reader.size()), (Some("a"), Some(100)));
    }

    #[test]
    fn repeats_the_first_error() {
        let mut reader = Reader::new(1000);
        let mut data = Vec::new();
        let failure = reader.feed(b"[", &mut data).unwrap_err();
        let document = br#"{"filename":"","filedata":""}"#;
        assert_eq!(reader.feed(document, &mut data), Err(failure.clone()));
        assert!(!reader.is_complete());
        assert_eq!(reader.finish(), Err(failure));
    }

    #[test]
    fn refuses_other_replies_at_their_first_byte() {
        for reply in ["HTTP/1.1 400", "[]", "SSH-2.0", "1"] {
            let mut reader = Reader::new(1000);
            let first = reply.split_at(1).0;
            let message = reader.feed(first.as_bytes(), &mut Vec::new()).unwrap_err().to_string();
            let expected = format!("expected `{{`, found '{first}'");
            assert!(message.starts_with(&expected), "{message}");
        }
    }

    #[test]
    fn checks_the_text_of_unknown_members() {
        for document in [
            &b"{\"x\":\"\xe2\x82\"}"[..],
            b"{\"x\":[\"\xff\"]}",
            b"{\"x\xc3\":1}",
            b"{\"x\":[\"\n\"]}",
            b"{\"x\":\"\\u12\"}",
        ] {
            let refused = Reader::new(1000).feed(document, &mut Vec::new());
            assert!(matches!(refused, Err(ReadError::Invalid(_))), "{document:x?}");
        }
    }

    #[test]
    fn ignores_one_leading_byte_order_mark() {
        let document = "{\"filename\":\"\",\"filedata\":\"\"}";
        let marked = format!("\u{feff}{document}");
        assert_eq!(read(&marked).unwrap(), read(document).unwrap());
        for piece in 1..4 {
            let mut reader = Reader::new(0);
            for piece in marked.as_bytes().chunks(piece) {
                reader.feed(piece, &mut Vec::new()).unwrap();
            }
            assert!(reader.finish().is_ok());
        }
        for document in [format!("\u{feff}{marked}"), format!(" {marked}")] {
            assert_fault(&document, r"expected `{`, found '\xef'");
        }
    }

    #[test]
    fn bounds_the_memory_of_endless_documents() {
        for (start, endless) in [
            ("{\"", "k"),
            ("{\"x\":\"", "\\t"),
            ("{\"x\":", "12"),
            ("{\"x\":[0", ",\"text\",{\"key\":[]}"),
            ("{\"x\":0", ",\"unknown\":\"text\""),
            ("{", " \n"),
        ] {
            let mut reader = Reader::new(1000);
            let mut data = Vec::new();
            reader.feed(start.as_bytes(), &mut data).unwrap();
            let piece = endless.repeat(1 << 12);
            let fed =
                (0..1 << 10).try_for_each(|_| reader.feed(piece.as_bytes(), &mut data).map(drop));
            assert!(fed.unwrap_err().to_string().contains("bytes besides the data"), "{start}");
            assert!(reader.text.capacity() <= 2 * MAX_TEXT && data.capacity() == 0, "{start}");
        }
    }

    #[test]
    fn accepts_one_newline_after_the_last_document() {
        let behind = |pieces: &[&str]| {
            let mut tail = Tail::default();
            pieces.iter().try_for_each(|piece| tail.feed(piece.as_bytes()))?;
            tail.finish()
        };
        let newlines: [&[&str]; 5] = [&[], &[""], &["\n"], &["\r\n"], &["\r", "", "\n"]];
        for pieces in newlines {
            assert_eq!(behind(pieces), Ok(()), "{pieces:?}");
        }
        let others: [&[&str]; 7] =
            [&["\n\n"], &["\r"], &["\r", "\r\n"], &["\n", "\r"], &[" \n"], &["\n{"], &["\0"]];
        for pieces in others {
            let message = behind(pieces).unwrap_err().to_string();
            assert!(message.contains("expected nothing behind the document, found "), "{message}");
        }
    }
}
