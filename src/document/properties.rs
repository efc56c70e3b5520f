//! Properties of every document: the reader returns the data of the writer, agrees with the oracle,
//! and its result does not depend on how the input is split.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use proptest::sample::select;

use crate::document::oracle::{Json, KEYS, LIMIT, Members, Verdict, verdict};
use crate::document::{
    File, Head, ReadError, Reader, WHOLE_GROUP, append_encoded, closing, opening,
};

/// The head, the data and the number of bytes taken.
type Reading = Result<(Head, Vec<u8>, usize), ReadError>;

fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, limit: u64) -> Reading {
    let mut reader = Reader::new(limit);
    let mut data = Vec::new();
    let mut taken = 0;
    for piece in pieces {
        let before = data.len();
        let length = reader.feed(piece, &mut data)?;
        assert!(length == piece.len() || reader.is_complete());
        assert!(data.len() - before <= piece.len() + 2);
        taken += length;
    }
    Ok((reader.finish()?, data, taken))
}

/// Splits `input` into pieces of these sizes, repeatedly.
fn cut<'a>(mut input: &'a [u8], sizes: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    sizes.iter().cycle().map_while(move |size| {
        let (piece, rest) = input.split_at((*size).min(input.len()));
        let is_more = !input.is_empty();
        input = rest;
        is_more.then_some(piece)
    })
}

/// Sizes of pieces; the last is not zero, so every input ends.
fn sizes() -> impl Strategy<Value = Vec<usize>> {
    let size = prop_oneof![4 => 0usize..8, 1 => 8usize..300];
    (prop::collection::vec(size, 0..8), 1usize..40).prop_map(|(mut sizes, last)| {
        sizes.push(last);
        sizes
    })
}

/// Prints JSON with optional space and escapes, as a list of choices decides.
struct Printer<'a> {
    output: Vec<u8>,
    choices: std::iter::Cycle<std::slice::Iter<'a, u8>>,
}

impl Printer<'_> {
    fn print(members: &Members, choices: &[u8]) -> Vec<u8> {
        let mut printer = Printer { output: Vec::new(), choices: choices.iter().cycle() };
        printer.space();
        printer.members(members);
        printer.output
    }

    fn choice(&mut self) -> u8 {
        self.choices.next().copied().unwrap_or(0)
    }

    fn put(&mut self, text: &str) {
        self.output.extend_from_slice(text.as_bytes());
    }

    fn space(&mut self) {
        let spaces = ["", "", "", "", " ", "\n", "\t\r", "  \r\n"];
        let choice = self.choice();
        self.put(spaces[usize::from(choice) % spaces.len()]);
    }

    fn members(&mut self, members: &Members) {
        self.put("{");
        for (number, (key, value)) in members.iter().enumerate() {
            if number > 0 {
                self.put(",");
            }
            self.space();
            self.text(key);
            self.space();
            self.put(":");
            self.value(value);
        }
        self.space();
        self.put("}");
    }

    fn value(&mut self, value: &Json) {
        self.space();
        match value {
            Json::Literal(literal) => self.put(literal),
            Json::Whole(number) => self.put(&number.to_string()),
            Json::Number(number) => self.put(number),
            Json::Text(text) => self.text(text),
            Json::Array(items) => {
                self.put("[");
                for (number, item) in items.iter().enumerate() {
                    if number > 0 {
                        self.put(",");
                    }
                    self.value(item);
                }
                self.space();
                self.put("]");
            }
            Json::Object(members) => self.members(members),
        }
        self.space();
    }

    fn text(&mut self, text: &str) {
        self.put("\"");
        for character in text.chars() {
            let choice = self.choice();
            let short = match character {
                '"' => Some("\\\""),
                '\\' => Some("\\\\"),
                '/' => Some("\\/"),
                '\u{8}' => Some("\\b"),
                '\u{c}' => Some("\\f"),
                '\n' => Some("\\n"),
                '\r' => Some("\\r"),
                '\t' => Some("\\t"),
                _ => None,
            };
            let must_escape = character < ' ' || matches!(character, '"' | '\\');
            match (choice % 8, short) {
                (0, _) => self.units(character, choice),
                (1 | 2, Some(short)) => self.put(short),
                (_, Some(short)) if must_escape => self.put(short),
                _ if must_escape => self.units(character, choice),
                _ => self.put(character.encode_utf8(&mut [0; 4])),
            }
        }
        self.put("\"");
    }

    /// A character as `\uXXXX`, in one case or the other.
    fn units(&mut self, character: char, choice: u8) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            let digits =
                if choice < 128 { format!("\\u{unit:04x}") } else { format!("\\u{unit:04X}") };
            self.put(&digits);
        }
    }
}

