//! `[sms.NAME]`: its table, its providers, and sending.
//!
//! A provider is asked once for each number, by a form over HTTPS, and says in JSON what became of it.
//! What it says in HTTP proves nothing by itself.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Response, Url};
use serde_json::Value;

use crate::config_reader::{Reported, Spanned, Table, values};
use crate::document::without_bom;
use crate::http::client;
use crate::http::client::{Client, Options};
use crate::http::egress;
use crate::http::egress::{Reach, shown};
use crate::http::pointer::Pointer;
use crate::http::tls;
use crate::http::tls::CaFile;
use crate::http::{ca_certs, retry};
use crate::notify::channel;
use crate::notify::channel::{Failure, Lasting, Sent, words};
use crate::secret;
use crate::secret::{Secret, Secrets};

/// The most recipients of one text.
const MAX_RECIPIENTS: usize = 100;

/// The longest segment, in characters.
const MAX_SEGMENT: usize = 160;

/// The largest reply of a provider that is read, in bytes.
const MAX_REPLY: usize = 64 << 10;

/// The longest number, in digits (ITU-T E.164).
const MAX_DIGITS: usize = 15;

/// What people see in the place of what may be a secret.
const HIDDEN: &str = "…";

const IHUYI: &str = "https://106.ihuyi.com/webservice/sms.php?method=Submit";

/// The checked settings of an SMS channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its kind and name, as `sms.ops`.
    pub name: Arc<str>,
    provider: Provider,
    url: Url,
    account: String,
    password_file: Option<PathBuf>,
    /// To whom, unless somebody else is named.
    pub to: Vec<Number>,
    timeout: Duration,
    max_segments: usize,
    ca_file: CaFile,
}

/// Who sends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Provider {
    Ihuyi,
    Twilio { from: String },
    Form(Form),
}

/// A provider that the configuration describes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Form {
    fields: Vec<(String, Template)>,
    success: (Pointer, String),
    id: Option<Pointer>,
}

/// A telephone number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Number(String);

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix('+').unwrap_or(text);
        let fits = (3..=MAX_DIGITS).contains(&digits.len())
            && digits.bytes().all(|byte| byte.is_ascii_digit());
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "expected a number of 3 to {MAX_DIGITS} digits, with + and the country's code in \
                 front or without, as \"+8613800000000\""
            ))
        }
    }
}

impl Number {
    /// Whether a provider sends to it.
    fn check(&self, provider: &str) -> Result<(), &'static str> {
        let Self(number) = self;
        match provider {
            "ihuyi" if number.len() != 11 || !number.starts_with('1') => {
                Err("expected a number of 11 digits that begins with 1")
            }
            "twilio" if !number.starts_with('+') => {
                Err("expected a number with + and the country's code in front")
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The value of a field: text with places for what is put in.
#[derive(Clone, PartialEq, Eq)]
struct Template(Vec<Piece>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Account,
    Password,
    To,
    Text,
}

#[derive(Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Place(Place),
}

const PLACES: [(&str, Place); 4] = [
    ("account", Place::Account),
    ("password", Place::Password),
    ("to", Place::To),
    ("text", Place::Text),
];

// What is written there may be a secret, although it should not be.
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
                let place = PLACES.iter().find(|(known, _)| *known == name);
                let (_, place) = place.ok_or_else(expected)?;
                pieces.push(Piece::Literal(std::mem::take(&mut literal)));
                pieces.push(Piece::Place(*place));
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
    /// Puts everything in, once: what is put in is not looked at again.
    fn fill<'a>(&'a self, values: &Values<'a>) -> String {
        let text = |piece: &'a Piece| match piece {
            Piece::Literal(_) if values.password.is_none() => HIDDEN,
            Piece::Literal(text) => text,
            Piece::Place(Place::Account) => values.account,
            Piece::Place(Place::Password) => values.password.unwrap_or(HIDDEN),
            Piece::Place(Place::To) => values.to,
            Piece::Place(Place::Text) => values.text,
        };
        self.0.iter().map(text).collect()
    }

    fn has(&self, place: Place) -> bool {
        self.0.contains(&Piece::Place(place))
    }
}

/// What is put into templates.
struct Values<'a> {
    account: &'a str,
    /// Without it, the template is filled for people, who see nothing that may be a secret.
    password: Option<&'a str>,
    to: &'a str,
    text: &'a str,
}

/// The keys of `provider = "form"` alone, as they stand.
struct FormKeys {
    fields: Result<Vec<(String, Template)>, Reported>,
    success: Result<Option<(Pointer, String)>, Reported>,
    id: Result<Option<Pointer>, Reported>,
    any: Option<&'static str>,
}

