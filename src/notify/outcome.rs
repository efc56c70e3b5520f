//! The outcome of sending: accepted, or a failure with its meaning for the next attempt.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::fs::filename::escape;
use crate::secret::{Secret, Secrets};

/// Maximum length of a server's text in a message, in characters.
const MAX_SERVER_TEXT: usize = 500;

/// The meaning of a failure for the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// A later attempt may succeed.
    Transient,
    /// Every attempt fails until the operator repairs the channel: password, certificate, address.
    ChannelBroken,
    /// The server rejects this message.
    Rejected,
    /// The server may have accepted the message without confirming it.
    Unconfirmed,
}

impl FailureKind {
    /// Whether the number of attempts has to be limited, because each may fail or deliver again.
    pub(crate) fn limits_attempts(self) -> bool {
        matches!(self, Self::Rejected | Self::Unconfirmed)
    }
}

/// The reason why a message was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Determines the next attempt.
    pub kind: FailureKind,
    /// Text for the operator; control flow does not depend on it.
    pub message: String,
}

impl Failure {
    pub(crate) fn transient(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Transient, message: message.into() }
    }

    pub(crate) fn channel_broken(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::ChannelBroken, message: message.into() }
    }

    pub(crate) fn rejected(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Rejected, message: message.into() }
    }

    pub(crate) fn unconfirmed(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Unconfirmed, message: message.into() }
    }

    /// Combines the failures of all recipients. The kind that allows the least decides.
    pub(crate) fn of_all(failures: &[(String, Self)]) -> Self {
        let messages: Vec<_> =
            failures.iter().map(|(to, failure)| format!("{to}: {failure}")).collect();
        let by_precedence =
            [FailureKind::Unconfirmed, FailureKind::Transient, FailureKind::ChannelBroken];
        let kind = by_precedence
            .into_iter()
            .find(|kind| failures.iter().any(|(_, failure)| failure.kind == *kind))
            .unwrap_or(FailureKind::Rejected);
        Self { kind, message: messages.join("; ") }
    }

    /// Returns the failure as it may be printed: one line, withheld if it contains a secret. The secret
    /// is searched before the text is cut or escaped.
    #[must_use]
    pub fn redacted(self, secrets: &Secrets) -> Self {
        Self { message: printable(&secrets.withhold(&self.message)), ..self }
    }

    pub(crate) fn connection_lost(error: &io::Error) -> Self {
        Self::transient(if error.kind() == io::ErrorKind::UnexpectedEof {
            "the server closed the connection without a reply".to_owned()
        } else {
            format!("the connection failed: {error}")
        })
    }

    pub(crate) fn timed_out(limit: Duration, stage: impl fmt::Display) -> Self {
        Self::transient(format!("not done within {} s (timeout): {stage}", limit.as_secs_f64()))
    }
}

/// Returns a server's text as one line of limited length, without control characters.
pub fn printable(text: &str) -> String {
    let text = text.trim();
    let mut line = escape(&text.chars().take(MAX_SERVER_TEXT).collect::<String>());
    if text.chars().nth(MAX_SERVER_TEXT).is_some() {
        line.push('…');
    }
    line
}

/// Reads the password of a channel on a blocking thread.
pub(super) async fn read_password(path: &Path) -> Result<Secret, Failure> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        Secret::read(&path).map_err(|error| {
            let path = path.display();
            let message = format!("the password in {path} cannot be read: {error}");
            Failure::channel_broken(printable(&message))
        })
    });
    read.await.map_err(|error| Failure::transient(error.to_string()))?
}

/// A message that the server accepted for at least one recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The Message-ID, or the provider's ID for each number.
    pub ids: Vec<String>,
    /// The recipients that failed.
    pub refused: Vec<(String, Failure)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_and_escapes_the_text_of_a_server() {
        assert_eq!(printable(" no \u{1b}[2J\r\nnever \n"), "no \\u{1b}[2J\\r\\nnever");
        assert_eq!(printable(&"ä".repeat(1000)).chars().count(), MAX_SERVER_TEXT + 1);
    }
}
