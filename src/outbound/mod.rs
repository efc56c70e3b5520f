//! What handout does to the outside: it asks HTTP(S) servers for files.
//!
//! | file | subject |
//! |---|---|
//! | [`reach`] | which hosts and addresses may be asked |
//! | [`http`] | the HTTP client |
//! | [`headers`] | which headers may be added to requests |
//! | [`back_off`] | what is tried again, and when |
//! | [`listing`] | a JSON listing to entries |
//! | [`state`] | what is known of the files here |
//! | [`place`] | the folder that they are in |
//! | [`transfer`] | one file |
//! | [`batch`] | one run |
//! | [`mirror`] | `[mirror.NAME]`: its table, and the daemon's jobs |
//!
//! Everything here is in builds with the feature `mirror`.

pub mod back_off;
pub mod batch;
pub mod headers;
pub mod http;
pub mod listing;
pub mod mirror;
pub mod place;
pub mod reach;
pub mod state;
pub mod transfer;
