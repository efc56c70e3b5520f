//! The SMTP client that mail channels send with.
//!
//! | file | subject |
//! |---|---|
//! | [`address`] | mail addresses, domains and address literals |
//! | [`helo`] | the name that EHLO announces |
//! | [`smtp_client`] | the SMTP dialogue, over any stream |

pub mod address;
pub mod helo;
pub mod smtp_client;
