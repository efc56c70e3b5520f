//! What a mail server says, from the greeting to the end of a mail: nothing is sent in the clear
//! before STARTTLS is agreed on, nothing that was said before it counts after it, and what is told is
//! a short line without the password, however the server's words are cut.
//!
//! Input: how it is cut, what is done, in a byte each, and what the server says.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use handout::internals::{
    Doing, EmailAddress, Failure, MailSettings as Settings, Secret, Secrets, SmtpClient, load_part,
    start_tls,
};
use handout_fuzz::{Memory, block_on, folder, is_one_line, pieces};
use libfuzzer_sys::fuzz_target;

const CHANNEL: &str = r#"
[mail.a]
server = "127.0.0.1"
security = "none"
from = "a@example.org"
to = ["b@example.org"]
"#;

const MAIL: &[u8] = b"Subject: x\r\n\r\n\xc3\xa9\r\n.\r\n";

/// What a server has said takes up to 500 characters, each of them up to ten if it is escaped.
const LONGEST: usize = 5100;

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let file = folder().join("handout.toml");
    fs::write(&file, CHANNEL).unwrap();
    let read = load_part(&file, |root| {
        let (name, table) = root.tables("mail").remove(0);
        Settings::read(name, table)
    });
    read.unwrap()
});

static PASSWORD: LazyLock<Secret> = LazyLock::new(|| {
    let file = folder().join("password");
    fs::write(&file, "hush").unwrap();
    Secret::read(&file).unwrap()
});

const NAME: &str = "[127.0.0.1]";

/// Sends a mail to `to` recipients over an open connection; returns the refusals.
async fn send(server: Memory, with_login: bool, to: usize) -> Result<Vec<Failure>, Failure> {
    let doing = Doing::default();
    let secrets = if with_login { Secrets::of_login("me", &PASSWORD) } else { Secrets::default() };
    let mut client = SmtpClient::new(server, NAME.to_owned()).with_secrets(secrets);
    client.greeting(&doing).await?;
    client.hello(with_login, &doing).await?;
    if with_login {
        client.log_in("me", &PASSWORD, &doing).await?;
    }
    let to: Vec<EmailAddress> =
        (0..to).map(|number| format!("{number}@example.org").parse().unwrap()).collect();
    let refused = SETTINGS.deliver(&mut client, &to, MAIL, &doing).await?;
    Ok(refused.into_iter().map(|(_, failure)| failure).collect())
}

/// Asks for STARTTLS.
async fn encrypt(server: Memory, said: &[u8]) -> Result<(), Failure> {
    let server = start_tls(server, NAME.to_owned(), &Secrets::default(), &Doing::default()).await;
    let server = server.map_err(|failure| failure.told(&Secrets::default()))?;
    let heard = String::from_utf8(server.heard.clone()).unwrap();
    let lines: Vec<_> = heard.split_inclusive("\r\n").collect();
    assert!(matches!(lines[..], [hello, "STARTTLS\r\n"] if hello.starts_with("EHLO ")), "{heard}");
    // It has heard all that was said so far, and that ends with the line that agrees.
    let taken = &said[..said.len() - server.unsaid().len()];
    // A last line may lack its end if the server closes behind it.
    assert!(taken.ends_with(b"\n") || taken.len() == said.len());
    let line = taken.strip_suffix(b"\n").unwrap_or(taken);
    let last = line.rsplit(|byte| *byte == b'\n').next().unwrap();
    assert!(last.starts_with(b"220"), "{}", taken.escape_ascii());
    Ok(())
}

fn check(failure: &Failure, count: usize, with_login: bool) {
    let Failure { words, .. } = failure;
    assert!(is_one_line(words) && words.chars().count() <= count * LONGEST, "{words:?}");
    assert!(!(with_login && words.contains("hush")), "{words}");
}

fuzz_target!(|input: &[u8]| {
    let [how, what, said @ ..] = input else { return };
    if what & 1 != 0 {
        let whole = block_on(encrypt(Memory::saying([said]), said));
        let cut = block_on(encrypt(Memory::saying(pieces(*how, said)), said));
        // What is said too early is noticed as far as it has been read; the rest goes to TLS, which takes
        // it for nothing. So what is agreed on may differ, and `encrypt` looks at each.
        whole.err().iter().chain(&cut.err()).for_each(|failure| check(failure, 1, false));
        return;
    }
    let (with_login, to) = (what & 2 != 0, 1 + usize::from(what >> 2 & 1));
    let sent = block_on(send(Memory::saying([said]), with_login, to));
    let cut = block_on(send(Memory::saying(pieces(*how, said)), with_login, to));
    assert_eq!(sent, cut);
    match &sent {
        Ok(refused) => {
            assert!(refused.len() < to);
            refused.iter().for_each(|failure| check(failure, 1, with_login));
        }
        Err(failure) => check(failure, to, with_login),
    }
});
