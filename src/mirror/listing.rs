//! The JSON listing of a mirror: requests it and reads its entries.
//!
//! A listing is untrusted. Its size, URLs, hosts and file names are checked here; an invalid entry
//! does not affect the others.

use std::collections::hash_map::{Entry as Slot, HashMap};
use std::io::{self, Read};
use std::time::Duration;

use bytesize::ByteSize;
use flate2::read::MultiGzDecoder;
use percent_encoding::percent_decode_str;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use reqwest::{Response, Url};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::document::without_bom;
use crate::fs::filename::{NameError, escape, file_name};
use crate::http::client::Client;
use crate::http::codings::{self, Codings};
use crate::http::egress::{self, EgressPolicy, Refused, shown};
use crate::http::pointer;
use crate::http::retry::Retries;
use crate::mirror::download;
use crate::mirror::manifest::Validators;
use crate::text::{counted, from_hex};

/// Maximum size of a listing, before and after decoding, in bytes.
const MAX_LISTING: usize = 16 << 20;

/// Maximum size of an entry, in bytes.
const MAX_ENTRY: usize = 64 << 10;

/// Maximum total length of the URLs, in bytes: a short relative URL becomes as long as its base.
const MAX_URLS: usize = 64 << 20;

/// Maximum length of server-supplied text in an error, in characters.
const MAX_SHOWN: usize = 200;

/// JSON pointers (RFC 6901) into a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pointers {
    /// The array of entries, in the document.
    pub list: String,
    /// The URL, in an entry.
    pub url: String,
    /// The file name, in an entry. Without it, the last segment of the URL's path.
    pub filename: Option<String>,
    /// The digest, in an entry.
    pub sha256: Option<String>,
}

/// The reason why a listing cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Transfer(#[from] download::Error),
    #[error("the listing is larger than {}", ByteSize(MAX_LISTING as u64))]
    TooLarge,
    #[error("the listing cannot be decoded: {0}")]
    Decode(io::Error),
    #[error(transparent)]
    Parse(#[from] ParseError),
}

/// The reason why a document is not a listing.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ParseError {
    #[error("the listing is not JSON: {0}")]
    Json(serde_json::Error),
    #[error("the listing has no array at \"{0}\" (`list`)")]
    NoArray(String),
    #[error("the listing has more than {} (`max-files`)", counted(*.0, "entry"))]
    TooManyEntries(usize),
    #[error("the URLs of the listing are longer than {} together", ByteSize(MAX_URLS as u64))]
    UrlsTooLong,
}

impl Error {
    pub(crate) fn is_interruption(&self) -> bool {
        matches!(self, Self::Transfer(download::Error::Interrupted))
    }

    /// Returns the time that the server asked to wait.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        if let Self::Transfer(error) = self { error.retry_after() } else { None }
    }
}

/// A file to mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Entry {
    /// A single path component.
    pub name: String,
    pub url: Url,
    pub sha256: Option<[u8; 32]>,
}

/// An entry that cannot be used.
#[derive(Debug)]
pub struct InvalidEntry {
    /// The printable name, URL or number of the entry.
    pub label: String,
    /// The name of its file, if that is known.
    pub name: Option<String>,
    /// Printed after the label.
    pub error: EntryError,
}

/// The reason why an entry cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum EntryError {
    #[error("the entry is larger than {}", ByteSize(MAX_ENTRY as u64))]
    TooLarge,
    #[error("the entry is not valid JSON: {0}")]
    Json(String),
    #[error("the entry has no text at \"{0}\"")]
    Missing(String),
    /// As of a URL of control characters, or `#`.
    #[error("the entry's URL is that of the listing itself")]
    ListingUrl,
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("refusing the name \"{name}\": {cause}")]
    NameRejected { name: String, cause: NameError },
    #[error("the last part of the URL's path is not UTF-8")]
    NotUtf8,
    #[error("expected a SHA-256 of 64 hexadecimal digits")]
    Digest,
    #[error("the name is taken by the entry for {0}")]
    NameTaken(String),
    #[error("the file system does not distinguish this name from \"{0}\"")]
    Alias(String),
}

/// Entries in the order of the listing.
pub(crate) type Entries = Vec<Result<Entry, InvalidEntry>>;

