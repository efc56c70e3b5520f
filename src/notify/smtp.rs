//! A connection to a mail server (RFC 5321): with TLS from the first byte (RFC 8314), after STARTTLS
//! (RFC 3207), or without, and logged in.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::client::HostPort;
use crate::http::tls;
use crate::http::tls::CaFile;
use crate::http::tls_error::{TlsError, TlsErrorKind};
use crate::notify::helo;
use crate::notify::outcome::{Failure, printable, read_password};
use crate::notify::smtp_client::{SharedStage, SmtpClient, SmtpStage};
use crate::secret::Secrets;
use crate::text::error_chain;

/// Maximum wait for the reply to QUIT.
const QUIT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Security {
    /// TLS from the first byte.
    Tls,
    /// TLS after STARTTLS, which is required.
    StartTls,
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
    pub(crate) fn default_port(self) -> u16 {
        match self {
            Self::Tls => 465,
            Self::StartTls => 587,
            Self::Plaintext => 25,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Login {
    pub username: String,
    pub password_file: PathBuf,
}

/// The mail server of a channel and how to connect to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RelayConfig {
    pub server: HostPort,
    pub security: Security,
    /// Permits connections without TLS to other machines.
    pub allow_plaintext: bool,
    /// Certificates that are trusted in addition to those of the system.
    pub ca_file: CaFile,
    /// Replaces the name of this machine in EHLO.
    pub helo: Option<String>,
    pub login: Option<Login>,
}

/// A dialogue over a stream with or without TLS.
pub(crate) type Connection = SmtpClient<Box<dyn Duplex>>;

pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// Connects and logs in. The caller bounds the total time; `connect_timeout` bounds the TCP connect.
pub(crate) async fn connect(
    relay: &RelayConfig,
    connect_timeout: Duration,
    stage: &SharedStage,
) -> Result<Connection, Failure> {
    let login = match &relay.login {
        None => None,
        Some(Login { username, password_file }) => {
            Some((username.as_str(), read_password(password_file).await?))
        }
    };
    let secrets = login
        .as_ref()
        .map(|(username, password)| Secrets::of_login(username, password))
        .unwrap_or_default();
    let opened = open(relay, connect_timeout, &secrets, stage).await;
    let mut connection = opened.map_err(|failure| failure.redacted(&secrets))?;
    if let Some((username, password)) = login
        && let Err(failure) = connection.log_in(username, &password).await
    {
        quit(connection).await;
        return Err(failure);
    }
    Ok(connection)
}

pub(crate) async fn quit(mut connection: Connection) {
    let _ = tokio::time::timeout(QUIT_TIMEOUT, connection.quit()).await;
}

/// Connects, agrees on TLS and greets the server.
async fn open(
    relay: &RelayConfig,
    connect_timeout: Duration,
    secrets: &Secrets,
    stage: &SharedStage,
) -> Result<Connection, Failure> {
    let RelayConfig { server, security, allow_plaintext, ca_file, .. } = relay;
    let client = |stream: Box<dyn Duplex>, helo| {
        SmtpClient::new(stream, helo, secrets.clone(), stage.clone())
    };
    let needs_extensions = relay.login.is_some();
    let tls = match security {
        Security::Plaintext => None,
        Security::Tls | Security::StartTls => Some(TlsSetup::prepare(ca_file, server).await?),
    };
    *stage.lock() = SmtpStage::Connecting;
    let (stream, name) = tokio::join!(
        server.connect(security.default_port(), connect_timeout),
        own_name(relay.helo.as_deref())
    );
    let stream = stream.map_err(|error| Failure::transient(printable(&error_chain(&error))))?;
    let lost = |error| Failure::connection_lost(&error);
    let peer = stream.peer_addr().map_err(lost)?;
    stream.set_nodelay(true).map_err(lost)?;
    let local = stream.local_addr().map_err(lost)?;
    let name = name.unwrap_or_else(|| helo::address_literal(local.ip()));
    let stream: Box<dyn Duplex> = match (security, tls) {
        (Security::Plaintext, _) | (_, None) => {
            if !allow_plaintext && !peer.ip().to_canonical().is_loopback() {
                return Err(Failure::channel_broken(format!(
                    "{peer} is another machine: without encryption (security = \"none\") it is sent \
                     to only with allow-plaintext = true"
                )));
            }
            Box::new(stream)
        }
        (Security::Tls, Some(tls)) => Box::new(tls.handshake(stream, stage).await?),
        (Security::StartTls, Some(tls)) => {
            let plain = SmtpClient::new(stream, name.clone(), secrets.clone(), stage.clone());
            let stream = start_tls(plain).await?;
            let mut connection = client(Box::new(tls.handshake(stream, stage).await?), name);
            // Extensions offered before TLS do not count (RFC 3207, 4.2).
            connection.hello(needs_extensions).await?;
            return Ok(connection);
        }
    };
    let mut connection = client(stream, name);
    connection.greeting().await?;
    connection.hello(needs_extensions).await?;
    Ok(connection)
}

/// Returns the name for EHLO: the configured one, or this machine's full name, if it has one.
async fn own_name(configured: Option<&str>) -> Option<String> {
    match configured {
        Some(name) => Some(name.to_owned()),
        None => helo::full_host_name().await,
    }
}

/// Agrees on STARTTLS. Returns the stream at the point where TLS begins.
pub async fn start_tls<S: AsyncRead + AsyncWrite + Unpin>(
    mut client: SmtpClient<S>,
) -> Result<S, Failure> {
    client.greeting().await?;
    client.hello(true).await?;
    client.start_tls().await
}

struct TlsSetup {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

impl TlsSetup {
    /// Reads the trusted certificates on a blocking thread.
    async fn prepare(ca_file: &CaFile, server: &HostPort) -> Result<Self, Failure> {
        let server_name = ServerName::try_from(server.host().to_owned())
            .map_err(|error| Failure::channel_broken(error.to_string()))?;
        let ca_file = ca_file.clone();
        let config = tokio::task::spawn_blocking(move || tls::client_config(&ca_file))
            .await
            .map_err(|error| Failure::transient(error.to_string()))?
            .map_err(|error| Failure::channel_broken(printable(&error.to_string())))?;
        Ok(Self { config: Arc::new(config), server_name })
    }

    async fn handshake(
        self,
        stream: TcpStream,
        stage: &SharedStage,
    ) -> Result<TlsStream<TcpStream>, Failure> {
        *stage.lock() = SmtpStage::TlsHandshake;
        let host = self.server_name.to_str().into_owned();
        let connector = TlsConnector::from(self.config);
        connector.connect(self.server_name, stream).await.map_err(|error| {
            match TlsError::of_io(&error, &host) {
                Some(TlsError { kind: TlsErrorKind::NotTls, .. }) => Failure::channel_broken(
                    "the server does not answer with TLS: is it the right port, or security = \
                     \"starttls\"?",
                ),
                Some(error) if error.kind == TlsErrorKind::Transient => {
                    Failure::transient(error.to_string())
                }
                Some(error) => Failure::channel_broken(error.to_string()),
                None if error.kind() == io::ErrorKind::UnexpectedEof => Failure::transient(
                    "the server closed the connection before it was encrypted (TLS)",
                ),
                None => Failure::connection_lost(&error),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Runs `start_tls` with a server that sends these replies in turn.
    async fn ask(replies: &'static [&'static str]) -> Result<(), Failure> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 1024];
            for reply in replies {
                stream.write_all(reply.as_bytes()).await.unwrap();
                let _ = stream.read(&mut buffer).await;
            }
        });
        let stream = TcpStream::connect(address).await.unwrap();
        let (secrets, stage) = (Secrets::default(), SharedStage::default());
        start_tls(SmtpClient::new(stream, "[127.0.0.1]".to_owned(), secrets, stage)).await.map(drop)
    }

    #[tokio::test]
    async fn requires_starttls_and_nothing_after_it() {
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
        for (replies, why) in wrong {
            let failure = ask(replies).await.unwrap_err();
            assert!(failure.message.starts_with(why), "{failure}");
        }
    }
}
