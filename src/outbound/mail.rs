//! `[mail.NAME]`: its table, and sending.
//!
//! Some recipients may be refused and others not: those get the mail, and these are named.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use lettre::Address;
use lettre::transport::smtp::commands::{Data, Mail, Rcpt};
use lettre::transport::smtp::extension::{Extension, MailBodyParameter, MailParameter};
use tokio::time::timeout;

use super::channel::{Failure, Sent};
use super::message::{Mailbox, header_text};
use super::reach;
use super::roots;
use super::smtp::{self, Connection, Doing, Login, Place, Security};
use crate::client::Server;
use crate::config::{self, Context, Noted, Table};
use crate::secret;

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
    pub fn read(name: &str, mut table: Table<'_>, context: &Context<'_>) -> Result<Self, Noted> {
        let expected = "the server, as \"smtp.example.org:465\"";
        let server = table.required("server", expected, Server::from_str);
        let security = table.text_or("security", "tls", Security::from_str);
        let allow_plaintext = table.boolean_or("allow-plaintext", false);
        let username = table.text("username", |name| header_text(name).map(|()| name.to_owned()));
        let password_file =
            table.text("password-file", |name| secret::file(name, context).map(|(path, _)| path));
        let from = table.required("from", "who writes, as \"handout@example.org\"", str::parse);
        let to = table.texts("to", Mailbox::from_str);
        let timeout = table.text_or("timeout", "30s", config::duration);
        let ca_file = table.text("ca-file", |name| roots::file(name, context));
        let max_attachment = table.text_or("max-attachment", "10MiB", config::size);
        let to = to.and_then(|to| match to {
            None => Err(table.fault("to", "missing; expected at least one address")),
            Some(to) if to.is_empty() => {
                Err(table.fault("to", "empty; expected at least one address"))
            }
            Some(to) if to.len() > MAX_RECIPIENTS => {
                Err(table.fault("to", format_args!("expected at most {MAX_RECIPIENTS} addresses")))
            }
            Some(to) => Ok(to.into_iter().map(|to| to.value).collect()),
        });
        let login = match (username?, password_file?) {
            (Some(username), Some(password_file)) => Ok(Some(Login { username, password_file })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(table.fault(
                "password-file",
                "missing; expected the file with the password of `username`, or the credential of \
                 that name",
            )),
            (None, Some(_)) => {
                Err(table.fault("username", "missing; expected whose password it is"))
            }
        };
        let (server, security, allow_plaintext) = (server?, security?, allow_plaintext?);
        let far = security == Security::Plaintext
            && !allow_plaintext
            && !reach::is_loopback(server.host());
        let far = far.then(|| {
            table.fault(
                "security",
                "none is for this machine only (127.0.0.1, ::1, localhost); expected tls or \
                 starttls, or allow-plaintext = true",
            )
        });
        table.finish();
        let (from, to, login) = (from?, to?, login?);
        let (timeout, ca_file, max_attachment) = (timeout?, ca_file?, max_attachment?);
        match far {
            Some(noted) => Err(noted),
            None => Ok(Self {
                name: format!("mail.{name}").into(),
                place: Place { server, security, allow_plaintext, ca_file, login },
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

    /// Connects, encrypts and logs in, and sends nothing; returns what was done.
    ///
    /// # Errors
    /// If that cannot be done.
    pub async fn try_out(&self) -> Result<String, Failure> {
        let doing = Doing::default();
        let connected = smtp::connect(&self.place, self.timeout, &doing);
        let late = |_| Err(Failure::late(self.timeout, doing.get()));
        let connection = timeout(self.timeout, connected).await.unwrap_or_else(late)?;
        connection.leave().await;
        let Place { server, security, login, .. } = &self.place;
        let encrypted = match security {
            Security::Tls => ", encrypted",
            Security::StartTls => ", encrypted after STARTTLS",
            Security::Plaintext => ", not encrypted",
        };
        let logged_in = if login.is_some() { ", logged in" } else { "" };
        Ok(format!("connected to {server}{encrypted}{logged_in}"))
    }

    /// Sends a mail, which is known by `id`, to these recipients.
    ///
    /// # Errors
    /// If nobody got it, as far as is known.
    pub async fn send(&self, id: &str, to: &[Address], mail: &[u8]) -> Result<Sent, Failure> {
        let doing = Doing::default();
        let deliver = async {
            let mut connection = smtp::connect(&self.place, self.timeout, &doing).await?;
            let delivered = self.deliver(&mut connection, to, mail, &doing).await;
            Ok((connection, delivered))
        };
        let late = |_| Err(Failure::late(self.timeout, doing.get()));
        let (connection, delivered) = timeout(self.timeout, deliver).await.unwrap_or_else(late)?;
        // What the server has said is certain, whether it hears us go or not.
        connection.leave().await;
        Ok(Sent { ids: vec![id.to_owned()], refused: delivered? })
    }

    /// The same over a connection that stands; returns for whom it was not taken.
    ///
    /// # Errors
    /// If nobody got it, as far as is known.
    pub async fn deliver(
        &self,
        connection: &mut Connection,
        to: &[Address],
        mail: &[u8],
        doing: &Doing,
    ) -> Result<Vec<(String, Failure)>, Failure> {
        let eight_bit = !mail.is_ascii();
        let mut parameters = Vec::new();
        let server = connection.inner.server_info();
        if eight_bit && server.supports_feature(Extension::EightBitMime) {
            parameters.push(MailParameter::Body(MailBodyParameter::EightBitMime));
        }
        doing.set("waiting for the reply to MAIL");
        let from = Mail::new(Some(self.from.address.clone()), parameters);
        let answer = connection.inner.command(from).await;
        answer.map_err(|error| connection.failure(&error, Failure::refused))?;
        doing.set("waiting for the reply to RCPT");
        let mut refused = Vec::new();
        for recipient in to {
            let answer = connection.inner.command(Rcpt::new(recipient.clone(), Vec::new())).await;
            if let Err(error) = answer {
                let failure = connection.failure(&error, Failure::refused);
                if error.status().is_none() {
                    return Err(failure);
                }
                refused.push((recipient.to_string(), failure));
            }
        }
        if refused.len() == to.len() {
            return Err(Failure::of_all(&refused));
        }
        doing.set("waiting for the reply to DATA");
        let answer = connection.inner.command(Data).await;
        answer.map_err(|error| connection.failure(&error, Failure::refused))?;
        doing.set(
            "waiting until the mail is taken, which it may be, although the server does not say so",
        );
        // It ends the last line by itself.
        let mail = mail.strip_suffix(b"\r\n").unwrap_or(mail);
        let answer = connection.inner.message(mail).await;
        answer.map_err(|error| connection.failure(&error, Failure::refused))?;
        Ok(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbound::smtp::{Bounded, greet};
    use crate::secret::Secret;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    /// Logs in as `me` with the password `hush`, and sends a mail to a server that says these
    /// things, one after the other.
    async fn send(said: &'static [&'static str]) -> Result<Vec<(String, Failure)>, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = [0; 1024];
            for reply in said {
                stream.write_all(reply.as_bytes()).await.unwrap();
                let _ = stream.read(&mut heard).await;
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let password = folder.path().join("password");
        std::fs::write(&password, "hush").unwrap();
        let password = Secret::read(&password).unwrap();
        let settings = Settings {
            name: "mail.ops".into(),
            place: Place {
                server: "127.0.0.1".parse().unwrap(),
                security: Security::Plaintext,
                allow_plaintext: false,
                ca_file: None,
                login: None,
            },
            from: "a@example.org".parse().unwrap(),
            to: Vec::new(),
            timeout: Duration::ZERO,
            max_attachment: 0,
        };
        let stream = Bounded::new(TcpStream::connect(address).await.unwrap(), address, b"");
        let doing = Doing::default();
        let mut connection = greet(Box::new(stream), Some(("me", &password)), &doing).await?;
        let to = ["b@example.org", "c@example.org"].map(|to| to.parse().unwrap());
        settings.deliver(&mut connection, &to, b"x\r\n", &doing).await
    }

    #[tokio::test]
    async fn a_password_that_a_server_repeats_is_never_told() {
        const LOGIN: &str = "250-mx\r\n250 AUTH PLAIN\r\n";
        let failed: [&'static [&'static str]; 6] = [
            &["554 hush\r\n"],
            &["220 mx\r\n", LOGIN, "535 hush\r\n", "221 bye\r\n"],
            &["220 mx\r\n", LOGIN, "235 in\r\n", "550 hush\r\n"],
            &["220 mx\r\n", LOGIN, "235 in\r\n", "250 ok\r\n", "550 hush\r\n", "450 hush\r\n"],
            &[
                "220 mx\r\n",
                LOGIN,
                "235 in\r\n",
                "250 ok\r\n",
                "250 ok\r\n",
                "250 ok\r\n",
                "hush\r\n",
            ],
            &[
                "220 mx\r\n",
                LOGIN,
                "235 in\r\n",
                "250 ok\r\n",
                "250 ok\r\n",
                "250 ok\r\n",
                "354 go\r\n",
                "552 aHVzaA==\r\n",
            ],
        ];
        for said in failed {
            let words = send(said).await.unwrap_err().words;
            assert!(words.contains('…'), "{words}");
            assert!(!words.contains("hush") && !words.contains("aHVzaA"), "{words}");
        }
    }
}