fn text() -> impl Strategy<Value = String> {
    let special =
        "\"\\/\0\u{8}\u{c}\n\r\t\u{1f} \u{7f}é€\u{d7ff}\u{e000}\u{feff}\u{ffff}😀\u{10ffff}";
    let character = prop_oneof![
        3 => prop::char::range(' ', '~'),
        1 => any::<char>(),
        2 => select(special.chars().collect::<Vec<_>>()),
    ];
    let short = prop::collection::vec(character, 0..12)
        .prop_map(|characters| characters.into_iter().collect::<String>());
    // Around the limits of names and of shorter values.
    let long = prop_oneof![4090usize..4100, 60usize..68].prop_map(|length| "n".repeat(length));
    prop_oneof![30 => short, 1 => long]
}

fn number() -> impl Strategy<Value = Json> {
    prop_oneof![
        any::<u64>().prop_map(Json::Whole),
        "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,4})?([eE][+-]?[0-9]{1,3})?".prop_map(Json::Number),
    ]
}

fn value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        select(vec!["true", "false", "null"]).prop_map(Json::Literal),
        number(),
        text().prop_map(Json::Text),
    ];
    let nested = leaf.prop_recursive(4, 16, 4, |value| {
        prop_oneof![
            prop::collection::vec(value.clone(), 0..4).prop_map(Json::Array),
            prop::collection::vec((key(), value), 0..4).prop_map(Json::Object),
        ]
    });
    // Around the limit of nesting.
    let deep = (58..70, any::<u64>()).prop_map(|(depth, kinds)| {
        (0..depth).fold(Json::Whole(0), |inner, level| match kinds >> (level % 64) & 1 {
            0 => Json::Array(vec![inner]),
            _ => Json::Object(vec![("filedata".to_owned(), inner)]),
        })
    });
    prop_oneof![30 => nested, 1 => deep]
}

fn key() -> impl Strategy<Value = String> {
    let near = ["filename", "filedata", "size", "error", "filenam", "filenames", "filename\0", ""];
    prop_oneof![text(), select(near.map(str::to_owned).to_vec())]
}

/// A known member with a value that is usually valid.
fn known_member(key: &'static str) -> BoxedStrategy<(String, Json)> {
    let value = match key {
        "filedata" => prop_oneof![
            8 => prop::collection::vec(any::<u8>(), 0..51).prop_map(|data| STANDARD.encode(data)),
            1 => "[A-D+/]{0,9}={0,3}",
        ]
        .prop_map(Json::Text)
        .boxed(),
        "size" => any::<u64>().prop_map(Json::Whole).boxed(),
        "modified" => prop_oneof![
            8 => (0i64..4_000_000_000).prop_map(|second| {
                jiff::Timestamp::from_second(second).unwrap().to_string()
            }),
            1 => "2026-1[0-3]-[0-3]1[T ]2[2-5]:46(:01(\\.[0-9]{0,4})?)?(Z|[+-]0[0-9](:00)?)?",
        ]
        .prop_map(Json::Text)
        .boxed(),
        "sha256" => "[0-9a-f]{64}|[0-9a-fA-F]{64}|[0-9a-g]{62,66}".prop_map(Json::Text).boxed(),
        _ => text().prop_map(Json::Text).boxed(),
    };
    value.prop_map(move |value| (key.to_owned(), value)).boxed()
}

/// The members of a document, sometimes invalid.
fn members() -> impl Strategy<Value = Members> {
    let maybe = |key| prop::collection::vec(known_member(key), 0..=1);
    let unknown = || prop::collection::vec((key(), value()), 0..3);
    let file = (
        known_member("filename"),
        known_member("filedata"),
        maybe("size"),
        maybe("modified"),
        maybe("sha256"),
        unknown(),
    )
        .prop_map(|(name, data, size, modified, sha256, unknown)| {
            [vec![name, data], size, modified, sha256, unknown].concat()
        });
    let refusal = (known_member("error"), maybe("filename"), maybe("size"), unknown())
        .prop_map(|(error, name, size, unknown)| [vec![error], name, size, unknown].concat());
    // Sometimes a repeated or contradicting member.
    let document = prop_oneof![6 => file, 2 => refusal, 1 => unknown()];
    let one_more = prop_oneof![
        8 => Just(Vec::new()),
        1 => select(KEYS.to_vec()).prop_flat_map(known_member).prop_map(|member| vec![member]),
    ];
    (document, one_more)
        .prop_map(|(document, one_more)| [document, one_more].concat())
        .prop_shuffle()
}

/// Small changes: position, number of dropped bytes, inserted bytes.
fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, usize, Vec<u8>)>> {
    let snippets: [&[u8]; 27] = [
        b"\"",
        b"\\",
        b"\\u",
        b"\\ud83d",
        b"\\ude00",
        b"\\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"=",
        b"A",
        b"0",
        b"-",
        b".",
        b"e9",
        b" ",
        b"\n",
        b"\0",
        b"\x80",
        b"\xe2\x82",
        b"\xf0\x9f",
        b"\xed\xa0\x80",
        b"null",
        b"\xef\xbb\xbf",
    ];
    let put = prop_oneof![
        select(snippets.map(<[u8]>::to_vec).to_vec()),
        prop::collection::vec(any::<u8>(), 1),
        Just(Vec::new()),
    ];
    let change = (any::<prop::sample::Index>(), 0usize..3, put);
    prop_oneof![Just(Vec::new()), prop::collection::vec(change, 1..4)]
}

