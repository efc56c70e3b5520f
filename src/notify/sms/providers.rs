//! SMS providers as data: the form to send and the meaning of the reply.
//!
//! `ihuyi` and `twilio` are presets of the provider `form`, which the configuration describes.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use crate::config_reader::{Reported, Table};
use crate::document::without_bom;
use crate::http::pointer;
use crate::http::retry;
use crate::notify::outcome::{Failure, FailureKind};

/// Placeholder of secrets in printed requests.
const HIDDEN: &str = "…";

/// The name of a provider in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ihuyi,
    Twilio,
    Form,
}

impl FromStr for Kind {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "ihuyi" => Ok(Self::Ihuyi),
            "twilio" => Ok(Self::Twilio),
            "form" => Ok(Self::Form),
            _ => Err("expected ihuyi, twilio or form"),
        }
    }
}

/// How to ask a provider, and how to read its JSON reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Provider {
    pub(super) kind: Kind,
    pub(super) fields: Vec<(String, Template)>,
    /// Value that reports success; without one, the presence of the ID does.
    success: Option<(String, String)>,
    id: Option<String>,
    /// Pointers to the code and the text of an error.
    error: Option<(String, String)>,
}

impl Provider {
    /// Returns the preset of a provider with its URL; `form` has none.
    pub(super) fn preset(kind: Kind) -> Option<(Self, &'static str)> {
        let fields = |fields: &[(&str, &str)]| -> Vec<(String, Template)> {
            let parse = |(name, value): &(&str, &str)| {
                ((*name).to_owned(), value.parse().expect("presets are valid templates"))
            };
            fields.iter().map(parse).collect()
        };
        let pointer = str::to_owned;
        match kind {
            Kind::Ihuyi => Some((
                Self {
                    kind,
                    fields: fields(&[
                        ("account", "{account}"),
                        ("password", "{password}"),
                        ("mobile", "{to}"),
                        ("content", "{text}"),
                        ("format", "json"),
                    ]),
                    success: Some((pointer("/code"), "2".to_owned())),
                    id: Some(pointer("/smsid")),
                    error: Some((pointer("/code"), pointer("/msg"))),
                },
                "https://106.ihuyi.com/webservice/sms.php?method=Submit",
            )),
            Kind::Twilio => Some((
                Self {
                    kind,
                    fields: fields(&[("To", "{to}"), ("From", "{from}"), ("Body", "{text}")]),
                    success: None,
                    id: Some(pointer("/sid")),
                    error: Some((pointer("/code"), pointer("/message"))),
                },
                "https://api.twilio.com/2010-04-01/Accounts/{account}/Messages.json",
            )),
            Kind::Form => None,
        }
    }

    /// Whether the account and password are sent as HTTP Basic authentication instead of fields.
    pub(super) fn has_basic_auth(&self) -> bool {
        self.kind == Kind::Twilio
    }

    pub(super) fn uses(&self, placeholder: Placeholder) -> bool {
        self.fields
            .iter()
            .any(|(_, template)| template.0.contains(&Piece::Placeholder(placeholder)))
    }

    pub(super) fn fill(&self, values: &Values<'_>) -> Vec<(String, String)> {
        let fields = self.fields.iter();
        fields.map(|(name, template)| (name.clone(), template.fill(values))).collect()
    }

