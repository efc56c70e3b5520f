//! A connection to a mail server (RFC 5321): encrypted from the beginning (RFC 8314), after STARTTLS
//! (RFC 3207), or not at all. Once it stands, lettre speaks.
//!
//! STARTTLS is asked for here, and not by lettre, so that nothing that was said before the encryption
//! can be taken for something that was said within it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use lettre::transport::smtp::authentication::{Credentials, DEFAULT_MECHANISMS};
use lettre::transport::smtp::client::{AsyncSmtpConnection, AsyncTokioStream};
use lettre::transport::smtp::extension::ClientId;
use lettre::transport::smtp::response::{Response, Severity};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::channel::{self, Failure, words};
use crate::client::Server;
use crate::errors::chain;
use crate::http::tls::{self, CaFile};
use crate::http::tls_error::{TlsError, TlsErrorKind};
use crate::secret::{Secret, Secrets};

/// How much a server may say in one connection, in bytes.
const MAX_SAID: u64 = 1 << 20;

/// The longest reply before the encryption, and what is kept of what was said first, in bytes.
const MAX_REPLY: usize = 64 << 10;

/// How long a server is waited for that is only said goodbye to.
const GOODBYE: Duration = Duration::from_secs(1);

/// What a server that was greeted before is taken to say at the beginning of the encryption.
const GREETED: &[u8] = b"220 \r\n";

/// How a connection is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
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
    pub fn port(self) -> u16 {
        match self {
            Self::Tls => 465,
            Self::StartTls => 587,
            Self::Plaintext => 25,
        }
    }
}

/// A user with a file that the password is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The user.
    pub username: String,
    /// Where the password is.
    pub password_file: PathBuf,
}

/// Who is connected to, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The server.
    pub server: Server,
    /// How the connection is protected.
    pub security: Security,
    /// Whether one that is not may lead to another machine.
    pub allow_plaintext: bool,
    /// Certificates that are trusted besides those of the system.
    pub ca_file: CaFile,
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

/// A connection over which mail can be sent.
pub struct Connection {
    /// What lettre has made of it.
    pub inner: AsyncSmtpConnection,
    /// What the server was told, and may repeat.
    pub secrets: Secrets,
    /// What it has said first: its greeting, and what it offers.
    said: Said,
}

/// What a server has said, which lettre does not tell all of.
type Said = Arc<Mutex<String>>;

/// Connects and logs in, which has to be done within `time`, as the caller sees to.
///
/// # Errors
/// If there is nobody, if it is not the one, if it does not encrypt though it has to, or if it does
/// not know us.
pub async fn connect(place: &Place, time: Duration, doing: &Doing) -> Result<Connection, Failure> {
    doing.set("reading the files that it needs");
    // First what can fail without anybody being asked.
    let login = match &place.login {
        None => None,
        Some(Login { username, password_file }) => {
            Some((username.as_str(), channel::password(password_file).await?))
        }
    };
    let login = login.as_ref().map(|(username, password)| (*username, password));
    let stands = open(place, time, doing).await;
    let Stands { stream, peer, first } = stands.map_err(|failure| failure.told(&secrets(login)))?;
    greet(stream, peer, first, login, doing).await
}

/// What a server is told of a login, and may repeat.
fn secrets(login: Option<(&str, &Secret)>) -> Secrets {
    login.map(|(username, password)| Secrets::of_login(username, password)).unwrap_or_default()
}

/// A stream to a server.
trait Duplex: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> Duplex for S {}

/// A connection that stands, encrypted as it has to be.
struct Stands {
    stream: Box<dyn Duplex>,
    peer: SocketAddr,
    /// What the server is taken to say first.
    first: &'static [u8],
}

/// Connects and encrypts; a failure still has in it whatever the server has said.
async fn open(place: &Place, time: Duration, doing: &Doing) -> Result<Stands, Failure> {
    let Place { server, security, allow_plaintext, ca_file, .. } = place;
    let tls = match security {
        Security::Plaintext => None,
        Security::Tls | Security::StartTls => Some(tls(ca_file.clone(), server).await?),
    };
    doing.set("connecting");
    let stream = server.connect(security.port(), time).await;
    let stream = stream.map_err(|error| Failure::temporary(words(&chain(&error))))?;
    let peer = stream.peer_addr().map_err(lost)?;
    let nodelay = stream.set_nodelay(true);
    nodelay.map_err(lost)?;
    let (stream, first): (Box<dyn Duplex>, &[u8]) = match (security, tls) {
        (Security::Plaintext, _) | (_, None) => {
            if !allow_plaintext && !peer.ip().to_canonical().is_loopback() {
                return Err(Failure::unusable(format!(
                    "{peer} is another machine: without encryption (security = \"none\") it is sent \
                     to only with allow-plaintext = true"
                )));
            }
            (Box::new(stream), b"")
        }
        (Security::Tls, Some(tls)) => (Box::new(encrypt(stream, tls, doing).await?), b""),
        (Security::StartTls, Some(tls)) => {
            let stream = start_tls(stream, doing).await?;
            (Box::new(encrypt(stream, tls, doing).await?), GREETED)
        }
    };
    Ok(Stands { stream, peer, first })
}

