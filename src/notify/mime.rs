//! A mail as it is sent: plain text with attachments (RFC 5322, MIME).
//!
//! Line ends never reach a header: they are refused here. Texts that are not plain ASCII become
//! encoded words (RFC 2047), names of files also parameters of RFC 2231.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use mail_builder::MessageBuilder;
use mail_builder::headers::date::Date;
use mail_builder::headers::raw::Raw;
use mail_builder::mime::MimePart;

use crate::fs::filename::escape;
use crate::notify::address::EmailAddress;

/// The longest subject, or name of a person, in bytes.
const MAX_TEXT: usize = 1000;

/// The longest name of a file, in bytes.
const MAX_FILE_NAME: usize = 255;

/// How many bytes of a text one encoded word takes, so that its line is at most 76 characters long,
/// with the name of the header.
const MAX_WORD: usize = 39;

/// A line is folded behind so many characters (RFC 5322, 2.1.1).
const MAX_LINE: usize = 76;

/// A person: a name, if one is said, and an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mailbox {
    name: Option<String>,
    /// The address.
    pub(crate) address: EmailAddress,
}

impl FromStr for Mailbox {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        header_text(text)?;
        let text = text.trim();
        let (name, address) = match text.strip_suffix('>').and_then(|text| text.rsplit_once('<')) {
            None => (None, text),
            Some((name, address)) => (Some(name.trim()), address.trim()),
        };
        let name =
            name.map(|name| match name.strip_prefix('"').and_then(|name| name.strip_suffix('"')) {
                Some(quoted) => quoted.replace("\\\"", "\"").replace("\\\\", "\\"),
                None => name.to_owned(),
            });
        let address = address.parse()?;
        Ok(Self { name: name.filter(|name| !name.is_empty()), address })
    }
}

impl fmt::Display for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            None => self.address.fmt(f),
            Some(name) => write!(f, "{name} <{}>", self.address),
        }
    }
}

impl Mailbox {
    fn encoded(&self) -> String {
        match &self.name {
            None => self.address.to_string(),
            Some(name) if is_plain(name) && name.chars().all(is_of_phrase) => {
                format!("\"{name}\" <{}>", self.address)
            }
            Some(name) => {
                let (words, address) = (encoded_words(name), &self.address);
                let column = words.rsplit('\n').next().map_or(0, str::len) + "From: ".len();
                let fits = column + address.to_string().len() + " <>,".len() <= MAX_LINE;
                format!("{words}{}<{address}>", if fits { " " } else { "\r\n " })
            }
        }
    }
}

/// Characters that mean nothing else in a quoted string.
fn is_of_phrase(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, ' ' | '-' | '_' | '.' | ',' | '@')
}

/// A file that goes with a mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// Its name, without a folder.
    pub name: String,
    /// Its content.
    pub content: Vec<u8>,
}

/// What is to be told.
#[derive(Debug, Clone)]
pub(crate) struct Email<'a> {
    /// Who tells it.
    pub from: &'a Mailbox,
    /// To whom.
    pub to: &'a [Mailbox],
    /// In a line.
    pub subject: &'a str,
    /// In full.
    pub text: &'a str,
    /// With these files.
    pub attachments: Vec<Attachment>,
    /// By which it is known: see [`new_id`].
    pub id: &'a str,
    /// When it was written.
    pub date: SystemTime,
    /// Whether no person has written it, so that nobody answers by himself (RFC 3834).
    pub automatic: bool,
}

/// A new Message-ID; every one is another.
pub(crate) fn new_id(from: &Mailbox) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (nanos, random) = (now.as_nanos(), fastrand::u128(..));
    format!("<{nanos:x}.{random:032x}@{}>", from.address.domain())
}

/// Takes a text for one of a header.
///
/// # Errors
/// Says what was expected.
pub(crate) fn header_text(text: &str) -> Result<(), String> {
    if text.contains(['\r', '\n', '\0']) {
        return Err("has the end of a line or a NUL in it; expected one line".to_owned());
    }
    if text.chars().any(char::is_control) {
        return Err("has a control character in it; expected visible text".to_owned());
    }
    if text.len() > MAX_TEXT {
        return Err(format!("expected at most {MAX_TEXT} bytes"));
    }
    Ok(())
}