/// A received listing, reused in the next sync if the server answers 304.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    validators: Validators,
    pub(crate) entries: Entries,
}

impl Listing {
    /// A listing of URLs that were given one by one.
    pub(crate) fn of_urls(urls: &[Url]) -> Self {
        let entry = |url: &Url| match name_of(url) {
            Ok(name) => Ok(Entry { name, url: url.clone(), sha256: None }),
            Err(error) => Err(InvalidEntry { label: shown(url), name: None, error }),
        };
        let mut entries = urls.iter().map(entry).collect();
        reject_duplicates(&mut entries, str::to_owned);
        Self { entries, ..Self::default() }
    }

    /// Returns all file names, also those of invalid entries.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter_map(|entry| match entry {
            Ok(entry) => Some(entry.name.as_str()),
            Err(invalid) => invalid.name.as_deref(),
        })
    }

    /// Whether every entry has a file name.
    pub(crate) fn is_fully_named(&self) -> bool {
        !self.entries.iter().any(|entry| matches!(entry, Err(InvalidEntry { name: None, .. })))
    }
}

/// Requests for a listing.
#[derive(Debug)]
pub(crate) struct ListingRequest<'a> {
    pub client: &'a Client,
    pub egress_policy: &'a EgressPolicy,
    pub url: &'a Url,
    pub pointers: &'a Pointers,
    pub retries: u32,
    pub max_entries: usize,
}

struct Body {
    json: Vec<u8>,
    /// The URL after redirects.
    base: Url,
    validators: Validators,
}

impl ListingRequest<'_> {
    /// Requests the listing until it is received or the error is permanent.
    pub(crate) async fn send(&self, cached: Option<Listing>) -> Result<Listing, Error> {
        let validators = cached.as_ref().map(|cached| &cached.validators);
        let mut headers = validators.map(download::if_changed).unwrap_or_default();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
        let mut retries = Retries::new(self.retries);
        let received = loop {
            match self.attempt(&headers).await {
                Ok(received) => break received,
                Err(Error::Transfer(error)) if error.is_temporary() => {
                    let delay = retries.next_delay(error.retry_after()).ok_or(error)?;
                    tokio::time::sleep(delay).await;
                }
                Err(error) => return Err(error),
            }
        };
        match (received, cached) {
            (Some(Body { json, base, validators }), _) => {
                let entries =
                    read(&json, self.pointers, self.max_entries, &base, self.egress_policy)?;
                Ok(Listing { validators, entries })
            }
            (None, Some(cached)) => Ok(cached),
            (None, None) => Err(download::Error::Status { status: 304, retry_after: None }.into()),
        }
    }

    /// Returns `None` if the listing has not changed.
    async fn attempt(&self, headers: &HeaderMap) -> Result<Option<Body>, Error> {
        let response = self.client.get(self.url, headers).await;
        let mut response = response.map_err(download::Error::from)?;
        match response.status().as_u16() {
            304 => return Ok(None),
            200 | 203 => {}
            _ => {
                let error = download::failure(&response);
                self.client.drain(&mut response).await;
                return Err(error.into());
            }
        }
        let json = receive(self.client, &mut response).await?;
        let mut validators = download::validators_of(&response);
        // A listing that may have changed within the second of its date is requested again.
        let date = download::date_of(&response);
        if validators.etag.is_none() && validators.strong(date).is_none() {
            validators = Validators::default();
        }
        Ok(Some(Body { json, base: response.url().clone(), validators }))
    }
}

async fn receive(client: &Client, response: &mut Response) -> Result<Vec<u8>, Error> {
    let Codings::Gzip(times) = codings::codings(response.headers()) else {
        return Err(download::Error::UnexpectedCoding(codings::shown(response.headers())).into());
    };
    let mut body = Vec::new();
    while let Some(piece) = client.piece(response).await.map_err(download::Error::from)? {
        if body.len() + piece.len() > MAX_LISTING {
            return Err(Error::TooLarge);
        }
        body.extend_from_slice(&piece);
    }
    (0..times).try_fold(body, |encoded, _| decode(&encoded))
}

