//! Headers of download requests and replies: conditions, validators, ranges and types.

use std::time::SystemTime;

use reqwest::Response;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE, RETRY_AFTER,
};

use super::Error;
use super::partial::{PartialMeta, Resume};
use crate::fs::filename::escape;
use crate::http::codings::{self, Codings, codings};
use crate::http::retry;
use crate::mirror::manifest::{Precondition, Validators};

fn header<'a>(response: &'a Response, name: &HeaderName) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// Returns the error of a reply with an unexpected status.
pub(crate) fn failure(response: &Response) -> Error {
    let retry_after = header(response, &RETRY_AFTER)
        .and_then(|value| retry::retry_after(value, SystemTime::now()));
    Error::Status { status: response.status().as_u16(), retry_after }
}

/// Returns the `Date` of a reply.
pub(crate) fn date_of(response: &Response) -> Option<&str> {
    header(response, &DATE)
}

pub(crate) fn validators_of(response: &Response) -> Validators {
    Validators::new(header(response, &ETAG), header(response, &LAST_MODIFIED))
}

/// Returns the headers of a request for a file, or for the rest of a partial file.
pub(super) fn request_headers(condition: &Precondition, resume: Option<&Resume>) -> HeaderMap {
    let mut headers = match (resume, condition) {
        (Some(Resume { length, meta, .. }), _) => {
            let mut headers = HeaderMap::new();
            set(&mut headers, RANGE, &format!("bytes={length}-"));
            set(&mut headers, IF_RANGE, &meta.validator);
            headers
        }
        (None, Precondition::IfChanged(validators)) => if_changed(validators),
        (None, Precondition::IfModifiedAtOtherTime(time)) => {
            let mut headers = HeaderMap::new();
            set(&mut headers, IF_MODIFIED_SINCE, time);
            headers
        }
        (None, Precondition::Always) => HeaderMap::new(),
    };
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers
}

/// Returns the headers of a request that is answered 304 if nothing has changed.
pub(crate) fn if_changed(validators: &Validators) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Some(etag) = &validators.etag {
        set(&mut headers, IF_NONE_MATCH, etag);
    }
    if let Some(last_modified) = &validators.last_modified {
        set(&mut headers, IF_MODIFIED_SINCE, last_modified);
    }
    headers
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // A manifest may hold a value that is invalid in a header.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Whether a reply 206 is the rest of the partial file, of the same content.
pub(super) fn continues(response: &Response, resume: &Resume) -> bool {
    let range = header(response, &CONTENT_RANGE).and_then(content_range);
    let now = validators_of(response);
    let PartialMeta { validator, validators: Validators { etag, last_modified }, total, .. } =
        &resume.meta;
    let differs = |now: &Option<String>, then: &Option<String>| now.is_some() && now != then;
    // A server that respects If-Range repeats the ETag, and may omit the rest.
    let is_same = etag.as_ref() != Some(validator) || now.etag == *etag;
    is_same
        && !differs(&now.etag, etag)
        && !differs(&now.last_modified, last_modified)
        && range.is_some_and(|range| {
            range.continues_at(resume.length, response.content_length())
                && (total.is_none() || range.total == *total)
        })
}

/// Returns the announced length of the whole file, or an error if the reply has an encoding, or a
/// type that is not among `content_types`.
pub(super) fn check_headers(
    response: &Response,
    content_types: &[String],
) -> Result<Option<u64>, Error> {
    if codings(response.headers()) != Codings::Gzip(0) {
        return Err(Error::UnexpectedCoding(codings::shown(response.headers())));
    }
    let kinds = response.headers().get_all(CONTENT_TYPE).iter();
    let kinds: Vec<_> = kinds.map(|kind| kind.to_str().unwrap_or_default()).collect();
    // The rest of a file may omit the type, which was checked with its beginning.
    let is_rest = response.status() == reqwest::StatusCode::PARTIAL_CONTENT;
    if !(is_rest && kinds.is_empty() || are_accepted(&kinds, content_types)) {
        let kind = if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") };
        return Err(Error::MediaTypeRejected(escape(&kind)));
    }
    Ok(if is_rest {
        header(response, &CONTENT_RANGE).and_then(content_range).and_then(|range| range.total)
    } else {
        response.content_length()
    })
}

