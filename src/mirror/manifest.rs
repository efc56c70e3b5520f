//! What is known of the files here, so that a server is asked only for what changed.
//!
//! It is kept in a hidden file beside them. Lost, it is found out again: at worst by a transfer.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use reqwest::Url;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::fs::atomic::SaveError;
use crate::fs::filename::file_name;
use crate::mirror::target_dir::{Local, Place, hex};

/// The file's name; hidden, so that no file service has it.
pub(crate) const FILE: &str = ".handout-mirror.json";

/// The largest state that is read, in bytes.
const MAX_STATE: u64 = 64 << 20;

/// The longest validator that is kept, in bytes.
const MAX_VALIDATOR: usize = 1024;

/// The identity of a content, as the server tells it (RFC 9110, 8.8).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Validators {
    /// `ETag`, as it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// `Last-Modified`, as it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
}

impl Validators {
    /// Takes what a server sent; what is too long is as if it had not been sent.
    pub(crate) fn new(etag: Option<&str>, last_modified: Option<&str>) -> Self {
        let short = |text: &&str| !text.is_empty() && text.len() <= MAX_VALIDATOR;
        Self {
            etag: etag.filter(short).map(str::to_owned),
            last_modified: last_modified.filter(short).map(str::to_owned),
        }
    }

    /// What two parts of one content have in common (RFC 9110, 8.8.1 and 13.1.5): a strong `ETag`, or
    /// a date that is older than the reply (sent at `date`), as a content can change twice in a
    /// second.
    pub(crate) fn strong(&self, date: Option<&str>) -> Option<String> {
        match &self.etag {
            Some(etag) if etag.starts_with('"') => return Some(etag.clone()),
            _ => {}
        }
        let last_modified = self.last_modified.as_ref()?;
        let modified = httpdate::parse_http_date(last_modified).ok()?;
        let sent = httpdate::parse_http_date(date?).ok()?;
        (sent > modified).then(|| last_modified.clone())
    }

    /// These, and what was said `before` where they say nothing: a reply that sends no content, or
    /// only a part of it, may leave them out (RFC 9110, 15.3.7 and 15.4.5).
    #[must_use]
    pub(crate) fn or(self, before: &Self) -> Self {
        Self {
            etag: self.etag.or_else(|| before.etag.clone()),
            last_modified: self.last_modified.or_else(|| before.last_modified.clone()),
        }
    }

    /// The time of `Last-Modified`.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        httpdate::parse_http_date(self.last_modified.as_deref()?).ok()
    }
}

/// What is known of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CachedFile {
    /// Which URL it is from: see [`source_id`].
    pub source: String,
    /// What its server said of it.
    #[serde(flatten)]
    pub validators: Validators,
    /// Its size in bytes, and when it was modified, so that it is seen if somebody changes it.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub modified: (i64, i64),
}

impl CachedFile {
    /// Whether it is what is known of this file, as it is now.
    pub(crate) fn is_of(&self, local: &Local) -> bool {
        self.size == local.size
            && (self.modified == local.modified || is_rounded(local.modified, self.modified))
    }
}

/// Resolutions of file times, in nanoseconds: NTFS and CIFS, old NFS, exFAT, and FAT.
const RESOLUTIONS: [i128; 5] = [100, 1_000, 10_000_000, 1_000_000_000, 2_000_000_000];

/// Whether a file system may have stored the time `exact` as `stored`. It shows only after the file
/// system was mounted again.
fn is_rounded(stored: (i64, i64), exact: (i64, i64)) -> bool {
    let [stored, exact] = [stored, exact].map(|(seconds, nanoseconds)| {
        i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
    });
    RESOLUTIONS
        .iter()
        .any(|unit| stored % unit == 0 && stored.abs_diff(exact) < unit.unsigned_abs())
}

/// A URL so that it can be told from every other, and a query that may be a secret cannot be read.
pub(crate) fn source_id(url: &Url) -> String {
    let Some(query) = url.query() else { return url.to_string() };
    let digest = hex(&Sha256::digest(query.as_bytes()));
    let mut url = url.clone();
    url.set_query(None);
    format!("{url}?sha256={digest}")
}

/// On which conditions a file is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Precondition {
    /// Whatever it is.
    Always,
    /// If it is not this any more.
    IfChanged(Validators),
    /// If it was not last modified at exactly this time, which is that of a file of which nothing
    /// else is known.
    IfModifiedAtOtherTime(String),
}

/// On which conditions the file is asked for that is here as `local`, and is to be what is at
/// `source`.
pub(crate) fn precondition(
    known: Option<&CachedFile>,
    local: &Local,
    source: &str,
) -> Precondition {
    match known {
        // Another, or somebody has changed it.
        Some(known) if known.source != source || !known.is_of(local) => Precondition::Always,
        Some(known) if known.validators != Validators::default() => {
            Precondition::IfChanged(known.validators.clone())
        }
        // The server says nothing of it.
        Some(_) => Precondition::Always,
        // It has the server's time, which has no fraction, if it was saved by us.
        None => match local.modified() {
            Some(modified) if local.modified.1 == 0 => {
                Precondition::IfModifiedAtOtherTime(httpdate::fmt_http_date(modified))
            }
            _ => Precondition::Always,
        },
    }
}

/// What is known of all files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// By name.
    pub files: BTreeMap<String, CachedFile>,
}

