//! A JSON listing, read into entries without holding the whole of it.
//!
//! Only the texts at the pointers (RFC 6901) are kept of it, however deep and wide the rest is.

use std::collections::HashSet;
use std::fmt;

use bytesize::ByteSize;
use percent_encoding::percent_decode_str;
use reqwest::Url;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use crate::document::without_bom;
use crate::fs::filename::{NameError, escape, file_name};
use crate::http::egress;
use crate::http::egress::{Reach, Refused, shown};
use crate::http::pointer::Pointer;
use crate::text::counted;

/// How long all URLs together may be, in bytes: a short one that is relative to a long one takes as
/// much as that.
const MAX_URLS: usize = 64 << 20;

/// The longest text of a server's that is told in an error, in characters.
const MAX_TOLD: usize = 200;

/// Where everything is in a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pointers {
    /// The array, in the document.
    pub list: Pointer,
    /// The URL, in an entry.
    pub url: Pointer,
    /// The file's name, in an entry; else it is the last segment of the URL's path.
    pub filename: Option<Pointer>,
    /// The digest, in an entry.
    pub sha256: Option<Pointer>,
}

/// What is at a pointer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum Found {
    /// Nothing, or null.
    #[default]
    Nothing,
    Text(String),
    /// Anything but a text.
    Other,
}

/// How many pointers lead into an entry.
const FIELDS: usize = 3;

/// An entry as it was listed: URL, name and digest.
type Raw = [Found; FIELDS];

/// Why a listing cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no JSON, or not all of it.
    #[error("the listing is no JSON: {0}")]
    Json(String),
    /// There is no array where one should be.
    #[error("the listing has no array at \"{0}\" (`list`)")]
    NoArray(Pointer),
    /// It is too long.
    #[error("the listing has more than {} (`max-files`)", counted(*.0, "entry"))]
    Long(usize),
    /// Its URLs, joined with where it is, take too much memory.
    #[error("the URLs of the listing are longer than {} together", ByteSize(MAX_URLS as u64))]
    Large,
}

/// Reads the entries of a listing, at most `max`.
///
/// # Errors
/// If it is no listing or too long.
fn raw_entries(json: &[u8], pointers: &Pointers, max: usize) -> Result<Vec<Raw>, Error> {
    let fields = [Some(&pointers.url), pointers.filename.as_ref(), pointers.sha256.as_ref()];
    let fields = fields.map(|pointer| pointer.map(Pointer::names));
    let (mut entries, mut too_long) = (None, false);
    let list = List {
        way: pointers.list.names(),
        fields: &fields,
        max,
        entries: &mut entries,
        too_long: &mut too_long,
    };
    let mut reader = serde_json::Deserializer::from_slice(without_bom(json));
    let read = list.deserialize(&mut reader).and_then(|()| reader.end());
    match (read, entries) {
        _ if too_long => Err(Error::Long(max)),
        (Err(error), _) => Err(Error::Json(escape(&error.to_string()))),
        (Ok(()), None) => Err(Error::NoArray(pointers.list.clone())),
        (Ok(()), Some(entries)) => Ok(entries),
    }
}

/// Follows the way to the array, and reads its entries.
struct List<'a> {
    way: &'a [String],
    fields: &'a [Option<&'a [String]>; FIELDS],
    max: usize,
    entries: &'a mut Option<Vec<Raw>>,
    too_long: &'a mut bool,
}

