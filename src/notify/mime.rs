//! Builds mails: plain text with attachments (RFC 5322, MIME).
//!
//! Refuses line ends in headers. Text outside of plain ASCII becomes encoded words (RFC 2047), and file
//! names also become parameters of RFC 2231.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;
use std::time::SystemTime;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use mail_builder::MessageBuilder;
use mail_builder::headers::date::Date;
use mail_builder::headers::raw::Raw;
use mail_builder::mime::MimePart;

use crate::fs::filename::escape;
use crate::notify::address::EmailAddress;

/// Maximum length of a subject or display name, in bytes.
const MAX_TEXT: usize = 1000;

/// Maximum length of an attachment name, in bytes.
const MAX_FILE_NAME: usize = 255;

/// Maximum length of the text in one encoded word, in bytes. With the header name, its line has at most
/// 76 characters.
const MAX_WORD: usize = 39;

/// Length after which lines are folded, in characters (RFC 5322, 2.1.1).
const MAX_LINE: usize = 76;

/// A mail address with an optional display name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mailbox {
    name: Option<String>,
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
            Some(name) if is_plain(name) && name.chars().all(is_phrase_char) => {
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

/// Whether a character needs no escape in a quoted string.
fn is_phrase_char(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, ' ' | '-' | '_' | '.' | ',' | '@')
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// File name without a folder.
    pub name: String,
    pub content: Vec<u8>,
}

/// The reason why a file cannot be attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachmentError {
    #[error("{0}")]
    Name(String),
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("larger than the limit")]
    TooLarge,
}

impl Attachment {
    /// Reads the file at `path`, which `open` opens, of at most `max` bytes.
    pub(crate) fn read<R: Read>(
        path: &Path,
        open: impl FnOnce(&Path) -> io::Result<R>,
        max: u64,
    ) -> Result<Self, AttachmentError> {
        let name = path.file_name().and_then(|name| name.to_str());
        let expected = || "expected a path that ends with a file's name, in UTF-8".to_owned();
        let name = name.ok_or_else(expected).map_err(AttachmentError::Name)?;
        attachment_name(name).map_err(AttachmentError::Name)?;
        let mut content = Vec::new();
        open(path)?.take(max.saturating_add(1)).read_to_end(&mut content)?;
        if content.len() as u64 > max {
            return Err(AttachmentError::TooLarge);
        }
        Ok(Self { name: name.to_owned(), content })
    }
}

/// The parts of a mail.
#[derive(Debug, Clone)]
pub(crate) struct Email<'a> {
    pub from: &'a Mailbox,
    pub to: &'a [Mailbox],
    pub subject: &'a str,
    pub text: &'a str,
    pub attachments: Vec<Attachment>,
    pub id: &'a str,
    pub date: SystemTime,
    /// Marks the mail as automatic, so that no automatic reply is sent (RFC 3834).
    pub automatic: bool,
}

/// Creates a unique Message-ID.
pub(crate) fn new_id(from: &Mailbox) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (nanos, random) = (now.as_nanos(), fastrand::u128(..));
    format!("<{nanos:x}.{random:032x}@{}>", from.address.domain())
}

/// Checks that a text is safe in a header.
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

fn attachment_name(name: &str) -> Result<(), String> {
    header_text(name)?;
    if name.is_empty() || name.len() > MAX_FILE_NAME || name.contains('/') {
        return Err(format!("expected a file's name of at most {MAX_FILE_NAME} bytes"));
    }
    Ok(())
}

pub(crate) fn build_message(email: Email<'_>) -> Result<Vec<u8>, String> {
    let Email { from, to, subject, text, attachments, id, date, automatic } = email;
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
        let parts = std::iter::once(text).chain(attachments.into_iter().map(attachment_part));
        MimePart::new("multipart/mixed", parts.collect::<Vec<_>>())
    };
    builder.body(body).write_to_vec().map_err(|error| error.to_string())
}

fn text_part(text: &str) -> MimePart<'static> {
    let text = text.replace("\r\n", "\n");
    let plain = |c: char| matches!(c, '\n' | '\t') || !c.is_control();
    if text.chars().all(plain) {
        return MimePart::new("text/plain", text);
    }
    base64_part("text/plain; charset=\"utf-8\"".to_owned(), text.replace('\n', "\r\n").into_bytes())
}

/// Builds a part in Base64. The builder would send control characters of a text part unencoded; a
/// `Raw` type prevents that.
fn base64_part(kind: String, content: Vec<u8>) -> MimePart<'static> {
    MimePart::raw(content).header("Content-Type", Raw::new(kind))
}

