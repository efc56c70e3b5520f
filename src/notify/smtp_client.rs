//! The client's side of an SMTP dialogue (RFC 5321) over any stream: greeting, EHLO, STARTTLS
//! (RFC 3207), AUTH (RFC 4954), and one mail at a time.
//!
//! Accepts replies without text, keywords in any case and lines that end in a bare LF. Limits the length
//! of a line and the total size of all replies. The caller limits the time.

use std::fmt;
use std::sync::Arc;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::notify::address::EmailAddress;
use crate::notify::outcome::{Failure, printable};
use crate::secret::{Secret, Secrets};

/// Maximum length of a reply line, in bytes. RFC 5321, 4.5.3.1.5 allows 512, but some send more.
const MAX_LINE: usize = 64 << 10;

/// Maximum number of bytes received per connection.
const MAX_RECEIVED: usize = 1 << 20;

/// Maximum length of a command without its line end, in bytes (RFC 5321, 4.5.3.1.4).
const MAX_COMMAND: usize = 510;

/// The current step of sending; a timeout reports it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SmtpStage {
    #[default]
    ReadingFiles,
    Connecting,
    TlsHandshake,
    Greeting,
    Ehlo,
    StartTls,
    Login,
    MailFrom,
    RcptTo,
    Data,
    /// From the first byte of the mail to the reply to its end. The server may have accepted the mail
    /// if the dialogue ends here.
    Transfer,
}

impl fmt::Display for SmtpStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadingFiles => "reading the files that it needs",
            Self::Connecting => "connecting",
            Self::TlsHandshake => "agreeing on the encryption (TLS)",
            Self::Greeting => "waiting for the server's greeting",
            Self::Ehlo => "waiting for the reply to EHLO",
            Self::StartTls => "waiting for the reply to STARTTLS",
            Self::Login => "logging in",
            Self::MailFrom => "waiting for the reply to MAIL",
            Self::RcptTo => "waiting for the reply to RCPT",
            Self::Data => "waiting for the reply to DATA",
            Self::Transfer => {
                "waiting until the mail is taken, which it may be, although the server does not say so"
            }
        })
    }
}

/// A stage that outlives a dialogue which a timeout cancels.
pub type SharedStage = Arc<Mutex<SmtpStage>>;

#[derive(Debug)]
struct Reply {
    code: u16,
    lines: Vec<String>,
}

impl Reply {
    fn is_positive(&self) -> bool {
        self.code / 100 == 2
    }
}

/// Returns the code, whether another line follows, and the text (RFC 5321, 4.2). The text may be
/// missing.
fn parse_line(line: &[u8]) -> Option<(u16, bool, &[u8])> {
    let (code, rest) = line.split_at_checked(3)?;
    let code =
        std::str::from_utf8(code).ok().filter(|code| code.bytes().all(|b| b.is_ascii_digit()));
    let code = code?.parse().ok().filter(|code| (200..600).contains(code))?;
    match rest.split_first() {
        None => Some((code, false, rest)),
        Some((b'-', text)) => Some((code, true, text)),
        Some((b' ' | b'\t', text)) => Some((code, false, text)),
        Some(_) => None,
    }
}

