//! The manifest: metadata of the mirrored files, for conditional requests and change detection.
//!
//! Stored as a hidden file in the folder. If it is lost, at worst every file is transferred again.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use reqwest::Url;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::fs::atomic::SaveError;
use crate::fs::filename::file_name;
use crate::mirror::target_dir::{LocalFile, TargetDir};
use crate::text::to_hex;

/// The name of the manifest; hidden, so that no service serves it.
pub(crate) const FILE: &str = ".handout-mirror.json";

/// Maximum size of a manifest, in bytes.
const MAX_SIZE: u64 = 64 << 20;

/// Maximum length of a stored validator, in bytes.
const MAX_VALIDATOR: usize = 1024;

/// Resolutions of file times in nanoseconds: NTFS and CIFS, old NFS, exFAT, and FAT.
const RESOLUTIONS: [i128; 5] = [100, 1_000, 10_000_000, 1_000_000_000, 2_000_000_000];

/// Validators of a response as sent by the server (RFC 9110, 8.8).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Validators {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
}

impl Validators {
    /// Ignores empty values and those longer than 1 KiB.
    pub(crate) fn new(etag: Option<&str>, last_modified: Option<&str>) -> Self {
        let checked = |text: Option<&str>| {
            text.filter(|text| (1..=MAX_VALIDATOR).contains(&text.len())).map(str::to_owned)
        };
        Self { etag: checked(etag), last_modified: checked(last_modified) }
    }

    /// Returns a validator that is equal only for parts of the same content (RFC 9110, 8.8.1 and
    /// 13.1.5): a strong `ETag`, or a `Last-Modified` before `date`, the time of the reply, as a
    /// content can change twice in a second.
    pub(crate) fn strong(&self, date: Option<&str>) -> Option<String> {
        if let Some(etag) = self.etag.as_ref().filter(|etag| etag.starts_with('"')) {
            return Some(etag.clone());
        }
        let sent = httpdate::parse_http_date(date?).ok()?;
        self.last_modified.clone().filter(|_| self.modified().is_some_and(|at| at < sent))
    }

    /// Completes validators from an earlier reply: 206 and 304 may omit them (RFC 9110, 15.3.7 and
    /// 15.4.5).
    #[must_use]
    pub(crate) fn or(self, before: &Self) -> Self {
        Self {
            etag: self.etag.or_else(|| before.etag.clone()),
            last_modified: self.last_modified.or_else(|| before.last_modified.clone()),
        }
    }

    /// Returns the time of `Last-Modified`.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        httpdate::parse_http_date(self.last_modified.as_deref()?).ok()
    }
}

/// Metadata of a mirrored file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CachedFile {
    /// The [`source_id`] of the file's URL.
    pub source: String,
    #[serde(flatten)]
    pub validators: Validators,
    /// In bytes.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

impl CachedFile {
    /// Whether the local file is unmodified since it was saved.
    pub(crate) fn matches(&self, local: &LocalFile) -> bool {
        self.size == local.size
            && (self.modified == local.modified || is_rounded(local.modified, self.modified))
    }
}

/// Whether a file system may have stored the time `exact` as `stored`, which shows only after it
/// was mounted again.
fn is_rounded(stored: (i64, i64), exact: (i64, i64)) -> bool {
    let [stored, exact] = [stored, exact].map(|(seconds, nanoseconds)| {
        i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
    });
    RESOLUTIONS
        .iter()
        .any(|unit| stored % unit == 0 && stored.abs_diff(exact) < unit.unsigned_abs())
}

/// Returns the URL with its query, which may be a secret, replaced by a digest.
pub(crate) fn source_id(url: &Url) -> String {
    let Some(query) = url.query() else { return url.to_string() };
    let digest = to_hex(&Sha256::digest(query.as_bytes()));
    let mut url = url.clone();
    url.set_query(None);
    format!("{url}?sha256={digest}")
}

/// The condition of a request for a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Precondition {
    Always,
    IfChanged(Validators),
    /// Unless the server's `Last-Modified` is exactly this time, that of a local file without
    /// metadata.
    IfModifiedAtOtherTime(String),
}