    /// Checks the form of a number that this provider accepts.
    pub(super) fn check_number(&self, number: &str) -> Result<(), &'static str> {
        match self.kind {
            Kind::Ihuyi if number.len() != 11 || !number.starts_with('1') => {
                Err("expected a number of 11 digits that begins with 1")
            }
            Kind::Twilio if !number.starts_with('+') => {
                Err("expected a number with + and the country's code in front")
            }
            _ => Ok(()),
        }
    }

    /// Returns the ID of an accepted message.
    pub(super) fn read_reply(&self, status: u16, reply: &[u8]) -> Result<String, Failure> {
        let json: Value = serde_json::from_slice(without_bom(reply)).map_err(|_| {
            let text = String::from_utf8_lossy(reply);
            // A page of a proxy may have any status.
            let kind = if status < 300 { FailureKind::Unconfirmed } else { kind_of_status(status) };
            Failure { kind, message: format!("HTTP {status} and no JSON: {}", text.trim()) }
        })?;
        let at = |pointer: &String| json.pointer(pointer).and_then(plain);
        let id = self.id.as_ref().and_then(at);
        let is_accepted = match &self.success {
            Some((pointer, expected)) => at(pointer).as_ref() == Some(expected),
            None => id.is_some(),
        };
        let is_success = match self.kind {
            // Other statuses of Twilio do not mean that the text is sent.
            Kind::Twilio => matches!(status, 200 | 201),
            Kind::Ihuyi | Kind::Form => (200..300).contains(&status),
        };
        if is_accepted && is_success {
            return Ok(id.unwrap_or_else(|| "sent".to_owned()));
        }
        let code = self.error.as_ref().and_then(|(code, _)| at(code));
        let text = self.error.as_ref().and_then(|(_, text)| at(text));
        let kind = code.as_deref().and_then(|code| self.kind_of_code(code));
        let message = match (code, text) {
            (None, None) => format!("HTTP {status}: {}", String::from_utf8_lossy(reply).trim()),
            (code, text) => {
                let code = code.unwrap_or_else(|| format!("HTTP {status}"));
                format!("{code} {}", text.unwrap_or_default())
            }
        };
        Err(Failure { kind: kind.unwrap_or_else(|| kind_of_status(status)), message })
    }

    /// Returns the kind of an error code, for providers that always reply with HTTP 200.
    fn kind_of_code(&self, code: &str) -> Option<FailureKind> {
        (self.kind == Kind::Ihuyi).then(|| match code {
            // The account, its key, its address, its balance.
            "400" | "401" | "402" => FailureKind::ChannelBroken,
            code if code.starts_with("405") => FailureKind::ChannelBroken,
            // Rate limits.
            "0" => FailureKind::Transient,
            code if code.starts_with("408") => FailureKind::Transient,
            _ => FailureKind::Rejected,
        })
    }
}

/// Returns the kind of an HTTP status that does not report success.
fn kind_of_status(status: u16) -> FailureKind {
    match status {
        // A gateway did not get the end of the reply.
        500 | 502 | 504 => FailureKind::Unconfirmed,
        _ if retry::is_temporary(status) || status >= 500 => FailureKind::Transient,
        300..=399 | 401 | 403 | 404 | 405 | 407 => FailureKind::ChannelBroken,
        _ => FailureKind::Rejected,
    }
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// The keys of `provider = "form"`.
pub(super) struct FormKeys {
    fields: Result<Vec<(String, Template)>, Reported>,
    success: Result<Option<(String, String)>, Reported>,
    id: Result<Option<String>, Reported>,
    /// The first of the keys that is present.
    pub(super) present: Option<&'static str>,
}

impl FormKeys {
    pub(super) fn read(table: &mut Table<'_>) -> Self {
        let present = ["fields", "success", "id"].into_iter().find(|key| table.has(key));
        let fields = table.entries("fields", |name, value| {
            value.parse().map(|template| (name.to_owned(), template))
        });
        let id = table.text("id", pointer::parse);
        let success = table.table("success").map(|mut success| {
            let expected = "where it stands in the reply, as \"/status\"";
            let pointer = success.required("pointer", expected, pointer::parse);
            let equals = success.required("equals", "what stands there if it was sent", |text| {
                Ok::<_, String>(text.to_owned())
            });
            success.finish();
            Ok((pointer?, equals?))
        });
        Self { fields, success: success.transpose(), id, present }
    }

    pub(super) fn provider(self, table: &Table<'_>) -> Result<Provider, Reported> {
        let (fields, success, id) = (self.fields?, self.success?, self.id?);
        if success.is_none() {
            return Err(table.report(
                "success",
                "missing; expected how to see that it was sent, as { pointer = \"/status\", \
                 equals = \"ok\" }",
            ));
        }
        let provider = Provider { kind: Kind::Form, fields, success, id, error: None };
        if provider.uses(Placeholder::To) && provider.uses(Placeholder::Text) {
            return Ok(provider);
        }
        Err(table.report(
            "fields",
            "missing; expected fields with {to} and {text}, as { phone = \"{to}\", text = \
             \"{text}\" }",
        ))
    }
}

/// A text with placeholders.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Template(Vec<Piece>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placeholder {
    Account,
    Password,
    From,
    To,
    Text,
}

