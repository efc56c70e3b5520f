//! Channels: mail and SMS.
//!
//! The alert dispatcher and the commands `mail` and `sms` send through a [`channel`]: [`mail`]
//! builds a message with [`mime`] and sends it by [`smtp`] over [`smtp_client`]; [`sms`] asks a
//! provider over HTTP. Retries and queues belong to `alert`.

pub(crate) mod address;
pub(crate) mod channel;
pub(crate) mod helo;
pub(crate) mod mail;
pub(crate) mod mime;
pub(crate) mod sms;
pub(crate) mod smtp;
pub(crate) mod smtp_client;