/// Documents, invalid ones, and both after small changes.
fn documents() -> impl Strategy<Value = Vec<u8>> {
    let choices = prop::collection::vec(any::<u8>(), 1..30);
    (members(), choices, changes(), 0usize..3).prop_map(|(members, choices, changes, behind)| {
        let mut input = Printer::print(&members, &choices);
        input.extend_from_slice(&b"\n{"[..behind]);
        for (position, drop, put) in changes {
            let start = position.index(input.len() + 1);
            let end = (start + drop).min(input.len());
            input.splice(start..end, put);
        }
        input
    })
}

/// Documents with a part that consists of random tokens: changed bytes rarely hit a short number or
/// the end of the data.
fn filled_holes() -> impl Strategy<Value = Vec<u8>> {
    let hole = |before: &'static [u8], fillings: &[&'static [u8]], behind: &'static [u8]| {
        prop::collection::vec(select(fillings.to_vec()), 0..10)
            .prop_map(move |filling| [before, &filling.concat(), behind].concat())
    };
    let number: &[&[u8]] = &[b"0", b"1", b"5", b"-", b"+", b".", b"e", b"E", b" "];
    let structure: &[&[u8]] =
        &[b"{", b"}", b"[", b"]", b",", b":", b"\"\"", b"\"k\"", b"0", b"null", b" ", b"\"k\":1"];
    let text: &[&[u8]] = &[
        b"\\",
        b"u",
        b"\\ud83d",
        b"\\ude00",
        b"\\u00",
        b"e9",
        b"n",
        b"\"",
        b"\x1f",
        b" ",
        b"\xc3",
        b"\xe2",
        b"\x82",
        b"\xac",
        b"\xf0\x9f",
        b"\x98\x80",
        b"\xed",
        b"\xa0",
        b"\x7f",
    ];
    let data: &[&[u8]] = &[b"AAA", b"A", b"Q", b"B", b"=", b"==", b"/", b"\\/", b"\\u003d"];
    prop_oneof![
        hole(b"{\"filename\":\"\",\"filedata\":\"\",\"x\":", number, b"}"),
        hole(b"{\"filename\":\"\",\"filedata\":\"\",\"size\":", number, b"}"),
        hole(b"{\"filename\":\"\",\"filedata\":\"\",\"x\":", structure, b"}"),
        hole(b"{\"filename\":\"\",\"filedata\":\"\"", structure, b"}"),
        hole(b"{\"filename\":\"", text, b"\",\"filedata\":\"\"}"),
        hole(b"{\"filename\":\"\",\"filedata\":\"\",\"x\":\"", text, b"\"}"),
        hole(b"{\"filename\":\"\",\"filedata\":\"\",\"", text, b"\":0}"),
        hole(b"{\"filename\":\"\",\"filedata\":\"", data, b"\"}"),
    ]
}

fn input() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![documents(), filled_holes()]
}

proptest! {
    #[test]
    fn reads_written_documents(
        name: String,
        data: Vec<u8>,
        newline: bool,
        groups in 1usize..20,
        sizes in sizes(),
    ) {
        let mut document = opening(&name).into_bytes();
        for piece in data.chunks(groups * WHOLE_GROUP) {
            append_encoded(piece, &mut document);
        }
        document.extend_from_slice(closing(newline).as_bytes());
        let length = data.len() as u64;
        let file = File { filename: name, size: None, modified: None, sha256: None, length };
        let taken = document.len() - usize::from(newline);
        let expected = Ok((Head::File(file), data, taken));
        prop_assert_eq!(&read(cut(&document, &sizes), length), &expected);
        prop_assert_eq!(&read(document.chunks(1), length), &expected);
    }

    #[test]
    fn agrees_with_the_oracle(input in input()) {
        let reading = read([input.as_slice()], LIMIT);
        match verdict(&input) {
            Verdict::Accept(head, data, taken) => prop_assert_eq!(reading, Ok((head, data, taken))),
            Verdict::Refuse => prop_assert!(reading.is_err(), "{:?}", reading),
            Verdict::HasForm(has_form) => prop_assert!(has_form || reading.is_err()),
        }
    }

    #[test]
    fn the_result_does_not_depend_on_the_pieces(input in input(), sizes in sizes()) {
        let whole = read([input.as_slice()], LIMIT);
        prop_assert_eq!(&read(cut(&input, &sizes), LIMIT), &whole);
        prop_assert_eq!(&read(input.chunks(1), LIMIT), &whole);
    }

    #[test]
    fn messages_are_short_and_printable(input in input()) {
        if let Err(error) = read([input.as_slice()], LIMIT) {
            let message = error.to_string();
            prop_assert!(message.chars().count() < 1000, "{}", message);
            prop_assert!(!message.chars().any(char::is_control), "{}", message);
        }
    }
}