impl FormKeys {
    fn read(table: &mut Table<'_>) -> Self {
        let any = ["fields", "success", "id"].into_iter().find(|key| table.has(key));
        let fields = table.entries("fields", |name, value| {
            value.parse().map(|template| (name.to_owned(), template))
        });
        let id = table.text("id", str::parse::<Pointer>);
        let success = table.table("success").map(|mut success| {
            let expected = "where it stands in the reply, as \"/status\"";
            let pointer = success.required("pointer", expected, str::parse::<Pointer>);
            let equals = success.required("equals", "what stands there if it was sent", |text| {
                Ok::<_, String>(text.to_owned())
            });
            success.finish();
            Ok((pointer?, equals?))
        });
        Self { fields, success: success.transpose(), id, any }
    }

    fn form(self, table: &Table<'_>) -> Result<Form, Reported> {
        let missing =
            |key, expected: &str| table.report(key, format_args!("missing; expected {expected}"));
        let (fields, success, id) = (self.fields?, self.success?, self.id?);
        let success = success.ok_or_else(|| {
            missing(
                "success",
                "how to see that it was sent, as { pointer = \"/status\", equals = \"ok\" }",
            )
        });
        let said = |place| fields.iter().any(|(_, template)| template.has(place));
        if !said(Place::To) || !said(Place::Text) {
            let expected =
                "fields with {to} and {text}, as { phone = \"{to}\", text = \"{text}\" }";
            return Err(missing("fields", expected));
        }
        Ok(Form { fields, success: success?, id })
    }
}

impl Settings {
    /// Reads `[sms.NAME]`, and reports what is wrong to the table.
    ///
    /// # Errors
    /// If something is.
    pub fn read(name: &str, mut table: Table<'_>) -> Result<Self, Reported> {
        let provider = table.required("provider", "ihuyi, twilio or form", |text| match text {
            "ihuyi" | "twilio" | "form" => Ok(text.to_owned()),
            _ => Err("expected ihuyi, twilio or form"),
        });
        let account = table.text("account", account);
        let password_file = secret::read_path(&mut table, "password-file");
        let from = table.text("from", sender);
        let to = table.texts("to", Number::from_str);
        let url = table.text("url", |text| Ok::<_, String>(text.to_owned()));
        let url = url.and_then(|url| {
            // It is not repeated in the fault, as there may be a password in it.
            url.map(|url| egress::url(&url).map_err(|error| table.report("url", error))).transpose()
        });
        let allow_plaintext = table.boolean_or("allow-plaintext", false);
        let keys = FormKeys::read(&mut table);
        let timeout = table.text_or("timeout", "30s", values::duration);
        let max_segments = table.integer_or("max-segments", 4, 1..=10);
        let ca_file = table.checked_path("ca-file", ca_certs::read);
        let (provider, account, password_file) = (provider?, account?, password_file?);
        let missing =
            |key, expected: &str| table.report(key, format_args!("missing; expected {expected}"));
        let to = to.and_then(|to| numbers(to.unwrap_or_default(), &provider, &table));
        let (form, usual) = match provider.as_str() {
            "form" => (Some(keys.form(&table)), None),
            provider => {
                if let Some(key) = keys.any {
                    return Err(table.report(key, "is for provider = \"form\""));
                }
                let account = account.as_deref().unwrap_or_default();
                let usual = match provider {
                    "ihuyi" => IHUYI.to_owned(),
                    _ => format!(
                        "https://api.twilio.com/2010-04-01/Accounts/{account}/Messages.json"
                    ),
                };
                (None, Some(usual))
            }
        };
        let form = form.transpose()?;
        let needs = |place| {
            form.as_ref()
                .is_none_or(|form| form.fields.iter().any(|(_, template)| template.has(place)))
        };
        let account = match account {
            None if needs(Place::Account) => Err(missing("account", "the account at the provider")),
            account => Ok(account.unwrap_or_default()),
        };
        let password_file = match password_file {
            None if needs(Place::Password) => Err(missing(
                "password-file",
                "the file with the password, or the credential of that name",
            )),
            file => Ok(file),
        };
        let url = url.and_then(|url| match (url, usual) {
            (Some(url), _) => Ok(url),
            (None, Some(usual)) => egress::url(&usual).map_err(|error| table.report("url", error)),
            (None, None) => Err(missing("url", "where the form is sent to")),
        });
        let url = url.and_then(|url| {
            if url.scheme() == "https"
                || allow_plaintext?
                || egress::is_loopback(&egress::host_of(&url))
            {
                return Ok(url);
            }
            let problem = "expected https://, or allow-plaintext = true";
            Err(table.report("url", problem))
        });
        let from = from.and_then(|from| match (from, provider.as_str()) {
            (None, "twilio") => Err(missing("from", "the number that it is sent from")),
            (Some(_), provider) if provider != "twilio" => {
                Err(table.report("from", "is for provider = \"twilio\""))
            }
            (from, _) => Ok(from),
        });
        table.finish();
        let provider = match (form, from?) {
            (Some(form), _) => Provider::Form(form),
            (None, Some(from)) => Provider::Twilio { from },
            (None, None) => Provider::Ihuyi,
        };
        Ok(Self {
            name: format!("sms.{name}").into(),
            provider,
            url: url?,
            account: account?,
            password_file: password_file?,
            to: to?,
            timeout: timeout?,
            max_segments: usize::try_from(max_segments?).unwrap_or(1),
            ca_file: CaFile::of_key(ca_file?),
        })
    }