/// An SMTP dialogue over one connection.
pub struct SmtpClient<S> {
    stream: S,
    /// The name or address literal that EHLO announces.
    helo: String,
    secrets: Secrets,
    stage: SharedStage,
    /// Bytes received and not yet read as a reply.
    unread: Vec<u8>,
    /// Remaining bytes of `MAX_RECEIVED`.
    allowance: usize,
    /// Keywords of the reply to EHLO with their parameters.
    extensions: Vec<String>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> SmtpClient<S> {
    /// Creates a client that announces itself as `helo`. No message contains `secrets`, also before
    /// the login: the server may know them from an earlier connection.
    pub fn new(stream: S, helo: String, secrets: Secrets, stage: SharedStage) -> Self {
        Self {
            stream,
            helo,
            secrets,
            stage,
            unread: Vec::new(),
            allowance: MAX_RECEIVED,
            extensions: Vec::new(),
        }
    }

    fn enter(&self, stage: SmtpStage) {
        *self.stage.lock() = stage;
    }

    /// Reads the greeting of the server, which may refuse the connection.
    pub async fn greeting(&mut self) -> Result<(), Failure> {
        self.enter(SmtpStage::Greeting);
        let greeting = self.read_reply().await?;
        self.expect_positive(&greeting, Failure::channel_broken)
    }

    /// Sends EHLO, or HELO if the server rejects EHLO (RFC 5321, 3.2) and no extension is needed.
    pub async fn hello(&mut self, needs_extensions: bool) -> Result<(), Failure> {
        self.enter(SmtpStage::Ehlo);
        self.extensions.clear();
        let reply = self.command(&format!("EHLO {}", self.helo)).await?;
        let Err(rejected) = self.expect_positive(&reply, Failure::channel_broken) else {
            // The first line is the server's name.
            self.extensions = reply.lines.into_iter().skip(1).collect();
            return Ok(());
        };
        if reply.code / 100 == 5 && !needs_extensions {
            let reply = self.command(&format!("HELO {}", self.helo)).await;
            if reply.is_ok_and(|reply| reply.is_positive()) {
                return Ok(());
            }
        }
        Err(rejected)
    }

    /// Returns the parameters of each line that offers an extension.
    fn extension(&self, keyword: &str) -> impl Iterator<Item = &str> {
        self.extensions.iter().filter_map(move |line| {
            // `AUTH=LOGIN` is how some offered it before RFC 2554.
            let end = line.find(|c: char| c.is_whitespace() || c == '=').unwrap_or(line.len());
            let (name, parameters) = line.split_at(end);
            name.eq_ignore_ascii_case(keyword).then(|| parameters.get(1..).unwrap_or_default())
        })
    }

    /// Returns the maximum size of a mail in bytes, if the server announces one (RFC 1870).
    pub fn max_size(&self) -> Option<u64> {
        let size = self.extension("SIZE").find_map(|size| size.trim().parse().ok());
        size.filter(|size| *size > 0)
    }

    /// Requests STARTTLS after EHLO. Returns the stream at the point where TLS begins.
    ///
    /// # Errors
    /// The server refuses, or sent more than its reply: the rest could be taken for encrypted text.
    pub async fn start_tls(mut self) -> Result<S, Failure> {
        if self.extension("STARTTLS").next().is_none() {
            self.quit().await;
            return Err(Failure::channel_broken(
                "the server offers no STARTTLS, and without encryption nothing is sent to it",
            ));
        }
        self.enter(SmtpStage::StartTls);
        let reply = self.command("STARTTLS").await?;
        self.expect_positive(&reply, Failure::channel_broken)?;
        if reply.code != 220 {
            return Err(Failure::channel_broken(format!(
                "STARTTLS is answered with {}",
                reply.code
            )));
        }
        if !self.unread.is_empty() {
            return Err(Failure::channel_broken(
                "something was said between STARTTLS and the encryption",
            ));
        }
        Ok(self.stream)
    }

    /// Logs in with AUTH PLAIN (RFC 4616), or AUTH LOGIN if the server does not offer PLAIN.
    pub async fn log_in(&mut self, username: &str, password: &Secret) -> Result<(), Failure> {
        self.enter(SmtpStage::Login);
        let password = password.reveal();
        let offered: Vec<_> = self.extension("AUTH").flat_map(str::split_whitespace).collect();
        let is_offered = |name: &str| offered.iter().any(|one| one.eq_ignore_ascii_case(name));
        let (plain, login) = (is_offered("PLAIN"), is_offered("LOGIN"));
        let mut refused = None;
        if plain {
            let response = BASE64_STANDARD.encode(format!("\0{username}\0{password}"));
            let initial = format!("AUTH PLAIN {response}");
            let fits = initial.len() <= MAX_COMMAND;
            let command = if fits { &initial } else { "AUTH PLAIN" };
            let reply = self.authenticate(command, &[response]).await?;
            // Some servers offer mechanisms that they do not implement.
            let may_try_login = reply.code == 504 && login;
            match self.expect_login(&reply) {
                Err(failure) if may_try_login => refused = Some(failure),
                outcome => return outcome,
            }
        }
        if login {
            let responses = [username, password].map(|text| BASE64_STANDARD.encode(text));
            let reply = self.authenticate("AUTH LOGIN", &responses).await?;
            return self.expect_login(&reply);
        }
        let neither =
            || Failure::channel_broken("the server offers neither AUTH PLAIN nor AUTH LOGIN");
        Err(refused.unwrap_or_else(neither))
    }

    /// Answers the prompts in order; their text is not standardised.
    async fn authenticate(
        &mut self,
        command: &str,
        responses: &[String],
    ) -> Result<Reply, Failure> {
        let mut reply = self.command(command).await?;
        for response in responses {
            if reply.code != 334 {
                return Ok(reply);
            }
            reply = self.command(response).await?;
        }
        // Too many prompts: `*` cancels (RFC 4954, 4).
        if reply.code == 334 { self.command("*").await } else { Ok(reply) }
    }

    /// Sends MAIL, and RCPT for each recipient. Returns the rejected recipients.
    pub async fn begin_mail(
        &mut self,
        from: &EmailAddress,
        to: &[EmailAddress],
    ) -> Result<Vec<(String, Failure)>, Failure> {
        self.enter(SmtpStage::MailFrom);
        let reply = self.command(&format!("MAIL FROM:<{from}>")).await?;
        self.expect_positive(&reply, Failure::channel_broken)?;
        self.enter(SmtpStage::RcptTo);
        let mut refused = Vec::new();
        for recipient in to {
            let reply = self.command(&format!("RCPT TO:<{recipient}>")).await?;
            let accepted = self.expect_positive(&reply, Failure::rejected);
            let Err(failure) = accepted else { continue };
            // The server closes the connection (RFC 5321, 3.8).
            if reply.code == 421 {
                return Err(failure);
            }
            refused.push((recipient.to_string(), failure));
        }
        Ok(refused)
    }

    /// Sends the content after [`Self::begin_mail`].
    pub async fn send_content(&mut self, mail: &[u8]) -> Result<(), Failure> {
        self.enter(SmtpStage::Data);
        let reply = self.command("DATA").await?;
        if reply.code != 354 {
            self.expect_positive(&reply, Failure::rejected)?;
            return Err(self.unexpected(&reply));
        }
        self.enter(SmtpStage::Transfer);
        let reply = self.exchange(&dot_stuffed(mail)).await;
        let reply = reply.map_err(|failure| Failure::unconfirmed(failure.message))?;
        match reply.code / 100 {
            3 => Err(Failure::unconfirmed(self.unexpected(&reply).message)),
            _ => self.expect_positive(&reply, Failure::rejected),
        }
    }

    /// Sends QUIT, which also cancels an unfinished mail (RFC 5321, 4.1.1.10). Ignores the reply.
    pub async fn quit(&mut self) {
        let _ = self.command("QUIT").await;
    }

    async fn command(&mut self, command: &str) -> Result<Reply, Failure> {
        self.exchange(format!("{command}\r\n").as_bytes()).await
    }

    async fn exchange(&mut self, bytes: &[u8]) -> Result<Reply, Failure> {
        // A server may reply and close before it has read everything: prefer its reply to the write
        // error.
        let written = match self.stream.write_all(bytes).await {
            Ok(()) => self.stream.flush().await,
            failed => failed,
        };
        let reply = self.read_reply().await;
        match written {
            Err(error) if reply.is_err() => Err(Failure::connection_lost(&error)),
            _ => reply,
        }
    }

    async fn read_reply(&mut self) -> Result<Reply, Failure> {
        let mut lines = Vec::new();
        loop {
            let line = self.read_line().await?;
            let line = line.trim_ascii_end();
            let Some((code, is_continued, text)) = parse_line(line) else {
                let line = String::from_utf8_lossy(line);
                let message = format!("the server does not speak SMTP: {line}");
                return Err(Failure::transient(message).redacted(&self.secrets));
            };
            lines.push(String::from_utf8_lossy(text).into_owned());
            if !is_continued {
                return Ok(Reply { code, lines });
            }
        }
    }

    /// Reads a line with its end, which may be missing if the server closes after it.
    async fn read_line(&mut self) -> Result<Vec<u8>, Failure> {
        loop {
            let end = memchr::memchr(b'\n', &self.unread);
            let length = end.map_or(self.unread.len(), |end| end + 1);
            if length > MAX_LINE.min(self.allowance) {
                return Err(Failure::transient("the server says too much"));
            }
            if end.is_some() {
                self.allowance -= length;
                return Ok(self.unread.drain(..length).collect());
            }
            let received = self.stream.read_buf(&mut self.unread).await;
            if received.map_err(|error| Failure::connection_lost(&error))? == 0 {
                if !self.unread.is_empty() {
                    return Ok(std::mem::take(&mut self.unread));
                }
                return Err(Failure::connection_lost(&std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    fn expect_positive(
        &self,
        reply: &Reply,
        permanent: fn(String) -> Failure,
    ) -> Result<(), Failure> {
        match reply.code / 100 {
            2 => Ok(()),
            5 => Err(permanent(self.text_of(reply))),
            4 => Err(Failure::transient(self.text_of(reply))),
            _ => Err(self.unexpected(reply)),
        }
    }

    /// Reports a refused login by its code and enhanced status only: the text may repeat the login.
    fn expect_login(&self, reply: &Reply) -> Result<(), Failure> {
        let status = reply.lines.first().and_then(|line| line.split_whitespace().next());
        let is_status =
            |text: &&str| text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let lines = status.filter(is_status).map(str::to_owned).into_iter().collect();
        self.expect_positive(&Reply { code: reply.code, lines }, Failure::channel_broken).map_err(
            |mut failure| {
                failure.message = format!("the login is refused: {}", failure.message.trim_end());
                failure
            },
        )
    }

    fn text_of(&self, Reply { code, lines }: &Reply) -> String {
        printable(&format!("{code} {}", self.secrets.withhold(&lines.join(" "))))
    }

    fn unexpected(&self, reply: &Reply) -> Failure {
        Failure::transient(format!("unexpected reply: {}", self.text_of(reply)))
    }
}

/// Returns the mail as DATA carries it: with doubled leading dots and the final dot.
fn dot_stuffed(mail: &[u8]) -> Vec<u8> {
    let mut stuffed = Vec::with_capacity(mail.len() + mail.len() / 64 + 8);
    for line in mail.split_inclusive(|byte| *byte == b'\n') {
        if line.starts_with(b".") {
            stuffed.push(b'.');
        }
        stuffed.extend_from_slice(line);
    }
    if !stuffed.ends_with(b"\r\n") {
        stuffed.extend_from_slice(b"\r\n");
    }
    stuffed.extend_from_slice(b".\r\n");
    stuffed
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::task::JoinHandle;

    use super::*;
    use crate::notify::outcome::FailureKind;

    /// A client of a server that sends `script` in pieces of `size` bytes, and the text that the server
    /// receives.
    fn client_of(script: &str, size: usize) -> (SmtpClient<DuplexStream>, JoinHandle<String>) {
        let (server, stream) = duplex(size);
        let (mut reader, mut writer) = tokio::io::split(server);
        let script = script.to_owned();
        let heard = tokio::spawn(async move {
            let mut heard = Vec::new();
            let send = async {
                let _ = writer.write_all(script.as_bytes()).await;
                let _ = writer.shutdown().await;
            };
            let ((), read) = tokio::join!(send, reader.read_to_end(&mut heard));
            read.unwrap();
            String::from_utf8(heard).unwrap()
        });
        (client(stream, Secrets::default()), heard)
    }

    fn client(stream: DuplexStream, secrets: Secrets) -> SmtpClient<DuplexStream> {
        SmtpClient::new(stream, "[192.0.2.1]".to_owned(), secrets, SharedStage::default())
    }

    fn address(text: &str) -> EmailAddress {
        text.parse().unwrap()
    }

    /// Sends a mail to two recipients; returns the rejected ones.
    async fn send(
        client: &mut SmtpClient<DuplexStream>,
        needs_extensions: bool,
    ) -> Result<Vec<(String, Failure)>, Failure> {
        client.greeting().await?;
        client.hello(needs_extensions).await?;
        let to = [address("b@example.org"), address("c@example.org")];
        let refused = client.begin_mail(&address("a@example.org"), &to).await?;
        client.send_content(b"Subject: x\r\n\r\ntext\r\n").await?;
        Ok(refused)
    }

    /// Returns the outcome of [`send`], which must not depend on the size of packets.
    async fn outcome_of(script: &str) -> Result<Vec<(String, Failure)>, Failure> {
        let mut outcomes = Vec::new();
        for size in [1, 7, 1024] {
            let (mut client, _) = client_of(script, size);
            outcomes.push(send(&mut client, false).await);
        }
        outcomes.dedup();
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
        outcomes.swap_remove(0)
    }

    #[test]
    fn parses_reply_lines_without_text() {
        let parsed = |line: &'static str| parse_line(line.as_bytes());
        for (line, expected) in [
            ("250", (250, false, "")),
            ("250-", (250, true, "")),
            ("250 ", (250, false, "")),
            ("250 ok", (250, false, "ok")),
            ("250-ok", (250, true, "ok")),
            ("250\tok", (250, false, "ok")),
            ("354  go", (354, false, " go")),
        ] {
            let (code, is_continued, text) = expected;
            assert_eq!(parsed(line), Some((code, is_continued, text.as_bytes())), "{line:?}");
        }
        for line in
            ["", "2", "25", "ok", "2500 ok", "250ok", "+25 ok", "150 ok", "600 no", "HTTP/1.1"]
        {
            assert_eq!(parsed(line), None, "{line:?}");
        }
    }

    #[tokio::test]
    async fn accepts_replies_without_text_and_with_bare_line_feeds() {
        for script in [
            "220\r\n250\r\n250\r\n250\r\n250\r\n354\r\n250\r\n",
            "220-\r\n220\r\n250-\r\n250\r\n250-\r\n250\r\n250\r\n251\r\n354-\r\n354\r\n250-\r\n250\r\n",
            "220\r\n250\r\n250\r\n250\r\n250\r\n354\r\n250 ok",
            "220 hi\n250-mx\n250 SIZE\n250 ok\n252 perhaps\n250 ok\n354 go\n250 \u{53d6}\n",
        ] {
            assert_eq!(outcome_of(script).await, Ok(Vec::new()), "{script:?}");
        }
    }

    #[tokio::test]
    async fn ignores_white_space_among_extensions() {
        for line in ["250- \n", "250-\u{a0}\r\n", "250-\t \r\n", "250-\r\n", "250-\u{3000}\r\n"] {
            let script = format!("220 hi\r\n250-mx\r\n{line}250 size 7 \r\n");
            let (mut client, _) = client_of(&script, 64);
            client.greeting().await.unwrap();
            client.hello(true).await.unwrap();
            assert_eq!(client.max_size(), Some(7), "{line:?}");
        }
    }

    #[tokio::test]
    async fn reads_extensions_in_any_case_from_the_second_line_on() {
        for (offered, size, mechanisms) in [
            (
                "250-mx\r\n250-Size 35882577\r\n250 auth plain LOGIN",
                Some(35_882_577),
                "plain LOGIN",
            ),
            ("250-mx\r\n250-SIZE\r\n250 AUTH=LOGIN PLAIN", None, "LOGIN PLAIN"),
            ("250-mx\r\n250-SIZE 0\r\n250-AUTH CRAM-MD5\r\n250 AUTH=LOGIN", None, "CRAM-MD5 LOGIN"),
            ("250-SIZE 7\r\n250-XSIZE 7\r\n250 XAUTH LOGIN", None, ""),
            ("250-AUTH LOGIN\r\n250 SIZE x", None, ""),
            ("250", None, ""),
        ] {
            let (mut client, _) = client_of(&format!("{offered}\r\n"), 64);
            client.hello(true).await.unwrap();
            assert_eq!(client.max_size(), size, "{offered}");
            let parameters: Vec<_> = client.extension("AUTH").collect();
            assert_eq!(parameters.join(" "), mechanisms, "{offered}");
        }
    }

    #[tokio::test]
    async fn falls_back_to_helo() {
        let script = "220 hi\r\n502 what\r\n250 hello\r\n250 ok\r\n250\r\n250\r\n354\r\n250\r\n";
        assert_eq!(outcome_of(script).await, Ok(Vec::new()));
        // The reply to EHLO is reported if HELO fails, too.
        for script in ["220 hi\r\n550 not you\r\n504 nor now\r\n", "220 hi\r\n550 not you\r\n"] {
            let failure = outcome_of(script).await.unwrap_err();
            assert_eq!(failure, Failure::channel_broken("550 not you"));
        }
        let (mut client, heard) = client_of("220 hi\r\n550 not you\r\n250 hello\r\n", 64);
        assert!(send(&mut client, true).await.is_err());
        drop(client);
        assert_eq!(heard.await.unwrap(), "EHLO [192.0.2.1]\r\n");
    }

    #[tokio::test]
    async fn the_code_and_the_stage_determine_the_kind_of_failure() {
        use FailureKind::{ChannelBroken, Rejected, Transient, Unconfirmed};
        let begun = "220\r\n250\r\n250\r\n250\r\n250\r\n";
        for (script, kind, message) in [
            ("554 no\r\n".to_owned(), ChannelBroken, "554 no"),
            ("421 busy\r\n".to_owned(), Transient, "421 busy"),
            ("354 go\r\n".to_owned(), Transient, "unexpected reply: 354 go"),
            ("HTTP/1.1 400\r\n".to_owned(), Transient, "the server does not speak SMTP: HTTP"),
            ("220\r\n421 busy\r\n".to_owned(), Transient, "421 busy"),
            ("220\r\n250\r\n550 not from you\r\n".to_owned(), ChannelBroken, "550 not from you"),
            // The server closes before it replies for the other recipient.
            ("220\r\n250\r\n250\r\n421 busy\r\n".to_owned(), Transient, "421 busy"),
            (format!("{begun}250 now?\r\n"), Transient, "unexpected reply: 250 now?"),
            (format!("{begun}554 no\r\n"), Rejected, "554 no"),
            (format!("{begun}354\r\n452 full\r\n"), Transient, "452 full"),
            (format!("{begun}354\r\n552-too\r\n552 large\r\n"), Rejected, "552 too large"),
            (format!("{begun}354\r\n354 more?\r\n"), Unconfirmed, "unexpected reply: 354 more?"),
            (
                format!("{begun}354\r\nwhat\r\n"),
                Unconfirmed,
                "the server does not speak SMTP: what",
            ),
            (format!("{begun}354\r\n"), Unconfirmed, "the server closed the connection"),
            (format!("{begun}354\r\n250-"), Unconfirmed, "the server closed the connection"),
            (format!("{begun}354\r\n25"), Unconfirmed, "the server does not speak SMTP: 25"),
        ] {
            let failure = outcome_of(&script).await.unwrap_err();
            assert_eq!(failure.kind, kind, "{script:?}: {failure}");
            assert!(failure.message.starts_with(message), "{script:?}: {failure}");
        }
        let refused = outcome_of("220\r\n250\r\n250\r\n550 who\r\n250\r\n354\r\n250\r\n").await;
        assert_eq!(refused.unwrap(), [("b@example.org".to_owned(), Failure::rejected("550 who"))]);
    }

    #[tokio::test]
    async fn reads_a_rejection_sent_before_the_end_of_the_mail() {
        let (mut server, stream) = duplex(64);
        tokio::spawn(async move {
            server.write_all(b"354 go\r\n552 too large\r\n").await.unwrap();
            server.read_exact(&mut [0; 16]).await.unwrap();
        });
        let mut client = client(stream, Secrets::default());
        let sent = client.send_content(&[b'x'; 10_000]).await;
        assert_eq!(sent, Err(Failure::rejected("552 too large")));
    }

    #[tokio::test]
    async fn withholds_a_password_that_the_server_sends_before_the_login() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hush").unwrap();
        let secrets = Secrets::of_login("me", &Secret::read(file.path()).unwrap());
        for script in ["hush, and no SMTP\r\n", "554 hush\r\n", "220 hi\r\n550 hush\r\n"] {
            let (client, _) = client_of(script, 1024);
            let mut client = SmtpClient { secrets: secrets.clone(), ..client };
            let failure = send(&mut client, true).await.unwrap_err();
            assert!(!failure.message.contains("hush"), "{failure:?}");
        }
    }

    #[tokio::test]
    async fn limits_the_size_of_replies() {
        let line = format!("220 {}", "x".repeat(MAX_LINE));
        let lines = format!("250-{}\r\n", "x".repeat(1000)).repeat(MAX_RECEIVED / 1000);
        for script in [line, format!("220 hi\r\n{lines}")] {
            let (mut client, _) = client_of(&script, 1024);
            let failure = send(&mut client, false).await.unwrap_err();
            assert_eq!(failure, Failure::transient("the server says too much"));
        }
    }

    #[test]
    fn doubles_leading_dots() {
        for (mail, stuffed) in [
            ("a\r\n", "a\r\n.\r\n"),
            ("a", "a\r\n.\r\n"),
            ("", "\r\n.\r\n"),
            (".\r\n..\r\na.\r\n", "..\r\n...\r\na.\r\n.\r\n"),
            ("a\n.\nb", "a\n..\nb\r\n.\r\n"),
        ] {
            assert_eq!(dot_stuffed(mail.as_bytes()), stuffed.as_bytes(), "{mail:?}");
        }
    }
}
