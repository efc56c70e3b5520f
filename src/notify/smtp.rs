//! A connection to a mail server (RFC 5321): encrypted from the beginning (RFC 8314), after STARTTLS
//! (RFC 3207), or not at all, and logged in.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::client::Server;
use crate::http::tls;
use crate::http::tls::CaFile;
use crate::http::tls_error::{TlsError, TlsErrorKind};
use crate::notify::channel;
use crate::notify::channel::{Failure, words};
use crate::notify::helo;
use crate::notify::smtp_client::SmtpClient;
use crate::secret::Secrets;
use crate::text::error_chain;

/// How long a server is waited for that is only said goodbye to.
const GOODBYE: Duration = Duration::from_secs(1);

/// How a connection is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Security {
    /// TLS from the first byte.
    Tls,
    /// TLS after STARTTLS, or nothing at all.
    StartTls,
    /// None.
    Plaintext,
}

impl FromStr for Security {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "tls" => Ok(Self::Tls),
            "starttls" => Ok(Self::StartTls),
            "none" => Ok(Self::Plaintext),
            _ => Err("expected tls, starttls or none"),
        }
    }
}

impl Security {
    /// The port that is meant if none is said.
    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Tls => 465,
            Self::StartTls => 587,
            Self::Plaintext => 25,
        }
    }
}

/// A user with a file that the password is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Login {
    /// The user.
    pub username: String,
    /// Where the password is.
    pub password_file: PathBuf,
}

/// Who is connected to, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The server.
    pub server: Server,
    /// How the connection is protected.
    pub security: Security,
    /// Whether one that is not may lead to another machine.
    pub allow_plaintext: bool,
    /// Certificates that are trusted besides those of the system.
    pub ca_file: CaFile,
    /// The name that EHLO announces, instead of this machine's.
    pub helo: Option<String>,
    /// Who is said to ask, if anybody.
    pub login: Option<Login>,
}