    /// Who is asked.
    pub fn server(&self) -> String {
        egress::host_of(&self.url)
    }

    /// Takes a text for a number that this provider sends to.
    ///
    /// # Errors
    /// Says what was expected.
    pub fn number(&self, text: &str) -> Result<Number, String> {
        let number: Number = text.parse()?;
        let provider = match &self.provider {
            Provider::Ihuyi => "ihuyi",
            Provider::Twilio { .. } => "twilio",
            Provider::Form(_) => "form",
        };
        number.check(provider)?;
        Ok(number)
    }

    /// Whether a text can be sent; the text as it is sent.
    ///
    /// # Errors
    /// Says why not.
    pub fn check(&self, text: &str) -> Result<String, String> {
        let text = text.trim_end_matches(['\r', '\n']).replace("\r\n", "\n");
        if text.is_empty() {
            return Err("the text is empty".to_owned());
        }
        if text.chars().any(|c| c.is_control() && c != '\n' && c != '\t') {
            return Err("the text has a control character in it".to_owned());
        }
        let Segments { count, size, alphabet } = Segments::of(&text);
        if count > self.max_segments {
            return Err(format!(
                "the text takes {count} segments of {size} characters each ({alphabet}), which are \
                 paid for one by one: more than {} (max-segments)",
                self.max_segments
            ));
        }
        Ok(text)
    }

    /// A text that fits, made of one that may not.
    pub fn shorten(&self, text: &str) -> String {
        let visible = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
        let fits = |text: &str| Segments::of(text).count <= self.max_segments;
        // No more fits in any alphabet.
        let most = self.max_segments * MAX_SEGMENT + 1;
        let mut short: String = text.trim().chars().map(visible).take(most).collect();
        if fits(&short) {
            return short;
        }
        loop {
            short.pop();
            // The mark takes place, too, and is of the same alphabet: the other takes half as much.
            let gsm = short.chars().all(|c| septets(c).is_some());
            let marked = format!("{short}{}", if gsm { "..." } else { "…" });
            if fits(&marked) || short.is_empty() {
                return marked;
            }
        }
    }

    /// What would be asked of the provider for each number, without what may be a secret: the
    /// password, and the fields' own text.
    pub fn show(&self, to: &[Number], text: &str) -> String {
        let fields = to.iter().flat_map(|number| self.fields(&number.0, text, None));
        let lines = fields.map(|(name, value)| format!("{name} = {value:?}\n"));
        format!("POST {}\n{}", shown(&self.url), lines.collect::<String>())
    }

    /// Without a password, for people.
    fn fields(&self, to: &str, text: &str, password: Option<&str>) -> Vec<(String, String)> {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let account = self.account.as_str();
        match &self.provider {
            Provider::Ihuyi => vec![
                pair("account", account),
                pair("password", password.unwrap_or(HIDDEN)),
                pair("mobile", to),
                pair("content", text),
                pair("format", "json"),
            ],
            Provider::Twilio { from } => {
                vec![pair("To", to), pair("From", from), pair("Body", text)]
            }
            Provider::Form(form) => {
                let values = Values { account, password, to, text };
                let fill = |(name, value): &(String, Template)| (name.clone(), value.fill(&values));
                form.fields.iter().map(fill).collect()
            }
        }
    }

