//! Listings of folder services.

use serde::Deserialize;

use super::error::Error;
use super::session::Session;
use crate::document::without_bom;
use crate::fs::filename::escape;

/// Maximum length of a listing, in bytes.
const MAX_LISTING: usize = 16 << 20;

/// A file in a listing.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ListedFile {
    /// Name on the server; untrusted text.
    pub filename: String,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last modification; untrusted text.
    pub modified: Option<String>,
}

/// Requests and receives the listing.
pub(super) async fn read_listing(session: &mut Session) -> Result<Vec<ListedFile>, Error> {
    #[derive(Deserialize)]
    struct Reply {
        files: Option<Vec<ListedFile>>,
        error: Option<String>,
    }
    session.send(b"\n").await?;
    let mut line = Vec::new();
    loop {
        let received = session.received();
        let end = received.iter().position(|byte| *byte == b'\n');
        let length = end.unwrap_or(received.len());
        line.extend_from_slice(received.get(..length).unwrap_or_default());
        session.consume(length);
        if line.len() > MAX_LISTING {
            return Err(Error::NotAListing);
        }
        if end.is_some() || !session.receive().await? {
            break;
        }
    }
    match serde_json::from_slice(without_bom(&line)) {
        Ok(Reply { files: Some(files), .. }) => Ok(files),
        Ok(Reply { error: Some(error), .. }) => Err(Error::Refused(escape(&error))),
        Ok(Reply { .. }) | Err(_) => Err(Error::NotAListing),
    }
}