/// A `Content-Range` (RFC 9110, 14.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ContentRange {
    first: u64,
    last: u64,
    total: Option<u64>,
}

impl ContentRange {
    /// Whether it begins at `length` and reaches the end, in a body of this length, if known.
    fn continues_at(self, length: u64, body: Option<u64>) -> bool {
        let Self { first, last, total } = self;
        first == length
            && last >= first
            && total.is_some()
            && last.checked_add(1) == total
            && body.is_none_or(|body| (last - first).checked_add(1) == Some(body))
    }
}

fn content_range(value: &str) -> Option<ContentRange> {
    let (range, total) = value.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some(ContentRange { first: first.parse().ok()?, last: last.parse().ok()?, total })
}

/// Whether all media types of a reply, normally one, are accepted.
fn are_accepted(kinds: &[&str], accepted: &[String]) -> bool {
    accepted.is_empty() || !kinds.is_empty() && kinds.iter().all(|kind| is_accepted(kind, accepted))
}

/// Whether a media type is accepted by its name, or as `image/*`.
fn is_accepted(kind: &str, accepted: &[String]) -> bool {
    let kind = kind.split(';').next().unwrap_or_default().trim();
    accepted.iter().any(|accepted| match accepted.strip_suffix("/*") {
        Some(of) => kind.split_once('/').is_some_and(|(kind, _)| kind.eq_ignore_ascii_case(of)),
        None => kind.eq_ignore_ascii_case(accepted),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accepts_only_the_rest_of_the_file() {
        let fits =
            |value, length| content_range(value).is_some_and(|range| range.continues_at(5, length));
        assert!(fits("bytes 5-9/10", Some(5)));
        assert!(fits("bytes 5-9/10", None));
        for (bad, length) in [
            ("bytes 0-9/10", None),
            ("bytes 4-9/10", None),
            ("bytes 6-9/10", None),
            ("bytes 5-8/10", None),
            ("bytes 5-9/11", None),
            ("bytes 5-4/5", None),
            ("bytes 5-9/10", Some(6)),
            ("bytes */10", None),
            ("bytes 5-9/*", Some(5)),
            ("5-9/10", None),
            ("bytes 5-18446744073709551615/18446744073709551615", None),
            ("", None),
        ] {
            assert!(!fits(bad, length), "{bad} {length:?}");
        }
    }

    #[test]
    fn matches_types_by_name_or_by_the_part_before_the_slash() {
        let wanted = ["image/*".to_owned(), "Text/Plain".to_owned()];
        for good in ["image/png", "IMAGE/jpeg", "image/svg+xml; charset=utf-8", "text/plain;x"] {
            assert!(are_accepted(&[good], &wanted), "{good}");
        }
        for bad in [
            &["text/html"][..],
            &["imagex/png"],
            &[""],
            &["image"],
            &[],
            &["image/png", "text/html"],
        ] {
            assert!(!are_accepted(bad, &wanted), "{bad:?}");
        }
        assert!(are_accepted(&[], &[]) && are_accepted(&["text/html"], &[]));
    }

    proptest! {
        #[test]
        fn accepts_ranges_of_exactly_the_missing_bytes(
            first in 0_u64..20, last in 0_u64..20, total in prop::option::of(0_u64..20),
            ours in 0_u64..20, body in 0_u64..20,
        ) {
            let range = ContentRange { first, last, total };
            if range.continues_at(ours, Some(body)) {
                prop_assert_eq!(first, ours);
                prop_assert_eq!(ours + body, last + 1);
                prop_assert!(total.is_none_or(|total| ours + body == total));
            }
        }

        #[test]
        fn never_panics_on_a_content_range(value in "(bytes )?[0-9*/-]{0,50}|.{0,20}", ours: u64, body: u64) {
            if let Some(range) = content_range(&value) {
                range.continues_at(ours, Some(body));
            }
        }
    }
}