    /// Reads what is needed for asking, within the time.
    async fn prepare(&self) -> Result<(Client, Option<Secret>, Secrets), Failure> {
        let prepare = async {
            let password = match &self.password_file {
                None => None,
                Some(path) => Some(channel::password(path).await?),
            };
            let secrets =
                password.as_ref().map(|password| Secrets::of_login(&self.account, password));
            Ok((self.client().await?, password, secrets.unwrap_or_default()))
        };
        let late = |_| Err(Failure::late(self.timeout, "reading the files that it needs"));
        tokio::time::timeout(self.timeout, prepare).await.unwrap_or_else(late)
    }

    async fn client(&self) -> Result<Client, Failure> {
        let (ca_file, url) = (self.ca_file.clone(), self.url.clone());
        let build = move || {
            let tls = tls::client_config(&ca_file);
            let tls = tls.map_err(|error| Failure::unusable(words(&error.to_string())))?;
            let reach = Arc::new(Reach::new([&url], [], false));
            let options = Options {
                tls,
                proxy: None,
                headers: HeaderMap::new(),
                sources: Vec::new(),
                timeout: None,
                connections: 1,
            };
            Client::new(options, reach).map_err(|error| Failure::unusable(error.to_string()))
        };
        // Files of roots are read, which can take its time.
        let client = tokio::task::spawn_blocking(build).await;
        client.map_err(|error| Failure::temporary(error.to_string()))?
    }

    fn headers(&self, password: Option<&Secret>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        if let (Provider::Twilio { .. }, Some(password)) = (&self.provider, password) {
            let login = format!("{}:{}", self.account, password.reveal());
            let login = format!("Basic {}", BASE64_STANDARD.encode(login));
            if let Ok(mut login) = HeaderValue::try_from(login) {
                login.set_sensitive(true);
                headers.insert(AUTHORIZATION, login);
            }
        }
        headers
    }

    /// Sends a text, which was checked, to these numbers.
    ///
    /// # Errors
    /// If nobody got it, as far as is known.
    pub async fn send(&self, to: &[Number], text: &str) -> Result<Sent, Failure> {
        let (client, password, secrets) = self.prepare().await?;
        let mut sent = Sent { ids: Vec::new(), refused: Vec::new() };
        for number in to {
            let one = self.send_one(&client, number, text, password.as_ref());
            let one = tokio::time::timeout(self.timeout, one).await.unwrap_or_else(|_| {
                let late =
                    Failure::late(self.timeout, "the provider may have taken it all the same");
                Err(Failure { lasting: Lasting::Doubtful, ..late })
            });
            match one {
                Ok(id) => sent.ids.push(words(&secrets.without(&id))),
                Err(failure) => sent.refused.push((number.to_string(), failure.told(&secrets))),
            }
        }
        if sent.ids.is_empty() { Err(Failure::of_all(&sent.refused)) } else { Ok(sent) }
    }

    async fn send_one(
        &self,
        client: &Client,
        to: &Number,
        text: &str,
        password: Option<&Secret>,
    ) -> Result<String, Failure> {
        let secret = password.map(Secret::reveal).unwrap_or_default();
        let fields = self.fields(&to.0, text, Some(secret));
        let (status, reply) = self.post(client, &self.url, &fields, password).await?;
        self.read_reply(status, &reply)
    }

    /// What the provider calls the text that it has taken, by its reply: an HTTP status and a body.
    ///
    /// # Errors
    /// If it has not taken it, or says something else.
    pub fn read_reply(&self, status: u16, reply: &[u8]) -> Result<String, Failure> {
        match &self.provider {
            Provider::Ihuyi => ihuyi(status, reply),
            Provider::Twilio { .. } => twilio(status, reply),
            Provider::Form(form) => form.read(status, reply),
        }
    }

    async fn post(
        &self,
        client: &Client,
        url: &Url,
        fields: &[(String, String)],
        password: Option<&Secret>,
    ) -> Result<(u16, Vec<u8>), Failure> {
        let mut headers = self.headers(password);
        let form = HeaderValue::from_static("application/x-www-form-urlencoded");
        headers.insert(CONTENT_TYPE, form);
        let response = client.post(url, &headers, encoded(fields)).await.map_err(failed)?;
        read_reply(client, response).await
    }

