//! `[sms.NAME]`: sends texts through a provider.
//!
//! Posts a form over HTTPS per recipient. The JSON of the reply decides, because its HTTP status proves
//! nothing. [`providers`] describes providers, [`segments`] counts the segments of a text.

mod providers;
mod segments;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Response, Url};
use tokio::time::timeout;

use crate::config_reader::{Reported, Spanned, Table, values};
use crate::http::ca_certs;
use crate::http::client::{self, Client, Options};
use crate::http::egress::{self, EgressPolicy, shown};
use crate::http::tls::{self, CaFile};
use crate::notify::outcome::{Failure, FailureKind, Sent, printable, read_password};
use crate::secret::{self, Secret, Secrets};
use providers::{FormKeys, Kind, Placeholder, Provider, Values};
use segments::Segments;

/// Maximum number of recipients of a text.
const MAX_RECIPIENTS: usize = 100;

/// Maximum size of a reply, in bytes.
const MAX_REPLY: usize = 64 << 10;

/// Maximum length of a number, in digits (ITU-T E.164).
const MAX_DIGITS: usize = 15;

/// The validated settings of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of the channel, such as `sms.ops`.
    pub name: Arc<str>,
    provider: Provider,
    url: Url,
    account: String,
    from: String,
    password_file: Option<PathBuf>,
    /// Numbers that receive texts without `--to`.
    pub to: Vec<Number>,
    timeout: Duration,
    max_segments: usize,
    ca_file: CaFile,
}

