//! The document that carries a file: `{"filename":"…","filedata":"…base64…"}`.
//!
//! Services write documents with [`writer`]. The client feeds received bytes to a [`Reader`], which
//! returns the decoded data at once ([`decoder`]) and the other members ([`head`]) at the end.
//! Nothing here knows files or sockets.

mod decoder;
mod head;
#[allow(unreachable_pub, reason = "the fuzz target includes the file, too")]
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod properties;
mod reader;
mod writer;

use std::sync::LazyLock;

use base64::engine::Simd;
use base64::engine::general_purpose::PAD;

pub use head::{File, Head, Refusal};
pub(crate) use reader::Tail;
pub use reader::{ReadError, Reader};
pub use writer::file_closing;
pub(crate) use writer::{
    WHOLE_GROUP, append_encoded, closing, encoded_len, file_opening, opening, refusal,
};

/// Canonical base64 (RFC 4648, section 4) with the widest vector instructions of this processor.
static BASE64: LazyLock<Simd> = LazyLock::new(|| Simd::standard(PAD));

/// Removes a leading UTF-8 byte order mark.
pub(crate) fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}
