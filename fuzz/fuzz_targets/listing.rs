//! The listing of a mirror: whatever it contains, each file has a unique name of one component and
//! a URL on an allowed host, and messages are single lines.
//!
//! Input: a line with the pointers to the list, the URL, and optionally the name and the digest;
//! then the listing.
#![no_main]

use std::collections::HashSet;
use std::path::{Component, Path};

use handout::internals::{
    EgressPolicy, Entry, Host, InvalidEntry, ParseError, Pointers, parse_pointer,
    read_listing as read,
};
use handout_fuzz::is_one_line;
use libfuzzer_sys::fuzz_target;
use reqwest::Url;
use serde::de::IgnoredAny;
use serde_json::Value;

const MAX: usize = 50;

fn pointers(line: &[u8]) -> Option<Pointers> {
    let line = str::from_utf8(line).ok().filter(|line| is_one_line(line))?;
    let mut pointers = line.split(' ').map(parse_pointer);
    Some(Pointers {
        list: pointers.next()?.ok()?,
        url: pointers.next()?.ok()?,
        filename: pointers.next().transpose().ok()?,
        sha256: pointers.next().transpose().ok()?,
    })
}

fuzz_target!(|input: &[u8]| {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else { return };
    let (line, json) = (&input[..end], &input[end + 1..]);
    let Some(pointers) = pointers(line) else { return };
    let base = Url::parse("https://api.example.org/v1/list").unwrap();
    let hosts = [Host::parse("*.example.net").unwrap()];
    let egress_policy = EgressPolicy::new([&base], &hosts, false);

    let text = json.strip_prefix("\u{feff}".as_bytes()).unwrap_or(json);
    let document: serde_json::Result<Value> = serde_json::from_slice(text);
    let list = document.as_ref().map(|document| document.pointer(&pointers.list)?.as_array());
    let read = read(json, &pointers, MAX, &base, &egress_policy);
    if let Ok(entries) = &read {
        check_entries(entries);
    }
    match (read, list) {
        (Ok(entries), Ok(Some(list))) if entries.len() == list.len() => {
            for (entry, item) in entries.iter().zip(list) {
                if let Ok(entry) = entry {
                    check_source(entry, item, &pointers, &base);
                }
            }
        }
        (Err(ParseError::TooManyEntries(_)), Ok(Some(list))) => assert!(list.len() > MAX),
        (Err(error), Ok(None) | Err(_)) => assert!(is_one_line(&error.to_string()), "{error:?}"),
        // Values that are not used may be too large or too deep for `Value`.
        (Ok(_), Err(_)) => assert!(serde_json::from_slice::<IgnoredAny>(text).is_ok()),
        (read, list) => panic!("{read:?} of {list:?}"),
    }
});

fn check_entries(entries: &[Result<Entry, InvalidEntry>]) {
    let mut names = HashSet::new();
    for entry in entries {
        match entry {
            Ok(entry) => {
                let path = Path::new(&entry.name).components().collect::<Vec<_>>();
                assert_eq!(path, [Component::Normal(entry.name.as_ref())]);
                assert!(!entry.name.starts_with('.') && is_one_line(&entry.name), "{entry:?}");
                assert!(names.insert(&entry.name), "{entry:?}");
                let host = entry.url.host_str().unwrap();
                let may = host == "api.example.org" || host.ends_with(".example.net");
                assert!(may || host.ends_with(".example.net.") || host == "api.example.org.");
                assert!(matches!(entry.url.scheme(), "http" | "https"), "{entry:?}");
                assert!(entry.url.username().is_empty() && entry.url.password().is_none());
            }
            Err(invalid) => {
                assert!(is_one_line(&invalid.label), "{invalid:?}");
                assert!(is_one_line(&invalid.error.to_string()), "{invalid:?}");
            }
        }
    }
}

fn check_source(entry: &Entry, item: &Value, pointers: &Pointers, base: &Url) {
    let text = |pointer: &String| item.pointer(pointer).and_then(Value::as_str);
    let mut url = base.join(text(&pointers.url).unwrap()).unwrap();
    url.set_fragment(None);
    assert_eq!(entry.url, url);
    if let Some(pointer) = &pointers.filename {
        assert_eq!(Some(entry.name.as_str()), text(pointer));
    }
    let digest = entry.sha256.map(|digest| digest.map(|b| format!("{b:02x}")).concat());
    let listed = pointers.sha256.as_ref().map(|pointer| text(pointer).unwrap());
    assert_eq!(digest, listed.map(str::to_ascii_lowercase));
}