/// Takes a text for the name of an attachment.
///
/// # Errors
/// Says what was expected.
pub(crate) fn attachment_name(name: &str) -> Result<(), String> {
    header_text(name)?;
    if name.is_empty() || name.len() > MAX_FILE_NAME || name.contains('/') {
        return Err(format!("expected a file's name of at most {MAX_FILE_NAME} bytes"));
    }
    Ok(())
}

/// Makes the mail that says a letter.
///
/// # Errors
/// Says what is wrong with it.
pub(crate) fn build_message(letter: Email<'_>) -> Result<Vec<u8>, String> {
    let Email { from, to, subject, text, attachments, id, date, automatic } = letter;
    header_text(subject).map_err(|problem| format!("subject: {problem}"))?;
    for attachment in &attachments {
        attachment_name(&attachment.name)
            .map_err(|problem| format!("attachment {}: {problem}", escape(&attachment.name)))?;
    }
    let to: Vec<_> = to.iter().map(Mailbox::encoded).collect();
    let date = date.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut builder = MessageBuilder::new()
        .header("From", Raw::new(from.encoded()))
        .header("To", Raw::new(to.join(",\r\n ")))
        .header("Subject", Raw::new(unstructured(subject)))
        .header("Message-ID", Raw::new(id))
        .date(Date::new(i64::try_from(date).unwrap_or(i64::MAX)));
    if automatic {
        builder = builder.header("Auto-Submitted", Raw::new("auto-generated"));
    }
    let text = text_part(text);
    let body = if attachments.is_empty() {
        text
    } else {
        let parts = std::iter::once(text).chain(attachments.into_iter().map(part_of));
        MimePart::new("multipart/mixed", parts.collect::<Vec<_>>())
    };
    builder.body(body).write_to_vec().map_err(|error| error.to_string())
}

fn text_part(text: &str) -> MimePart<'static> {
    // Every line ends in one way.
    let text = text.replace("\r\n", "\n");
    let plain = |c: char| matches!(c, '\n' | '\t') || !c.is_control();
    if text.chars().all(plain) {
        return MimePart::new("text/plain", text);
    }
    base64_part("text/plain; charset=\"utf-8\"".to_owned(), text.replace('\n', "\r\n").into_bytes())
}

/// A part in Base64, whatever its content. A type that is `Raw` is not looked at; that of a text
/// would let control characters through as they are.
fn base64_part(kind: String, content: Vec<u8>) -> MimePart<'static> {
    MimePart::raw(content).header("Content-Type", Raw::new(kind))
}

fn part_of(Attachment { name, content }: Attachment) -> MimePart<'static> {
    base64_part(named_type(&name), content).attachment(name)
}

/// `Content-Type` of a file, with its name for those who do not know RFC 2231.
fn named_type(file: &str) -> String {
    let kind = if file.to_ascii_lowercase().ends_with(".txt") {
        // In which character set it is, nobody has said.
        "text/plain"
    } else {
        "application/octet-stream"
    };
    let encoded = if is_plain(file) && file.chars().all(is_of_phrase) {
        file.to_owned()
    } else {
        encoded_words(file)
    };
    format!("{kind};\r\n name=\"{encoded}\"")
}

/// Whether a text can stand in a header as it is, and is read as it is.
fn is_plain(text: &str) -> bool {
    text.len() <= MAX_WORD
        && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
        && !text.contains("=?")
        && text.trim() == text
}

/// The value of an unstructured header. Plain words stay as they are; the builder folds between
/// them.
fn unstructured(text: &str) -> String {
    let mut words = text.split(' ');
    let is_foldable = words.all(|word| !word.is_empty() && is_plain(word));
    if is_foldable || is_plain(text) { text.to_owned() } else { encoded_words(text) }
}

