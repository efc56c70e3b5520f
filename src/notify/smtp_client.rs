//! The client's side of an SMTP dialogue (RFC 5321) over any stream: greeting, EHLO, STARTTLS
//! (RFC 3207), AUTH (RFC 4954), and one mail at a time.
//!
//! Lenient where the standard asks for it: a reply needs no text, keywords come in any case, lines
//! may end in a bare LF. Bounded everywhere: the length of a line, and all that a server sends. The
//! caller bounds the time.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::notify::address::EmailAddress;
use crate::notify::channel::{Failure, words};
use crate::notify::smtp::Doing;
use crate::secret::{Secret, Secrets};

/// The longest line of a reply, in bytes. RFC 5321, 4.5.3.1.5 allows 512, but some send more.
const MAX_LINE: usize = 64 << 10;

/// The most that a server may send in one connection, in bytes.
const MAX_RECEIVED: usize = 1 << 20;

/// The longest command line without its end, in bytes (RFC 5321, 4.5.3.1.4).
const MAX_COMMAND: usize = 510;

/// The stage from the first byte of a mail to the reply to its end. A mail may have been accepted if
/// the dialogue breaks off here.
pub(crate) const TRANSFER: &str =
    "waiting until the mail is taken, which it may be, although the server does not say so";

/// A reply: its code and the text of its lines.
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

