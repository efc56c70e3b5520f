//! `handout mail` and `handout sms`: send through a configured channel.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use bytesize::ByteSize;
use clap::CommandFactory;
use clap::error::ErrorKind;

use super::output::{complain, fail, print, reject};
use super::runtime::run_until_signal;
use crate::alert::config;
use crate::cli::args::{Cli, ConfigFile, Mail, Sms};
use crate::config::load_part;
use crate::config_reader::Diagnostics;
use crate::fs::filename::escape;
use crate::notify::Channel;
use crate::notify::address::EmailAddress;
use crate::notify::mime;
use crate::notify::mime::{Attachment, Email, Mailbox};
use crate::notify::outcome::{Failure, Sent};
use crate::notify::sms::Number;
use crate::notify::{mail, sms};

/// The longest text that is read, in bytes.
const MAX_TEXT: u64 = 1 << 20;

pub(super) fn run_mail(arguments: &Mail) -> ExitCode {
    match mail(arguments) {
        Ok(mail) if arguments.dry_run => print(mail.formatted()),
        Ok(mail) => run_until_signal(async move { report(mail.send().await) }),
        Err(error) => fail_before_sending(error),
    }
}

pub(super) fn run_sms(arguments: &Sms) -> ExitCode {
    match sms(arguments) {
        Ok(sms) if arguments.dry_run => print(sms.show().as_bytes()),
        Ok(sms) => run_until_signal(async move { report(sms.send().await) }),
        Err(error) => fail_before_sending(error),
    }
}

fn report(sent: Result<Sent, Failure>) -> ExitCode {
    match sent {
        Ok(sent) => {
            let lines = sent.ids.iter().map(|id| format!("{id}\n"));
            let printed = print(lines.collect::<String>().as_bytes());
            for (to, failure) in &sent.refused {
                complain(&format!("{}: {failure}", escape(to)));
            }
            if sent.refused.is_empty() { printed } else { ExitCode::FAILURE }
        }
        Err(failure) => fail(&failure),
    }
}

fn fail_before_sending(error: Error) -> ExitCode {
    match error {
        Error::Usage(error) => error.exit(),
        Error::Configuration(faults) => reject(&faults),
        error @ Error::Other(_) => fail(&error),
    }
}

/// The reason why nothing is sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The command line is wrong.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The configuration is wrong.
    #[error("{0}")]
    Configuration(Diagnostics),
    /// A file, or the text, cannot be sent.
    #[error("{0}")]
    Other(String),
}

fn wrong(problem: impl std::fmt::Display) -> Error {
    Error::Usage(Cli::command().error(ErrorKind::ValueValidation, problem))
}

/// A mail that is ready to go.
#[derive(Debug)]
pub(crate) struct ReadyMail {
    channel: mail::Settings,
    id: String,
    to: Vec<EmailAddress>,
    message: Vec<u8>,
}

/// Makes the mail that a command line orders.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn mail(arguments: &Mail) -> Result<ReadyMail, Error> {
    let Mail { config, name, subject, to, attach, text, .. } = arguments;
    mime::header_text(subject).map_err(|problem| wrong(format!("--subject: {problem}")))?;
    let to = to.iter().map(|to| {
        to.parse::<Mailbox>().map_err(|problem| wrong(format!("--to {}: {problem}", escape(to))))
    });
    let to = to.collect::<Result<Vec<_>, _>>()?;
    let Channel::Mail(channel) = channel(config, "mail", name)? else {
        return Err(Error::Other(format!("mail.{name} is no mail channel")));
    };
    let attachments = read_attachments(attach, channel.max_attachment)?;
    let text = read_text(text.as_deref())?;
    let id = mime::new_id(&channel.from);
    let to = if to.is_empty() { &channel.to } else { &to };
    let letter = Email {
        from: &channel.from,
        to,
        subject,
        text: &text,
        attachments,
        id: &id,
        date: SystemTime::now(),
        automatic: false,
    };
    let message = mime::build_message(letter).map_err(Error::Other)?;
    let to = to.iter().map(|to| to.address.clone()).collect();
    Ok(ReadyMail { channel, id, to, message })
}