/// A telephone number of 3 to 15 digits, with an optional `+`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Number(String);

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix('+').unwrap_or(text);
        let is_number = (3..=MAX_DIGITS).contains(&digits.len())
            && digits.bytes().all(|byte| byte.is_ascii_digit());
        if is_number {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "expected a number of 3 to {MAX_DIGITS} digits, with + and the country's code in front \
             or without, as \"+8613800000000\""
        ))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Settings {
    /// Reads `[sms.NAME]`.
    ///
    /// # Errors
    /// The table has a fault.
    pub fn read(name: &str, mut table: Table<'_>) -> Result<Self, Reported> {
        let kind = table.required("provider", "ihuyi, twilio or form", str::parse::<Kind>);
        let account = table.text("account", account);
        let password_file = secret::read_path(&mut table, "password-file");
        let from = table.text("from", sender);
        let to = table.texts("to", Number::from_str);
        let url = table.text("url", |text| Ok::<_, String>(text.to_owned()));
        let allow_plaintext = table.boolean_or("allow-plaintext", false);
        let keys = FormKeys::read(&mut table);
        let timeout = table.text_or("timeout", "30s", values::duration);
        let max_segments = table.integer_or("max-segments", 4, 1..=10);
        let ca_file = table.checked_path("ca-file", ca_certs::read);
        let (kind, account, password_file) = (kind?, account?, password_file?);
        let (provider, preset_url) = match Provider::preset(kind) {
            Some((provider, url)) => match keys.present {
                Some(key) => (Err(table.report(key, "is for provider = \"form\"")), None),
                None => (Ok(provider), Some(url)),
            },
            None => (keys.provider(&table), None),
        };
        let to = to.and_then(|to| numbers(to.unwrap_or_default(), provider.as_ref().ok(), &table));
        let provider = provider?;
        let missing = |key, hint| table.report(key, format_args!("missing; expected {hint}"));
        let needs = |placeholder| provider.has_basic_auth() || provider.uses(placeholder);
        let account = match account {
            None if needs(Placeholder::Account) => {
                Err(missing("account", "the account at the provider"))
            }
            account => Ok(account.unwrap_or_default()),
        };
        let password_file = match password_file {
            None if needs(Placeholder::Password) => Err(missing(
                "password-file",
                "the file with the password, or the credential of that name",
            )),
            file => Ok(file),
        };
        let from = check_sender(from?, kind, &table);
        let preset_url =
            preset_url.map(|url| url.replace("{account}", account.as_deref().unwrap_or_default()));
        let url = url.and_then(|url| match url.or(preset_url) {
            Some(url) => {
                read_url(&url, allow_plaintext?).map_err(|error| table.report("url", error))
            }
            None => Err(missing("url", "where the form is sent to")),
        });
        table.finish();
        Ok(Self {
            name: format!("sms.{name}").into(),
            provider,
            url: url?,
            account: account?,
            from: from?,
            password_file: password_file?,
            to: to?,
            timeout: timeout?,
            max_segments: usize::try_from(max_segments?).expect("max-segments is at most 10"),
            ca_file: CaFile::of_key(ca_file?),
        })
    }

    /// Returns the host of the provider.
    pub fn server(&self) -> String {
        egress::host_of(&self.url)
    }

    /// Parses a number that this provider accepts.
    ///
    /// # Errors
    /// The expected form.
    pub fn number(&self, text: &str) -> Result<Number, String> {
        let number: Number = text.parse()?;
        self.provider.check_number(&number.0)?;
        Ok(number)
    }

    /// Checks a text and returns it as it is sent.
    ///
    /// # Errors
    /// The reason why it cannot be sent.
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

    /// Shortens a text to `max-segments`.
    pub fn shorten(&self, text: &str) -> String {
        segments::shorten(text, self.max_segments)
    }

    /// Returns the requests for people, without the password and the literals of `fields`.
    pub fn show(&self, to: &[Number], text: &str) -> String {
        let fields = to.iter().flat_map(|number| self.fields(number, text, None));
        let lines = fields.map(|(name, value)| format!("{name} = {value:?}\n"));
        format!("POST {}\n{}", shown(&self.url), lines.collect::<String>())
    }

    fn fields(&self, to: &Number, text: &str, password: Option<&str>) -> Vec<(String, String)> {
        let (account, from, to) = (self.account.as_str(), self.from.as_str(), to.0.as_str());
        let hides_literals = password.is_none() && self.provider.kind == Kind::Form;
        self.provider.fill(&Values { account, password, hides_literals, from, to, text })
    }

    /// Reads the password and the trusted certificates.
    async fn prepare(&self) -> Result<(Client, Option<Secret>, Secrets), Failure> {
        let prepare = async {
            let password = match &self.password_file {
                None => None,
                Some(path) => Some(read_password(path).await?),
            };
            let secrets =
                password.as_ref().map(|password| Secrets::of_login(&self.account, password));
            Ok((self.client().await?, password, secrets.unwrap_or_default()))
        };
        let late = |_| Err(Failure::timed_out(self.timeout, "reading the files that it needs"));
        timeout(self.timeout, prepare).await.unwrap_or_else(late)
    }

    async fn client(&self) -> Result<Client, Failure> {
        let (ca_file, url) = (self.ca_file.clone(), self.url.clone());
        let build = move || {
            let tls = tls::client_config(&ca_file);
            let tls =
                tls.map_err(|error| Failure::channel_broken(printable(&error.to_string())))?;
            let egress_policy = Arc::new(EgressPolicy::new([&url], [], false));
            let options = Options {
                tls,
                proxy: None,
                headers: HeaderMap::new(),
                sources: Vec::new(),
                timeout: None,
                connections: 1,
            };
            Client::new(options, egress_policy)
                .map_err(|error| Failure::channel_broken(error.to_string()))
        };
        // Reading the certificates of the system may block.
        let client = tokio::task::spawn_blocking(build).await;
        client.map_err(|error| Failure::transient(error.to_string()))?
    }

    fn headers(&self, password: Option<&Secret>) -> HeaderMap {
        let form = HeaderValue::from_static("application/x-www-form-urlencoded");
        let json = HeaderValue::from_static("application/json");
        let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, form), (ACCEPT, json)]);
        if let Some(password) = password.filter(|_| self.provider.has_basic_auth()) {
            let login = BASE64_STANDARD.encode(format!("{}:{}", self.account, password.reveal()));
            let mut login = HeaderValue::try_from(format!("Basic {login}"))
                .expect("base64 is a valid header value");
            login.set_sensitive(true);
            headers.insert(AUTHORIZATION, login);
        }
        headers
    }

    /// Sends a checked text to these numbers.
    ///
    /// # Errors
    /// All of them failed.
    pub async fn send(&self, to: &[Number], text: &str) -> Result<Sent, Failure> {
        let (client, password, secrets) = self.prepare().await?;
        let mut sent = Sent { ids: Vec::new(), refused: Vec::new() };
        for number in to {
            let one = self.send_one(&client, number, text, password.as_ref());
            let one = timeout(self.timeout, one).await.unwrap_or_else(|_| {
                let late =
                    Failure::timed_out(self.timeout, "the provider may have taken it all the same");
                Err(Failure { kind: FailureKind::Unconfirmed, ..late })
            });
            match one {
                Ok(id) => sent.ids.push(printable(&secrets.withhold(&id))),
                Err(failure) => sent.refused.push((number.to_string(), failure.redacted(&secrets))),
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
        let form = encode(&self.fields(to, text, Some(secret)));
        let response =
            client.post(&self.url, &self.headers(password), form).await.map_err(failed)?;
        let (status, reply) = read_body(client, response).await?;
        self.read_reply(status, &reply)
    }

    /// Returns the provider's ID of an accepted text.
    ///
    /// # Errors
    /// The text was not accepted, or the reply is unknown.
    pub fn read_reply(&self, status: u16, reply: &[u8]) -> Result<String, Failure> {
        self.provider.read_reply(status, reply)
    }

    /// Checks that the provider can be reached, without the login, which only sending tests.
    pub(crate) async fn check_server(&self) -> Result<String, Failure> {
        let (client, _, secrets) = self.prepare().await?;
        let connect = async {
            let mut response =
                client.get_here(&self.url, &HeaderMap::new()).await.map_err(failed)?;
            client.drain(&mut response).await;
            Ok(response.status().as_u16())
        };
        let status = timeout(self.timeout, connect)
            .await
            .unwrap_or_else(|_| Err(Failure::timed_out(self.timeout, "waiting for the provider")))
            .map_err(|failure| failure.redacted(&secrets))?;
        let encrypted = if self.url.scheme() == "https" { "encrypted" } else { "not encrypted" };
        Ok(format!(
            "connected to {}, {encrypted}, HTTP {status}; the login is tested when a text is sent",
            self.server()
        ))
    }
}

/// Checks the number of recipients, and each number.
fn numbers(
    to: Vec<Spanned<Number>>,
    provider: Option<&Provider>,
    table: &Table<'_>,
) -> Result<Vec<Number>, Reported> {
    if !(1..=MAX_RECIPIENTS).contains(&to.len()) {
        return Err(table.report("to", format_args!("expected 1 to {MAX_RECIPIENTS} numbers")));
    }
    let check = |number: &Number| provider.map_or(Ok(()), |it| it.check_number(&number.0));
    let each = to.into_iter().map(|to| match check(&to.value) {
        Ok(()) => Ok(to.value),
        Err(problem) => Err(table.report_at(&to.origin, problem)),
    });
    // Reports every fault.
    each.collect::<Vec<_>>().into_iter().collect()
}

/// Parses a URL; the messages do not repeat it, because it may contain a password.
fn read_url(text: &str, allow_plaintext: bool) -> Result<Url, String> {
    let url = egress::url(text).map_err(|error| error.to_string())?;
    if url.scheme() == "https" || allow_plaintext || egress::is_loopback(&egress::host_of(&url)) {
        return Ok(url);
    }
    Err("expected https://, or allow-plaintext = true".to_owned())
}

fn account(text: &str) -> Result<String, String> {
    let is_account = (1..=128).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_graphic() && !matches!(c, ':' | '/' | '?' | '#' | '%'));
    let expected = || "expected the account's name: visible ASCII without : / ? # %".to_owned();
    is_account.then(|| text.to_owned()).ok_or_else(expected)
}

