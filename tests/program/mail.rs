//! `handout mail` and `[mail.NAME]` against a real mail server and against faulty ones.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::fmt::rfc2822;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{eventually, program, run, sample};
use crate::servers::{Outcome, Running, Server, bounded, end, nobody};
use crate::smtp_server::{PASSWORD, SmtpServer, USER};

/// A folder with a configuration, from which mails are sent.
struct Place(TempDir);

impl Place {
    fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("handout.toml"), config).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn prepare(&self, mut command: Command, arguments: &[&str]) -> Command {
        command.args(arguments).args(["--config", "handout.toml"]).current_dir(&self.0);
        command
    }

    /// Runs `handout` with these arguments and this configuration. Checks that it prints no secret.
    fn handout(&self, arguments: &[&str]) -> Outcome {
        let outcome = Outcome::of(run(&mut self.prepare(bounded(), arguments)));
        tells_no_secret(&format!("{}{}", outcome.text(), outcome.stderr));
        outcome
    }

    /// `handout mail ops --subject Test` with these and a text.
    fn send(&self, arguments: &[&str]) -> Outcome {
        self.handout(&[&["mail", "ops", "--subject", "Test", "text"], arguments].concat())
    }

    fn check(&self) -> Outcome {
        self.handout(&["check", "--connect"])
    }
}

fn tells_no_secret(said: &str) {
    let plain = STANDARD.encode(format!("\0{USER}\0{PASSWORD}"));
    for secret in [PASSWORD, &STANDARD.encode(PASSWORD), &plain, "hush"] {
        assert!(!said.contains(secret), "{secret} in {said}");
    }
}

/// A channel `mail.ops` of a server in the clear, with no login.
fn channel_of(server: &Server, more: &str) -> String {
    format!(
        "[mail.ops]\nserver = \"{}\"\nsecurity = \"none\"\nfrom = \"a@example.org\"\n\
         to = [\"b@example.org\"]\n{more}\n",
        server.address
    )
}

/// A server that answers each command as it says, by the command's first word; what follows the
/// end of DATA goes by the name `END`. Without an answer, the connection is ended.
fn smtp(answer: impl Fn(&str, &str) -> Option<String> + Send + Sync + 'static) -> Server {
    smtp_in_bytes(move |word, line| answer(word, line).map(String::into_bytes))
}

/// The same for a server that does not speak UTF-8.
fn smtp_in_bytes(answer: impl Fn(&str, &str) -> Option<Vec<u8>> + Send + Sync + 'static) -> Server {
    Server::answers(move |mut stream| {
        let _ = speak(&mut stream, &answer);
        end(stream);
    })
}

fn speak(stream: &mut TcpStream, answer: &dyn Fn(&str, &str) -> Option<Vec<u8>>) -> io::Result<()> {
    stream.write_all(b"220 mail.example.org\r\n")?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(line) = lines.next() {
        let line = line?;
        let word = line.split_whitespace().next().unwrap_or_default().to_owned();
        let Some(said) = answer(&word, &line) else { return Ok(()) };
        stream.write_all(&[&said[..], b"\r\n"].concat())?;
        if word == "DATA" && said.starts_with(b"3") {
            for line in lines.by_ref() {
                if line? == "." {
                    break;
                }
            }
            let Some(said) = answer("END", "") else { return Ok(()) };
            stream.write_all(&[&said[..], b"\r\n"].concat())?;
        }
    }
    Ok(())
}

/// The replies of a server that accepts everything.
fn usual(word: &str) -> Option<String> {
    let said = match word {
        "EHLO" => "250-mail.example.org\r\n250 8BITMIME",
        "DATA" => "354 go on",
        "QUIT" => "221 bye",
        _ => "250 ok",
    };
    Some(said.to_owned())
}

/// The message that ends a failure, after the name of the program.
fn words(outcome: &Outcome) -> &str {
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    outcome.stderr.trim_end().strip_prefix("handout: ").unwrap()
}

/// A mail's text, whose last line may end or not.
fn lines(mail: &Value) -> String {
    let text = mail["text"].as_str().unwrap().replace("\r\n", "\n");
    text.strip_suffix('\n').unwrap_or(&text).to_owned()
}