fn decode(encoded: &[u8]) -> Result<Vec<u8>, Error> {
    let mut decoded = Vec::new();
    let mut gzip = MultiGzDecoder::new(encoded).take(MAX_LISTING as u64 + 1);
    gzip.read_to_end(&mut decoded).map_err(Error::Decode)?;
    if decoded.len() > MAX_LISTING {
        return Err(Error::TooLarge);
    }
    Ok(decoded)
}

/// Reads the entries of a listing that was received from `base`, at most `max`.
pub fn read(
    json: &[u8],
    pointers: &Pointers,
    max: usize,
    base: &Url,
    egress_policy: &EgressPolicy,
) -> Result<Vec<Result<Entry, InvalidEntry>>, ParseError> {
    let document = serde_json::from_slice(without_bom(json)).map_err(ParseError::Json)?;
    let list = pointer::find_array(document, &pointers.list, max);
    let list = list.ok_or_else(|| ParseError::NoArray(pointers.list.clone()))?;
    if list.len() > max {
        return Err(ParseError::TooManyEntries(max));
    }
    let mut url_length = 0;
    let mut entries = Vec::with_capacity(list.len());
    for (index, raw) in list.into_iter().map(RawValue::get).enumerate() {
        let (item, entry) = match parse_entry(raw) {
            Ok(item) => {
                let entry = pointers.read_entry(&item, base, egress_policy);
                (item, entry)
            }
            Err(error) => (Value::Null, Err(error)),
        };
        url_length += entry.as_ref().map_or(0, |entry| entry.url.as_str().len());
        if url_length > MAX_URLS {
            return Err(ParseError::UrlsTooLong);
        }
        entries.push(entry.map_err(|error| pointers.invalid_entry(&item, index, error)));
    }
    reject_duplicates(&mut entries, str::to_owned);
    Ok(entries)
}

/// Parses an entry, whose syntax is valid but which may be too large or too deep.
fn parse_entry(raw: &str) -> Result<Value, EntryError> {
    if raw.len() > MAX_ENTRY {
        return Err(EntryError::TooLarge);
    }
    serde_json::from_str(raw).map_err(|error| EntryError::Json(error.to_string()))
}

impl Pointers {
    fn read_entry(
        &self,
        item: &Value,
        base: &Url,
        egress_policy: &EgressPolicy,
    ) -> Result<Entry, EntryError> {
        let text = |pointer: &String| {
            text_at(item, pointer).ok_or_else(|| EntryError::Missing(pointer.clone()))
        };
        let url = text(&self.url)?;
        // A blank reference would be that of the listing (RFC 3986, 4.4).
        if url.trim().is_empty() {
            return Err(EntryError::Missing(self.url.clone()));
        }
        let url = egress::join(base, url)?;
        if url == *base {
            return Err(EntryError::ListingUrl);
        }
        egress_policy.check_url(&url)?;
        let name = match &self.filename {
            None => name_of(&url)?,
            Some(pointer) => accept_name(text(pointer)?)?,
        };
        let sha256 = self.sha256.as_ref().map(|pointer| {
            let digest = text(pointer)?;
            from_hex(digest).ok_or(EntryError::Digest)
        });
        Ok(Entry { name, url, sha256: sha256.transpose()? })
    }

    fn invalid_entry(&self, item: &Value, index: usize, error: EntryError) -> InvalidEntry {
        let name = self.filename.as_ref().and_then(|pointer| text_at(item, pointer));
        let label = label(name, text_at(item, &self.url));
        InvalidEntry {
            label: label.unwrap_or_else(|| format!("entry {}", index + 1)),
            name: name.and_then(|name| file_name(name).ok()).map(str::to_owned),
            error,
        }
    }
}

fn text_at<'a>(item: &'a Value, pointer: &str) -> Option<&'a str> {
    item.pointer(pointer)?.as_str()
}

fn shorten(text: &str) -> String {
    escape(&text.chars().take(MAX_SHOWN).collect::<String>())
}

