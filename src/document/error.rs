//! Why a document is refused: what was expected and where.
//!
//! A message never carries a server's text as it came: single bytes and short values are escaped.
//! Offsets count the document's bytes from 0 and name the byte at which the fault shows, so that
//! they do not depend on the pieces in which the document arrived.

use crate::text::counted;

/// Why a document is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The input ended before a document began.
    #[error("there is no document: the input ends before its `{{`")]
    Empty,
    /// The input ended inside the document.
    #[error("the document ends early, in {within}, after {}", counted(*length, "byte"))]
    Cut {
        /// The part of the document that is not whole.
        within: &'static str,
        /// How much of the document there was, in bytes.
        length: u64,
    },
    /// A byte that cannot stand where it stands.
    #[error("expected {expected} at offset {at}, found '{}'", found.escape_ascii())]
    Unexpected {
        /// What could stand there.
        expected: &'static str,
        /// What stands there.
        found: u8,
        /// Where.
        at: u64,
    },
    /// Bytes in a string that are no UTF-8.
    #[error("expected UTF-8 at offset {at}")]
    NotUtf8 {
        /// Where.
        at: u64,
    },
    /// `\uD800` to `\uDFFF` outside of a surrogate pair.
    #[error("expected both halves of a surrogate pair, found one at offset {at}")]
    LoneSurrogate {
        /// Where.
        at: u64,
    },
    /// Objects and arrays in one another beyond the limit.
    #[error("expected at most {limit} objects and arrays in one another, at offset {at}")]
    TooDeep {
        /// How many are allowed, the document's own object included.
        limit: u32,
        /// Where.
        at: u64,
    },
    /// A string longer than its key allows.
    #[error("expected {key} to be at most {} long, at offset {at}", counted(*limit, "byte"))]
    TooLong {
        /// The key.
        key: &'static str,
        /// The longest that is allowed, in bytes of UTF-8.
        limit: usize,
        /// Where.
        at: u64,
    },
    /// A key that has been there before.
    #[error("expected {key} only once, found it again at offset {at}")]
    Repeated {
        /// The key.
        key: &'static str,
        /// Where.
        at: u64,
    },
    /// A file's data and a refusal in one document.
    #[error("expected either filedata or an error, found both at offset {at}")]
    Contradiction {
        /// Where.
        at: u64,
    },
    /// A value of another type than its key's.
    #[error("expected {key} to be {expected}, at offset {at}")]
    WrongType {
        /// The key.
        key: &'static str,
        /// The type that it has.
        expected: &'static str,
        /// Where.
        at: u64,
    },
    /// A string that does not say what its key should say.
    #[error("expected {key} to be {expected}, found {found:?} at offset {at}")]
    WrongValue {
        /// The key.
        key: &'static str,
        /// What it should say.
        expected: &'static str,
        /// What it says; short, as its key's limit is.
        found: String,
        /// Where.
        at: u64,
    },
    /// Bits in the last character of base64 that belong to no byte.
    #[error("expected the unused bits of the last base64 character to be zero, at offset {at}")]
    StrayBits {
        /// Where.
        at: u64,
    },
    /// More data than the caller wants.
    #[error("the file is larger than the limit of {}", counted(*limit, "byte"))]
    TooMuchData {
        /// The caller's limit, in bytes of the file.
        limit: u64,
    },
    /// A key that every document has, and this one has not.
    #[error("expected the document to have {key}")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// Something behind a document that should be the last.
    #[error("expected nothing behind the document, found '{}'", found.escape_ascii())]
    Behind {
        /// Its first byte.
        found: u8,
    },
}