/// Lets the server at the other end of a stream say who it is, which is taken to have said `first`
/// before, and logs in as a user with a password, if there is one.
///
/// # Errors
/// If the server speaks no SMTP, or does not know us.
pub async fn greet(
    stream: impl AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
    peer: SocketAddr,
    first: &[u8],
    login: Option<(&str, &Secret)>,
    doing: &Doing,
) -> Result<Connection, Failure> {
    let (said, secrets) = (Said::default(), secrets(login));
    let stream = Box::new(Bounded::new(stream, peer, first, &said));
    match log_in(stream, login, doing).await {
        Ok(inner) => Ok(Connection { inner, secrets, said }),
        Err(failure) => Err(failure.told(&secrets)),
    }
}

/// The same; a failure still has in it whatever the server has said.
async fn log_in(
    stream: Box<dyn AsyncTokioStream>,
    login: Option<(&str, &Secret)>,
    doing: &Doing,
) -> Result<AsyncSmtpConnection, Failure> {
    doing.set("waiting for the server's greeting");
    let hello = hello();
    let mut inner = AsyncSmtpConnection::connect_with_transport(stream, &hello)
        .await
        .map_err(|error| Failure::from_smtp(&error, Failure::unusable))?;
    if let Some((username, password)) = login {
        doing.set("logging in");
        let credentials = Credentials::new(username.to_owned(), password.reveal().to_owned());
        let logged_in = inner.auth(DEFAULT_MECHANISMS, &credentials).await;
        if let Err(error) = logged_in {
            let failure = Failure::from_smtp(&error, Failure::unusable);
            leave(inner).await;
            let said = if error.is_client() {
                "the server offers neither AUTH PLAIN nor AUTH LOGIN".to_owned()
            } else {
                format!("the login is refused: {}", failure.words)
            };
            return Err(Failure { words: said, ..failure });
        }
    }
    Ok(inner)
}

impl Connection {
    /// How large a mail may be for this server, in bytes, if it says so (RFC 1870).
    pub fn max_size(&self) -> Option<u64> {
        max_size(&self.said.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says goodbye. Whether that is heard does not matter.
    pub async fn leave(self) {
        leave(self.inner).await;
    }
}

async fn leave(mut connection: AsyncSmtpConnection) {
    let _ = tokio::time::timeout(GOODBYE, connection.abort()).await;
}

/// The size that is among what a server offers; without one, or with 0, it names no limit.
fn max_size(said: &str) -> Option<u64> {
    let offers = said.lines().filter_map(|line| line.strip_prefix("250")?.get(1..));
    let mut sizes = offers.filter_map(|offer| {
        let (name, size) = offer.split_once(' ')?;
        if name.eq_ignore_ascii_case("SIZE") { size.trim().parse().ok() } else { None }
    });
    sizes.next().filter(|size| *size > 0)
}

impl Failure {
    /// What lettre says of a reply, or of there being none; what a definite refusal means is for
    /// the caller to say, and it is not yet [`told`](Failure::told).
    pub fn from_smtp(error: &lettre::transport::smtp::Error, definite: fn(String) -> Self) -> Self {
        let said = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        match error.status() {
            Some(code) => {
                let said = format!("{code} {said}");
                match code.severity {
                    Severity::PermanentNegativeCompletion => definite(said),
                    _ => Self::temporary(said),
                }
            }
            None if error.is_client() => definite(said),
            None if error.is_response() && said.contains("incomplete") => {
                Self::temporary("the server closed the connection without a reply")
            }
            None if error.is_response() => {
                Self::temporary(format!("what the server says is no SMTP: {said}"))
            }
            None => Self::temporary(format!("the connection failed: {said}")),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn lost(error: io::Error) -> Failure {
    let closed = error.kind() == io::ErrorKind::UnexpectedEof;
    Failure::temporary(if closed {
        "the server closed the connection without a reply".to_owned()
    } else {
        format!("the connection failed: {error}")
    })
}

/// Who we say we are: this machine's name, or nobody in particular.
fn hello() -> ClientId {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_str().unwrap_or_default();
    let fits = !name.is_empty()
        && name.len() <= 255
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.'));
    if fits { ClientId::Domain(name.to_owned()) } else { ClientId::default() }
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
            None => lost(error),
        }
    })
}

/// Asks for TLS, and returns the connection at the place where it begins.
///
/// # Errors
/// If the server does not agree, or says more than that; in its own words, which are not yet
/// [`told`](Failure::told).
pub async fn start_tls<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    doing: &Doing,
) -> Result<S, Failure> {
    let mut said = Vec::new();
    doing.set("waiting for the server's greeting");
    positive(reply(&mut stream, &mut said).await?, Failure::unusable)?;
    doing.set("waiting for the reply to EHLO");
    say(&mut stream, &format!("EHLO {}\r\n", hello())).await?;
    let offers = positive(reply(&mut stream, &mut said).await?, Failure::unusable)?;
    let offered = offers.message().skip(1).any(|line| line.trim().eq_ignore_ascii_case("STARTTLS"));
    if !offered {
        let _ = say(&mut stream, "QUIT\r\n").await;
        return Err(Failure::unusable(
            "the server offers no STARTTLS, and without encryption nothing is sent to it",
        ));
    }
    doing.set("waiting for the reply to STARTTLS");
    say(&mut stream, "STARTTLS\r\n").await?;
    let agreed = reply(&mut stream, &mut said).await?;
    let agreed = positive(agreed, Failure::unusable)?;
    if !agreed.has_code(220) {
        return Err(Failure::unusable(format!("STARTTLS is answered with {}", agreed.code())));
    }
    if said.is_empty() {
        Ok(stream)
    } else {
        Err(Failure::unusable("something was said between STARTTLS and the encryption"))
    }
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), line: &str) -> Result<(), Failure> {
    stream.write_all(line.as_bytes()).await.map_err(lost)
}