#[test]
fn delivers_every_field_unchanged() {
    for security in ["tls", "starttls"] {
        let smtp_server = SmtpServer::start(security);
        let place = Place::new(&format!(
            "[mail.ops]\n{}from = \"handout <sender@example.org>\"\n\
             to = [\"xm@example.com\", \"汇总 <hui@example.com>\"]\n",
            smtp_server.keys()
        ));
        let hello = b"hello\r\n.\r\n\x00\xff\n".as_slice();
        let table = sample(7, 30_000);
        fs::write(place.path("hello.txt"), hello).unwrap();
        fs::write(place.path("汇总数据.xlsx"), &table).unwrap();
        let text = "第一行\n.\n..\n  Zwei\tÄ\nFrom here\n";
        let before = SystemTime::now();
        let outcome = place.handout(&[
            "mail",
            "ops",
            "--subject",
            "示例代码实验邮件",
            "--attach",
            "hello.txt",
            "--attach",
            "汇总数据.xlsx",
            text,
        ]);
        let id = outcome.succeeded().text().trim_end();
        let mail = smtp_server.wait_for(0);
        assert_eq!(mail["headers"]["subject"], "示例代码实验邮件");
        assert_eq!(mail["headers"]["message-id"], id);
        assert!(id.starts_with('<') && id.ends_with("@example.org>"), "{id}");
        assert_eq!(mail["from"], json!([["handout", "sender@example.org"]]));
        assert_eq!(mail["to"], json!([["", "xm@example.com"], ["汇总", "hui@example.com"]]));
        let envelope = json!(["sender@example.org", ["xm@example.com", "hui@example.com"]]);
        assert_eq!(mail["envelope"], envelope);
        let date = rfc2822::parse(mail["headers"]["date"].as_str().unwrap()).unwrap();
        let date: SystemTime = date.timestamp().into();
        let second = Duration::from_secs(1);
        assert!(date + second > before && date < SystemTime::now() + second, "{mail}");
        assert_eq!(lines(&mail), text.trim_end());
        let attachment = |file: &str, kind: &str, content: &[u8]| {
            json!({ "filename": file, "name": file, "type": kind, "encoding": "base64",
                    "content": STANDARD.encode(content) })
        };
        let attachments = json!([
            attachment("hello.txt", "text/plain", hello),
            attachment("汇总数据.xlsx", "application/octet-stream", &table),
        ]);
        assert_eq!(mail["attachments"], attachments);
        assert_eq!(mail["defects"], json!([]));
        assert_eq!((&mail["tls"], &mail["mechanism"]), (&json!(true), &json!("PLAIN")));
        let raw = smtp_server.raw(0);
        assert!(raw.is_ascii(), "{raw:?}");
        assert!(raw.split(|byte| *byte == b'\n').all(|line| line.len() <= 79), "{raw:?}");
    }
}

#[test]
fn reads_the_text_from_standard_input_for_named_recipients() {
    let smtp_server = SmtpServer::start("tls");
    let place = Place::new(&smtp_server.channel(""));
    for dash in [&[][..], &["-"]] {
        let arguments = [&["mail", "ops", "-s", "Disks", "--to", "Ü <x@example.com>"], dash];
        let mut command = place.prepare(bounded(), &arguments.concat());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all("Größe\n12 GB\n".as_bytes()).unwrap();
        Outcome::of(child.wait_with_output().unwrap()).succeeded();
    }
    let mails = [smtp_server.wait_for(0), smtp_server.wait_for(1)];
    for mail in &mails {
        assert_eq!(mail["to"], json!([["Ü", "x@example.com"]]));
        assert_eq!(lines(mail), "Größe\n12 GB");
        assert_eq!(mail["attachments"], json!([]));
    }
    assert_ne!(mails[0]["headers"]["message-id"], mails[1]["headers"]["message-id"]);
}

#[test]
fn names_rejected_recipients_and_delivers_to_the_others() {
    let smtp_server = SmtpServer::start("tls");
    let place = Place::new(&smtp_server.channel(""));
    let to = ["--to", "nobody@example.com", "--to", "x@example.com", "--to", "later@example.com"];
    let outcome = place.send(&to);
    outcome.failed_with(&[
        "handout: nobody@example.com: 550 5.1.1 no such user here\n",
        "handout: later@example.com: 451 4.2.0 the mailbox is busy\n",
    ]);
    let mail = smtp_server.wait_for(0);
    assert_eq!(mail["envelope"][1], json!(["x@example.com"]));
    assert_eq!(mail["headers"]["message-id"], outcome.text().trim_end());
    let outcome = place.send(&["--to", "nobody@example.com"]);
    assert_eq!(words(&outcome), "nobody@example.com: 550 5.1.1 no such user here");
    assert_eq!(outcome.text(), "");
    assert_eq!(smtp_server.mails().len(), 1);
}

