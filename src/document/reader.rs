//! The document as the client reads it, from a server that may send anything.
//!
//! The reader is given bytes as they arrive and gives back the file's data; what else the document
//! says comes at its end. Its memory does not grow with the input: the values that are kept have a
//! limit, and everything unknown is checked and dropped. It neither reads from a connection nor
//! writes files, nor does it judge the name, the size or the digest that the server claims.

use crate::document::data::Decoder;
use crate::document::head::{Key, Values};
use crate::document::json::{Event, Scanner};
use crate::document::string::Text;
use crate::document::{Head, ReadError};

/// Reads one document, piece by piece.
///
/// Keys may stand in any order and unknown ones are skipped; everything else is as strict as JSON
/// (RFC 8259) and canonical base64 (RFC 4648) are.
///
/// ```
/// # fn main() -> Result<(), handout::document::ReadError> {
/// use handout::document::{Head, Reader};
///
/// let mut reader = Reader::new(1024);
/// let mut data = Vec::new();
/// for piece in [r#"{"filename":"hel"#, r#"lo","fileda"#, r#"ta":"aGVsbG8="}"#] {
///     reader.feed(piece.as_bytes(), &mut data)?;
/// }
/// assert_eq!(data, b"hello");
/// let Head::File(file) = reader.finish()? else { panic!("a refusal") };
/// assert_eq!((file.filename.as_str(), file.length), ("hello", 5));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Reader {
    json: Scanner,
    member: Member,
    /// The key or string that is being read, unless it is the file's data.
    text: Text,
    data: Decoder,
    values: Values,
    /// Why the document was refused, if it was.
    failure: Option<ReadError>,
}

/// Which part of the document's object is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    /// None.
    Between,
    /// A key.
    Key,
    /// What stands behind a key that means something.
    Known(Key),
    /// What stands behind any other.
    Unknown,
}

impl Reader {
    /// A reader of one document whose file may be `max_data` bytes long.
    #[must_use]
    pub fn new(max_data: u64) -> Self {
        Self {
            json: Scanner::new(),
            member: Member::Between,
            text: Text::default(),
            data: Decoder::new(max_data),
            values: Values::default(),
            failure: None,
        }
    }