impl<'de> DeserializeSeed<'de> for List<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a listing")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match self.way {
                [first, rest @ ..] if *first == key => {
                    let Self { fields, max, .. } = self;
                    let (entries, too_long) = (&mut *self.entries, &mut *self.too_long);
                    // Of several with the same name, the last counts.
                    *entries = None;
                    map.next_value_seed(List { way: rest, fields, max, entries, too_long })?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { way, fields, max, entries, too_long } = self;
        if let [first, rest @ ..] = way {
            let mut index = 0_usize;
            loop {
                let found = if *first == index.to_string() {
                    let (entries, too_long) = (&mut *entries, &mut *too_long);
                    let below = List { way: rest, fields, max, entries, too_long };
                    list.next_element_seed(below)?.is_some()
                } else {
                    list.next_element::<IgnoredAny>()?.is_some()
                };
                if !found {
                    return Ok(());
                }
                index += 1;
            }
        }
        let mut read = Vec::new();
        loop {
            let mut raw = Raw::default();
            let wanted = fields.iter().zip(&mut raw);
            let wanted = wanted.filter_map(|(way, into)| Some(((*way)?, into)));
            if list.next_element_seed(Fields(wanted.collect()))?.is_none() {
                break;
            }
            if read.len() == max {
                *too_long = true;
                return Err(A::Error::custom("too many entries"));
            }
            read.push(raw);
        }
        *entries = Some(read);
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

/// The ways that are left to fields, each with where it puts what it finds.
struct Fields<'a>(Vec<(&'a [String], &'a mut Found)>);

impl Fields<'_> {
    fn put(self, found: &Found) {
        for (way, into) in self.0 {
            // Beyond a text there is nothing.
            *into = if way.is_empty() { found.clone() } else { Found::Nothing };
        }
    }

    /// Those that lead through `name`, one name further.
    fn through(&mut self, name: &str) -> Vec<(&[String], &mut Found)> {
        let through = self.0.iter_mut().filter_map(|(way, into)| match way {
            [first, rest @ ..] if *first == name => Some((rest, &mut **into)),
            _ => None,
        });
        through.collect()
    }

    /// An object or an array is here.
    fn begin(&mut self) {
        for (way, into) in &mut self.0 {
            **into = if way.is_empty() { Found::Other } else { Found::Nothing };
        }
    }
}

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.0.is_empty() {
            return deserializer.deserialize_ignored_any(IgnoredAny).map(drop);
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an entry")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.begin();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value_seed(Fields(self.through(&key)))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        self.begin();
        let mut index = 0_usize;
        while list.next_element_seed(Fields(self.through(&index.to_string())))?.is_some() {
            index += 1;
        }
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.put(&Found::Text(text.to_owned()));
        Ok(())
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.put(&Found::Other);
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.put(&Found::Other);
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        self.put(&Found::Other);
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.put(&Found::Other);
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        self.put(&Found::Nothing);
        Ok(())
    }
}

/// A file that is to be here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name here, which is one component.
    pub name: String,
    /// Where it is from.
    pub url: Url,
    /// The digest that must hold.
    pub sha256: Option<[u8; 32]>,
}

/// An entry that cannot be used.
#[derive(Debug)]
pub struct InvalidEntry {
    /// Its name, its URL or its number, as people are told.
    pub what: String,
    /// The name that its file would have, if that is known.
    pub name: Option<String>,
    /// Why.
    pub fault: EntryError,
}

/// Why an entry cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Something is not there.
    #[error("the entry has no text at \"{0}\"")]
    Missing(Pointer),
    /// The URL leads back to the listing, as one of control characters or `#` does.
    #[error("the entry's URL is that of the listing itself")]
    Listing,
    /// Its URL is not asked.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Its name is not taken.
    #[error("the name \"{name}\" is not taken: {cause}")]
    Name {
        /// The name, escaped.
        name: String,
        /// Why.
        cause: NameError,
    },
    /// Its name is no text.
    #[error("the last part of the URL's path is no UTF-8, and no name")]
    NotText,
    /// Its digest is none.
    #[error("expected a SHA-256 of 64 hexadecimal digits")]
    Digest,
    /// Another file has its name.
    #[error("the name is taken by the entry for {0}")]
    Collision(String),
    /// The file system does not tell its name from another's.
    #[error("the file system does not distinguish this name from \"{0}\"")]
    Alias(String),
}

/// The entries of a listing that was found at `base`, each of which may have a fault of its own.
///
/// # Errors
/// If it is no listing, or has more than `max` entries.
pub fn read(
    json: &[u8],
    pointers: &Pointers,
    max: usize,
    base: &Url,
    reach: &Reach,
) -> Result<Vec<Result<Entry, InvalidEntry>>, Error> {
    let mut urls = 0;
    let mut entries = Vec::new();
    for (index, [url, name, sha256]) in raw_entries(json, pointers, max)?.into_iter().enumerate() {
        let told = told(&name, &url).unwrap_or_else(|| format!("entry {}", index + 1));
        let named = match &name {
            Found::Text(name) => file_name(name).ok().map(str::to_owned),
            _ => None,
        };
        let entry = entry(url, name, sha256, pointers, base, reach);
        urls += entry.as_ref().map_or(0, |entry| entry.url.as_str().len());
        if urls > MAX_URLS {
            return Err(Error::Large);
        }
        entries.push(entry.map_err(|fault| InvalidEntry { what: told, name: named, fault }));
    }
    Ok(without_collisions(entries))
}

