//! A way to a person: how sending over it ends.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::fs::filename::escape;
use crate::notify::{mail, sms};
use crate::secret::{Secret, Secrets};

/// The longest that is told of what a server has said, in characters.
const MAX_WORDS: usize = 500;

/// What a failure means for the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasting {
    /// It may be better a little later.
    Temporary,
    /// It will not be better before somebody does something about the channel: its password, its
    /// certificate, its address.
    Unusable,
    /// This message is not taken, and will hardly be another time.
    Refused,
    /// It may have been taken, which nobody can know.
    Doubtful,
}

impl Lasting {
    /// Whether to try again and again does no good: it would be in vain, or sent again and again.
    pub fn is_bounded(self) -> bool {
        matches!(self, Self::Refused | Self::Doubtful)
    }
}

/// Why something was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{words}")]
pub struct Failure {
    /// What it means for the next attempt.
    pub lasting: Lasting,
    /// What happened, in the server's own words if it has said any; see [`Failure::told`].
    pub words: String,
}

impl Failure {
    /// One that may pass.
    pub fn temporary(words: impl Into<String>) -> Self {
        Self { lasting: Lasting::Temporary, words: words.into() }
    }

    /// One of the channel.
    pub fn unusable(words: impl Into<String>) -> Self {
        Self { lasting: Lasting::Unusable, words: words.into() }
    }

    /// One of this message.
    pub fn refused(words: impl Into<String>) -> Self {
        Self { lasting: Lasting::Refused, words: words.into() }
    }

    /// One of a message that may have been taken.
    pub fn doubtful(words: impl Into<String>) -> Self {
        Self { lasting: Lasting::Doubtful, words: words.into() }
    }

    /// One of several recipients, none of whom was taken.
    pub fn of_all(refused: &[(String, Self)]) -> Self {
        let each: Vec<_> = refused.iter().map(|(to, failure)| format!("{to}: {failure}")).collect();
        let is = |lasting| refused.iter().any(|(_, failure)| failure.lasting == lasting);
        let worst = [Lasting::Doubtful, Lasting::Temporary, Lasting::Unusable];
        let lasting = worst.into_iter().find(|one| is(*one));
        Self { lasting: lasting.unwrap_or(Lasting::Refused), words: each.join("; ") }
    }

    /// Returns the failure as it may be printed: one line, withheld if it contains a secret. The secret
    /// is searched before the text is cut or escaped.
    #[must_use]
    pub fn told(self, secrets: &Secrets) -> Self {
        Self { words: words(&secrets.withhold(&self.words)), ..self }
    }

    /// A broken connection. Whether that is temporary, the server does not say.
    pub fn lost(error: &io::Error) -> Self {
        Self::temporary(if error.kind() == io::ErrorKind::UnexpectedEof {
            "the server closed the connection without a reply".to_owned()
        } else {
            format!("the connection failed: {error}")
        })
    }

    /// One that has taken too long.
    pub fn late(time: Duration, doing: &str) -> Self {
        Self::temporary(format!("not done within {} s (timeout): {doing}", time.as_secs_f64()))
    }
}

/// What a server has said, as a line that can be printed.
pub fn words(said: &str) -> String {
    let said = said.trim();
    let mut words = escape(&said.chars().take(MAX_WORDS).collect::<String>());
    if said.chars().nth(MAX_WORDS).is_some() {
        words.push('…');
    }
    words
}

/// Reads the password of a channel, apart from the event loop, as a disk can take its time.
///
/// # Errors
/// If it cannot be read.
pub(crate) async fn password(path: &Path) -> Result<Secret, Failure> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        Secret::read(&path).map_err(|error| {
            let path = path.display();
            Failure::unusable(words(&format!("the password in {path} cannot be read: {error}")))
        })
    });
    read.await.map_err(|error| Failure::temporary(error.to_string()))?
}

/// A message that has been taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// What it is known by: the Message-ID, or what the provider has called it for each number.
    pub ids: Vec<String>,
    /// For whom it was not taken.
    pub refused: Vec<(String, Failure)>,
}

/// A way to a person.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Channel {
    /// `[mail.NAME]`
    Mail(mail::Settings),
    /// `[sms.NAME]`
    Sms(sms::Settings),
}

impl Channel {
    /// Its kind and name, as `mail.ops`.
    pub(crate) fn name(&self) -> &Arc<str> {
        match self {
            Self::Mail(mail) => &mail.name,
            Self::Sms(sms) => &sms.name,
        }
    }

    /// The server that it asks, for people.
    pub(crate) fn server(&self) -> String {
        match self {
            Self::Mail(mail) => escape(&mail.server().to_string()),
            Self::Sms(sms) => sms.server(),
        }
    }

    /// Looks whether its server can be reached, can encrypt, and knows us, as far as that can be seen
    /// without sending; returns what was done.
    ///
    /// # Errors
    /// If not.
    pub(crate) async fn try_out(&self) -> Result<String, Failure> {
        match self {
            Self::Mail(mail) => mail.try_out().await,
            Self::Sms(sms) => sms.try_out().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_is_bounded_and_obeyed_by_no_terminal() {
        assert_eq!(words(" no \u{1b}[2J\r\nnever \n"), "no \\u{1b}[2J\\r\\nnever");
        assert_eq!(words(&"ä".repeat(1000)).chars().count(), MAX_WORDS + 1);
    }
}
