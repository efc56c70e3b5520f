//! Replies of mail servers, from the greeting to the end of a mail. Nothing is sent before STARTTLS but
//! EHLO, and messages are short lines without the password, however the replies are split.
//!
//! Input: one byte each for the split and the scenario, then the replies.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use handout::internals::{
    EmailAddress, Failure, MailSettings as Settings, Secret, Secrets, SharedStage, SmtpClient,
    load_part, start_tls,
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

/// Maximum length of a message: 500 characters of the server, each up to ten bytes when escaped.
const MAX_MESSAGE: usize = 5100;

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

fn new_client(server: Memory, secrets: Secrets) -> SmtpClient<Memory> {
    SmtpClient::new(server, NAME.to_owned(), secrets, SharedStage::default())
}

/// Sends a mail to `to` recipients over an open connection; returns the rejections.
async fn send(server: Memory, with_login: bool, to: usize) -> Result<Vec<Failure>, Failure> {
    let secrets = if with_login { Secrets::of_login("me", &PASSWORD) } else { Secrets::default() };
    let mut client = new_client(server, secrets);
    client.greeting().await?;
    client.hello(with_login).await?;
    if with_login {
        client.log_in("me", &PASSWORD).await?;
    }
    let to: Vec<EmailAddress> =
        (0..to).map(|number| format!("{number}@example.org").parse().unwrap()).collect();
    let rejected = SETTINGS.deliver(&mut client, &to, MAIL).await?;
    Ok(rejected.into_iter().map(|(_, failure)| failure).collect())
}

async fn encrypt(server: Memory, replies: &[u8]) -> Result<(), Failure> {
    let server = start_tls(new_client(server, Secrets::default())).await;
    let server = server.map_err(|failure| failure.redacted(&Secrets::default()))?;
    let heard = String::from_utf8(server.heard.clone()).unwrap();
    let lines: Vec<_> = heard.split_inclusive("\r\n").collect();
    assert!(matches!(lines[..], [hello, "STARTTLS\r\n"] if hello.starts_with("EHLO ")), "{heard}");
    // The replies that were read end with the agreement.
    let read = &replies[..replies.len() - server.unsaid().len()];
    // The end of the last line may be missing if the server closes after it.
    assert!(read.ends_with(b"\n") || read.len() == replies.len());
    let line = read.strip_suffix(b"\n").unwrap_or(read);
    let last = line.rsplit(|byte| *byte == b'\n').next().unwrap();
    assert!(last.starts_with(b"220"), "{}", read.escape_ascii());
    Ok(())
}

fn check(failure: &Failure, count: usize, with_login: bool) {
    let Failure { message, .. } = failure;
    assert!(is_one_line(message) && message.chars().count() <= count * MAX_MESSAGE, "{message:?}");
    assert!(!(with_login && message.contains("hush")), "{message}");
}

fuzz_target!(|input: &[u8]| {
    let [split, scenario, replies @ ..] = input else { return };
    if scenario & 1 != 0 {
        let whole = block_on(encrypt(Memory::saying([replies]), replies));
        let cut = block_on(encrypt(Memory::saying(pieces(*split, replies)), replies));
        // Early text is noticed only if it was read already; the rest fails in TLS. The outcomes may
        // differ, so `encrypt` checks each.
        whole.err().iter().chain(&cut.err()).for_each(|failure| check(failure, 1, false));
        return;
    }
    let (with_login, to) = (scenario & 2 != 0, 1 + usize::from(scenario >> 2 & 1));
    let sent = block_on(send(Memory::saying([replies]), with_login, to));
    let cut = block_on(send(Memory::saying(pieces(*split, replies)), with_login, to));
    assert_eq!(sent, cut);
    match &sent {
        Ok(rejected) => {
            assert!(rejected.len() < to);
            rejected.iter().for_each(|failure| check(failure, 1, with_login));
        }
        Err(failure) => check(failure, to, with_login),
    }
});
