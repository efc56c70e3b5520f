//! Sends one message of the outbox over a channel.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use crate::alert::outbox::Message;
use crate::fs::file::OpenFile;
use crate::fs::filename::escape;
use crate::notify::Channel;
use crate::notify::mime::{self, Attachment, AttachmentError, Email};
use crate::notify::outcome::{Failure, FailureKind, Sent};
use crate::notify::{mail, sms};
use crate::text::counted;

pub(super) async fn deliver(channel: &Channel, message: Message) -> Result<Sent, Failure> {
    match channel {
        Channel::Mail(mail) => deliver_mail(mail, message).await,
        Channel::Sms(sms) => {
            let number = sms::Number::from_str(&message.to).map_err(Failure::rejected)?;
            sms.send(&[number], &sms.shorten(&message.text)).await
        }
    }
}

async fn deliver_mail(mail: &mail::Settings, message: Message) -> Result<Sent, Failure> {
    let Message { id, to, subject, mut text, date, files, .. } = message;
    let to = [to.parse().map_err(Failure::rejected)?];
    let max = mail.max_attachment;
    let (attachments, problems) =
        tokio::task::spawn_blocking(move || read_attachments(&files, max))
            .await
            .map_err(|error| Failure::transient(error.to_string()))?;
    for problem in problems {
        text.push_str(&format!("\nNot attached: {problem}"));
    }
    let attached = attachments.len();
    let date = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(date).unwrap_or(0));
    let build = |text: &str, attachments| {
        let mail = mime::build_message(Email {
            from: &mail.from,
            to: &mail.to,
            subject: &subject,
            text,
            attachments,
            id: &id,
            date,
            automatic: true,
        });
        mail.map_err(Failure::rejected)
    };
    let sent = mail.send(&id, &to, &build(&text, attachments)?).await;
    match sent {
        Err(Failure { kind: FailureKind::Rejected, message }) if attached > 0 => {
            let files = counted(attached, "file");
            text.push_str(&format!("\nNot attached: {files}, which the server refuses: {message}"));
            mail.send(&id, &to, &build(&text, Vec::new())?).await
        }
        sent => sent,
    }
}

/// Reads the files up to a total of `max` bytes. Returns a problem for each other file.
fn read_attachments(files: &[PathBuf], max: u64) -> (Vec<Attachment>, Vec<String>) {
    let (mut attachments, mut problems) = (Vec::new(), Vec::new());
    let mut remaining = max;
    for path in files {
        let open = |path: &Path| OpenFile::open(path).map(OpenFile::into_file);
        match Attachment::read(path, open, remaining) {
            Ok(attachment) => {
                remaining -= attachment.content.len() as u64;
                attachments.push(attachment);
            }
            Err(error) => {
                let problem = match error {
                    AttachmentError::TooLarge => {
                        "with the others it is larger than max-attachment".to_owned()
                    }
                    error => error.to_string(),
                };
                let name = path.file_name().unwrap_or(path.as_os_str());
                problems.push(format!("{}: {problem}", escape(&name.to_string_lossy())));
            }
        }
    }
    (attachments, problems)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn attaches_files_that_fit() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            path
        };
        let files = [file("a", "1234"), file("b", "12345"), file("c", ""), folder.path().into()];
        let (attached, problems) = read_attachments(&files, 8);
        let names: Vec<_> = attached.iter().map(|attachment| &*attachment.name).collect();
        assert_eq!(names, ["a", "c"]);
        assert_eq!(problems[0], "b: with the others it is larger than max-attachment");
        assert_eq!(problems.len(), 2);
    }
}