/// The code, whether another line follows, and the text of a line (RFC 5321, 4.2). The code alone is
/// a line, too.
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
    /// Secrets that the server may know, also from earlier connections. No failure message repeats
    /// them.
    secrets: Secrets,
    /// Bytes received and not yet read as a reply.
    unread: Vec<u8>,
    /// How many more bytes the server may send.
    allowance: usize,
    /// The keywords that EHLO was answered with, each with its parameters.
    extensions: Vec<String>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> SmtpClient<S> {
    /// A client that announces itself as `helo`.
    pub fn new(stream: S, helo: String) -> Self {
        Self {
            stream,
            helo,
            secrets: Secrets::default(),
            unread: Vec::new(),
            allowance: MAX_RECEIVED,
            extensions: Vec::new(),
        }
    }

    /// Keeps `secrets` out of failure messages from the greeting on: a server may know them from an
    /// earlier connection.
    #[must_use]
    pub fn with_secrets(self, secrets: Secrets) -> Self {
        Self { secrets, ..self }
    }

    /// Waits for the greeting.
    ///
    /// # Errors
    /// If the server refuses to talk.
    pub async fn greeting(&mut self, doing: &Doing) -> Result<(), Failure> {
        doing.set("waiting for the server's greeting");
        let greeting = self.read_reply().await?;
        self.expect_positive(&greeting, Failure::unusable)
    }

    /// Says EHLO. A server that does not know it is greeted with HELO (RFC 5321, 3.2), unless it is
    /// asked for something that only EHLO can offer.
    ///
    /// # Errors
    /// If the server refuses to talk to us.
    pub async fn hello(&mut self, needs_extensions: bool, doing: &Doing) -> Result<(), Failure> {
        doing.set("waiting for the reply to EHLO");
        self.extensions.clear();
        let reply = self.command(&format!("EHLO {}", self.helo)).await?;
        let Err(refused) = self.expect_positive(&reply, Failure::unusable) else {
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
        Err(refused)
    }

    /// The parameters of an extension, once for each time it is offered.
    fn extension(&self, keyword: &str) -> impl Iterator<Item = &str> {
        self.extensions.iter().filter_map(move |line| {
            // `AUTH=LOGIN` is how some offered it before RFC 2554.
            let end = line.find(|c: char| c.is_whitespace() || c == '=').unwrap_or(line.len());
            let (name, parameters) = line.split_at(end);
            name.eq_ignore_ascii_case(keyword).then(|| parameters.get(1..).unwrap_or_default())
        })
    }

    /// The largest mail that the server accepts, in bytes, if it says so (RFC 1870).
    pub fn max_size(&self) -> Option<u64> {
        let size = self.extension("SIZE").find_map(|size| size.trim().parse().ok());
        size.filter(|size| *size > 0)
    }

    /// Asks for STARTTLS after EHLO, and returns the stream at the point where TLS begins.
    ///
    /// # Errors
    /// If the server does not agree, or has sent more than its agreement: that could be taken for
    /// part of the encrypted dialogue.
    pub async fn start_tls(mut self, doing: &Doing) -> Result<S, Failure> {
        if self.extension("STARTTLS").next().is_none() {
            self.quit().await;
            return Err(Failure::unusable(
                "the server offers no STARTTLS, and without encryption nothing is sent to it",
            ));
        }
        doing.set("waiting for the reply to STARTTLS");
        let reply = self.command("STARTTLS").await?;
        self.expect_positive(&reply, Failure::unusable)?;
        if reply.code != 220 {
            return Err(Failure::unusable(format!("STARTTLS is answered with {}", reply.code)));
        }
        if !self.unread.is_empty() {
            return Err(Failure::unusable(
                "something was said between STARTTLS and the encryption",
            ));
        }
        Ok(self.stream)
    }

    /// Logs in with AUTH PLAIN (RFC 4616), or LOGIN if the server does not offer that.
    ///
    /// # Errors
    /// If the server offers neither, or refuses the login.
    pub async fn log_in(
        &mut self,
        username: &str,
        password: &Secret,
        doing: &Doing,
    ) -> Result<(), Failure> {
        doing.set("logging in");
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
        let neither = || Failure::unusable("the server offers neither AUTH PLAIN nor AUTH LOGIN");
        Err(refused.unwrap_or_else(neither))
    }

    /// Answers one prompt after the other. Their order determines the answer; their text, for
    /// which there is no standard, may be anything.
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

    /// Begins a mail: MAIL, and RCPT for each recipient. Returns the recipients that were refused.
    ///
    /// # Errors
    /// If the sender or every recipient is refused, or the dialogue breaks off.
    pub async fn begin_mail(
        &mut self,
        from: &EmailAddress,
        to: &[EmailAddress],
        doing: &Doing,
    ) -> Result<Vec<(String, Failure)>, Failure> {
        doing.set("waiting for the reply to MAIL");
        let reply = self.command(&format!("MAIL FROM:<{from}>")).await?;
        self.expect_positive(&reply, Failure::unusable)?;
        doing.set("waiting for the reply to RCPT");
        let mut refused = Vec::new();
        for recipient in to {
            let reply = self.command(&format!("RCPT TO:<{recipient}>")).await?;
            let accepted = self.expect_positive(&reply, Failure::refused);
            let Err(failure) = accepted else { continue };
            // The server closes the connection (RFC 5321, 3.8).
            if reply.code == 421 {
                return Err(failure);
            }
            refused.push((recipient.to_string(), failure));
        }
        Ok(refused)
    }

    /// Sends the content of the mail that was begun.
    ///
    /// # Errors
    /// If the server does not accept it, or nothing is known of that.
    pub async fn send_content(&mut self, mail: &[u8], doing: &Doing) -> Result<(), Failure> {
        doing.set("waiting for the reply to DATA");
        let reply = self.command("DATA").await?;
        if reply.code != 354 {
            self.expect_positive(&reply, Failure::refused)?;
            return Err(self.unexpected(&reply));
        }
        doing.set(TRANSFER);
        let reply = self.exchange(&dot_stuffed(mail)).await;
        let reply = reply.map_err(|failure| Failure::doubtful(failure.words))?;
        match reply.code / 100 {
            3 => Err(Failure::doubtful(self.unexpected(&reply).words)),
            _ => self.expect_positive(&reply, Failure::refused),
        }
    }

    /// Says goodbye, which also takes back a mail that was begun. The answer does not matter.
    pub async fn quit(&mut self) {
        let _ = self.command("QUIT").await;
    }

    async fn command(&mut self, command: &str) -> Result<Reply, Failure> {
        self.exchange(format!("{command}\r\n").as_bytes()).await
    }

    async fn exchange(&mut self, bytes: &[u8]) -> Result<Reply, Failure> {
        // A server that refuses and closes before it has read everything has still replied, so
        // that a failed write says less than the reply.
        let written = match self.stream.write_all(bytes).await {
            Ok(()) => self.stream.flush().await,
            failed => failed,
        };
        let reply = self.read_reply().await;
        match written {
            Err(error) if reply.is_err() => Err(Failure::lost(&error)),
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
                return Err(Failure::temporary(message).told(&self.secrets));
            };
            lines.push(String::from_utf8_lossy(text).into_owned());
            if !is_continued {
                return Ok(Reply { code, lines });
            }
        }
    }

    /// Reads a line with its end, which the last one before the server closes may lack: its code
    /// counts all the same.
    async fn read_line(&mut self) -> Result<Vec<u8>, Failure> {
        loop {
            let end = memchr::memchr(b'\n', &self.unread);
            let length = end.map_or(self.unread.len(), |end| end + 1);
            if length > MAX_LINE.min(self.allowance) {
                return Err(Failure::temporary("the server says too much"));
            }
            if end.is_some() {
                self.allowance -= length;
                return Ok(self.unread.drain(..length).collect());
            }
            let received = self.stream.read_buf(&mut self.unread).await;
            if received.map_err(|error| Failure::lost(&error))? == 0 {
                if !self.unread.is_empty() {
                    return Ok(std::mem::take(&mut self.unread));
                }
                return Err(Failure::lost(&std::io::ErrorKind::UnexpectedEof.into()));
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
            4 => Err(Failure::temporary(self.text_of(reply))),
            _ => Err(self.unexpected(reply)),
        }
    }

    /// Reports a refused login by its code and enhanced status only: the text may repeat the login.
    fn expect_login(&self, reply: &Reply) -> Result<(), Failure> {
        let status = reply.lines.first().and_then(|line| line.split_whitespace().next());
        let is_status =
            |text: &&str| text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let lines = status.filter(is_status).map(str::to_owned).into_iter().collect();
        self.expect_positive(&Reply { code: reply.code, lines }, Failure::unusable).map_err(
            |mut failure| {
                failure.words = format!("the login is refused: {}", failure.words.trim_end());
                failure
            },
        )
    }

    fn text_of(&self, Reply { code, lines }: &Reply) -> String {
        words(&format!("{code} {}", self.secrets.withhold(&lines.join(" "))))
    }

    fn unexpected(&self, reply: &Reply) -> Failure {
        Failure::temporary(format!("unexpected reply: {}", self.text_of(reply)))
    }
}

/// The mail as DATA carries it: no line begins with a single dot but the last, which ends it.
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
    use crate::notify::channel::Lasting;

    /// A client of a server that sends `script` at once, however many bytes fit at a time, and
    /// returns what it heard.
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
        (SmtpClient::new(stream, "[192.0.2.1]".to_owned()), heard)
    }

    fn address(text: &str) -> EmailAddress {
        text.parse().unwrap()
    }

    /// Sends a mail to two recipients; returns the refused ones.
    async fn send(
        client: &mut SmtpClient<DuplexStream>,
        needs_extensions: bool,
    ) -> Result<Vec<(String, Failure)>, Failure> {
        let doing = Doing::default();
        client.greeting(&doing).await?;
        client.hello(needs_extensions, &doing).await?;
        let to = [address("b@example.org"), address("c@example.org")];
        let refused = client.begin_mail(&address("a@example.org"), &to, &doing).await?;
        client.send_content(b"Subject: x\r\n\r\ntext\r\n", &doing).await?;
        Ok(refused)
    }

    /// The outcome of [`send`] to a server with this script, whatever the size of its packets.
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
    fn a_reply_line_needs_no_text() {
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
    async fn white_space_in_the_list_of_extensions_is_harmless() {
        for line in ["250- \n", "250-\u{a0}\r\n", "250-\t \r\n", "250-\r\n", "250-\u{3000}\r\n"] {
            let script = format!("220 hi\r\n250-mx\r\n{line}250 size 7 \r\n");
            let (mut client, _) = client_of(&script, 64);
            let doing = Doing::default();
            client.greeting(&doing).await.unwrap();
            client.hello(true, &doing).await.unwrap();
            assert_eq!(client.max_size(), Some(7), "{line:?}");
        }
    }

    #[tokio::test]
    async fn extensions_are_read_in_any_case_and_from_the_second_line_on() {
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
            client.hello(true, &Doing::default()).await.unwrap();
            assert_eq!(client.max_size(), size, "{offered}");
            let parameters: Vec<_> = client.extension("AUTH").collect();
            assert_eq!(parameters.join(" "), mechanisms, "{offered}");
        }
    }

    #[tokio::test]
    async fn greets_a_server_that_does_not_know_ehlo_with_helo() {
        let script = "220 hi\r\n502 what\r\n250 hello\r\n250 ok\r\n250\r\n250\r\n354\r\n250\r\n";
        assert_eq!(outcome_of(script).await, Ok(Vec::new()));
        // The refusal of EHLO is the one that counts, and all there is if HELO cannot do.
        for script in ["220 hi\r\n550 not you\r\n504 nor now\r\n", "220 hi\r\n550 not you\r\n"] {
            let failure = outcome_of(script).await.unwrap_err();
            assert_eq!(failure, Failure::unusable("550 not you"));
        }
        let (mut client, heard) = client_of("220 hi\r\n550 not you\r\n250 hello\r\n", 64);
        assert!(send(&mut client, true).await.is_err());
        drop(client);
        assert_eq!(heard.await.unwrap(), "EHLO [192.0.2.1]\r\n");
    }

    #[tokio::test]
    async fn what_a_failure_means_depends_on_the_code_and_the_step() {
        use Lasting::{Doubtful, Refused, Temporary, Unusable};
        let begun = "220\r\n250\r\n250\r\n250\r\n250\r\n";
        for (script, lasting, message) in [
            ("554 no\r\n".to_owned(), Unusable, "554 no"),
            ("421 busy\r\n".to_owned(), Temporary, "421 busy"),
            ("354 go\r\n".to_owned(), Temporary, "unexpected reply: 354 go"),
            ("HTTP/1.1 400\r\n".to_owned(), Temporary, "the server does not speak SMTP: HTTP"),
            ("220\r\n421 busy\r\n".to_owned(), Temporary, "421 busy"),
            ("220\r\n250\r\n550 not from you\r\n".to_owned(), Unusable, "550 not from you"),
            // Nothing is known of the other recipient: the server has closed.
            ("220\r\n250\r\n250\r\n421 busy\r\n".to_owned(), Temporary, "421 busy"),
            (format!("{begun}250 now?\r\n"), Temporary, "unexpected reply: 250 now?"),
            (format!("{begun}554 no\r\n"), Refused, "554 no"),
            (format!("{begun}354\r\n452 full\r\n"), Temporary, "452 full"),
            (format!("{begun}354\r\n552-too\r\n552 large\r\n"), Refused, "552 too large"),
            (format!("{begun}354\r\n354 more?\r\n"), Doubtful, "unexpected reply: 354 more?"),
            (format!("{begun}354\r\nwhat\r\n"), Doubtful, "the server does not speak SMTP: what"),
            (format!("{begun}354\r\n"), Doubtful, "the server closed the connection"),
            (format!("{begun}354\r\n250-"), Doubtful, "the server closed the connection"),
            (format!("{begun}354\r\n25"), Doubtful, "the server does not speak SMTP: 25"),
        ] {
            let failure = outcome_of(&script).await.unwrap_err();
            assert_eq!(failure.lasting, lasting, "{script:?}: {failure}");
            assert!(failure.words.starts_with(message), "{script:?}: {failure}");
        }
        let refused = outcome_of("220\r\n250\r\n250\r\n550 who\r\n250\r\n354\r\n250\r\n").await;
        assert_eq!(refused.unwrap(), [("b@example.org".to_owned(), Failure::refused("550 who"))]);
    }

    #[tokio::test]
    async fn a_refusal_is_heard_also_if_the_server_does_not_read_to_the_end() {
        let (mut server, stream) = duplex(64);
        tokio::spawn(async move {
            server.write_all(b"354 go\r\n552 too large\r\n").await.unwrap();
            server.read_exact(&mut [0; 16]).await.unwrap();
        });
        let mut client = SmtpClient::new(stream, "[192.0.2.1]".to_owned());
        let sent = client.send_content(&[b'x'; 10_000], &Doing::default()).await;
        assert_eq!(sent, Err(Failure::refused("552 too large")));
    }

    #[tokio::test]
    async fn withholds_a_password_that_the_server_sends_before_the_login() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hush").unwrap();
        let secrets = Secrets::of_login("me", &Secret::read(file.path()).unwrap());
        for script in ["hush, and no SMTP\r\n", "554 hush\r\n", "220 hi\r\n550 hush\r\n"] {
            let (client, _) = client_of(script, 1024);
            let mut client = client.with_secrets(secrets.clone());
            let failure = send(&mut client, true).await.unwrap_err();
            assert!(!failure.words.contains("hush"), "{failure:?}");
        }
    }

    #[tokio::test]
    async fn what_a_server_may_send_is_bounded() {
        let line = format!("220 {}", "x".repeat(MAX_LINE));
        let lines = format!("250-{}\r\n", "x".repeat(1000)).repeat(MAX_RECEIVED / 1000);
        for script in [line, format!("220 hi\r\n{lines}")] {
            let (mut client, _) = client_of(&script, 1024);
            let failure = send(&mut client, false).await.unwrap_err();
            assert_eq!(failure, Failure::temporary("the server says too much"));
        }
    }

    #[test]
    fn only_the_last_line_of_a_mail_is_a_single_dot() {
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