    /// Reads on in `input` and appends the file's bytes to `data`: at most two more than `input`
    /// has.
    ///
    /// Returns how many bytes were taken from `input`: all of them, unless the document ends before
    /// its last. What stands behind the document is the caller's.
    ///
    /// # Errors
    /// Whatever is wrong with the document. Every later call says so again, and what is in `data`
    /// is worth nothing.
    pub fn feed(&mut self, input: &[u8], data: &mut Vec<u8>) -> Result<usize, ReadError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let mut rest = input;
        match self.read(&mut rest, data) {
            Ok(()) => Ok(input.len().saturating_sub(rest.len())),
            Err(failure) => {
                self.failure = Some(failure.clone());
                Err(failure)
            }
        }
    }

    /// Whether the document's end was read.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.json.is_at_end()
    }

    /// The file's name, as soon as it was read: it may come behind the data.
    #[must_use]
    pub fn filename(&self) -> Option<&str> {
        self.values.filename.as_deref()
    }

    /// How long the file should be in bytes, as soon as that was read: it may come behind the data.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.values.size
    }

    /// What the document said, once it is complete or there is no more input.
    ///
    /// # Errors
    /// If the document is cut short, lacks a key, or was refused before.
    pub fn finish(self) -> Result<Head, ReadError> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if !self.json.is_begun() {
            return Err(ReadError::Empty);
        }
        if !self.is_complete() {
            let within = self.member.description();
            return Err(ReadError::Cut { within, length: self.json.offset() });
        }
        self.values.into_head()
    }

    fn read(&mut self, input: &mut &[u8], data: &mut Vec<u8>) -> Result<(), ReadError> {
        while let Some(event) = self.json.next(input)? {
            // Where the event's last byte stands.
            let at = self.json.offset().saturating_sub(1);
            match event {
                Event::KeyStart => self.start_key(),
                Event::StringStart => self.start_string(at)?,
                Event::Run(run) => self.take_run(run, data)?,
                Event::Char(character) => self.take_char(character, at, data)?,
                Event::StringEnd => self.end_string(at)?,
                Event::Number(Some(size)) if self.member == Member::Known(Key::Size) => {
                    self.values.size = Some(size);
                    self.end_value();
                }
                Event::Number(_) | Event::Literal | Event::Open | Event::Close => {
                    if let Member::Known(key) = self.member {
                        return Err(key.wrong_type(at));
                    }
                    self.end_value();
                }
            }
        }
        Ok(())
    }

    fn start_key(&mut self) {
        let is_nested = self.member == Member::Unknown;
        if is_nested {
            self.text = Text::beginning(0);
        } else {
            self.member = Member::Key;
            self.text = Text::beginning(Key::ENOUGH);
        }
    }

    fn start_string(&mut self, at: u64) -> Result<(), ReadError> {
        self.text = match self.member {
            Member::Known(Key::Size) => return Err(Key::Size.wrong_type(at)),
            Member::Known(key) => Text::bounded(key.name(), key.limit()),
            _ => Text::beginning(0),
        };
        Ok(())
    }

    fn take_run(&mut self, run: &[u8], data: &mut Vec<u8>) -> Result<(), ReadError> {
        let start = self.json.offset().saturating_sub(run.len() as u64);
        match self.member {
            Member::Known(Key::Filedata) => self.data.run(run, start, data),
            _ => self.text.run(run, start),
        }
    }

    fn take_char(&mut self, character: char, at: u64, data: &mut Vec<u8>) -> Result<(), ReadError> {
        match self.member {
            Member::Known(Key::Filedata) => {
                let mut buffer = [0; 4];
                let mut bytes = character.encode_utf8(&mut buffer).bytes();
                bytes.try_for_each(|byte| self.data.character(byte, at, data))
            }
            _ => self.text.char(character, at),
        }
    }

    fn end_string(&mut self, at: u64) -> Result<(), ReadError> {
        match self.member {
            Member::Key => return self.end_key(at),
            Member::Known(Key::Filedata) => self.values.length = Some(self.data.end(b'"', at)?),
            Member::Known(key) => {
                let text = self.text.take(at)?;
                self.values.set(key, text, at)?;
            }
            Member::Unknown | Member::Between => self.text.end(at)?,
        }
        self.end_value();
        Ok(())
    }

    fn end_key(&mut self, at: u64) -> Result<(), ReadError> {
        self.text.end(at)?;
        self.member = match Key::named(self.text.kept()) {
            Some(key) => {
                self.values.check_new(key, at)?;
                Member::Known(key)
            }
            None => Member::Unknown,
        };
        Ok(())
    }

    /// A value may have ended: it has, unless it is in another.
    fn end_value(&mut self) {
        if self.json.depth() <= 1 {
            self.member = Member::Between;
        }
    }
}

impl Member {
    /// What the input ended in.
    fn description(self) -> &'static str {
        match self {
            Member::Between => "the space between its keys",
            Member::Key => "a key",
            Member::Known(key) => key.name(),
            Member::Unknown => "the value of an unknown key",
        }
    }
}

/// What may stand behind a document that is the last: one newline, LF or CRLF, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Tail {
    /// Nothing so far.
    #[default]
    Nothing,
    /// CR, which LF must follow.
    CarriageReturn,
    /// The newline, which nothing may follow.
    Newline,
}

impl Tail {
    /// Takes the next bytes behind the document.
    ///
    /// # Errors
    /// If they are anything but the newline.
    pub(crate) fn feed(&mut self, input: &[u8]) -> Result<(), ReadError> {
        for &found in input {
            *self = match (*self, found) {
                (Self::Nothing, b'\r') => Self::CarriageReturn,
                (Self::Nothing | Self::CarriageReturn, b'\n') => Self::Newline,
                (Self::CarriageReturn, _) => return Err(ReadError::Behind { found: b'\r' }),
                _ => return Err(ReadError::Behind { found }),
            };
        }
        Ok(())
    }

