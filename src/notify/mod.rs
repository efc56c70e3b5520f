//! Channels: mail and SMS.
//!
//! The alert dispatcher and the commands `mail` and `sms` send through a [`channel`]: [`mail`]
//! builds a message with [`mime`] and sends it by [`smtp`] over [`smtp_client`]; [`sms`] asks a
//! provider over HTTP. Retries and queues belong to `alert`.

pub mod address;
pub mod channel;
pub mod helo;
pub mod mail;
pub mod mime;
pub mod sms;
pub mod smtp;
pub mod smtp_client;