#[test]
fn a_dry_run_prints_the_mail_without_connecting_or_secrets() {
    let smtp_server = SmtpServer::down("tls");
    let place = Place::new(&smtp_server.channel(""));
    fs::write(place.path("a.txt"), "alpha").unwrap();
    let outcome = place.send(&["--dry-run", "--attach", "a.txt"]);
    let printed = outcome.succeeded().text();
    for field in ["Subject: Test\r\n", "To: ops@example.org\r\n", "YWxwaGE="] {
        assert!(printed.contains(field), "{printed}");
    }
}

#[test]
fn logs_in_with_any_offered_mechanism() {
    let smtp_server = SmtpServer::start_without("PLAIN", "starttls");
    let place = Place::new(&smtp_server.channel(""));
    place.send(&[]).succeeded();
    assert_eq!(smtp_server.wait_for(0)["mechanism"], "LOGIN");
    let neither = smtp(|word, _| usual(word));
    let login =
        format!("username = \"{USER}\"\npassword-file = \"{}\"", smtp_server.password_file());
    let place = Place::new(&channel_of(&neither, &login));
    assert!(words(&place.send(&[])).contains("neither AUTH PLAIN nor AUTH LOGIN"));
}

#[test]
fn reads_the_password_from_a_credential() {
    let smtp_server = SmtpServer::start("tls");
    let credentials = tempfile::tempdir().unwrap();
    fs::copy(smtp_server.password_file(), credentials.path().join("secret")).unwrap();
    let named = format!("\"{}\"", smtp_server.password_file());
    let place = Place::new(&smtp_server.channel("").replace(&named, "\"secret\""));
    let mut command = place.prepare(bounded(), &["check", "--connect"]);
    assert_eq!(run(&mut command).status.code(), Some(78));
    command.env("CREDENTIALS_DIRECTORY", credentials.path());
    Outcome::of(run(&mut command)).succeeded();
}

#[test]
fn reports_a_wrong_password() {
    for security in ["tls", "starttls"] {
        let smtp_server = SmtpServer::start(security);
        let place = Place::new(&smtp_server.channel(""));
        place.check().succeeded();
        fs::write(smtp_server.password_file(), "wrong-one\n").unwrap();
        for outcome in [place.send(&[]), place.check()] {
            outcome.failed_with(&["the login is refused: 535 5.7.8"]);
            assert!(!outcome.stderr.contains("wrong-one"), "{outcome:?}");
        }
        assert!(smtp_server.mails().is_empty());
    }
}

#[test]
fn withholds_secrets_that_a_server_repeats() {
    let server = smtp(|word, line| match word {
        "EHLO" => Some("250-mail.example.org\r\n250 AUTH PLAIN".to_owned()),
        "AUTH" => {
            let encoded = line.split(' ').next_back().unwrap();
            let plain = STANDARD.decode(encoded).unwrap();
            let plain = String::from_utf8(plain).unwrap();
            let password = plain.split('\0').next_back().unwrap();
            Some(format!("535 no: {encoded} is {password}"))
        }
        _ => usual(word),
    });
    let smtp_server = SmtpServer::down("none");
    let login =
        format!("username = \"{USER}\"\npassword-file = \"{}\"", smtp_server.password_file());
    let place = Place::new(&channel_of(&server, &login));
    for outcome in [place.send(&[]), place.check()] {
        outcome.failed_with(&["the login is refused: 535\n"]);
    }
}

#[test]
fn withholds_secrets_in_late_and_long_replies() {
    for (at, before) in [("MAIL", ""), ("RCPT", "no: "), ("END", &"x".repeat(490)[..])] {
        let before = before.to_owned();
        let server = smtp(move |word, _| match word {
            "EHLO" => Some("250-mail.example.org\r\n250 AUTH PLAIN".to_owned()),
            "AUTH" => Some("235 welcome".to_owned()),
            _ if word == at => Some(format!("451 {before}{PASSWORD}")),
            _ => usual(word),
        });
        let smtp_server = SmtpServer::down("none");
        let login =
            format!("username = \"{USER}\"\npassword-file = \"{}\"", smtp_server.password_file());
        Place::new(&channel_of(&server, &login)).send(&[]).failed_with(&["451 (withheld"]);
    }
}