/// Returns the name of an entry or else its URL, without parts that may be secret. The URL may be
/// malformed, so it is cut as text.
fn label(name: Option<&str>, url: Option<&str>) -> Option<String> {
    let is_blank = |text: &str| text.trim().is_empty();
    if let Some(name) = name.filter(|name| !is_blank(name)) {
        return Some(shorten(name));
    }
    let url = url.filter(|url| !url.contains('@'))?;
    let url = url.split_once('#').map_or(url, |(before, _)| before);
    match url.split_once('?') {
        Some((before, _)) => Some(shorten(before) + "?…"),
        None => Some(shorten(url)).filter(|_| !is_blank(url)),
    }
}

/// Returns the last segment of a URL's path.
fn name_of(url: &Url) -> Result<String, EntryError> {
    let last = url.path_segments().and_then(Iterator::last).unwrap_or_default();
    accept_name(&percent_decode_str(last).decode_utf8().map_err(|_| EntryError::NotUtf8)?)
}

fn accept_name(name: &str) -> Result<String, EntryError> {
    let rejected = |cause| EntryError::NameRejected { name: shorten(name), cause };
    file_name(name).map(str::to_owned).map_err(rejected)
}

/// Keeps the first of several entries whose names are equal after `fold`.
pub(crate) fn reject_duplicates(entries: &mut Entries, fold: impl Fn(&str) -> String) {
    let mut first = HashMap::<String, (String, String)>::new();
    for slot in entries {
        let Ok(entry) = slot else { continue };
        let error = match first.entry(fold(&entry.name)) {
            Slot::Vacant(vacant) => {
                vacant.insert((entry.name.clone(), shown(&entry.url)));
                continue;
            }
            Slot::Occupied(other) => {
                let (name, url) = other.get();
                if *name == entry.name {
                    EntryError::NameTaken(url.clone())
                } else {
                    EntryError::Alias(escape(name))
                }
            }
        };
        let label = format!("{} ({})", escape(&entry.name), shown(&entry.url));
        *slot = Err(InvalidEntry { label, name: Some(entry.name.clone()), error });
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn labels_blank_entries_by_number() {
        for blank in ["", " ", "\t\n", "#"] {
            assert_eq!(label(None, Some(blank)), None, "{blank:?}");
        }
        assert_eq!(label(Some(" "), None), None);
        assert_eq!(label(None, Some("/a.jpg?token")).unwrap(), "/a.jpg?…");
    }

    fn pointers() -> Pointers {
        Pointers {
            list: "/newslist".to_owned(),
            url: "/picUrl".to_owned(),
            filename: Some("/title".to_owned()),
            sha256: None,
        }
    }

    fn base() -> Url {
        Url::parse("https://api.example.org/v1/list").unwrap()
    }

    fn read_bytes(json: &[u8], pointers: &Pointers, max: usize) -> Result<Entries, ParseError> {
        let egress_policy = EgressPolicy::new([&base()], [], false);
        read(json, pointers, max, &base(), &egress_policy)
    }

    fn entries(json: &Value, pointers: &Pointers) -> Entries {
        read_bytes(json.to_string().as_bytes(), pointers, 100).unwrap()
    }

    fn entry_error(entry: &Value) -> EntryError {
        let mut entries = entries(&json!({"newslist": [entry]}), &pointers());
        entries.remove(0).unwrap_err().error
    }

    #[test]
    fn bounds_the_total_length_of_relative_urls() {
        let base = egress::url(&format!("http://a/{}/", "x".repeat(8000))).unwrap();
        let egress_policy = EgressPolicy::new([&base], [], false);
        let json = serde_json::to_vec(&(0..9000).map(|it| it.to_string()).collect::<Vec<_>>());
        let read = read(&json.unwrap(), &Pointers::default(), 100_000, &base, &egress_policy);
        assert!(matches!(read, Err(ParseError::UrlsTooLong)));
    }

    #[test]
    fn reads_entries_in_order() {
        let json = json!({"code": 200, "newslist": [
            {"title": "a.jpg", "picUrl": "/a.jpg", "more": [1, {"title": "no"}]},
            {"picUrl": "b?x=1", "title": "b.jpg"},
        ], "end": null});
        let read: Vec<_> = entries(&json, &pointers()).into_iter().map(Result::unwrap).collect();
        let read: Vec<_> = read.iter().map(|entry| (&*entry.name, entry.url.as_str())).collect();
        assert_eq!(
            read,
            [
                ("a.jpg", "https://api.example.org/a.jpg"),
                ("b.jpg", "https://api.example.org/v1/b?x=1")
            ]
        );
    }

    #[test]
    fn unreadable_values_invalidate_their_entry_only() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for value in ["1e999", r#""\ud800""#, &deep] {
            let json = format!(
                r#"{{"ttl": {value}, "newslist": [
                    {{"title": "a.jpg", "picUrl": "/a.jpg", "size": {value}}},
                    {{"title": "b.jpg", "picUrl": "/b.jpg"}}
                ]}}"#
            );
            let read = read_bytes(json.as_bytes(), &pointers(), 9).unwrap();
            let invalid = read[0].as_ref().unwrap_err();
            assert_eq!(invalid.label, "entry 1");
            assert!(matches!(invalid.error, EntryError::Json(_)), "{invalid:?}");
            assert_eq!(read[1].as_ref().unwrap().name, "b.jpg");
        }
    }

    #[test]
    fn ignores_one_byte_order_mark() {
        let read = |json: &[u8]| read_bytes(json, &Pointers::default(), 9);
        assert_eq!(read(b"\xef\xbb\xbf[\"a.jpg\"]").unwrap().len(), 1);
        assert!(read(b"\xef\xbb\xbf\xef\xbb\xbf[]").is_err());
    }

    #[test]
    fn accepts_an_array_of_urls() {
        let read = entries(&json!(["/x/a%20b.jpg", "c.jpg"]), &Pointers::default());
        let names: Vec<_> = read.into_iter().map(|entry| entry.unwrap().name).collect();
        assert_eq!(names, ["a b.jpg", "c.jpg"]);
    }

    #[test]
    fn reports_each_invalid_entry() {
        let missing = |pointer: &str| EntryError::Missing(pointer.to_owned());
        assert_eq!(entry_error(&json!({"title": "a"})), missing("/picUrl"));
        assert_eq!(entry_error(&json!({"picUrl": "/a"})), missing("/title"));
        assert_eq!(entry_error(&json!({"picUrl": 3, "title": "a"})), missing("/picUrl"));
        assert_eq!(entry_error(&json!(7)), missing("/picUrl"));
        let of = |url: &str| entry_error(&json!({"picUrl": url, "title": "a"}));
        for blank in ["", " ", "\t\n", "\u{3000}"] {
            assert_eq!(of(blank), missing("/picUrl"), "{blank:?}");
        }
        for itself in
            ["#", "#top", "\0", "list", "./list", "/v1/list#x", "//api.example.org/v1/list"]
        {
            assert_eq!(of(itself), EntryError::ListingUrl, "{itself:?}");
        }
        assert_eq!(of("ftp://api.example.org/"), EntryError::Refused(Refused::Scheme));
        assert!(matches!(of("https://evil.example/"), EntryError::Refused(Refused::Host(_))));
        for name in ["", "..", "../a", "a/b", "a\\b", ".hidden", "a\0", "a\u{202e}b", "a\n"] {
            let error = entry_error(&json!({"picUrl": "/a", "title": name}));
            assert!(matches!(error, EntryError::NameRejected { .. }), "{name:?}: {error:?}");
        }
    }

    #[test]
    fn hides_secrets_of_urls() {
        let label = |url: &str| {
            let pointers = Pointers { filename: None, ..pointers() };
            let json = json!({"newslist": [{}, {"picUrl": url}]});
            entries(&json, &pointers).remove(1).unwrap_err().label
        };
        assert_eq!(label("ftp://a/b?key=hush"), "ftp://a/b?…");
        assert_eq!(label("ftp://a/b#hush"), "ftp://a/b");
        assert_eq!(label("ftp://a/b#hush?hush"), "ftp://a/b");
        assert_eq!(label("ftp://a/b?hush#hush"), "ftp://a/b?…");
        assert_eq!(label("ftp://me:hush@a/b"), "entry 2");
        assert_eq!(label("http://[me:hush@a/b"), "entry 2");
        assert_eq!(label("ftp://me:hu?sh@a/b"), "entry 2");
        let long = format!("ftp://me:{}@a/", "hush".repeat(MAX_SHOWN));
        assert_eq!(label(&long), "entry 2");
        assert_eq!(label("ftp://a/b"), "ftp://a/b");
    }

    #[test]
    fn decodes_and_checks_names_from_urls() {
        let name = |url: &str| name_of(&Url::parse(url).unwrap());
        assert_eq!(name("http://a/b/guido%20v.jpg?x#y"), Ok("guido v.jpg".to_owned()));
        for bad in [
            "http://a/",
            "http://a/b/",
            "http://a/%2e%2e%2fetc",
            "http://a/%2Ehidden",
            "http://a/b%00",
        ] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keeps_the_first_of_equal_names() {
        let json = json!([{"title": "a", "picUrl": "/1"}, {"title": "a", "picUrl": "/2"}]);
        let mut read = entries(&json!({"newslist": json}), &pointers());
        assert_eq!(read[0].as_ref().unwrap().url.path(), "/1");
        let error = &read[1].as_ref().unwrap_err().error;
        assert_eq!(*error, EntryError::NameTaken("https://api.example.org/1".to_owned()));
        let listing = Listing { entries: read, ..Listing::default() };
        assert_eq!(listing.names().collect::<Vec<_>>(), ["a", "a"]);
        read = entries(&json!(["/a", "/A"]), &Pointers::default());
        reject_duplicates(&mut read, str::to_lowercase);
        assert_eq!(read[1].as_ref().unwrap_err().error, EntryError::Alias("a".to_owned()));
    }

    #[test]
    fn expects_digests_of_64_hexadecimal_digits() {
        let pointers = Pointers { sha256: Some("/sha256".to_owned()), ..pointers() };
        let read = |digest: &str| {
            let json = json!({"newslist": [{"title": "a", "picUrl": "/a", "sha256": digest}]});
            entries(&json, &pointers).remove(0).map(|entry| entry.sha256)
        };
        assert_eq!(read(&"aB".repeat(32)).unwrap(), Some([0xab; 32]));
        for bad in ["", "ab", &"zz".repeat(32), &"ab".repeat(33), &"é".repeat(32)] {
            assert_eq!(read(bad).unwrap_err().error, EntryError::Digest, "{bad}");
        }
    }

    #[test]
    fn refuses_documents_without_the_array() {
        let read =
            |json: &str| read_bytes(json.as_bytes(), &pointers(), 3).unwrap_err().to_string();
        for broken in ["<html>", "{\"newslist\": [1, 2", "{\"newslist\": []} x"] {
            assert!(read(broken).starts_with("the listing is not JSON: "), "{broken}");
        }
        for other in ["{}", "[]", "3", "null", "\"x\"", "{\"newslist\": {}}", "{\"newslist\": 3}"] {
            assert_eq!(
                read(other),
                "the listing has no array at \"/newslist\" (`list`)",
                "{other}"
            );
        }
        assert!(read("{\"newslist\": [1, 2, 3, 4]}").contains("more than 3 entries"));
        assert!(read(&"[".repeat(100_000)).starts_with("the listing is not JSON: "));
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn bounds_decoded_listings() {
        assert_eq!(decode(&gzip(b"[1, 2]")).unwrap(), b"[1, 2]");
        assert_eq!(decode(&gzip(&vec![0; MAX_LISTING])).unwrap().len(), MAX_LISTING);
        let small = gzip(&vec![0; 2 * MAX_LISTING]);
        assert!(small.len() < 64 << 10);
        assert!(matches!(decode(&small), Err(Error::TooLarge)));
    }

    #[test]
    fn refuses_truncated_and_malformed_gzip() {
        let encoded = gzip(b"[1, 2]");
        assert!(matches!(decode(&encoded[..encoded.len() - 3]), Err(Error::Decode(_))));
        assert!(matches!(decode(b"no gzip at all"), Err(Error::Decode(_))));
    }

    proptest! {
        #[test]
        fn names_are_single_components(url in "http://a/[a-z%./2eEfF0]{0,20}") {
            if let Ok(name) = Url::parse(&url).map_err(drop).and_then(|url| name_of(&url).map_err(drop)) {
                prop_assert!(!name.contains('/') && !name.starts_with('.') && !name.is_empty());
            }
        }
    }
}
