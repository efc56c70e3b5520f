//! `[mail.NAME]`: its table, and sending.
//!
//! Some recipients may be refused and others not: those get the mail, and these are named.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::client::Server;
use crate::config_reader::{Reported, Table, values};
use crate::http::ca_certs;
use crate::http::egress;
use crate::http::tls::CaFile;
use crate::notify::address::EmailAddress;
use crate::notify::channel::{Failure, Lasting, Sent};
use crate::notify::helo;
use crate::notify::mime::{Mailbox, header_text};
use crate::notify::smtp;
use crate::notify::smtp::{Doing, Login, Place, Security};
use crate::notify::smtp_client::{SmtpClient, TRANSFER};
use crate::secret;
use crate::text::counted;

/// The most recipients of a mail; servers take that many at least (RFC 5321, 4.5.3.1.8).
const MAX_RECIPIENTS: usize = 100;

/// The checked settings of a mail channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its kind and name, as `mail.ops`.
    pub name: Arc<str>,
    place: Place,
    /// Who writes.
    pub from: Mailbox,
    /// To whom, unless somebody else is named.
    pub to: Vec<Mailbox>,
    timeout: Duration,
    /// How much may be attached to one mail, in bytes.
    pub max_attachment: u64,
}

impl Settings {
    /// Reads `[mail.NAME]`, and reports what is wrong to the table.
    ///
    /// # Errors
    /// If something is.
    pub fn read(name: &str, mut table: Table<'_>) -> Result<Self, Reported> {
        let expected = "the server, as \"smtp.example.org:465\"";
        let server = table.required("server", expected, Server::from_str);
        let security = table.text_or("security", "tls", Security::from_str);
        let allow_plaintext = table.boolean_or("allow-plaintext", false);
        let username = table.text("username", |name| header_text(name).map(|()| name.to_owned()));
        let password_file = secret::read_path(&mut table, "password-file");
        let from = table.required("from", "who writes, as \"handout@example.org\"", str::parse);
        let to = table.texts("to", Mailbox::from_str);
        let timeout = table.text_or("timeout", "30s", values::duration);
        let ca_file = table.checked_path("ca-file", ca_certs::read);
        let helo = table.text("helo", helo::parse);
        let max_attachment = table.text_or("max-attachment", "10MiB", values::size);
        let to = to.and_then(|to| match to {
            None => Err(table.report("to", "missing; expected at least one address")),
            Some(to) if to.is_empty() => {
                Err(table.report("to", "empty; expected at least one address"))
            }
            Some(to) if to.len() > MAX_RECIPIENTS => {
                Err(table.report("to", format_args!("expected at most {MAX_RECIPIENTS} addresses")))
            }
            Some(to) => Ok(to.into_iter().map(|to| to.value).collect()),
        });
        let login = match (username?, password_file?) {
            (Some(username), Some(password_file)) => Ok(Some(Login { username, password_file })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(table.report(
                "password-file",
                "missing; expected the file with the password of `username`, or the credential of \
                 that name",
            )),
            (None, Some(_)) => {
                Err(table.report("username", "missing; expected whose password it is"))
            }
        };
        let (server, security, allow_plaintext) = (server?, security?, allow_plaintext?);
        let far = security == Security::Plaintext
            && !allow_plaintext
            && !egress::is_loopback(server.host());
        let far = far.then(|| {
            table.report(
                "security",
                "none is for this machine only (127.0.0.1, ::1, localhost); expected tls or \
                 starttls, or allow-plaintext = true",
            )
        });
        table.finish();
        let (from, to, login) = (from?, to?, login?);
        let (timeout, ca_file, max_attachment) = (timeout?, ca_file?, max_attachment?);
        let helo = helo?;
        match far {
            Some(noted) => Err(noted),
            None => Ok(Self {
                name: format!("mail.{name}").into(),
                place: Place {
                    server,
                    security,
                    allow_plaintext,
                    ca_file: CaFile::of_key(ca_file),
                    helo,
                    login,
                },
                from,
                to,
                timeout,
                max_attachment,
            }),
        }
    }

    /// Who is connected to.
    pub fn server(&self) -> &Server {
        &self.place.server
    }

    /// Goes as far as a mail can go without being sent: connects, encrypts, logs in, and names the
    /// sender and every recipient. Returns what was done.
    ///
    /// # Errors
    /// If a step fails or the server refuses a recipient.
    pub async fn try_out(&self) -> Result<String, Failure> {
        let doing = Doing::default();
        let to: Vec<_> = self.to.iter().map(|to| to.address.clone()).collect();
        let try_out = async {
            let mut connection = smtp::connect(&self.place, self.timeout, &doing).await?;
            let begun = connection.begin_mail(&self.from.address, &to, &doing).await;
            Ok((connection, begun))
        };
        let late = |_| Err(Failure::late(self.timeout, doing.get()));
        let (connection, begun) = timeout(self.timeout, try_out).await.unwrap_or_else(late)?;
        // QUIT takes back what was begun (RFC 5321, 4.1.1.10).
        smtp::leave(connection).await;
        let refused = begun?;
        if !refused.is_empty() {
            return Err(Failure::of_all(&refused));
        }
        let Place { server, security, login, .. } = &self.place;
        let encrypted = match security {
            Security::Tls => ", encrypted",
            Security::StartTls => ", encrypted after STARTTLS",
            Security::Plaintext => ", not encrypted",
        };
        let logged_in = if login.is_some() { ", logged in" } else { "" };
        let recipients = counted(to.len(), "recipient");
        Ok(format!("connected to {server}{encrypted}{logged_in}, {recipients} accepted"))
    }

    /// Sends a mail, which is known by `id`, to these recipients. One that is larger than the server
    /// takes is not begun.
    ///
    /// # Errors
    /// If nobody got it, as far as is known.
    pub async fn send(&self, id: &str, to: &[EmailAddress], mail: &[u8]) -> Result<Sent, Failure> {
        let doing = Doing::default();
        let deliver = async {
            let mut connection = smtp::connect(&self.place, self.timeout, &doing).await?;
            let delivered = match connection.max_size() {
                Some(max) if mail.len() as u64 > max => Err(too_large(mail.len(), max)),
                _ => self.deliver(&mut connection, to, mail, &doing).await,
            };
            Ok((connection, delivered))
        };
        let late = |_| {
            let late = Failure::late(self.timeout, doing.get());
            Err(if doing.get() == TRANSFER { Failure::doubtful(late.words) } else { late })
        };
        let (connection, delivered) = timeout(self.timeout, deliver).await.unwrap_or_else(late)?;
        // What the server has said is certain, whether it hears us go or not.
        smtp::leave(connection).await;
        Ok(Sent { ids: vec![id.to_owned()], refused: delivered? })
    }

    /// Sends a mail over a connection that stands; returns for whom it was not taken.
    ///
    /// # Errors
    /// If nobody got it, as far as is known.
    pub async fn deliver<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        connection: &mut SmtpClient<S>,
        to: &[EmailAddress],
        mail: &[u8],
        doing: &Doing,
    ) -> Result<Vec<(String, Failure)>, Failure> {
        let refused = connection.begin_mail(&self.from.address, to, doing).await?;
        if refused.len() == to.len() {
            let Failure { lasting, words } = Failure::of_all(&refused);
            // Without another recipient, the channel cannot deliver anything.
            let is_only = self.to.len() == 1 && lasting == Lasting::Refused;
            let lasting = if is_only { Lasting::Unusable } else { lasting };
            return Err(Failure { lasting, words });
        }
        connection.send_content(mail, doing).await?;
        Ok(refused)
    }
}

fn too_large(size: usize, max: u64) -> Failure {
    Failure::refused(format!(
        "the mail has {size} bytes, the server takes at most {max}: less has to be attached"
    ))
}
