//! What handout does to the outside: it asks HTTP(S) servers for files, and tells the operator by mail
//! and SMS.
//!
//! | file | subject |
//! |---|---|
//! | [`reach`] | which hosts and addresses may be asked |
//! | [`http`] | the HTTP client |
//! | [`roots`] | authorities that are trusted besides those of the system |
//! | [`mod@pointer`] | places in JSON documents |
//! | [`back_off`] | what is tried again, and when |
//!
//! With the feature `mirror`:
//!
//! | file | subject |
//! |---|---|
//! | `headers` | which headers may be added to requests |
//! | `listing` | a JSON listing to entries |
//! | `state` | what is known of the files here |
//! | `place` | the folder that they are in |
//! | `transfer` | one file |
//! | `batch` | one run |
//! | `mirror` | `[mirror.NAME]`: its table, and the daemon's jobs |
//!
//! With the feature `alert`:
//!
//! | file | subject |
//! |---|---|
//! | `channel` | a way to a person, by its name, and how sending ends |
//! | `mail` | `[mail.NAME]`: its table, and sending |
//! | `message` | a mail as it is sent |
//! | `smtp` | a connection to a mail server |
//! | `sms` | `[sms.NAME]`: its table, its providers, and sending |
//! | `incidents` | what of all that happens is told, and when |
//! | `queue` | what waits to be sent, also across a restart |
//! | `alert` | the channels of a configuration, and `[alert]`: their tables |
//! | `teller` | the job of the daemon that tells what happens |

pub mod back_off;
pub mod http;
pub mod pointer;
pub mod reach;
pub mod roots;

#[cfg(feature = "mirror")]
pub mod batch;
#[cfg(feature = "mirror")]
pub mod headers;
#[cfg(feature = "mirror")]
pub mod listing;
#[cfg(feature = "mirror")]
pub mod mirror;
#[cfg(feature = "mirror")]
pub mod place;
#[cfg(feature = "mirror")]
pub mod state;
#[cfg(feature = "mirror")]
pub mod transfer;

#[cfg(feature = "alert")]
pub mod alert;
#[cfg(feature = "alert")]
pub mod channel;
#[cfg(feature = "alert")]
pub mod incidents;
#[cfg(feature = "alert")]
pub mod mail;
#[cfg(feature = "alert")]
pub mod message;
#[cfg(feature = "alert")]
pub mod queue;
#[cfg(feature = "alert")]
pub mod sms;
#[cfg(feature = "alert")]
pub mod smtp;
#[cfg(feature = "alert")]
pub mod teller;