#[test]
fn shows_no_secret_in_arguments_and_environment() {
    let connected = Arc::<AtomicBool>::default();
    let seen = Arc::clone(&connected);
    let server = Server::answers(move |mut stream| {
        seen.store(true, Ordering::SeqCst);
        let _ = io::copy(&mut stream, &mut io::sink());
    });
    let smtp_server = SmtpServer::down("none");
    let login =
        format!("username = \"{USER}\"\npassword-file = \"{}\"", smtp_server.password_file());
    let place = Place::new(&channel_of(&server, &login));
    let client =
        Running::start(&mut place.prepare(program(), &["mail", "ops", "-s", "Test", "text"]));
    eventually("the connection", || connected.load(Ordering::SeqCst));
    for file in ["cmdline", "environ"] {
        let shown = fs::read(format!("/proc/{}/{file}", client.child.id())).unwrap();
        assert!(file == "environ" || !shown.is_empty());
        tells_no_secret(&String::from_utf8_lossy(&shown));
    }
}

#[test]
fn times_out_at_every_stage() {
    let stalls = |said: &'static str| Server::stalls_after(said);
    let greeting = "220 mail.example.org\r\n";
    for (server, security, doing, connects) in [
        (stalls(""), "none", "waiting for the server's greeting", true),
        (stalls(greeting), "starttls", "waiting for the reply to EHLO", true),
        (stalls(""), "tls", "agreeing on the encryption", true),
        (stalls("220 a\r\n250 a\r\n"), "none", "waiting for the reply to MAIL", false),
        (
            stalls("220 a\r\n250 a\r\n250 ok\r\n250 ok\r\n354 go on\r\n"),
            "none",
            "waiting until the mail is taken, which it may be",
            false,
        ),
    ] {
        let config = channel_of(&server, "timeout = \"1s\"");
        let place = Place::new(&config.replace("\"none\"", &format!("\"{security}\"")));
        let start = Instant::now();
        place.send(&[]).failed_with(&["not done within 1 s (timeout)", doing]);
        assert!(start.elapsed() >= Duration::from_secs(1));
        if connects {
            place.check().failed_with(&["mail.ops: not done within 1 s (timeout)", doing]);
        }
    }
}

#[test]
fn times_out_on_a_trickling_server() {
    let server = Server::answers(|mut stream| {
        // A line that has no end, a byte at a time, each far within the time.
        while stream.write_all(b"2").is_ok() {
            std::thread::park_timeout(Duration::from_millis(20));
        }
    });
    let place = Place::new(&channel_of(&server, "timeout = \"500ms\""));
    place.send(&[]).failed_with(&["not done within 0.5 s (timeout)"]);
}