impl ReadyMail {
    /// The mail as it goes.
    pub(crate) fn formatted(&self) -> &[u8] {
        &self.message
    }

    /// Sends it.
    ///
    /// # Errors
    /// If nobody got it, as far as is known.
    pub(crate) async fn send(&self) -> Result<Sent, Failure> {
        self.channel.send(&self.id, &self.to, &self.message).await
    }
}

/// An SMS that is ready to go.
#[derive(Debug)]
pub(crate) struct ReadySms {
    channel: sms::Settings,
    to: Vec<Number>,
    text: String,
}

/// Makes the SMS that a command line orders.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn sms(arguments: &Sms) -> Result<ReadySms, Error> {
    let Sms { config, name, to, text, .. } = arguments;
    let Channel::Sms(channel) = channel(config, "sms", name)? else {
        return Err(Error::Other(format!("sms.{name} is no SMS channel")));
    };
    let to = to.iter().map(|to| {
        channel.number(to).map_err(|problem| wrong(format!("--to {}: {problem}", escape(to))))
    });
    let to = to.collect::<Result<Vec<_>, _>>()?;
    let text = channel.check(&read_text(text.as_deref())?).map_err(Error::Other)?;
    let to = if to.is_empty() { channel.to.clone() } else { to };
    Ok(ReadySms { channel, to, text })
}

impl ReadySms {
    /// What would be asked of the provider, without secrets.
    pub(crate) fn show(&self) -> String {
        self.channel.show(&self.to, &self.text)
    }

    /// Sends it.
    ///
    /// # Errors
    /// If nobody got it, as far as is known.
    pub(crate) async fn send(&self) -> Result<Sent, Failure> {
        self.channel.send(&self.to, &self.text).await
    }
}

fn channel(config: &ConfigFile, kind: &'static str, name: &str) -> Result<Channel, Error> {
    load_part(config.path(), |root| config::channel(root, kind, name)).map_err(Error::Configuration)
}

/// The text: as it was typed, or what standard input says.
fn read_text(text: Option<&str>) -> Result<String, Error> {
    match text {
        Some(text) if text != "-" => Ok(text.to_owned()),
        _ => {
            let mut read = Vec::new();
            let input = io::stdin().take(MAX_TEXT + 1).read_to_end(&mut read);
            input.map_err(|error| Error::Other(format!("cannot read the text: {error}")))?;
            if read.len() as u64 > MAX_TEXT {
                let most = ByteSize(MAX_TEXT);
                return Err(Error::Other(format!("the text is longer than {most}; --attach it")));
            }
            String::from_utf8(read)
                .map_err(|_| Error::Other("the text is not UTF-8; --attach it".to_owned()))
        }
    }
}

fn read_attachments(
    paths: &[impl AsRef<Path>],
    max_attachment: u64,
) -> Result<Vec<Attachment>, Error> {
    let mut left = max_attachment;
    let mut read = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or("expected a path that ends with a file's name, in UTF-8")?;
        mime::attachment_name(name)?;
        let mut content = Vec::new();
        let file = fs::File::open(path);
        let read =
            file.and_then(|file| file.take(left.saturating_add(1)).read_to_end(&mut content));
        read.map_err(|error| format!("cannot be read: {error}"))?;
        let Some(less) = left.checked_sub(content.len() as u64) else {
            let most = ByteSize(max_attachment);
            return Err(format!("all attachments are longer than {most} (max-attachment)"));
        };
        left = less;
        Ok(Attachment { name: name.to_owned(), content })
    };
    paths
        .iter()
        .map(|path| {
            let path = path.as_ref();
            read(path).map_err(|problem: String| {
                Error::Other(format!("{}: {problem}", escape(&path.to_string_lossy())))
            })
        })
        .collect()
}