    /// Looks whether the provider can be reached and, if it can be asked for that without sending,
    /// knows the account; returns what was done.
    ///
    /// # Errors
    /// If not.
    pub async fn try_out(&self) -> Result<String, Failure> {
        let (client, password, secrets) = self.prepare().await?;
        let tried = self.try_login(&client, password.as_ref());
        let tried = tokio::time::timeout(self.timeout, tried)
            .await
            .unwrap_or_else(|_| Err(Failure::late(self.timeout, "waiting for the provider")));
        let done = tried.map_err(|failure| failure.told(&secrets))?;
        let done = words(&secrets.without(&done));
        let encrypted = if self.url.scheme() == "https" { "encrypted" } else { "not encrypted" };
        Ok(format!("connected to {}, {encrypted}, {done}", egress::host_of(&self.url)))
    }

    async fn try_login(
        &self,
        client: &Client,
        password: Option<&Secret>,
    ) -> Result<String, Failure> {
        match &self.provider {
            Provider::Twilio { .. } => {
                // The list of what was sent, in which nothing is looked at.
                let mut url = self.url.clone();
                url.query_pairs_mut().append_pair("PageSize", "1");
                let headers = self.headers(password);
                let response = client.get_here(&url, &headers).await.map_err(failed)?;
                let (status, reply) = read_reply(client, response).await?;
                match status {
                    200 => Ok("logged in".to_owned()),
                    _ => Err(twilio_failure(status, &reply)),
                }
            }
            Provider::Ihuyi if self.url.query() == Some("method=Submit") => {
                let mut url = self.url.clone();
                url.set_query(Some("method=GetNum"));
                let password_ = password.map(Secret::reveal).unwrap_or_default();
                let fields =
                    [("account", &*self.account), ("password", password_), ("format", "json")];
                let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned()));
                let (status, reply) = self.post(client, &url, &fields, password).await?;
                let json = json(status, &reply)?;
                match at(&json, "/code").as_deref() {
                    Some("2") => {
                        let left = at(&json, "/num").unwrap_or_else(|| "?".to_owned());
                        Ok(format!("logged in, {left} left"))
                    }
                    _ => Err(ihuyi_failure(&json)),
                }
            }
            Provider::Ihuyi | Provider::Form(_) => {
                let mut response =
                    client.get_here(&self.url, &HeaderMap::new()).await.map_err(failed)?;
                client.drain(&mut response).await;
                let status = response.status().as_u16();
                Ok(format!("HTTP {status}; whether it knows the account is seen when it sends"))
            }
        }
    }
}

/// The numbers of a table, if this provider sends to all of them.
fn numbers(
    to: Vec<Spanned<Number>>,
    provider: &str,
    table: &Table<'_>,
) -> Result<Vec<Number>, Reported> {
    if !(1..=MAX_RECIPIENTS).contains(&to.len()) {
        return Err(table.report("to", format_args!("expected 1 to {MAX_RECIPIENTS} numbers")));
    }
    let each = to.into_iter().map(|to| match to.value.check(provider) {
        Ok(()) => Ok(to.value),
        Err(problem) => Err(table.report_at(&to.origin, problem)),
    });
    // All of them first, so that every fault is noted.
    each.collect::<Vec<_>>().into_iter().collect()
}

fn account(text: &str) -> Result<String, String> {
    let fits = (1..=128).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_graphic() && !matches!(c, ':' | '/' | '?' | '#' | '%'));
    if fits {
        Ok(text.to_owned())
    } else {
        Err("expected the account's name: visible ASCII without : / ? # %".to_owned())
    }
}

fn sender(text: &str) -> Result<String, String> {
    if (1..=40).contains(&text.len()) && text.chars().all(|c| c == ' ' || c.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("expected a number of yours at the provider, as \"+15017122661\"".to_owned())
    }
}

/// Fields as `application/x-www-form-urlencoded`.
fn encoded(fields: &[(String, String)]) -> String {
    // The library that reads URLs has the writer, which is not to be had otherwise.
    let Ok(mut url) = Url::parse("form:") else { return String::new() };
    url.query_pairs_mut().extend_pairs(fields);
    url.query().unwrap_or_default().to_owned()
}

fn failed(error: client::Error) -> Failure {
    let words = error.to_string();
    match error {
        // After it was asked, perhaps.
        client::Error::Network(_) | client::Error::Malformed(_) => Failure::doubtful(words),
        error if error.is_temporary() => Failure::temporary(words),
        _ => Failure::unusable(words),
    }
}

async fn read_reply(client: &Client, mut response: Response) -> Result<(u16, Vec<u8>), Failure> {
    let status = response.status().as_u16();
    if response.status().is_redirection() {
        return Err(Failure::unusable(format!(
            "HTTP {status}: it is redirected, which is not followed, as the password is for this \
             server alone; is `url` right?"
        )));
    }
    let mut reply = Vec::new();
    while let Some(piece) = client.piece(&mut response).await.map_err(failed)? {
        if reply.len() + piece.len() > MAX_REPLY {
            return Err(Failure::doubtful(format!(
                "HTTP {status} with more than {} KiB: no reply of an SMS provider",
                MAX_REPLY >> 10
            )));
        }
        reply.extend_from_slice(&piece);
    }
    Ok((status, reply))
}

