//! The codings of a reply's body (RFC 9110, 8.4).

use std::fmt::Write as _;

use reqwest::header::{CONTENT_ENCODING, HeaderMap};

use crate::fs::filename::escape_bytes;

/// Registered codings (IANA), with which a body is not the content itself. Servers also send other
/// words, such as `utf-8` and `none`, with a body that is not encoded.
const REGISTERED: [&str; 12] = [
    "aes128gcm",
    "br",
    "compress",
    "dcb",
    "dcz",
    "deflate",
    "exi",
    "gzip",
    "pack200-gzip",
    "x-compress",
    "x-gzip",
    "zstd",
];

/// Maximum number of codings of one body, as in curl.
const MAX_CODINGS: usize = 5;

/// The codings of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codings {
    /// The number of times that gzip was applied.
    Gzip(usize),
    /// At least one coding that cannot be decoded.
    Unsupported,
}

/// Returns the codings of a body, in any case and in any number of header fields and elements.
pub(crate) fn codings(headers: &HeaderMap) -> Codings {
    let mut gzip = 0;
    for coding in elements(headers) {
        let coding = coding.to_ascii_lowercase();
        match std::str::from_utf8(&coding) {
            Ok("gzip" | "x-gzip") => gzip += 1,
            Ok(coding) if REGISTERED.contains(&coding) => return Codings::Unsupported,
            _ => {}
        }
    }
    if gzip > MAX_CODINGS { Codings::Unsupported } else { Codings::Gzip(gzip) }
}

/// Returns the codings as the server names them, escaped for messages.
pub(crate) fn shown(headers: &HeaderMap) -> String {
    let mut shown = String::new();
    for coding in elements(headers) {
        let separator = if shown.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = write!(shown, "{separator}{}", escape_bytes(coding));
    }
    shown
}

/// Returns the elements of the lists, without empty ones (RFC 9110, 5.6.1.2).
fn elements(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lists = headers.get_all(CONTENT_ENCODING).into_iter();
    let elements = lists.flat_map(|list| list.as_bytes().split(|byte| *byte == b','));
    elements.map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (CONTENT_ENCODING, value.parse().unwrap())).collect()
    }

    #[test]
    fn reads_codings_in_any_case_and_any_list() {
        for (values, expected) in [
            (&[][..], Codings::Gzip(0)),
            (&[""], Codings::Gzip(0)),
            (&[" , ,"], Codings::Gzip(0)),
            (&["Identity"], Codings::Gzip(0)),
            (&["utf-8"], Codings::Gzip(0)),
            (&["GZIP"], Codings::Gzip(1)),
            (&["X-GZip"], Codings::Gzip(1)),
            (&[", gzip ,identity"], Codings::Gzip(1)),
            (&["gzip", "x-gzip"], Codings::Gzip(2)),
            (&["gzip,gzip,gzip,gzip,gzip,gzip"], Codings::Unsupported),
            (&["gzip, BR"], Codings::Unsupported),
            (&["zstd"], Codings::Unsupported),
        ] {
            assert_eq!(codings(&of(values)), expected, "{values:?}");
        }
        assert_eq!(shown(&of(&["GZip,,", "br"])), "GZip, br");
    }
}