/// The name of an entry or else its URL as people are told it, unless that may hold a password. The
/// URL may be none that can be read, so that it is cut as a text: see [`shown`].
fn told(name: &Found, url: &Found) -> Option<String> {
    let short = |text: &str| escape(&text.chars().take(MAX_TOLD).collect::<String>());
    let is_blank = |text: &str| text.trim().is_empty();
    match (name, url) {
        (Found::Text(name), _) if !is_blank(name) => Some(short(name)),
        (_, Found::Text(url)) if url.contains('@') => None,
        (_, Found::Text(url)) => {
            let all = url.split_once('#').map_or(&**url, |(before, _)| before);
            match all.split_once('?') {
                Some((before, _)) => Some(short(before) + "?…"),
                None => Some(all).filter(|all| !is_blank(all)).map(short),
            }
        }
        _ => None,
    }
}

fn entry(
    url: Found,
    name: Found,
    sha256: Found,
    pointers: &Pointers,
    base: &Url,
    reach: &Reach,
) -> Result<Entry, EntryError> {
    let text = |found, pointer: Option<&Pointer>| match found {
        Found::Text(text) => Ok(text),
        _ => Err(EntryError::Missing(pointer.cloned().unwrap_or_default())),
    };
    let url = text(url, Some(&pointers.url))?;
    // A blank reference would be that of the listing (RFC 3986, 4.4).
    if url.trim().is_empty() {
        return Err(EntryError::Missing(pointers.url.clone()));
    }
    let url = egress::join(base, &url)?;
    if url == *base {
        return Err(EntryError::Listing);
    }
    reach.may_ask(&url)?;
    let name = match &pointers.filename {
        None => name_of(&url)?,
        pointer => take_name(text(name, pointer.as_ref())?)?,
    };
    let sha256 = match &pointers.sha256 {
        None => None,
        pointer => Some(digest(&text(sha256, pointer.as_ref())?).ok_or(EntryError::Digest)?),
    };
    Ok(Entry { name, url, sha256 })
}

/// Entries for URLs that were named one by one.
pub(crate) fn of_urls(urls: &[Url]) -> Vec<Result<Entry, InvalidEntry>> {
    let entry = |url: &Url| match name_of(url) {
        Ok(name) => Ok(Entry { name, url: url.clone(), sha256: None }),
        Err(fault) => Err(InvalidEntry { what: shown(url), name: None, fault }),
    };
    without_collisions(urls.iter().map(entry).collect())
}

/// The last segment of a URL's path, as a name.
fn name_of(url: &Url) -> Result<String, EntryError> {
    let last = url.path_segments().and_then(Iterator::last).unwrap_or_default();
    take_name(percent_decode_str(last).decode_utf8().map_err(|_| EntryError::NotText)?.into_owned())
}

fn take_name(name: String) -> Result<String, EntryError> {
    match file_name(&name) {
        Ok(_) => Ok(name),
        Err(cause) => {
            let told: String = name.chars().take(MAX_TOLD).collect();
            Err(EntryError::Name { name: escape(&told), cause })
        }
    }
}

fn digest(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(digest)
}

/// Of several entries with one name, the first has it.
fn without_collisions(
    entries: Vec<Result<Entry, InvalidEntry>>,
) -> Vec<Result<Entry, InvalidEntry>> {
    let mut names = std::collections::HashMap::new();
    let own = entries.into_iter().map(|entry| {
        let entry = entry?;
        match names.get(&entry.name) {
            None => {
                names.insert(entry.name.clone(), shown(&entry.url));
                Ok(entry)
            }
            Some(other) => Err(InvalidEntry {
                what: format!("{} ({})", escape(&entry.name), shown(&entry.url)),
                fault: EntryError::Collision(String::clone(other)),
                name: Some(entry.name),
            }),
        }
    });
    own.collect()
}