fn sender(text: &str) -> Result<String, String> {
    let is_sender =
        (1..=40).contains(&text.len()) && text.chars().all(|c| c == ' ' || c.is_ascii_graphic());
    let expected = || "expected a number of yours at the provider, as \"+15017122661\"".to_owned();
    is_sender.then(|| text.to_owned()).ok_or_else(expected)
}

/// Twilio requires `from`; the other providers do not use it.
fn check_sender(from: Option<String>, kind: Kind, table: &Table<'_>) -> Result<String, Reported> {
    match from {
        None if kind == Kind::Twilio => {
            Err(table.report("from", "missing; expected the number that it is sent from"))
        }
        Some(_) if kind != Kind::Twilio => {
            Err(table.report("from", "is for provider = \"twilio\""))
        }
        from => Ok(from.unwrap_or_default()),
    }
}

/// Encodes fields as `application/x-www-form-urlencoded`, with the writer of the URL library.
fn encode(fields: &[(String, String)]) -> String {
    let mut url = Url::parse("form:").expect("the URL is valid");
    url.query_pairs_mut().extend_pairs(fields);
    url.query().unwrap_or_default().to_owned()
}

fn failed(error: client::Error) -> Failure {
    let message = error.to_string();
    match error {
        // The provider may have received the request.
        client::Error::Network(_) | client::Error::Malformed(_) => Failure::unconfirmed(message),
        error if error.is_temporary() => Failure::transient(message),
        _ => Failure::channel_broken(message),
    }
}

async fn read_body(client: &Client, mut response: Response) -> Result<(u16, Vec<u8>), Failure> {
    let status = response.status().as_u16();
    if response.status().is_redirection() {
        return Err(Failure::channel_broken(format!(
            "HTTP {status}: it is redirected, which is not followed, as the password is for this \
             server alone; is `url` right?"
        )));
    }
    let mut reply = Vec::new();
    while let Some(piece) = client.piece(&mut response).await.map_err(failed)? {
        if reply.len() + piece.len() > MAX_REPLY {
            return Err(Failure::unconfirmed(format!(
                "HTTP {status} with more than {} KiB: no reply of an SMS provider",
                MAX_REPLY >> 10
            )));
        }
        reply.extend_from_slice(&piece);
    }
    Ok((status, reply))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_consist_of_digits() {
        for good in ["13800000000", "+8613800000000", "110"] {
            assert_eq!(good.parse::<Number>().unwrap().to_string(), good);
        }
        for bad in ["", "+", "12", "1380000000O", "+86 138", "1234567890123456", "１２３４５６"]
        {
            assert!(bad.parse::<Number>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn encoded_fields_are_read_back(
            fields in prop::collection::vec(("[a-z&=%+ ]{0,9}", "\\PC{0,20}"), 0..4),
        ) {
            let body = encode(&fields);
            prop_assert!(body.is_ascii());
            let url = Url::parse(&format!("form:?{body}")).unwrap();
            let read: Vec<_> = url.query_pairs().map(|(a, b)| (a.into_owned(), b.into_owned())).collect();
            prop_assert_eq!(read, fields);
        }
    }
}
