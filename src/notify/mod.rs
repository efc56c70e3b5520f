//! Channels: mail and SMS.
//!
//! The alert dispatcher and the commands `mail` and `sms` send through a [`Channel`]: [`mail`]
//! builds a message with [`mime`] and sends it by [`smtp`] over [`smtp_client`]; [`sms`] posts to a
//! provider over HTTP. Each attempt ends with an [`outcome`]. Retries and queues belong to `alert`.

use std::sync::Arc;

use crate::fs::filename::escape;
use outcome::Failure;

pub(crate) mod address;
pub(crate) mod helo;
pub(crate) mod mail;
pub(crate) mod mime;
pub(crate) mod outcome;
pub(crate) mod sms;
pub(crate) mod smtp;
pub(crate) mod smtp_client;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Channel {
    Mail(mail::Settings),
    Sms(sms::Settings),
}

impl Channel {
    /// Returns kind and name, such as `mail.ops`.
    pub(crate) fn name(&self) -> &Arc<str> {
        match self {
            Self::Mail(mail) => &mail.name,
            Self::Sms(sms) => &sms.name,
        }
    }

    /// Returns the server as printable text.
    pub(crate) fn server(&self) -> String {
        match self {
            Self::Mail(mail) => escape(&mail.server().to_string()),
            Self::Sms(sms) => sms.server(),
        }
    }

    /// Checks the server without sending a message. Returns the steps that succeeded.
    pub(crate) async fn check(&self) -> Result<String, Failure> {
        match self {
            Self::Mail(mail) => mail.check_server().await,
            Self::Sms(sms) => sms.check_server().await,
        }
    }
}