/// Every name that a listing has, also of entries that cannot be used.
pub(crate) fn names<'a>(entries: &'a [Result<Entry, InvalidEntry>]) -> HashSet<&'a str> {
    let name = |entry: &'a Result<Entry, InvalidEntry>| match entry {
        Ok(entry) => Some(entry.name.as_str()),
        Err(invalid) => invalid.name.as_deref(),
    };
    entries.iter().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn entries_with_blank_names_and_urls_are_known_by_their_number() {
        for blank in ["", " ", "\t\n", "#"] {
            let text = Found::Text(blank.to_owned());
            assert_eq!(told(&Found::Nothing, &text), None, "{blank:?}");
        }
        assert_eq!(told(&Found::Text(" ".to_owned()), &Found::Nothing), None);
        let url = Found::Text("/a.jpg?token".to_owned());
        assert_eq!(told(&Found::Nothing, &url).unwrap(), "/a.jpg?…");
    }

    fn pointer(text: &str) -> Pointer {
        text.parse().unwrap()
    }

    fn pointers() -> Pointers {
        Pointers {
            list: pointer("/newslist"),
            url: pointer("/picUrl"),
            filename: Some(pointer("/title")),
            sha256: None,
        }
    }

    fn base() -> Url {
        Url::parse("https://api.example.org/v1/list").unwrap()
    }

    fn entries(json: &Value, pointers: &Pointers) -> Vec<Result<Entry, InvalidEntry>> {
        let reach = Reach::new([&base()], [], false);
        read(json.to_string().as_bytes(), pointers, 100, &base(), &reach).unwrap()
    }

    fn fault(entry: &Value) -> EntryError {
        let mut entries = entries(&json!({"newslist": [entry]}), &pointers());
        entries.remove(0).unwrap_err().fault
    }

    #[test]
    fn short_urls_do_not_become_more_than_the_memory_holds() {
        let base = egress::url(&format!("http://a/{}/", "x".repeat(8000))).unwrap();
        let reach = Reach::new([&base], [], false);
        let json = serde_json::to_vec(&(0..9000).map(|it| it.to_string()).collect::<Vec<_>>());
        let pointers = Pointers::default();
        let read = read(&json.unwrap(), &pointers, 100_000, &base, &reach);
        assert!(matches!(read, Err(Error::Large)));
    }

    #[test]
    fn a_listing_is_read_into_entries() {
        let json = json!({"code": 200, "newslist": [
            {"title": "a.jpg", "picUrl": "/a.jpg", "more": [1, {"title": "no"}]},
            {"picUrl": "b?x=1", "title": "b.jpg"},
        ], "end": null});
        let read: Vec<_> = entries(&json, &pointers()).into_iter().map(Result::unwrap).collect();
        let told: Vec<_> = read.iter().map(|entry| (&*entry.name, entry.url.as_str())).collect();
        assert_eq!(
            told,
            [
                ("a.jpg", "https://api.example.org/a.jpg"),
                ("b.jpg", "https://api.example.org/v1/b?x=1")
            ]
        );
    }

    #[test]
    fn ignores_a_byte_order_mark() {
        let reach = Reach::new([&base()], [], false);
        let json = b"\xef\xbb\xbf[\"a.jpg\"]";
        assert_eq!(read(json, &Pointers::default(), 9, &base(), &reach).unwrap().len(), 1);
        let twice = b"\xef\xbb\xbf\xef\xbb\xbf[]";
        assert!(read(twice, &Pointers::default(), 9, &base(), &reach).is_err());
    }

    #[test]
    fn an_array_may_be_the_listing_and_texts_the_entries() {
        let pointers = Pointers::default();
        let read = entries(&json!(["/x/a%20b.jpg", "c.jpg"]), &pointers);
        let names: Vec<_> = read.into_iter().map(|entry| entry.unwrap().name).collect();
        assert_eq!(names, ["a b.jpg", "c.jpg"]);
    }

    #[test]
    fn each_entry_has_its_own_fault() {
        assert_eq!(fault(&json!({"title": "a"})), EntryError::Missing(pointer("/picUrl")));
        assert_eq!(fault(&json!({"picUrl": "/a"})), EntryError::Missing(pointer("/title")));
        assert_eq!(
            fault(&json!({"picUrl": 3, "title": "a"})),
            EntryError::Missing(pointer("/picUrl"))
        );
        assert_eq!(fault(&json!(7)), EntryError::Missing(pointer("/picUrl")));
        for blank in ["", " ", "\t\n", "\u{3000}"] {
            let entry = json!({"picUrl": blank, "title": "a"});
            assert_eq!(fault(&entry), EntryError::Missing(pointer("/picUrl")), "{blank:?}");
        }
        for itself in
            ["#", "#top", "\0", "list", "./list", "/v1/list#x", "//api.example.org/v1/list"]
        {
            let entry = json!({"picUrl": itself, "title": "a"});
            assert_eq!(fault(&entry), EntryError::Listing, "{itself:?}");
        }
        let of = |url: &str| fault(&json!({"picUrl": url, "title": "a"}));
        assert_eq!(of("ftp://api.example.org/"), EntryError::Refused(Refused::Scheme));
        assert!(matches!(of("https://evil.example/"), EntryError::Refused(Refused::Host(_))));
        for name in ["", "..", "../a", "a/b", "a\\b", ".hidden", "a\0", "a\u{202e}b", "a\n"] {
            let fault = fault(&json!({"picUrl": "/a", "title": name}));
            assert!(matches!(fault, EntryError::Name { .. }), "{name:?}: {fault:?}");
        }
    }

    #[test]
    fn no_secret_of_a_url_is_told() {
        let what = |url: &str| {
            let pointers = Pointers { filename: None, ..pointers() };
            let json = json!({"newslist": [{}, {"picUrl": url}]});
            entries(&json, &pointers).remove(1).unwrap_err().what
        };
        assert_eq!(what("ftp://a/b?key=hush"), "ftp://a/b?…");
        assert_eq!(what("ftp://a/b#hush"), "ftp://a/b");
        assert_eq!(what("ftp://a/b#hush?hush"), "ftp://a/b");
        assert_eq!(what("ftp://a/b?hush#hush"), "ftp://a/b?…");
        assert_eq!(what("ftp://me:hush@a/b"), "entry 2");
        assert_eq!(what("http://[me:hush@a/b"), "entry 2");
        assert_eq!(what("ftp://me:hu?sh@a/b"), "entry 2");
        let long = format!("ftp://me:{}@a/", "hush".repeat(MAX_TOLD));
        assert_eq!(what(&long), "entry 2");
        assert_eq!(what("ftp://a/b"), "ftp://a/b");
    }

    #[test]
    fn names_from_urls_are_decoded_and_then_looked_at() {
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
    fn the_first_of_one_name_has_it() {
        let json = json!([{"title": "a", "picUrl": "/1"}, {"title": "a", "picUrl": "/2"}]);
        let read = entries(&json!({"newslist": json}), &pointers());
        assert_eq!(read[0].as_ref().unwrap().url.path(), "/1");
        let invalid = read[1].as_ref().unwrap_err();
        assert_eq!(invalid.fault, EntryError::Collision("https://api.example.org/1".to_owned()));
        assert_eq!(names(&read), HashSet::from(["a"]));
    }

    #[test]
    fn a_digest_is_64_hexadecimal_digits() {
        assert_eq!(digest(&"aB".repeat(32)), Some([0xab; 32]));
        for bad in ["", "ab", &"zz".repeat(32), &"ab".repeat(33), &"é".repeat(32)] {
            assert_eq!(digest(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_no_listing_is_told() {
        let read =
            |json: &str| raw_entries(json.as_bytes(), &pointers(), 3).unwrap_err().to_string();
        assert!(read("<html>").starts_with("the listing is no JSON: "));
        assert!(read("{\"newslist\": [1, 2").starts_with("the listing is no JSON: "));
        assert!(read("{\"newslist\": []} x").starts_with("the listing is no JSON: "));
        for other in ["{}", "[]", "3", "null", "\"x\"", "{\"newslist\": {}}", "{\"newslist\": 3}"] {
            assert_eq!(
                read(other),
                "the listing has no array at \"/newslist\" (`list`)",
                "{other}"
            );
        }
        assert!(read("{\"newslist\": [1, 2, 3, 4]}").contains("more than 3 entries"));
        assert!(read(&"[".repeat(100_000)).starts_with("the listing is no JSON: "));
    }

    fn document() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[ab01]{0,2}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[ab01]", inner, 0..4).prop_map(|map| Value::from(
                    map.into_iter().collect::<serde_json::Map<_, _>>()
                )),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_finds_what_the_whole_document_has_at_the_pointers(
            document in document(), list in "(/[ab01]){0,2}", url in "(/[ab01]){0,2}", name in "(/[ab01]){0,2}",
        ) {
            let pointers = Pointers {
                list: pointer(&list), url: pointer(&url), filename: Some(pointer(&name)), sha256: None,
            };
            let read = raw_entries(document.to_string().as_bytes(), &pointers, 100);
            match document.pointer(&list) {
                Some(Value::Array(array)) => {
                    let found = |entry: &Value, pointer: &str| match entry.pointer(pointer) {
                        None | Some(Value::Null) => Found::Nothing,
                        Some(Value::String(text)) => Found::Text(text.clone()),
                        Some(_) => Found::Other,
                    };
                    let wanted: Vec<Raw> = array
                        .iter()
                        .map(|entry| [found(entry, &url), found(entry, &name), Found::Nothing])
                        .collect();
                    prop_assert_eq!(read.unwrap(), wanted);
                }
                _ => prop_assert!(matches!(read, Err(Error::NoArray(_)))),
            }
        }

        #[test]
        fn every_name_that_is_taken_is_one_component(url in "http://a/[a-z%./2eEfF0]{0,20}") {
            if let Ok(name) = Url::parse(&url).map_err(drop).and_then(|url| name_of(&url).map_err(drop)) {
                prop_assert!(!name.contains('/') && !name.starts_with('.') && !name.is_empty());
            }
        }
    }
}
