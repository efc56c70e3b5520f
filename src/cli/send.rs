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
use crate::notify::mime::{Attachment, AttachmentError, Email, Mailbox};
use crate::notify::outcome::{Failure, Sent};
use crate::notify::sms::Number;
use crate::notify::{mail, sms};

/// Maximum length of a text from standard input, in bytes.
const MAX_TEXT: u64 = 1 << 20;

pub(super) fn run_mail(arguments: &Mail) -> ExitCode {
    match prepare_mail(arguments) {
        Ok(mail) if arguments.dry_run => print(&mail.message),
        Ok(PreparedMail { channel, id, to, message }) => {
            run_until_signal(async move { report(channel.send(&id, &to, &message).await) })
        }
        Err(error) => fail_before_sending(error),
    }
}

pub(super) fn run_sms(arguments: &Sms) -> ExitCode {
    match prepare_sms(arguments) {
        Ok(PreparedSms { channel, to, text }) if arguments.dry_run => {
            print(channel.show(&to, &text).as_bytes())
        }
        Ok(PreparedSms { channel, to, text }) => {
            run_until_signal(async move { report(channel.send(&to, &text).await) })
        }
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
        Error::Configuration(diagnostics) => reject(&diagnostics),
        error @ Error::Input(_) => fail(&error),
    }
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Usage(#[from] clap::Error),
    #[error("{0}")]
    Configuration(Diagnostics),
    #[error("{0}")]
    Input(String),
}

fn invalid_argument(problem: impl std::fmt::Display) -> Error {
    Error::Usage(Cli::command().error(ErrorKind::ValueValidation, problem))
}

fn parse_recipients<T>(
    to: &[String],
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, Error> {
    let parse = |to: &String| {
        parse(to).map_err(|problem| invalid_argument(format!("--to {}: {problem}", escape(to))))
    };
    to.iter().map(parse).collect()
}

struct PreparedMail {
    channel: mail::Settings,
    id: String,
    to: Vec<EmailAddress>,
    message: Vec<u8>,
}

fn prepare_mail(arguments: &Mail) -> Result<PreparedMail, Error> {
    let Mail { config, name, subject, to, attach, text, .. } = arguments;
    mime::header_text(subject)
        .map_err(|problem| invalid_argument(format!("--subject: {problem}")))?;
    let to = parse_recipients(to, str::parse::<Mailbox>)?;
    let Channel::Mail(channel) = channel(config, "mail", name)? else {
        unreachable!("the kind of the table is mail")
    };
    let attachments = read_attachments(attach, channel.max_attachment)?;
    let text = read_text(text.as_deref())?;
    let id = mime::new_id(&channel.from);
    let to = if to.is_empty() { &channel.to } else { &to };
    let email = Email {
        from: &channel.from,
        to,
        subject,
        text: &text,
        attachments,
        id: &id,
        date: SystemTime::now(),
        automatic: false,
    };
    let message = mime::build_message(email).map_err(Error::Input)?;
    let to = to.iter().map(|to| to.address.clone()).collect();
    Ok(PreparedMail { channel, id, to, message })
}

struct PreparedSms {
    channel: sms::Settings,
    to: Vec<Number>,
    text: String,
}

fn prepare_sms(arguments: &Sms) -> Result<PreparedSms, Error> {
    let Sms { config, name, to, text, .. } = arguments;
    let Channel::Sms(channel) = channel(config, "sms", name)? else {
        unreachable!("the kind of the table is sms")
    };
    let to = parse_recipients(to, |to| channel.number(to))?;
    let text = channel.check(&read_text(text.as_deref())?).map_err(Error::Input)?;
    let to = if to.is_empty() { channel.to.clone() } else { to };
    Ok(PreparedSms { channel, to, text })
}

fn channel(config: &ConfigFile, kind: &'static str, name: &str) -> Result<Channel, Error> {
    load_part(config.path(), |root| config::channel(root, kind, name)).map_err(Error::Configuration)
}

/// Returns the argument, or standard input.
fn read_text(text: Option<&str>) -> Result<String, Error> {
    match text {
        Some(text) if text != "-" => Ok(text.to_owned()),
        _ => {
            let mut read = Vec::new();
            let input = io::stdin().take(MAX_TEXT + 1).read_to_end(&mut read);
            input.map_err(|error| Error::Input(format!("cannot read the text: {error}")))?;
            if read.len() as u64 > MAX_TEXT {
                let limit = ByteSize(MAX_TEXT);
                return Err(Error::Input(format!("the text is longer than {limit}: use --attach")));
            }
            String::from_utf8(read)
                .map_err(|_| Error::Input("the text is not UTF-8: use --attach".to_owned()))
        }
    }
}

fn read_attachments(
    paths: &[impl AsRef<Path>],
    max_attachment: u64,
) -> Result<Vec<Attachment>, Error> {
    let mut remaining = max_attachment;
    let mut read = |path: &Path| {
        let attachment = Attachment::read(path, |path| fs::File::open(path), remaining);
        let attachment = attachment.map_err(|error| match error {
            AttachmentError::TooLarge => {
                let limit = ByteSize(max_attachment);
                format!("the attachments together are larger than {limit} (max-attachment)")
            }
            error => error.to_string(),
        })?;
        remaining -= attachment.content.len() as u64;
        Ok(attachment)
    };
    paths
        .iter()
        .map(|path| {
            let path = path.as_ref();
            read(path).map_err(|problem: String| {
                Error::Input(format!("{}: {problem}", escape(&path.to_string_lossy())))
            })
        })
        .collect()
}