#[derive(Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Placeholder(Placeholder),
}

const PLACEHOLDERS: [(&str, Placeholder); 5] = [
    ("account", Placeholder::Account),
    ("password", Placeholder::Password),
    ("from", Placeholder::From),
    ("to", Placeholder::To),
    ("text", Placeholder::Text),
];

// Literals may contain a secret, although they should not.
impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Template(…)")
    }
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            "expected {account}, {password}, {to} or {text} in braces; a brace itself is written \
             twice"
                .to_owned()
        };
        let (mut pieces, mut literal) = (Vec::new(), String::new());
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, behind) = rest.split_at(at);
            literal.push_str(before);
            if let Some(behind) = behind.strip_prefix("{{") {
                literal.push('{');
                rest = behind;
            } else if let Some(behind) = behind.strip_prefix("}}") {
                literal.push('}');
                rest = behind;
            } else {
                let inside = behind.strip_prefix('{').and_then(|inside| inside.split_once('}'));
                let (name, behind) = inside.ok_or_else(expected)?;
                let placeholder = PLACEHOLDERS.iter().find(|(known, _)| *known == name);
                let (_, placeholder) = placeholder.ok_or_else(expected)?;
                pieces.push(Piece::Literal(std::mem::take(&mut literal)));
                pieces.push(Piece::Placeholder(*placeholder));
                rest = behind;
            }
        }
        literal.push_str(rest);
        pieces.push(Piece::Literal(literal));
        pieces.retain(|piece| *piece != Piece::Literal(String::new()));
        Ok(Self(pieces))
    }
}

impl Template {
    /// Fills the placeholders; values are not searched for further ones.
    fn fill<'a>(&'a self, values: &Values<'a>) -> String {
        let text = |piece: &'a Piece| match piece {
            Piece::Literal(_) if values.hides_literals => HIDDEN,
            Piece::Literal(text) => text,
            Piece::Placeholder(Placeholder::Account) => values.account,
            Piece::Placeholder(Placeholder::Password) => values.password.unwrap_or(HIDDEN),
            Piece::Placeholder(Placeholder::From) => values.from,
            Piece::Placeholder(Placeholder::To) => values.to,
            Piece::Placeholder(Placeholder::Text) => values.text,
        };
        self.0.iter().map(text).collect()
    }
}