/// What a failure with this HTTP status means.
fn lasting(status: u16) -> Lasting {
    match status {
        // Somebody on the way has not heard its end.
        500 | 502 | 504 => Lasting::Doubtful,
        _ if retry::is_temporary(status) || status >= 500 => Lasting::Temporary,
        300..=399 | 401 | 403 | 404 | 405 | 407 => Lasting::Unusable,
        _ => Lasting::Refused,
    }
}

/// A reply that has to be JSON.
fn json(status: u16, reply: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(without_bom(reply)).map_err(|_| {
        let said = String::from_utf8_lossy(reply);
        let said = said.trim();
        // Behind a status that means success there may be a page of somebody else.
        let lasting = if status < 300 { Lasting::Doubtful } else { lasting(status) };
        Failure { lasting, words: format!("HTTP {status} and no JSON: {said}") }
    })
}

/// The text, the number or the truth value at a pointer.
fn at(json: &Value, pointer: &str) -> Option<String> {
    plain(json.pointer(pointer)?)
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn ihuyi(status: u16, reply: &[u8]) -> Result<String, Failure> {
    let json = json(status, reply)?;
    match at(&json, "/code").as_deref() {
        Some("2") if status < 300 => Ok(at(&json, "/smsid").unwrap_or_default()),
        Some(_) => Err(ihuyi_failure(&json)),
        None => Err(unexpected(status, reply)),
    }
}

fn ihuyi_failure(json: &Value) -> Failure {
    let code = at(json, "/code").unwrap_or_default();
    let text = at(json, "/msg").unwrap_or_default();
    let lasting = match code.as_str() {
        // The account, its key, its address, its money.
        code if code.starts_with("405") => Lasting::Unusable,
        "400" | "401" | "402" => Lasting::Unusable,
        // Too much in too short a time.
        code if code.starts_with("408") => Lasting::Temporary,
        "0" => Lasting::Temporary,
        _ => Lasting::Refused,
    };
    Failure { lasting, words: format!("{code} {text}") }
}

fn twilio(status: u16, reply: &[u8]) -> Result<String, Failure> {
    if !matches!(status, 200 | 201) {
        return Err(twilio_failure(status, reply));
    }
    let json = json(status, reply)?;
    at(&json, "/sid").ok_or_else(|| unexpected(status, reply))
}

fn twilio_failure(status: u16, reply: &[u8]) -> Failure {
    let lasting = lasting(status);
    let said = json(status, reply).ok().and_then(|json| {
        let (code, text) = (at(&json, "/code"), at(&json, "/message")?);
        Some(format!("{} {text}", code.unwrap_or_else(|| format!("HTTP {status}"))))
    });
    Failure { lasting, words: said.unwrap_or_else(|| unexpected(status, reply).words) }
}

fn unexpected(status: u16, reply: &[u8]) -> Failure {
    let said = String::from_utf8_lossy(reply);
    Failure { lasting: lasting(status), words: format!("HTTP {status}: {}", said.trim()) }
}

impl Form {
    fn read(&self, status: u16, reply: &[u8]) -> Result<String, Failure> {
        let json = json(status, reply)?;
        let (pointer, expected) = &self.success;
        let found = pointer.find(&json).and_then(plain);
        if !(200..300).contains(&status) || found.as_deref() != Some(expected) {
            return Err(unexpected(status, reply));
        }
        let id = self.id.as_ref().and_then(|pointer| pointer.find(&json)).and_then(plain);
        Ok(id.unwrap_or_else(|| "sent".to_owned()))
    }
}

/// Of how many messages of the network a text consists (3GPP TS 23.038 and 23.040).
struct Segments {
    count: usize,
    /// How many characters each of them takes.
    size: usize,
    alphabet: &'static str,
}

/// The characters of the GSM 7 bit default alphabet, but for those of ASCII.
const GSM: &str = "£¥èéùìòÇØøÅåΔΦΓΛΩΠΨΣΘΞÆæßÉ¤¡ÄÖÑÜ§¿äöñüà";

/// What a character takes of that alphabet, with those behind its escape; none if it is not in it.
fn septets(character: char) -> Option<usize> {
    match character {
        '^' | '{' | '}' | '\\' | '[' | ']' | '~' | '|' | '€' => Some(2),
        '`' | '\t' => None,
        '\n' | '\r' | ' '..='~' => Some(1),
        other => GSM.contains(other).then_some(1),
    }
}

impl Segments {
    fn of(text: &str) -> Self {
        let gsm = text.chars().map(septets).collect::<Option<Vec<_>>>();
        let (single, several, alphabet) = match gsm {
            Some(_) => (MAX_SEGMENT, 153, "GSM 7 bit"),
            None => (70, 67, "UCS-2, as it is not all GSM 7 bit"),
        };
        let lengths = gsm.unwrap_or_else(|| text.chars().map(char::len_utf16).collect());
        if lengths.iter().sum::<usize>() <= single {
            return Self { count: 1, size: single, alphabet };
        }
        // A character that is a pair is not divided: one of the segments stays shorter.
        let (mut count, mut room) = (1, several);
        for length in lengths {
            if length > room {
                (count, room) = (count + 1, several);
            }
            room -= length;
        }
        Self { count, size: several, alphabet }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_number_is_of_digits() {
        for good in ["13800000000", "+8613800000000", "110"] {
            assert_eq!(good.parse::<Number>().unwrap().to_string(), good);
        }
        for bad in ["", "+", "12", "1380000000O", "+86 138", "1234567890123456", "１２３４５６"]
        {
            assert!(bad.parse::<Number>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_text_has_segments() {
        let count = |text: &str| Segments::of(text).count;
        assert_eq!(count(&"a".repeat(160)), 1);
        assert_eq!(count(&"a".repeat(161)), 2);
        assert_eq!(count(&"{".repeat(80)), 1);
        assert_eq!(count(&"{".repeat(81)), 2);
        assert_eq!(count(&"汇".repeat(70)), 1);
        assert_eq!(count(&"汇".repeat(71)), 2);
        assert_eq!(count(&"\u{1f600}".repeat(36)), 2);
    }

    #[test]
    fn a_pair_is_in_one_segment() {
        let count = |text: &str| Segments::of(text).count;
        // Four times 153 septets, but for the borders.
        let euros = |between: usize| format!("{}€", "a".repeat(between));
        assert_eq!(count(&"a".repeat(612)), 4);
        assert_eq!(count(&(euros(152) + &euros(151) + &euros(151) + &"a".repeat(152))), 5);
        assert_eq!(count(&(euros(151) + &euros(151) + &euros(151) + &euros(151))), 4);
        assert_eq!(count(&"\u{1f600}".repeat(66)), 2);
        assert_eq!(count(&"\u{1f600}".repeat(67)), 3);
    }

    #[test]
    fn what_a_provider_says_is_read_as_its_document_says() {
        let of = |failure: Failure| (failure.lasting, failure.words);
        let sent = r#"{"code":2,"msg":"提交成功","smsid":"16236622659841"}"#;
        assert_eq!(ihuyi(200, sent.as_bytes()).unwrap(), "16236622659841");
        let refused = r#"{"code":4051,"msg":"剩余条数不足","smsid":"0"}"#;
        let failure = ihuyi(200, refused.as_bytes()).unwrap_err();
        assert_eq!(of(failure), (Lasting::Unusable, "4051 剩余条数不足".to_owned()));
        let failure = ihuyi(200, b"<html>").unwrap_err();
        assert_eq!(of(failure), (Lasting::Doubtful, "HTTP 200 and no JSON: <html>".to_owned()));
        assert_eq!(ihuyi(500, b"oops").unwrap_err().lasting, Lasting::Doubtful);
        assert_eq!(ihuyi(200, b"[]").unwrap_err().words, "HTTP 200: []");
        assert_eq!(ihuyi(200, b"{\"code\":\"2\"}").unwrap(), "");

        assert_eq!(twilio(201, b"{\"sid\":\"SM1\"}").unwrap(), "SM1");
        let refused = r#"{"code":21211,"message":"Invalid 'To' Phone Number","status":400}"#;
        let failure = twilio(400, refused.as_bytes()).unwrap_err();
        assert_eq!(of(failure), (Lasting::Refused, "21211 Invalid 'To' Phone Number".to_owned()));
        let failure = twilio(401, br#"{"code":20003,"message":"Authenticate"}"#).unwrap_err();
        assert_eq!(of(failure), (Lasting::Unusable, "20003 Authenticate".to_owned()));
        assert_eq!(twilio(503, b"").unwrap_err().lasting, Lasting::Temporary);
        assert!(twilio(200, b"{}").is_err());
    }

    fn form(equals: &str) -> Form {
        Form {
            fields: Vec::new(),
            success: ("/status".parse().unwrap(), equals.to_owned()),
            id: Some("/message/id".parse().unwrap()),
        }
    }

    #[test]
    fn a_form_is_sent_if_the_reply_says_so() {
        let reply = br#"{"status":"ok","message":{"id":17}}"#;
        assert_eq!(form("ok").read(200, reply).unwrap(), "17");
        assert!(form("ok").read(500, reply).is_err());
        assert_eq!(form("0").read(200, b"{\"status\":0}").unwrap(), "sent");
        assert!(form("true").read(201, b"{\"status\":true}").is_ok());
        for other in ["{\"status\":\"OK\"}", "{}", "{\"status\":[\"ok\"]}", "", "ok"] {
            assert!(form("ok").read(200, other.as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn a_template_has_places_and_no_others() {
        let password = Some("{text}");
        let values = Values { account: "me", password, to: "1", text: "{password}&a=b" };
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
        fn what_is_put_in_is_put_in_once_and_encoded(
            account in "\\PC{0,9}", password in "[{}a-z&=%+ ]{0,20}", text in "[{}a-z&=%+\\n ]{0,40}",
        ) {
            let template: Template = "{text}|{password}|{account}".parse().unwrap();
            let password_ = Some(&*password);
            let values = Values { account: &account, password: password_, to: "1", text: &text };
            let filled = template.fill(&values);
            prop_assert_eq!(&filled, &format!("{text}|{password}|{account}"));
            let fields = [("a".to_owned(), filled), ("b&=".to_owned(), text)];
            let body = encoded(&fields);
            prop_assert!(body.is_ascii());
            let read = Url::parse(&format!("form:?{body}")).unwrap();
            let read: Vec<_> =
                read.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
            prop_assert_eq!(read, fields);
        }

        #[test]
        fn any_template_prints_nothing_and_panics_never(text in "[{}a-z]{0,30}") {
            if let Ok(template) = text.parse::<Template>() {
                prop_assert_eq!(format!("{template:?}"), "Template(…)");
            }
        }

        #[test]
        fn a_text_that_is_shortened_fits(
            text in prop_oneof!["\\PC{0,900}", "[a-z€{}]{0,900}", "[\u{1f600}汇a]{0,400}"],
            max_segments in 1_usize..4,
        ) {
            let short = settings(max_segments).shorten(&text);
            prop_assert!(divided(&short).len() <= max_segments);
            prop_assert!(short == text.trim() || short.ends_with("...") || short.ends_with('…'));
            prop_assert_eq!(Segments::of(&text).count, divided(&text).len().max(1));
        }
    }

    fn settings(max_segments: usize) -> Settings {
        Settings {
            name: "sms.a".into(),
            provider: Provider::Ihuyi,
            url: Url::parse(IHUYI).unwrap(),
            account: String::new(),
            password_file: None,
            to: Vec::new(),
            timeout: Duration::from_secs(1),
            max_segments,
            ca_file: CaFile::of_key(None),
        }
    }

    /// The segments of a text, as a telephone divides it: as much as goes into each.
    fn divided(text: &str) -> Vec<String> {
        let gsm = text.chars().all(|c| septets(c).is_some());
        let length = |text: &str| {
            if gsm { text.chars().filter_map(septets).sum() } else { text.encode_utf16().count() }
        };
        let (single, several) = if gsm { (160, 153) } else { (70, 67) };
        if length(text) <= single {
            return vec![text.to_owned()];
        }
        let mut segments = vec![String::new()];
        for character in text.chars() {
            let last = segments.last_mut().unwrap();
            last.push(character);
            if length(last) > several {
                last.pop();
                segments.push(character.into());
            }
        }
        segments
    }

    #[test]
    fn a_text_that_is_shortened_takes_all_that_is_paid_for() {
        let long = |text: &str| text.repeat(1000);
        assert_eq!(settings(4).shorten(&long("a")), "a".repeat(609) + "...");
        assert_eq!(settings(1).shorten(&long("a")), "a".repeat(157) + "...");
        assert_eq!(settings(4).shorten(&long("汇")), "汇".repeat(267) + "…");
        // What is cut off does not say how the rest is written.
        assert_eq!(settings(2).shorten(&(long("a") + "汇")), "a".repeat(303) + "...");
        assert_eq!(settings(4).shorten("  a汇 "), "a汇");
    }
}