/// A text as encoded words (RFC 2047), a line for each; no character is divided.
fn encoded_words(text: &str) -> String {
    let mut words = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (word, behind) = rest.split_at(rest.floor_char_boundary(MAX_WORD));
        words.push(format!("=?utf-8?B?{}?=", BASE64_STANDARD.encode(word)));
        rest = behind;
    }
    words.join("\r\n ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mailbox(text: &str) -> Mailbox {
        text.parse().unwrap()
    }

    fn composed(subject: &str, text: &str, attachments: Vec<Attachment>) -> Result<String, String> {
        let (from, to) = (mailbox("a@example.org"), [mailbox("汇总 <hui@example.com>")]);
        let letter = Email {
            from: &from,
            to: &to,
            subject,
            text,
            attachments,
            id: "<1@example.org>",
            date: SystemTime::UNIX_EPOCH,
            automatic: true,
        };
        build_message(letter).map(|message| String::from_utf8(message).unwrap())
    }

    /// The value of a header, unfolded.
    fn header(mail: &str, name: &str) -> String {
        let unfolded = mail.replace("\r\n ", " ");
        let mut lines = unfolded.split("\r\n");
        let value = lines.find_map(|line| line.strip_prefix(&format!("{name}: ")));
        value.unwrap_or_else(|| panic!("{name} in {mail}")).to_owned()
    }

    /// Reads encoded words as RFC 2047 says: spaces between two of them are none.
    fn decoded(value: &str) -> String {
        let mut text = String::new();
        let mut rest = value;
        let mut after_word = false;
        while let Some((before, word)) = rest.split_once("=?utf-8?B?") {
            if !(after_word && before == " ") {
                text.push_str(before);
            }
            let (word, behind) = word.split_once("?=").unwrap();
            assert!("=?utf-8?B??=".len() + word.len() <= 75);
            text.push_str(&String::from_utf8(BASE64_STANDARD.decode(word).unwrap()).unwrap());
            rest = behind;
            after_word = true;
        }
        text + rest
    }

    /// Reads the parameter of a name as RFC 2231 says.
    fn parameter(value: &str, name: &str) -> String {
        let mut whole = Vec::new();
        let mut rest = value.split_once(';').unwrap().1.trim_start();
        while let Some((key, behind)) = rest.split_once('=') {
            let (value, behind) = if let Some(quoted) = behind.strip_prefix('"') {
                let mut value = Vec::new();
                let mut bytes = quoted.bytes();
                loop {
                    match bytes.next().unwrap() {
                        b'\\' => value.push(bytes.next().unwrap()),
                        b'"' => break,
                        byte => value.push(byte),
                    }
                }
                let behind = quoted.len() - bytes.len();
                (value, &quoted[behind..])
            } else {
                let (value, behind) = behind.split_at(behind.find(';').unwrap_or(behind.len()));
                let value = value.strip_prefix("UTF-8''").unwrap_or(value);
                (percent_encoding::percent_decode_str(value).collect(), behind)
            };
            assert!(key.starts_with(name), "{key}");
            whole.extend(value);
            rest = behind.trim_start_matches(';').trim_start();
        }
        String::from_utf8(whole).unwrap()
    }

    #[test]
    fn a_mail_has_what_a_mail_needs() {
        let attachment =
            Attachment { name: "汇总数据.xlsx".to_owned(), content: b"\0\r\n.\r\n".to_vec() };
        let mail = composed("示例代码实验邮件", "两行\n.\n", vec![attachment]).unwrap();
        assert_eq!(decoded(&header(&mail, "Subject")), "示例代码实验邮件");
        assert_eq!(decoded(&header(&mail, "To")), "汇总 <hui@example.com>");
        assert_eq!(header(&mail, "From"), "a@example.org");
        assert_eq!(header(&mail, "Message-ID"), "<1@example.org>");
        assert_eq!(header(&mail, "Date"), "Thu, 1 Jan 1970 00:00:00 +0000");
        assert_eq!(header(&mail, "MIME-Version"), "1.0");
        assert_eq!(header(&mail, "Auto-Submitted"), "auto-generated");
        assert!(mail.contains("AA0KLg0K"), "{mail}");
        assert!(mail.is_ascii() && mail.split("\r\n").all(|line| line.len() <= 78), "{mail}");
    }

    #[test]
    fn a_person_has_an_address_and_perhaps_a_name() {
        let read = |text: &str| mailbox(text).to_string();
        assert_eq!(read(" a@example.org "), "a@example.org");
        assert_eq!(read("<a@example.org>"), "a@example.org");
        assert_eq!(read("汇总 <hui@example.com>"), "汇总 <hui@example.com>");
        assert_eq!(read("\"A, \\\"B\\\"\" <a@b.c>"), "A, \"B\" <a@b.c>");
        assert_eq!(read("a@bücher.example"), "a@xn--bcher-kva.example");
        for bad in
            ["", "a", "a@", "@b", "a b@c.d", "a@b.c, d@e.f", "x <a@b.c", "ä@b.c", "a@b.c\r\n"]
        {
            assert!(bad.parse::<Mailbox>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_ends_a_line_is_refused_in_every_header() {
        for end in ["\r", "\n", "\0", "\r\nBcc: x@example.org", "\u{85}"] {
            let bad = format!("a{end}b");
            assert!(composed(&bad, "", Vec::new()).is_err());
            let attachment = Attachment { name: bad.clone(), content: Vec::new() };
            assert!(composed("a", "", vec![attachment]).is_err());
            assert!(format!("{bad} <a@example.org>").parse::<Mailbox>().is_err());
            assert!(format!("x <{bad}@example.org>").parse::<Mailbox>().is_err());
        }
    }

    #[test]
    fn every_id_is_another() {
        let from = mailbox("a@example.org");
        let id = new_id(&from);
        assert!(id.starts_with('<') && id.ends_with("@example.org>"), "{id}");
        assert_ne!(id, new_id(&from));
    }

    fn visible(max: usize) -> impl Strategy<Value = String> {
        let texts = prop_oneof![
            "[ -~]{0,120}",
            "\\PC{0,60}",
            "([a-z]{1,9} ){0,30}",
            "(=\\?utf-8\\?[a-z? ]){0,9}",
            "[ \"\\\\;'*%]{0,20}",
        ];
        texts.prop_filter("too long", move |text| text.len() <= max && header_text(text).is_ok())
    }

    proptest! {
        #[test]
        fn any_subject_is_read_as_it_was_written(subject in visible(MAX_TEXT)) {
            let mail = composed(&subject, "", Vec::new()).unwrap();
            prop_assert_eq!(decoded(&header(&mail, "Subject")), subject);
            prop_assert!(mail.is_ascii() && mail.split("\r\n").all(|line| line.len() <= 78));
        }

        #[test]
        fn any_name_of_a_person_is_read_as_it_was_written(name in visible(MAX_TEXT)) {
            let person = Mailbox {
                name: Some(name.clone()).filter(|name| !name.is_empty()),
                address: "a@example.org".parse().unwrap(),
            };
            let value = person.encoded().replace("\r\n ", " ");
            let read = value.strip_suffix(" <a@example.org>").unwrap_or_default();
            let quoted = read.strip_prefix('"').and_then(|read| read.strip_suffix('"'));
            prop_assert_eq!(quoted.map_or_else(|| decoded(read), str::to_owned), name);
        }

        #[test]
        fn any_name_of_a_file_is_read_as_it_was_written(name in visible(MAX_FILE_NAME)) {
            prop_assume!(attachment_name(&name).is_ok());
            let attachment = Attachment { name: name.clone(), content: Vec::new() };
            let mut part = Vec::new();
            part_of(attachment).write_part(&mut part);
            let part = String::from_utf8(part).unwrap();
            prop_assert!(part.is_ascii());
            prop_assert_eq!(parameter(&header(&part, "Content-Disposition"), "filename"), &*name);
            let kind = header(&part, "Content-Type");
            let (_, plain) = kind.split_once("name=\"").unwrap();
            prop_assert_eq!(decoded(plain.strip_suffix('"').unwrap()), name);
        }
    }
}