fn attachment_part(Attachment { name, content }: Attachment) -> MimePart<'static> {
    base64_part(content_type(&name), content).attachment(name)
}

/// Returns `Content-Type` with the file name, for clients without RFC 2231.
fn content_type(file: &str) -> String {
    let kind = if file.to_ascii_lowercase().ends_with(".txt") {
        // The character set is unknown.
        "text/plain"
    } else {
        "application/octet-stream"
    };
    let encoded = if is_plain(file) && file.chars().all(is_phrase_char) {
        file.to_owned()
    } else {
        encoded_words(file)
    };
    format!("{kind};\r\n name=\"{encoded}\"")
}

/// Whether a text needs no encoding in a header.
fn is_plain(text: &str) -> bool {
    text.len() <= MAX_WORD
        && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
        && !text.contains("=?")
        && text.trim() == text
}

/// Encodes an unstructured header. The builder folds between plain words.
fn unstructured(text: &str) -> String {
    let mut words = text.split(' ');
    let is_foldable = words.all(|word| !word.is_empty() && is_plain(word));
    if is_foldable || is_plain(text) { text.to_owned() } else { encoded_words(text) }
}

/// Encodes a text as encoded words (RFC 2047), one per line, without splitting characters.
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

    fn built(subject: &str, text: &str, attachments: Vec<Attachment>) -> Result<String, String> {
        let (from, to) = (mailbox("a@example.org"), [mailbox("汇总 <hui@example.com>")]);
        let email = Email {
            from: &from,
            to: &to,
            subject,
            text,
            attachments,
            id: "<1@example.org>",
            date: SystemTime::UNIX_EPOCH,
            automatic: true,
        };
        build_message(email).map(|message| String::from_utf8(message).unwrap())
    }

    /// Returns the unfolded value of a header.
    fn header(mail: &str, name: &str) -> String {
        let unfolded = mail.replace("\r\n ", " ");
        let mut lines = unfolded.split("\r\n");
        let value = lines.find_map(|line| line.strip_prefix(&format!("{name}: ")));
        value.unwrap_or_else(|| panic!("{name} in {mail}")).to_owned()
    }

    /// Decodes encoded words (RFC 2047), ignoring spaces between two of them.
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

    /// Decodes a parameter (RFC 2231).
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
    fn builds_a_complete_mail() {
        let attachment =
            Attachment { name: "汇总数据.xlsx".to_owned(), content: b"\0\r\n.\r\n".to_vec() };
        let mail = built("示例代码实验邮件", "两行\n.\n", vec![attachment]).unwrap();
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
    fn parses_mailboxes_with_and_without_names() {
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
    fn refuses_line_ends_in_every_header() {
        for end in ["\r", "\n", "\0", "\r\nBcc: x@example.org", "\u{85}"] {
            let bad = format!("a{end}b");
            assert!(built(&bad, "", Vec::new()).is_err());
            let attachment = Attachment { name: bad.clone(), content: Vec::new() };
            assert!(built("a", "", vec![attachment]).is_err());
            assert!(format!("{bad} <a@example.org>").parse::<Mailbox>().is_err());
            assert!(format!("x <{bad}@example.org>").parse::<Mailbox>().is_err());
        }
    }

    #[test]
    fn message_ids_are_unique() {
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
        fn decodes_any_subject(subject in visible(MAX_TEXT)) {
            let mail = built(&subject, "", Vec::new()).unwrap();
            prop_assert_eq!(decoded(&header(&mail, "Subject")), subject);
            prop_assert!(mail.is_ascii() && mail.split("\r\n").all(|line| line.len() <= 78));
        }

        #[test]
        fn decodes_any_display_name(name in visible(MAX_TEXT)) {
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
        fn decodes_any_attachment_name(name in visible(MAX_FILE_NAME)) {
            prop_assume!(attachment_name(&name).is_ok());
            let attachment = Attachment { name: name.clone(), content: Vec::new() };
            let mut part = Vec::new();
            attachment_part(attachment).write_part(&mut part);
            let part = String::from_utf8(part).unwrap();
            prop_assert!(part.is_ascii());
            prop_assert_eq!(parameter(&header(&part, "Content-Disposition"), "filename"), &*name);
            let kind = header(&part, "Content-Type");
            let (_, plain) = kind.split_once("name=\"").unwrap();
            prop_assert_eq!(decoded(plain.strip_suffix('"').unwrap()), name);
        }
    }
}