/// Returns the condition of a request that updates `local` from `source`.
pub(crate) fn precondition(
    cached: Option<&CachedFile>,
    local: &LocalFile,
    source: &str,
) -> Precondition {
    match (cached, local.modified()) {
        (Some(cached), _)
            if cached.source == source
                && cached.matches(local)
                && cached.validators != Validators::default() =>
        {
            Precondition::IfChanged(cached.validators.clone())
        }
        // A saved file has the server's time, which has no fraction of a second.
        (None, Some(modified)) if local.modified.1 == 0 => {
            Precondition::IfModifiedAtOtherTime(httpdate::fmt_http_date(modified))
        }
        _ => Precondition::Always,
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// Metadata by file name.
    pub files: BTreeMap<String, CachedFile>,
}

impl Manifest {
    /// Reads the manifest. An unreadable one counts as empty.
    pub(crate) fn load(target: &TargetDir) -> Self {
        let read = target.read_small(Path::new(FILE), MAX_SIZE).ok();
        let parsed = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut manifest: Self = parsed.unwrap_or_default();
        // Files are removed by these names, so a modified manifest must not contain paths.
        manifest.files.retain(|name, _| file_name(name).is_ok());
        manifest
    }

    pub(crate) fn save_if_changed(&self, target: &TargetDir) -> Result<(), SaveError> {
        if Self::load(target) == *self {
            return Ok(());
        }
        let json = serde_json::to_vec_pretty(self).map_err(io::Error::from)?;
        target.write_small(FILE, &json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DATE: &str = "Sun, 22 Nov 2026 13:46:01 GMT";

    fn cached(etag: Option<&str>, last_modified: Option<&str>) -> CachedFile {
        let validators = Validators::new(etag, last_modified);
        CachedFile { source: "http://a/".to_owned(), validators, size: 3, modified: (1, 2) }
    }

    const LOCAL: LocalFile = LocalFile { size: 3, modified: (1, 2) };

    #[test]
    fn requests_unmodified_files_conditionally() {
        let saved = cached(Some("W/\"x\""), Some(DATE));
        assert_eq!(
            precondition(Some(&saved), &LOCAL, "http://a/"),
            Precondition::IfChanged(saved.validators.clone())
        );
        assert_eq!(precondition(Some(&saved), &LOCAL, "http://b/"), Precondition::Always);
        for touched in [LocalFile { size: 4, ..LOCAL }, LocalFile { modified: (1, 3), ..LOCAL }] {
            assert_eq!(precondition(Some(&saved), &touched, "http://a/"), Precondition::Always);
        }
    }

    #[test]
    fn recognises_times_that_a_file_system_rounds() {
        let matches = |stored, exact| {
            let cached = CachedFile { modified: exact, ..cached(None, None) };
            cached.matches(&LocalFile { modified: stored, ..LOCAL })
        };
        for (stored, exact) in [
            ((1_700_000_000, 0), (1_700_000_001, 0)),
            ((1_700_000_002, 0), (1_700_000_001, 0)),
            ((5, 120_000_000), (5, 123_456_789)),
            ((5, 123_456_700), (5, 123_456_789)),
        ] {
            assert!(matches(stored, exact), "{stored:?} {exact:?}");
        }
        for (stored, exact) in [
            ((1_700_000_001, 0), (1_700_000_000, 0)),
            ((1_700_000_002, 0), (1_700_000_000, 0)),
            ((5, 123_456_788), (5, 123_456_789)),
        ] {
            assert!(!matches(stored, exact), "{stored:?} {exact:?}");
        }
    }

    #[test]
    fn requests_files_without_metadata_by_their_time() {
        let at = |modified| precondition(None, &LocalFile { modified, ..LOCAL }, "http://a/");
        assert_eq!(
            at((1, 0)),
            Precondition::IfModifiedAtOtherTime("Thu, 01 Jan 1970 00:00:01 GMT".to_owned())
        );
        assert_eq!(at((-5, 0)), Precondition::Always);
        // No server sends fractions of a second.
        assert_eq!(at((1, 2)), Precondition::Always);
        assert_eq!(
            precondition(Some(&cached(None, None)), &LOCAL, "http://a/"),
            Precondition::Always
        );
    }

    #[test]
    fn matches_parts_by_strong_validators_only() {
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
    fn stores_queries_as_digests() {
        let source_id = |url: &str| source_id(&Url::parse(url).unwrap());
        assert_eq!(source_id("http://a/b"), "http://a/b");
        let one = source_id("http://a/b?key=secret");
        assert!(one.starts_with("http://a/b?sha256=") && !one.contains("secret"), "{one}");
        assert_ne!(one, source_id("http://a/b?key=other"));
    }

    #[test]
    fn saves_and_loads_and_ignores_garbage() {
        let folder = tempfile::tempdir().unwrap();
        let place = TargetDir::open(folder.path()).unwrap();
        assert_eq!(Manifest::load(&place), Manifest::default());
        let mut manifest = Manifest::default();
        manifest.files.insert("a".to_owned(), cached(Some("\"x\""), None));
        manifest.save_if_changed(&place).unwrap();
        assert_eq!(Manifest::load(&place), manifest);
        manifest.files.insert("../b".to_owned(), cached(None, None));
        manifest.save_if_changed(&place).unwrap();
        assert_eq!(Manifest::load(&place).files.len(), 1);
        std::fs::write(folder.path().join(FILE), "{\"files\":[").unwrap();
        assert_eq!(Manifest::load(&place), Manifest::default());
    }

    proptest! {
        #[test]
        fn accepts_any_validator(etag in ".{0,20}", date in ".{0,40}", sent in ".{0,40}") {
            let validators = Validators::new(Some(&etag), Some(&date));
            if let Some(strong) = validators.strong(Some(&sent)) {
                prop_assert!(strong.starts_with('"') || strong == date);
            }
        }
    }
}