impl Manifest {
    /// Reads it; what cannot be read is not known.
    pub(crate) fn load(place: &Place) -> Self {
        let read = place.read_small(Path::new(FILE), MAX_STATE);
        let mut state: Self =
            read.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        // Files are removed by these names: somebody may have written others.
        state.files.retain(|name, _| file_name(name).is_ok());
        state
    }

    /// Writes it if it is not what is there.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub(crate) fn save_if_changed(&self, place: &Place) -> Result<(), SaveError> {
        if Self::load(place) == *self { Ok(()) } else { self.save(place) }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub(crate) fn save(&self, place: &Place) -> Result<(), SaveError> {
        let json = serde_json::to_vec_pretty(self).map_err(io::Error::from)?;
        place.write_small(FILE, &json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DATE: &str = "Sun, 22 Nov 2026 13:46:01 GMT";

    fn known(etag: Option<&str>, last_modified: Option<&str>) -> CachedFile {
        let validators = Validators::new(etag, last_modified);
        CachedFile { source: "http://a/".to_owned(), validators, size: 3, modified: (1, 2) }
    }

    const LOCAL: Local = Local { size: 3, modified: (1, 2) };

    #[test]
    fn what_is_known_is_asked_for_only_if_it_changed() {
        let known = known(Some("W/\"x\""), Some(DATE));
        assert_eq!(
            precondition(Some(&known), &LOCAL, "http://a/"),
            Precondition::IfChanged(known.validators.clone())
        );
        assert_eq!(precondition(Some(&known), &LOCAL, "http://b/"), Precondition::Always);
        for touched in [Local { size: 4, ..LOCAL }, Local { modified: (1, 3), ..LOCAL }] {
            assert_eq!(precondition(Some(&known), &touched, "http://a/"), Precondition::Always);
        }
    }

    #[test]
    fn recognises_times_that_a_file_system_rounds() {
        let is_of = |stored, exact| {
            let known = CachedFile { modified: exact, ..known(None, None) };
            known.is_of(&Local { modified: stored, ..LOCAL })
        };
        for (stored, exact) in [
            ((1_700_000_000, 0), (1_700_000_001, 0)),
            ((1_700_000_002, 0), (1_700_000_001, 0)),
            ((5, 120_000_000), (5, 123_456_789)),
            ((5, 123_456_700), (5, 123_456_789)),
        ] {
            assert!(is_of(stored, exact), "{stored:?} {exact:?}");
        }
        for (stored, exact) in [
            ((1_700_000_001, 0), (1_700_000_000, 0)),
            ((1_700_000_002, 0), (1_700_000_000, 0)),
            ((5, 123_456_788), (5, 123_456_789)),
        ] {
            assert!(!is_of(stored, exact), "{stored:?} {exact:?}");
        }
    }

    #[test]
    fn of_what_is_not_known_the_time_is_told() {
        let at = |modified| precondition(None, &Local { modified, ..LOCAL }, "http://a/");
        assert_eq!(
            at((1, 0)),
            Precondition::IfModifiedAtOtherTime("Thu, 01 Jan 1970 00:00:01 GMT".to_owned())
        );
        assert_eq!(at((-5, 0)), Precondition::Always);
        // No server says so much.
        assert_eq!(at((1, 2)), Precondition::Always);
        assert_eq!(
            precondition(Some(&known(None, None)), &LOCAL, "http://a/"),
            Precondition::Always
        );
    }

    #[test]
    fn parts_are_of_one_content_by_a_strong_validator_only() {
        let strong = |etag, date, sent| Validators::new(etag, date).strong(sent);
        assert_eq!(strong(Some("\"x\""), Some(DATE), None), Some("\"x\"".to_owned()));
        assert_eq!(strong(Some("W/\"x\""), None, Some(DATE)), None);
        let later = Some("Sun, 22 Nov 2026 13:46:02 GMT");
        assert_eq!(strong(Some("W/\"x\""), Some(DATE), later), Some(DATE.to_owned()));
        assert_eq!(strong(None, Some(DATE), Some(DATE)), None);
        assert_eq!(strong(None, Some(DATE), None), None);
        assert_eq!(strong(None, Some("yesterday"), later), None);
    }

    #[test]
    fn a_query_is_kept_as_a_digest() {
        let source_id = |url: &str| source_id(&Url::parse(url).unwrap());
        assert_eq!(source_id("http://a/b"), "http://a/b");
        let one = source_id("http://a/b?key=secret");
        assert!(one.starts_with("http://a/b?sha256=") && !one.contains("secret"), "{one}");
        assert_ne!(one, source_id("http://a/b?key=other"));
    }

    #[test]
    fn it_is_read_as_it_was_written_and_junk_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::open(folder.path()).unwrap();
        assert_eq!(Manifest::load(&place), Manifest::default());
        let mut state = Manifest::default();
        state.files.insert("a".to_owned(), known(Some("\"x\""), None));
        state.save(&place).unwrap();
        assert_eq!(Manifest::load(&place), state);
        state.files.insert("../b".to_owned(), known(None, None));
        state.save(&place).unwrap();
        assert_eq!(Manifest::load(&place).files.len(), 1);
        std::fs::write(folder.path().join(FILE), "{\"files\":[").unwrap();
        assert_eq!(Manifest::load(&place), Manifest::default());
    }

    proptest! {
        #[test]
        fn whatever_a_server_sends_is_no_panic(etag in ".{0,20}", date in ".{0,40}", sent in ".{0,40}") {
            let validators = Validators::new(Some(&etag), Some(&date));
            if let Some(strong) = validators.strong(Some(&sent)) {
                prop_assert!(strong.starts_with('"') || strong == date);
            }
        }
    }
}