fn positive(reply: Response, definite: fn(String) -> Failure) -> Result<Response, Failure> {
    if reply.is_positive() {
        return Ok(reply);
    }
    let said = reply.message().collect::<Vec<_>>().join(" ");
    let said = format!("{} {said}", reply.code());
    match reply.code().severity {
        Severity::PermanentNegativeCompletion => Err(definite(said)),
        _ => Err(Failure::temporary(said)),
    }
}

/// Reads a whole reply; what comes behind it stays in `said`.
async fn reply(
    stream: &mut (impl AsyncRead + Unpin),
    said: &mut Vec<u8>,
) -> Result<Response, Failure> {
    loop {
        if let Some(end) = end_of_reply(said) {
            let reply: Vec<u8> = said.drain(..end).collect();
            let text = String::from_utf8_lossy(&reply);
            return text.parse().map_err(|_| {
                Failure::temporary(format!("what the server says is no SMTP: {text}"))
            });
        }
        if said.len() > MAX_REPLY {
            return Err(Failure::temporary("the server says too much"));
        }
        if stream.read_buf(said).await.map_err(lost)? == 0 {
            return Err(lost(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Where a reply ends: behind the first line that does not say that another follows.
fn end_of_reply(said: &[u8]) -> Option<usize> {
    let mut end = 0;
    for line in said.split_inclusive(|byte| *byte == b'\n') {
        end += line.len();
        if line.ends_with(b"\n") && line.get(3) != Some(&b'-') {
            return Some(end);
        }
    }
    None
}

/// A stream whose other end may say only so much, and what it says is as lettre wants it.
struct Bounded<S> {
    inner: S,
    peer: SocketAddr,
    /// What was said and has not been read.
    unread: Vec<u8>,
    /// The beginning of a line whose end has not come.
    unfinished: Vec<u8>,
    said: Said,
    left: u64,
}

impl<S> Bounded<S> {
    /// `first` is taken to have been said first.
    fn new(inner: S, peer: SocketAddr, first: &[u8], said: &Said) -> Self {
        let (unread, unfinished, said) = (first.to_vec(), Vec::new(), Arc::clone(said));
        Self { inner, peer, unread, unfinished, said, left: MAX_SAID }
    }

    fn take(&mut self, came: &[u8]) {
        self.unfinished.extend_from_slice(came);
        while let Some(end) = memchr::memchr(b'\n', &self.unfinished) {
            let line: Vec<u8> = self.unfinished.drain(..=end).collect();
            self.take_line(&line);
        }
    }

    fn take_line(&mut self, line: &[u8]) {
        let line = readable(line);
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() < MAX_REPLY {
            said.push_str(&line);
        }
        self.unread.extend_from_slice(line.as_bytes());
    }
}

/// A line of a reply as lettre reads it. What is not UTF-8 becomes U+FFFD, as the text of a reply is
/// only for people. White space at its end goes, and the end is CR LF: where there is a text, lettre
/// takes it for granted that there is a word.
fn readable(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    match line.split_at_checked("250-".len()) {
        Some((code, text)) if text.ends_with('\n') => format!("{code}{}\r\n", text.trim_end()),
        _ => line.into_owned(),
    }
}

impl<S> fmt::Debug for Bounded<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bounded").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> AsyncTokioStream for Bounded<S> {
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() {
            let mut piece = [0; 4096];
            let mut piece = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut piece))?;
            let came = piece.filled();
            if came.is_empty() {
                // What has no end is none of lettre's business either, but it is to be told of.
                let rest = std::mem::take(&mut this.unfinished);
                if rest.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                this.take_line(&rest);
                break;
            }
            match this.left.checked_sub(came.len() as u64) {
                Some(left) => this.left = left,
                None => return Poll::Ready(Err(io::Error::other("the server says too much"))),
            }
            this.take(came);
        }
        let now = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.unread.drain(..now).collect::<Vec<_>>());
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_ends_with_its_last_line() {
        let end = |said: &str| end_of_reply(said.as_bytes());
        assert_eq!(end("220 hi\r\n"), Some(8));
        assert_eq!(end("250-a\r\n250 b\r\nrest"), Some(14));
        assert_eq!(end("250-a\r\n"), None);
        assert_eq!(end("250-a\r\n250 b"), None);
        assert_eq!(end(""), None);
        // It is no reply, and is not waited for more of.
        assert_eq!(end("\r\n"), Some(2));
    }

    #[test]
    fn a_size_is_the_one_that_is_offered() {
        assert_eq!(
            max_size("220 hi\r\n250-a\r\n250-SIZE 35882577\r\n250 HELP\r\n"),
            Some(35_882_577)
        );
        assert_eq!(max_size("250-a\r\n250 size 7 \r\n"), Some(7));
        for none in [
            "",
            "220 SIZE 7\r\n250 a\r\n",
            "250 SIZE\r\n",
            "250 SIZE 0",
            "250 SIZE x",
            "250 XSIZE 7",
        ] {
            assert_eq!(max_size(none), None, "{none}");
        }
    }

    #[tokio::test]
    async fn what_is_said_is_utf_8_however_it_comes() {
        let peer = "127.0.0.1:25".parse().unwrap();
        let gbk = b"250 \xd3\xca\xbc\xfe\r\n250 \xe6\x82\xa8\xf0\x9f\x98\x80 \xe6\x82\r\n\xe6";
        let whole = String::from_utf8_lossy(gbk);
        for size in 1..gbk.len() {
            let (mut server, stream) = tokio::io::duplex(size);
            let said = Said::default();
            let mut stream = Bounded::new(stream, peer, b"220 \r\n", &said);
            tokio::spawn(async move { server.write_all(gbk).await });
            let mut read = Vec::new();
            stream.read_to_end(&mut read).await.unwrap();
            assert_eq!(String::from_utf8(read).unwrap(), format!("220 \r\n{whole}"), "{size}");
            assert_eq!(*said.lock().unwrap(), whole);
        }
    }

    #[tokio::test]
    async fn a_line_of_white_space_among_what_is_offered_is_nothing() {
        for line in [
            "250- \n",
            "250- \r\n",
            "250-\u{a0}\r\n",
            "250-\t \r\n",
            "250-\r\n",
            "250 \u{3000}\r\n",
        ] {
            let (server, stream) = tokio::io::duplex(1024);
            let said = format!("220 hi\r\n250-me\r\n{line}250 8BITMIME\r\n");
            let (mut heard, mut says) = tokio::io::split(server);
            says.write_all(said.as_bytes()).await.unwrap();
            tokio::spawn(async move { heard.read_to_end(&mut Vec::new()).await });
            let peer = "127.0.0.1:25".parse().unwrap();
            let greeted = greet(stream, peer, b"", None, &Doing::default()).await;
            assert!(greeted.is_ok(), "{line:?}: {:?}", greeted.err());
        }
    }

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
        start_tls(stream, &Doing::default()).await.map(drop)
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
            (&["HTTP/1.1 400\r\n"], "what the server says is no SMTP"),
        ];
        for (said, why) in wrong {
            let failure = ask(said).await.unwrap_err();
            assert!(failure.words.starts_with(why), "{failure}");
        }
    }
}
