//! Mail channels: `[mail.NAME]`, and sending. Rejected recipients do not keep the others from
//! receiving the mail.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::client::HostPort;
use crate::config_reader::{Reported, Table, values};
use crate::http::ca_certs;
use crate::http::egress;
use crate::http::tls::CaFile;
use crate::notify::address::EmailAddress;
use crate::notify::helo;
use crate::notify::mime::{Mailbox, header_text};
use crate::notify::outcome::{Failure, FailureKind, Sent};
use crate::notify::smtp;
use crate::notify::smtp::{Connection, Login, RelayConfig, Security};
use crate::notify::smtp_client::{SharedStage, SmtpClient, SmtpStage};
use crate::secret;
use crate::text::counted;

/// Maximum number of recipients; servers accept at least as many (RFC 5321, 4.5.3.1.8).
const MAX_RECIPIENTS: usize = 100;

/// The validated settings of a mail channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Kind and name, such as `mail.ops`.
    pub(crate) name: Arc<str>,
    relay: RelayConfig,
    pub(crate) from: Mailbox,
    /// Addresses that receive mail without `--to`.
    pub(crate) to: Vec<Mailbox>,
    timeout: Duration,
    /// Maximum total size of attachments, in bytes.
    pub(crate) max_attachment: u64,
}

impl Settings {
    /// Reads `[mail.NAME]`.
    ///
    /// # Errors
    /// The table has a fault.
    pub fn read(name: &str, mut table: Table<'_>) -> Result<Self, Reported> {
        let expected = "the server, as \"smtp.example.org:465\"";
        let server = table.required("server", expected, HostPort::from_str);
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
        let login = read_login(username?, password_file?, &table);
        let (server, security, allow_plaintext) = (server?, security?, allow_plaintext?);
        let is_unprotected = security == Security::Plaintext
            && !allow_plaintext
            && !egress::is_loopback(server.host());
        let unprotected = is_unprotected.then(|| {
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
        match unprotected {
            Some(reported) => Err(reported),
            None => Ok(Self {
                name: format!("mail.{name}").into(),
                relay: RelayConfig {
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

    pub(crate) fn server(&self) -> &HostPort {
        &self.relay.server
    }

    /// Connects, logs in, and names the sender and every recipient without sending a mail. Returns the
    /// steps that succeeded.
    pub(crate) async fn check_server(&self) -> Result<String, Failure> {
        let to: Vec<_> = self.to.iter().map(|to| to.address.clone()).collect();
        let rejected = self
            .in_session(|mut connection| async {
                let rejected = connection.begin_mail(&self.from.address, &to).await;
                (connection, rejected)
            })
            .await?;
        if !rejected.is_empty() {
            return Err(Failure::of_all(&rejected));
        }
        let RelayConfig { server, security, login, .. } = &self.relay;
        let encrypted = match security {
            Security::Tls => ", encrypted",
            Security::StartTls => ", encrypted after STARTTLS",
            Security::Plaintext => ", not encrypted",
        };
        let logged_in = if login.is_some() { ", logged in" } else { "" };
        let recipients = counted(to.len(), "recipient");
        Ok(format!("connected to {server}{encrypted}{logged_in}, {recipients} accepted"))
    }

    /// Sends a mail with the Message-ID `id`.
    ///
    /// # Errors
    /// No recipient was accepted, or the mail is larger than the server permits.
    pub(crate) async fn send(
        &self,
        id: &str,
        to: &[EmailAddress],
        mail: &[u8],
    ) -> Result<Sent, Failure> {
        let refused = self
            .in_session(|mut connection| async {
                let delivered = match connection.max_size() {
                    Some(max) if mail.len() as u64 > max => Err(too_large(mail.len(), max)),
                    _ => self.deliver(&mut connection, to, mail).await,
                };
                (connection, delivered)
            })
            .await?;
        Ok(Sent { ids: vec![id.to_owned()], refused })
    }

    /// Connects, runs `dialogue` and quits, within the timeout of the channel.
    async fn in_session<T, F>(&self, dialogue: impl FnOnce(Connection) -> F) -> Result<T, Failure>
    where
        F: Future<Output = (Connection, Result<T, Failure>)>,
    {
        let stage = SharedStage::default();
        let session =
            async { Ok(dialogue(smtp::connect(&self.relay, self.timeout, &stage).await?).await) };
        let on_timeout = |_| {
            let stage = *stage.lock();
            let failure = Failure::timed_out(self.timeout, stage);
            Err(match stage {
                SmtpStage::Transfer => Failure::unconfirmed(failure.message),
                _ => failure,
            })
        };
        let (connection, result) =
            timeout(self.timeout, session).await.unwrap_or_else(on_timeout)?;
        // Outside of the timeout: the result is known, whether the server replies to QUIT or not.
        smtp::quit(connection).await;
        result
    }

    /// Sends a mail over an open connection. Returns the rejected recipients.
    ///
    /// # Errors
    /// No recipient was accepted.
    pub async fn deliver<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        connection: &mut SmtpClient<S>,
        to: &[EmailAddress],
        mail: &[u8],
    ) -> Result<Vec<(String, Failure)>, Failure> {
        let rejected = connection.begin_mail(&self.from.address, to).await?;
        if rejected.len() == to.len() {
            let mut failure = Failure::of_all(&rejected);
            // Without another recipient, the channel cannot deliver anything.
            if self.to.len() == 1 && failure.kind == FailureKind::Rejected {
                failure.kind = FailureKind::ChannelBroken;
            }
            return Err(failure);
        }
        connection.send_content(mail).await?;
        Ok(rejected)
    }
}

fn read_login(
    username: Option<String>,
    password_file: Option<PathBuf>,
    table: &Table<'_>,
) -> Result<Option<Login>, Reported> {
    match (username, password_file) {
        (Some(username), Some(password_file)) => Ok(Some(Login { username, password_file })),
        (None, None) => Ok(None),
        (Some(_), None) => Err(table.report(
            "password-file",
            "missing; expected the file with the password of `username`, or the credential of that \
             name",
        )),
        (None, Some(_)) => Err(table.report("username", "missing; expected whose password it is")),
    }
}

fn too_large(size: usize, max: u64) -> Failure {
    Failure::rejected(format!(
        "the mail has {size} bytes, the server takes at most {max}: less has to be attached"
    ))
}