/// The values of placeholders.
pub(super) struct Values<'a> {
    pub(super) account: &'a str,
    /// `None` prints the request for people.
    pub(super) password: Option<&'a str>,
    pub(super) hides_literals: bool,
    pub(super) from: &'a str,
    pub(super) to: &'a str,
    pub(super) text: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn preset(kind: Kind) -> Provider {
        Provider::preset(kind).unwrap().0
    }

    fn outcome(result: Result<String, Failure>) -> (FailureKind, String) {
        let failure = result.unwrap_err();
        (failure.kind, failure.message)
    }

    #[test]
    fn reads_replies_of_ihuyi() {
        let read = |status, reply: &str| preset(Kind::Ihuyi).read_reply(status, reply.as_bytes());
        let sent = r#"{"code":2,"msg":"提交成功","smsid":"16236622659841"}"#;
        assert_eq!(read(200, sent).unwrap(), "16236622659841");
        let refused = r#"{"code":4051,"msg":"剩余条数不足","smsid":"0"}"#;
        let expected = (FailureKind::ChannelBroken, "4051 剩余条数不足".to_owned());
        assert_eq!(outcome(read(200, refused)), expected);
        let page = (FailureKind::Unconfirmed, "HTTP 200 and no JSON: <html>".to_owned());
        assert_eq!(outcome(read(200, "<html>")), page);
        assert_eq!(read(500, "oops").unwrap_err().kind, FailureKind::Unconfirmed);
        assert_eq!(read(200, "[]").unwrap_err().message, "HTTP 200: []");
        assert_eq!(read(200, "{\"code\":\"2\"}").unwrap(), "sent");
    }

    #[test]
    fn reads_replies_of_twilio() {
        let read = |status, reply: &str| preset(Kind::Twilio).read_reply(status, reply.as_bytes());
        assert_eq!(read(201, "{\"sid\":\"SM1\"}").unwrap(), "SM1");
        let refused = r#"{"code":21211,"message":"Invalid 'To' Phone Number","status":400}"#;
        let expected = (FailureKind::Rejected, "21211 Invalid 'To' Phone Number".to_owned());
        assert_eq!(outcome(read(400, refused)), expected);
        let login = r#"{"code":20003,"message":"Authenticate"}"#;
        assert_eq!(
            outcome(read(401, login)),
            (FailureKind::ChannelBroken, "20003 Authenticate".to_owned())
        );
        assert_eq!(read(503, "").unwrap_err().kind, FailureKind::Transient);
        assert!(read(200, "{}").is_err());
    }

    #[test]
    fn reads_replies_of_forms() {
        let read = |equals: &str, status, reply: &str| {
            let provider = Provider {
                kind: Kind::Form,
                fields: Vec::new(),
                success: Some(("/status".parse().unwrap(), equals.to_owned())),
                id: Some("/message/id".parse().unwrap()),
                error: None,
            };
            provider.read_reply(status, reply.as_bytes())
        };
        let reply = r#"{"status":"ok","message":{"id":17}}"#;
        assert_eq!(read("ok", 200, reply).unwrap(), "17");
        assert!(read("ok", 500, reply).is_err());
        assert_eq!(read("0", 200, "{\"status\":0}").unwrap(), "sent");
        assert!(read("true", 201, "{\"status\":true}").is_ok());
        for other in ["{\"status\":\"OK\"}", "{}", "{\"status\":[\"ok\"]}", "", "ok"] {
            assert!(read("ok", 200, other).is_err(), "{other}");
        }
    }

    fn values<'a>(account: &'a str, password: &'a str, text: &'a str) -> Values<'a> {
        let password = Some(password);
        Values { account, password, hides_literals: false, from: "2", to: "1", text }
    }

    #[test]
    fn templates_have_known_placeholders_only() {
        let values = values("me", "{text}", "{password}&a=b");
        let fill = |text: &str| text.parse::<Template>().map(|template| template.fill(&values));
        assert_eq!(fill("").unwrap(), "");
        assert_eq!(fill("[{text}]").unwrap(), "[{password}&a=b]");
        assert_eq!(fill("{account}:{password}@{to}").unwrap(), "me:{text}@1");
        assert_eq!(fill("{{text}} {{{to}}}").unwrap(), "{text} {1}");
        for bad in ["{", "}", "{}", "{other}", "{text", "text}", "{ text }", "{te{to}xt}"] {
            assert!(fill(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn fills_each_placeholder_once(
            account in "\\PC{0,9}", password in "[{}a-z&=%+ ]{0,20}", text in "[{}a-z&=%+\\n ]{0,40}",
        ) {
            let template: Template = "{text}|{password}|{account}".parse().unwrap();
            let filled = template.fill(&values(&account, &password, &text));
            prop_assert_eq!(&filled, &format!("{text}|{password}|{account}"));
        }

        #[test]
        fn templates_print_nothing(text in "[{}a-z]{0,30}") {
            if let Ok(template) = text.parse::<Template>() {
                prop_assert_eq!(format!("{template:?}"), "Template(…)");
            }
        }
    }
}