    /// The end of the input.
    ///
    /// # Errors
    /// If the newline is not whole.
    pub(crate) fn finish(self) -> Result<(), ReadError> {
        match self {
            Self::CarriageReturn => Err(ReadError::Behind { found: b'\r' }),
            Self::Nothing | Self::Newline => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{File, Refusal};

    /// What a reader makes of `document`, given in one piece, and the data.
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

    /// The message with which `document` is refused.
    fn fault(document: &str) -> String {
        read(document).unwrap_err().to_string()
    }

    #[test]
    fn a_pushed_document_is_read() {
        let (head, data) = read(r#"{"filename":"guido.jpg","filedata":"/9j/"}"#).unwrap();
        assert_eq!(data, b"\xff\xd8\xff");
        let filename = "guido.jpg".to_owned();
        let file = File { filename, size: None, modified: None, sha256: None, length: 3 };
        assert_eq!(head, Head::File(file));
    }

    #[test]
    fn a_document_out_of_a_folder_is_read() {
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
    fn a_refusal_is_read() {
        let refused = |error: &str, filename: Option<&str>| {
            let filename = filename.map(str::to_owned);
            Head::Refusal(Refusal { error: error.to_owned(), filename })
        };
        let (head, data) = read(r#"{"error":"no such file","filename":"x"}"#).unwrap();
        assert_eq!((head, data), (refused("no such file", Some("x")), Vec::new()));
        assert_eq!(read(r#"{"error":""}"#).unwrap().0, refused("", None));
    }

    #[test]
    fn data_comes_before_the_name_and_between_unknown_keys() {
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
    fn keys_are_known_however_they_are_escaped() {
        assert_eq!(file(r#"{"\u0066ile\u006Eame":"a","file\u0064ata":""}"#).filename, "a");
        let unknown = r#"{"filename\u0000":1,"filenameé":2,"filename\u00e9":3,"filename\n":4,
            "filename":"a","filedata":""}"#;
        assert_eq!(file(unknown).filename, "a");
    }

    #[test]
    fn data_may_be_escaped() {
        let (_, data) = read(r#"{"filename":"a","filedata":"\/9\u006A\/\/9g\u003d"}"#).unwrap();
        assert_eq!(data, b"\xff\xd8\xff\xff\xd8");
        assert_eq!(
            fault(r#"{"filename":"a","filedata":"AA\nAA"}"#),
            r"expected a character of base64 at offset 31, found '\n'"
        );
        assert_eq!(
            fault(r#"{"filename":"a","filedata":"AAAA\u20acA=="}"#),
            r"expected a character of base64 at offset 37, found '\xe2'"
        );
    }

    #[test]
    fn known_keys_stand_once() {
        for key in [
            r#""filename":"a""#,
            r#""filedata":"""#,
            r#""size":1"#,
            r#""modified":"2026-11-22T05:46:01Z""#,
            r#""error":"e""#,
        ] {
            let message = fault(&format!("{{{key},\"x\":1,\"x\":2,{key}}}"));
            assert!(message.contains(" only once, found it again at offset "), "{message}");
        }
        let sha256 = format!(r#""sha256":"{}""#, "0".repeat(64));
        let message = fault(&format!("{{{sha256},{sha256}}}"));
        assert_eq!(message, "expected sha256 only once, found it again at offset 84");
    }

    #[test]
    fn name_and_data_must_be_there() {
        assert_eq!(fault(r#"{"filedata":""}"#), "expected the document to have filename");
        assert_eq!(fault(r#"{"filename":""}"#), "expected the document to have filedata");
        assert_eq!(fault(r#"{"files":[]}"#), "expected the document to have filename");
        assert_eq!(fault("{}"), "expected the document to have filename");
    }

    #[test]
    fn a_refusal_has_no_data() {
        let message = "expected either filedata or an error, found both at offset 21";
        assert_eq!(fault(r#"{"error":"","filedata":""}"#), message);
        assert_eq!(fault(r#"{"filedata":"","error":""}"#), message);
    }

    #[test]
    fn values_have_their_types() {
        for key in ["filename", "filedata", "modified", "sha256", "error"] {
            for value in ["null", "true", "5", "[", "{"] {
                let message = fault(&format!("{{\"{key}\":{value},"));
                assert!(
                    message.starts_with(&format!("expected {key} to be a string, at ")),
                    "{message}"
                );
            }
        }
        for size in ["-0", "-1", "1.0", "1e3", "18446744073709551616", "\"1\"", "null", "[1]"] {
            let message = fault(&format!("{{\"size\":{size},"));
            let expected = "expected size to be a whole number below 2^64, at offset ";
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn times_and_digests_are_refused_unless_they_are_some() {
        assert_eq!(
            fault("{\"modified\":\"\u{202e}now\\n\""),
            "expected modified to be a time as \"2026-11-22T05:46:01Z\", \
             found \"\\u{202e}now\\n\" at offset 21"
        );
        for digest in ["", "ab", &"0".repeat(63), &"g".repeat(64), &"é".repeat(32)] {
            let message = fault(&format!("{{\"sha256\":\"{digest}\""));
            let expected = "expected sha256 to be 64 hexadecimal digits, found ";
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn kept_values_have_limits() {
        let name = "n".repeat(4096);
        assert_eq!(file(&format!(r#"{{"filename":"{name}","filedata":""}}"#)).filename, name);
        for (key, limit) in [("filename", 4096), ("error", 4096), ("modified", 64), ("sha256", 64)]
        {
            let too_long = "0".repeat(limit + 1);
            let at = key.len() + 5 + limit;
            assert_eq!(
                fault(&format!(r#"{{"{key}":"{too_long}"#)),
                format!("expected {key} to be at most {limit} bytes long, at offset {at}")
            );
        }
    }

    #[test]
    fn more_data_than_wanted_is_refused() {
        let read = |limit, data: &str| {
            let mut reader = Reader::new(limit);
            let document = format!(r#"{{"filename":"","filedata":"{data}"}}"#);
            reader.feed(document.as_bytes(), &mut Vec::new()).map_err(|error| error.to_string())
        };
        assert!(read(4, "AAAAAA==").is_ok());
        assert!(read(0, "").is_ok());
        assert_eq!(
            read(3, "AAAAAA==").unwrap_err(),
            "the file is larger than the limit of 3 bytes"
        );
        assert_eq!(read(0, "AA==").unwrap_err(), "the file is larger than the limit of 0 bytes");
    }

    #[test]
    fn a_document_that_is_cut_short_says_where() {
        assert_eq!(fault(""), "there is no document: the input ends before its `{`");
        assert_eq!(fault(" \n"), "there is no document: the input ends before its `{`");
        for (document, within) in [
            ("{", "the space between its keys"),
            (r#"{"filen"#, "a key"),
            (r#"{"filename""#, "filename"),
            (r#"{"filename":"guid"#, "filename"),
            (r#"{"filename":"","filedata":"AAA"#, "filedata"),
            (r#"{"filename":"","filedata":"" "#, "the space between its keys"),
            (r#"{"size":1"#, "size"),
            (r#"{"x":[1,"filedata"#, "the value of an unknown key"),
        ] {
            let length = document.len();
            let length = crate::text::counted(length, "byte");
            let expected = format!("the document ends early, in {within}, after {length}");
            assert_eq!(fault(document), expected);
        }
    }

    #[test]
    fn several_documents_come_one_after_the_other() {
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

    #[test]
    fn name_and_size_are_known_before_the_end() {
        let mut reader = Reader::new(1000);
        let mut data = Vec::new();
        reader.feed(br#"{"filename":"a"#, &mut data).unwrap();
        assert_eq!((reader.filename(), reader.size()), (None, None));
        reader.feed(br#"","size":10"#, &mut data).unwrap();
        assert_eq!((reader.filename(), reader.size()), (Some("a"), None));
        reader.feed(br#"0,"filedata":""#, &mut data).unwrap();
        assert_eq!((reader.filename(), reader.size()), (Some("a"), Some(100)));
    }

    #[test]
    fn a_refused_document_stays_refused() {
        let mut reader = Reader::new(1000);
        let mut data = Vec::new();
        let failure = reader.feed(b"[", &mut data).unwrap_err();
        let document = br#"{"filename":"","filedata":""}"#;
        assert_eq!(reader.feed(document, &mut data), Err(failure.clone()));
        assert!(!reader.is_complete());
        assert_eq!(reader.finish(), Err(failure));
    }

    #[test]
    fn text_of_no_interest_is_checked_too() {
        for (document, at) in [
            (&b"{\"x\":\"\xe2\x82\""[..], 8),
            (b"{\"x\":[\"\xff\"", 7),
            (b"{\"x\xc3\"", 4),
            (b"{\"x\":{\"\xc3\"", 8),
        ] {
            let refused = Reader::new(1000).feed(document, &mut Vec::new());
            assert_eq!(refused, Err(ReadError::NotUtf8 { at }), "{document:x?}");
        }
        assert!(fault("{\"x\":[\"\n").contains("an escape in place of a control character"));
        assert!(fault("{\"x\":[{\"\\ud800\"").contains("a surrogate pair"));
    }

    #[test]
    fn ignores_one_byte_order_mark_in_front() {
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
        let message = r"expected `{` at offset 3, found '\xef'";
        assert_eq!(fault(&format!("\u{feff}{marked}")), message);
        let message = r"expected `{` at offset 1, found '\xef'";
        assert_eq!(fault(&format!(" {marked}")), message);
        assert_eq!(read("\u{feff}").unwrap_err(), ReadError::Empty);
    }

    #[test]
    fn what_never_ends_costs_no_memory() {
        for (start, endless) in [
            ("", " \n"),
            ("{\"", "k"),
            ("{\"", "\\u00e9\\n"),
            ("{\"x\":\"", "é"),
            ("{\"x\":\"", "\\t"),
            ("{\"x\":", "12"),
            ("{\"x\":0.", "0"),
            ("{\"x\":[0", ",\"text\",{\"key\":[]}"),
            ("{\"x\":0", ",\"unknown\":\"text\""),
            ("{\"filename\":\"a\",\"x\":0", ",\"unknown\":{}"),
        ] {
            let mut reader = Reader::new(1000);
            let mut data = Vec::new();
            reader.feed(start.as_bytes(), &mut data).unwrap();
            let piece = endless.repeat(4096);
            for _ in 0..64 {
                assert_eq!(reader.feed(piece.as_bytes(), &mut data), Ok(piece.len()));
                assert!(reader.text.capacity() <= 64, "{start}");
                assert_eq!(data.capacity(), 0, "{start}");
            }
        }
    }

    #[test]
    fn one_newline_may_stand_behind_the_last_document() {
        let behind = |pieces: &[&str]| {
            let mut tail = Tail::default();
            pieces.iter().try_for_each(|piece| tail.feed(piece.as_bytes()))?;
            tail.finish()
        };
        let newlines: [&[&str]; 5] = [&[], &[""], &["\n"], &["\r\n"], &["\r", "", "\n"]];
        for pieces in newlines {
            assert_eq!(behind(pieces), Ok(()), "{pieces:?}");
        }
        let others: [(&[&str], u8); 7] = [
            (&["\n\n"], b'\n'),
            (&["\r"], b'\r'),
            (&["\r", "\r\n"], b'\r'),
            (&["\n", "\r"], b'\r'),
            (&[" \n"], b' '),
            (&["\n{"], b'{'),
            (&["\0"], 0),
        ];
        for (pieces, found) in others {
            assert_eq!(behind(pieces), Err(ReadError::Behind { found }), "{pieces:?}");
        }
        let message = ReadError::Behind { found: 0 }.to_string();
        assert_eq!(message, r"expected nothing behind the document, found '\x00'");
    }
}