#[test]
fn reports_servers_that_refuse_close_or_do_not_speak_smtp() {
    let closes = |at: &'static str| smtp(move |word, _| usual(word).filter(|_| word != at));
    for (server, said) in [
        (Server::sends(""), "the server closed the connection without a reply"),
        (closes("EHLO"), "the server closed the connection without a reply"),
        (closes("DATA"), "the server closed the connection without a reply"),
        (closes("END"), "the server closed the connection without a reply"),
        (Server::sends("HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak SMTP: HTTP/1.1 400"),
        (Server::sends("554 5.7.1 not for you\r\n"), "554 5.7.1 not for you"),
        (Server::sends("421 4.3.2 closing\r\n"), "421 4.3.2 closing"),
    ] {
        let place = Place::new(&channel_of(&server, ""));
        let outcome = place.send(&[]);
        outcome.failed_with(&[said]);
        assert_eq!(outcome.text(), "");
    }
    let config = format!(
        "[mail.ops]\nserver = \"{}\"\nsecurity = \"none\"\nfrom = \"a@example.org\"\n\
         to = [\"b@example.org\"]\n",
        nobody()
    );
    let place = Place::new(&config);
    place.send(&[]).failed_with(&["refused"]);
    place.check().failed_with(&["mail.ops: ", "refused"]);
}

#[test]
fn accepts_replies_in_gbk() {
    // "邮件已接收" and "邮箱不存在", which are no UTF-8.
    let (taken, unknown) = (b"250 \xd3\xca\xbc\xfe\xd2\xd1\xbd\xd3\xca\xd5", b"550 \xd3\xca no");
    let server = smtp_in_bytes(|word, _| match word {
        "END" => Some(taken.to_vec()),
        _ => usual(word).map(String::into_bytes),
    });
    Place::new(&channel_of(&server, "")).send(&[]).succeeded();
    let server = smtp_in_bytes(|word, _| match word {
        "RCPT" => Some(unknown.to_vec()),
        _ => usual(word).map(String::into_bytes),
    });
    Place::new(&channel_of(&server, "")).send(&[]).failed_with(&["550 ", "\u{fffd} no"]);
    let server = smtp_in_bytes(|word, _| match word {
        "EHLO" => Some(unknown.to_vec()),
        _ => usual(word).map(String::into_bytes),
    });
    let config = channel_of(&server, "").replace("\"none\"", "\"starttls\"");
    Place::new(&config).send(&[]).failed_with(&["550 ", "\u{fffd} no"]);
}

#[test]
fn does_not_begin_a_mail_above_the_announced_size() {
    let commands = Arc::new(std::sync::Mutex::new(Vec::new()));
    for (offers, fits) in
        [("SIZE 100", false), ("size 100000", true), ("SIZE 0", true), ("SIZE", true)]
    {
        let heard = Arc::clone(&commands);
        let server = smtp(move |word, _| {
            heard.lock().unwrap().push(word.to_owned());
            match word {
                "EHLO" => Some(format!("250-mail.example.org\r\n250-{offers}\r\n250 8BITMIME")),
                _ => usual(word),
            }
        });
        let outcome = Place::new(&channel_of(&server, "")).send(&[]);
        let heard = std::mem::take(&mut *commands.lock().unwrap());
        if fits {
            outcome.succeeded();
        } else {
            outcome.failed_with(&["the mail has ", " bytes, the server takes at most 100: "]);
            assert_eq!(heard, ["EHLO", "QUIT"]);
        }
    }
}

#[test]
fn starttls_is_never_skipped() {
    let said = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = Arc::clone(&said);
    let server = smtp(move |word, line| {
        heard.lock().unwrap().push(line.to_owned());
        usual(word)
    });
    let smtp_server = SmtpServer::down("none");
    let login =
        format!("username = \"{USER}\"\npassword-file = \"{}\"", smtp_server.password_file());
    let config = channel_of(&server, &login).replace("\"none\"", "\"starttls\"");
    let place = Place::new(&config);
    for outcome in [place.send(&[]), place.check()] {
        outcome.failed_with(&["the server offers no STARTTLS"]);
    }
    let said = said.lock().unwrap();
    let unencrypted = |line: &String| line.starts_with("EHLO ") || line == "QUIT";
    assert!(!said.is_empty() && said.iter().all(unencrypted), "{said:?}");
}

#[test]
fn refuses_text_between_starttls_and_tls() {
    let server = smtp(|word, _| match word {
        "EHLO" => Some("250-mail.example.org\r\n250 STARTTLS".to_owned()),
        "STARTTLS" => Some("220 go on\r\n250 AUTH PLAIN".to_owned()),
        _ => usual(word),
    });
    let config = channel_of(&server, "").replace("\"none\"", "\"starttls\"");
    Place::new(&config)
        .send(&[])
        .failed_with(&["something was said between STARTTLS and the encryption"]);
}

#[test]
fn sends_nothing_to_a_server_whose_certificate_is_not_trusted() {
    for security in ["tls", "starttls"] {
        let known = SmtpServer::start(security);
        let of_another = SmtpServer::start_on(Ipv4Addr::new(127, 0, 0, 2), security);
        let ca_file = format!("ca-file = \"{}\"\n", known.authority());
        let unknown = known.channel("").replace(&ca_file, "");
        for (smtp_server, config, why) in [
            (&known, unknown, "issued by \"handouts test\", is not trusted: name a file"),
            (&of_another, of_another.channel(""), "is not valid for this name"),
        ] {
            let place = Place::new(&config);
            for outcome in [place.send(&[]), place.check()] {
                outcome.failed_with(&["the certificate of 127.0.0.", why]);
            }
            assert!(smtp_server.mails().is_empty());
        }
    }
}

#[test]
fn sends_to_a_server_whose_certificate_is_in_the_ca_file_byte_for_byte() {
    for security in ["tls", "starttls"] {
        let smtp_server = SmtpServer::start_as_authority(security);
        let place = Place::new(&smtp_server.channel(""));
        place.send(&[]).succeeded();
        assert_eq!(smtp_server.mails().len(), 1, "{security}");
    }
}

#[test]
fn reports_a_port_without_tls() {
    let server = Server::stalls_after("220 mail.example.org\r\n");
    let config = channel_of(&server, "").replace("\"none\"", "\"tls\"");
    Place::new(&config).send(&[]).failed_with(&["the server does not answer with TLS"]);
}

#[test]
fn reports_greylisting_and_succeeds_later() {
    let smtp_server = SmtpServer::start("tls");
    let place = Place::new(&smtp_server.channel(""));
    smtp_server.order("busy");
    assert_eq!(words(&place.send(&[])), "451 4.3.2 not now");
    // The server is well: only it takes no mail.
    place.check().succeeded();
    smtp_server.withdraw("busy");
    place.send(&[]).succeeded();
    assert_eq!(smtp_server.mails().len(), 1);
}

#[test]
fn refuses_line_ends_in_headers_before_connecting() {
    let asked = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&asked);
    let server = Server::answers(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let place = Place::new(&channel_of(&server, ""));
    fs::write(place.path("a\nb.txt"), "x").unwrap();
    for (code, arguments) in [
        (2, ["--subject", "a\r\nBcc: x@example.com", "--to", "x@example.com"]),
        (2, ["--subject", "a\nb", "--to", "x@example.com"]),
        (2, ["--subject", "a\rb", "--to", "x@example.com"]),
        (2, ["--subject", "a", "--to", "x@example.com\r\nRCPT TO:<y@example.com>"]),
        (2, ["--subject", "a", "--to", "X\n <x@example.com>"]),
        (1, ["--subject", "a", "--attach", "a\nb.txt"]),
    ] {
        let outcome = place.handout(&[&["mail", "ops", "text"], &arguments[..]].concat());
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        assert!(outcome.stderr.contains("has the end of a line"), "{outcome:?}");
    }
    let config =
        channel_of(&server, "").replace("\"a@example.org\"", "\"A\\r\\n <a@example.org>\"");
    let outcome = Place::new(&config).send(&[]);
    assert_eq!(outcome.code, Some(78), "{outcome:?}");
    assert!(outcome.stderr.contains("has the end of a line"), "{outcome:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

#[test]
fn limits_the_total_size_of_attachments() {
    let smtp_server = SmtpServer::start("none");
    let place = Place::new(&smtp_server.channel("max-attachment = \"10B\"").replace(
        &format!("username = \"{USER}\"\npassword-file = \"{}\"\n", smtp_server.password_file()),
        "",
    ));
    fs::write(place.path("a"), "12345").unwrap();
    fs::write(place.path("b"), "123456").unwrap();
    place.send(&["-a", "a", "-a", "b"]).failed_with(&["b: ", "10 B (max-attachment)"]);
    place.send(&["-a", "missing"]).failed_with(&["missing: cannot be read"]);
    let unbounded = smtp_server.channel("max-attachment = \"16EiB\"");
    let printed = Place::new(&unbounded);
    fs::write(printed.path("a"), "12345").unwrap();
    let outcome = printed.send(&["-a", "a", "--dry-run"]);
    assert!(outcome.succeeded().text().contains("MTIzNDU="), "{outcome:?}");
    // Nobody may send without a login there.
    place.send(&["-a", "a", "-a", "a"]).failed_with(&["530 5.7.0"]);
    assert!(smtp_server.mails().is_empty());
}

#[test]
fn check_connect_checks_every_channel_without_sending() {
    let [secure, later] = ["tls", "starttls"].map(SmtpServer::start);
    let plain = smtp(|word, _| usual(word));
    let dead = nobody();
    let people = "from = \"a@example.org\"\nto = [\"b@example.org\"]\n";
    let place = Place::new(&format!(
        "[mail.a]\n{}{people}[mail.b]\n{}{people}\
         [mail.c]\nserver = \"{}\"\nsecurity = \"none\"\n{people}\
         [mail.d]\nserver = \"{dead}\"\nsecurity = \"none\"\n{people}",
        secure.keys(),
        later.keys(),
        plain.address,
    ));
    let outcome = place.check();
    outcome.failed_with(&["mail.d: ", "refused"]);
    for line in [
        format!(
            "mail.a: connected to {}, encrypted, logged in, 1 recipient accepted\n",
            secure.address
        ),
        format!(
            "mail.b: connected to {}, encrypted after STARTTLS, logged in, 1 recipient accepted\n",
            later.address
        ),
        format!("mail.c: connected to {}, not encrypted, 1 recipient accepted\n", plain.address),
    ] {
        assert!(outcome.text().contains(&line), "{line:?} in {outcome:?}");
    }
    assert!(secure.mails().is_empty() && later.mails().is_empty());
    // Without the flag there is no connection.
    place.handout(&["check"]).succeeded();
}

#[test]
fn requires_allow_plaintext_for_other_machines() {
    let config = |more: &str| {
        format!(
            "[mail.ops]\nserver = \"192.0.2.1:25\"\nsecurity = \"none\"\n\
             from = \"a@example.org\"\nto = [\"b@example.org\"]\n{more}\n"
        )
    };
    let outcome = Place::new(&config("")).send(&["--dry-run"]);
    assert_eq!(outcome.code, Some(78), "{outcome:?}");
    assert!(outcome.stderr.contains("allow-plaintext"), "{outcome:?}");
    Place::new(&config("allow-plaintext = true")).send(&["--dry-run"]).succeeded();
}

/// The commands that a server heard, without those of the mail's content.
type Heard = Arc<std::sync::Mutex<Vec<String>>>;

/// A server with these replies to some commands that notes every command.
fn listening(
    answer: impl Fn(&str) -> Option<&'static str> + Send + Sync + 'static,
) -> (Server, Heard) {
    let heard = Heard::default();
    let notes = Arc::clone(&heard);
    let server = smtp(move |word, line| {
        notes.lock().unwrap().push(line.to_owned());
        answer(word).map(str::to_owned).or_else(|| usual(word))
    });
    (server, heard)
}

#[test]
fn accepts_replies_of_the_code_alone_and_sends_the_mail_once() {
    for reply in [
        |code: &str| code.to_owned(),
        |code: &str| format!("{code}-\r\n{code}"),
        |code: &str| format!("{code} "),
        |code: &str| format!("{code}-\r\n{code} "),
    ] {
        let contents = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&contents);
        let server = smtp(move |word, _| {
            count.fetch_add(usize::from(word == "END"), Ordering::SeqCst);
            Some(reply(if word == "DATA" { "354" } else { "250" }))
        });
        Place::new(&channel_of(&server, "")).send(&[]).succeeded();
        assert_eq!(contents.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn answers_login_prompts_in_order_whatever_their_text() {
    let smtp_server = SmtpServer::down("none");
    let login =
        format!("username = \"{USER}\"\npassword-file = \"{}\"", smtp_server.password_file());
    let (user, password) = (STANDARD.encode(USER), STANDARD.encode(PASSWORD));
    for (offered, first, second) in [
        ("AUTH LOGIN", "334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6"),
        ("AUTH LOGIN", "334 ", "334 "),
        ("AUTH LOGIN", "334", "334"),
        ("auth login", "334 dXNlciBuYW1l", "334 a2V5"),
        ("AUTH=LOGIN", "334 user?", "334 password?"),
        ("AUTH CRAM-MD5 Login", "334-\r\n334 ", "334 \u{540d}"),
    ] {
        let (first, second) = (first.to_owned(), second.to_owned());
        let (user, password) = (user.clone(), password.clone());
        let server = smtp(move |word, line| match word {
            "EHLO" => Some(format!("250-mail.example.org\r\n250 {offered}")),
            "AUTH" if line == "AUTH LOGIN" => Some(first.clone()),
            _ if word == user => Some(second.clone()),
            _ if word == password => Some("235".to_owned()),
            "MAIL" | "RCPT" | "DATA" | "END" | "QUIT" => usual(word),
            _ => Some("535 no".to_owned()),
        });
        Place::new(&channel_of(&server, &login)).send(&[]).succeeded();
    }
}

#[test]
fn cancels_a_login_with_endless_prompts() {
    let smtp_server = SmtpServer::down("none");
    let login =
        format!("username = \"{USER}\"\npassword-file = \"{}\"", smtp_server.password_file());
    for mechanism in ["PLAIN", "LOGIN"] {
        let server = smtp(move |word, _| match word {
            "EHLO" => Some(format!("250-mail.example.org\r\n250 AUTH {mechanism}")),
            "*" => Some("501 cancelled".to_owned()),
            "QUIT" => usual(word),
            _ => Some("334 more".to_owned()),
        });
        let outcome = Place::new(&channel_of(&server, &login)).send(&[]);
        outcome.failed_with(&["the login is refused: 501\n"]);
    }
}

#[test]
fn greets_servers_without_ehlo_with_helo() {
    let (server, heard) = listening(|word| (word == "EHLO").then_some("500 unknown command"));
    Place::new(&channel_of(&server, "")).send(&[]).succeeded();
    let heard = heard.lock().unwrap();
    assert_eq!(heard[1].strip_prefix("HELO "), heard[0].strip_prefix("EHLO "), "{heard:?}");
}

#[test]
fn the_helo_key_is_announced_and_checked() {
    let (server, heard) = listening(|_| None);
    for name in ["mail.example.org", "[192.0.2.1]", "[IPv6:2001:db8::1]"] {
        Place::new(&channel_of(&server, &format!("helo = \"{name}\""))).send(&[]).succeeded();
        let heard = std::mem::take(&mut *heard.lock().unwrap());
        assert_eq!(heard[0], format!("EHLO {name}"));
    }
    for name in ["", "box", "192.0.2.1", "a b.example.org", "a.org\\r\\nRSET"] {
        let outcome = Place::new(&channel_of(&server, &format!("helo = \"{name}\""))).check();
        assert_eq!(outcome.code, Some(78), "{outcome:?}");
        assert!(outcome.stderr.contains("mail.ops.helo: "), "{outcome:?}");
    }
    assert!(heard.lock().unwrap().is_empty());
}

/// `handout mail` on a machine of this name, with this content of /etc/hosts.
fn send_as(place: &Place, name: &str, hosts: &str) -> Outcome {
    fs::write(place.path("hosts"), hosts).unwrap();
    let script = "hostname \"$0\" && mount --bind hosts /etc/hosts && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "--uts", "sh", "-c", script, name]);
    command.arg(program().get_program());
    let arguments = ["mail", "ops", "--subject", "Test", "text"];
    Outcome::of(run(&mut place.prepare(command, &arguments)))
}

#[test]
fn announces_the_full_host_name_or_the_address_literal() {
    let probe = ["--map-root-user", "--mount", "--uts", "sh", "-c", "mount -t tmpfs none /tmp"];
    let probe = Command::new("unshare").args(probe).stdin(Stdio::null()).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: no machine can be simulated here");
        return;
    }
    let (server, heard) = listening(|_| None);
    let place = Place::new(&channel_of(&server, ""));
    for (name, hosts, announced) in [
        ("mail.example.org", "", "mail.example.org"),
        ("box", "127.0.1.1 box.example.org box\n", "box.example.org"),
        ("box", "127.0.1.1 box\n", "[127.0.0.1]"),
        ("box", "127.0.0.1 localhost.localdomain box\n", "[127.0.0.1]"),
    ] {
        send_as(&place, name, hosts).succeeded();
        let heard = std::mem::take(&mut *heard.lock().unwrap());
        assert_eq!(heard[0], format!("EHLO {announced}"), "{name}: {hosts}");
    }
}

#[test]
fn check_connect_names_every_refused_recipient() {
    let smtp_server = SmtpServer::start("tls");
    let to = "to = [\"nobody@example.com\", \"ops@example.org\", \"later@example.com\"]";
    let config = smtp_server.channel("").replace("to = [\"ops@example.org\"]", to);
    let outcome = Place::new(&config).check();
    outcome.failed_with(&[
        "mail.ops: nobody@example.com: 550 5.1.1 no such user here",
        "later@example.com: 451 4.2.0 the mailbox is busy",
    ]);
    assert!(!outcome.stderr.contains("ops@example.org"), "{outcome:?}");
    let (server, heard) = listening(|word| (word == "MAIL").then_some("553 not from you"));
    let place = Place::new(&channel_of(&server, ""));
    place.check().failed_with(&["mail.ops: 553 not from you"]);
    let (server, begun) = listening(|_| None);
    Place::new(&channel_of(&server, "")).check().succeeded();
    let words = |heard: &Heard| -> Vec<String> {
        let heard = heard.lock().unwrap();
        heard.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    };
    assert_eq!(words(&heard), ["EHLO", "MAIL", "QUIT"]);
    assert_eq!(words(&begun), ["EHLO", "MAIL", "RCPT", "QUIT"]);
    assert!(smtp_server.mails().is_empty());
}

#[test]
fn mails_go_from_and_to_address_literals() {
    let smtp_server = SmtpServer::start("tls");
    let to = "to = [\"ops@[192.0.2.1]\", \"Ops <ops@[IPv6:2001:db8::1]>\"]";
    let config = smtp_server.channel("").replace("sender@example.org>", "handout@[127.0.0.1]>");
    let config = config.replace("to = [\"ops@example.org\"]", to);
    let outcome = Place::new(&config).send(&[]);
    assert!(outcome.succeeded().text().trim_end().ends_with("@[127.0.0.1]>"), "{outcome:?}");
    let mail = smtp_server.wait_for(0);
    let envelope = json!(["handout@[127.0.0.1]", ["ops@[192.0.2.1]", "ops@[IPv6:2001:db8::1]"]]);
    assert_eq!(mail["envelope"], envelope);
    assert_eq!(mail["from"], json!([["handout", "handout@[127.0.0.1]"]]));
    assert_eq!(mail["defects"], json!([]));
    for address in
        ["ops@[192.0.2]", "ops@[mail.example.org]", "ops@[IPv6:192.0.2.1]", "ops@192.0.2.1"]
    {
        let config = smtp_server.channel("").replace("ops@example.org", address);
        let outcome = Place::new(&config).check();
        assert_eq!(outcome.code, Some(78), "{outcome:?}");
    }
}
