//! The document that carries a file: `{"filename":"…","filedata":"…base64…"}`.
//!
//! The server writes exactly these two keys, in this order; base64 in the standard alphabet, padded
//! (RFC 4648, section 4). Out of a folder, `size`, `modified` and `sha256` come with them, or
//! `{"error":"…","filename":"…"}` comes instead. The client reads all of these, in any order, and
//! whatever a stranger's server adds. This folder knows the bytes of the document and nothing of
//! files or sockets.
//!
//! | file | subject |
//! |---|---|
//! | `writer` | what the server sends |
//! | `reader` | what the client reads, piece by piece |
//! | `head` | the keys, their limits, and what they make together |
//! | `json`, `string` | JSON as it arrives; what stands between its quotes |
//! | `data` | base64 as it arrives |
//! | `error` | why a document is refused |

mod data;
mod error;
mod head;
mod json;
#[cfg(test)]
#[allow(unreachable_pub, reason = "the fuzz target includes the file, too")]
mod oracle;
#[cfg(test)]
mod properties;
mod reader;
mod string;
mod writer;

use std::sync::LazyLock;

use base64::engine::Simd;
use base64::engine::general_purpose::PAD;

pub use error::ReadError;
pub use head::{File, Head, Refusal};
pub(crate) use json::without_bom;
pub use reader::Reader;
pub(crate) use reader::Tail;
pub use writer::file_closing;
pub(crate) use writer::{
    WHOLE_GROUP, append_encoded, closing, encoded_len, file_opening, opening, refusal,
};

/// Base64 for writing and reading: it picks the widest vector instructions of this processor, and
/// refuses what no encoder writes (missing padding, stray bits).
static BASE64: LazyLock<Simd> = LazyLock::new(|| Simd::standard(PAD));