/// What is being done at the moment, so that it can be told if it takes too long.
#[derive(Debug, Default)]
pub struct Doing(Mutex<&'static str>);

impl Doing {
    /// This is being done from now on.
    pub fn set(&self, what: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// What is being done.
    pub fn get(&self) -> &'static str {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A dialogue with a server, encrypted or not.
pub(crate) type Connection = SmtpClient<Box<dyn Duplex>>;

/// Connects and logs in. The caller bounds the time, of which `time` is for connecting.
///
/// # Errors
/// If the server cannot be reached, cannot prove its identity, does not encrypt though it must, or
/// refuses the login.
pub(crate) async fn connect(
    place: &Place,
    time: Duration,
    doing: &Doing,
) -> Result<Connection, Failure> {
    doing.set("reading the files that it needs");
    // Whatever can fail here fails before the server is bothered.
    let login = match &place.login {
        None => None,
        Some(Login { username, password_file }) => {
            Some((username.as_str(), channel::password(password_file).await?))
        }
    };
    let secrets = login.as_ref().map(|(username, password)| Secrets::of_login(username, password));
    let opened = open(place, time, secrets.as_ref(), doing).await;
    let mut connection = opened.map_err(|failure| failure.told(&secrets.unwrap_or_default()))?;
    if let Some((username, password)) = login
        && let Err(failure) = connection.log_in(username, &password, doing).await
    {
        leave(connection).await;
        return Err(failure);
    }
    Ok(connection)
}

/// Says goodbye, briefly.
pub(crate) async fn leave(mut connection: Connection) {
    let _ = tokio::time::timeout(GOODBYE, connection.quit()).await;
}

/// A stream to a server.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// Connects, encrypts and says EHLO, which a login requires (`secrets`).
async fn open(
    place: &Place,
    time: Duration,
    secrets: Option<&Secrets>,
    doing: &Doing,
) -> Result<Connection, Failure> {
    let needs_extensions = secrets.is_some();
    let secrets = secrets.cloned().unwrap_or_default();
    let Place { server, security, allow_plaintext, ca_file, .. } = place;
    let tls = match security {
        Security::Plaintext => None,
        Security::Tls | Security::StartTls => Some(tls(ca_file.clone(), server).await?),
    };
    doing.set("connecting");
    let (stream, name) =
        tokio::join!(server.connect(security.port(), time), own_name(place.helo.as_deref()));
    let stream = stream.map_err(|error| Failure::temporary(words(&error_chain(&error))))?;
    let lost = |error| Failure::lost(&error);
    let peer = stream.peer_addr().map_err(lost)?;
    stream.set_nodelay(true).map_err(lost)?;
    let local = stream.local_addr().map_err(lost)?;
    let name = name.unwrap_or_else(|| helo::address_literal(local.ip()));
    let connection: Connection = match (security, tls) {
        (Security::Plaintext, _) | (_, None) => {
            if !allow_plaintext && !peer.ip().to_canonical().is_loopback() {
                return Err(Failure::unusable(format!(
                    "{peer} is another machine: without encryption (security = \"none\") it is sent \
                     to only with allow-plaintext = true"
                )));
            }
            SmtpClient::new(Box::new(stream) as Box<dyn Duplex>, name)
        }
        (Security::Tls, Some(tls)) => {
            SmtpClient::new(Box::new(encrypt(stream, tls, doing).await?) as Box<dyn Duplex>, name)
        }
        (Security::StartTls, Some(tls)) => {
            let stream = start_tls(stream, name.clone(), &secrets, doing).await?;
            let stream = encrypt(stream, tls, doing).await?;
            let stream = Box::new(stream) as Box<dyn Duplex>;
            let mut connection = SmtpClient::new(stream, name).with_secrets(secrets);
            // What was offered before the encryption does not count (RFC 3207, 4.2).
            connection.hello(needs_extensions, doing).await?;
            return Ok(connection);
        }
    };
    let mut connection = connection.with_secrets(secrets);
    connection.greeting(doing).await?;
    connection.hello(needs_extensions, doing).await?;
    Ok(connection)
}

/// The name that EHLO announces: the configured one, else this machine's full name, if it has one.
async fn own_name(configured: Option<&str>) -> Option<String> {
    match configured {
        Some(name) => Some(name.to_owned()),
        None => helo::full_host_name().await,
    }
}

/// Agrees with a server on TLS, and returns the stream at the point where it begins.
///
/// # Errors
/// If the server refuses or does not offer it.
pub async fn start_tls<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    name: String,
    secrets: &Secrets,
    doing: &Doing,
) -> Result<S, Failure> {
    let mut client = SmtpClient::new(stream, name).with_secrets(secrets.clone());
    client.greeting(doing).await?;
    client.hello(true, doing).await?;
    client.start_tls(doing).await
}

/// How a server shows who it is, with the name that it has to have.
struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// Prepares the encryption; the files of roots are read, which can take its time.
async fn tls(ca_file: CaFile, server: &Server) -> Result<Tls, Failure> {
    let unusable = |error: &dyn fmt::Display| Failure::unusable(error.to_string());
    let name = ServerName::try_from(server.host().to_owned()).map_err(|error| unusable(&error))?;
    let config = tokio::task::spawn_blocking(move || tls::client_config(&ca_file));
    let config = config.await.map_err(|error| Failure::temporary(error.to_string()))?;
    let config = config.map_err(|error| Failure::unusable(words(&error.to_string())))?;
    Ok(Tls { config: Arc::new(config), name })
}

async fn encrypt(
    stream: TcpStream,
    Tls { config, name }: Tls,
    doing: &Doing,
) -> Result<TlsStream<TcpStream>, Failure> {
    doing.set("agreeing on the encryption (TLS)");
    let host = name.to_str().into_owned();
    TlsConnector::from(config).connect(name, stream).await.map_err(|error| {
        match TlsError::of_io(&error, &host) {
            Some(TlsError { kind: TlsErrorKind::NotTls, .. }) => Failure::unusable(
                "the server does not answer with TLS: is it the right port, or security = \
                 \"starttls\"?",
            ),
            Some(error) if error.kind == TlsErrorKind::Transient => {
                Failure::temporary(error.to_string())
            }
            Some(error) => Failure::unusable(error.to_string()),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                Failure::temporary("the server closed the connection before it was encrypted (TLS)")
            }
            None => Failure::lost(&error),
        }
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What `start_tls` does with a server that says these things, one after the other.
    async fn ask(said: &'static [&'static str]) -> Result<(), Failure> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = [0; 1024];
            for reply in said {
                stream.write_all(reply.as_bytes()).await.unwrap();
                let _ = stream.read(&mut heard).await;
            }
        });
        let stream = TcpStream::connect(address).await.unwrap();
        start_tls(stream, "[127.0.0.1]".to_owned(), &Secrets::default(), &Doing::default())
            .await
            .map(drop)
    }

    #[tokio::test]
    async fn encryption_is_agreed_on_or_nothing_is_sent() {
        let right = &["220 hi\r\n", "250-me\r\n250 STARTTLS\r\n", "220 go\r\n"];
        assert_eq!(ask(right).await, Ok(()));
        let wrong: [(&'static [&'static str], &str); 6] = [
            (&["220 hi\r\n", "250 STARTTLS\r\n"], "the server offers no STARTTLS"),
            (&["220 hi\r\n", "250-me\r\n250 SIZE\r\n"], "the server offers no STARTTLS"),
            (&["220 hi\r\n", "250-me\r\n250 STARTTLS\r\n", "454 no\r\n"], "454 no"),
            (
                &["220 hi\r\n", "250-me\r\n250 STARTTLS\r\n", "220 go\r\n250 AUTH PLAIN\r\n"],
                "something was said between",
            ),
            (&["554 never\r\n"], "554 never"),
            (&["HTTP/1.1 400\r\n"], "the server does not speak SMTP"),
        ];
        for (said, why) in wrong {
            let failure = ask(said).await.unwrap_err();
            assert!(failure.words.starts_with(why), "{failure}");
        }
    }
}
