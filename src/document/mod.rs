//! The document that carries a file: `{"filename":"…","filedata":"…base64…"}`.
//!
//! The server writes exactly these two keys, in this order; base64 in the standard alphabet, padded
//! (RFC 4648, section 4). This folder knows the bytes of the document and nothing of files or
//! sockets.

mod writer;

use std::sync::LazyLock;

use base64::engine::Simd;
use base64::engine::general_purpose::PAD;

pub use writer::{
    WHOLE_GROUP, append_encoded, closing, encoded_len, file_closing, file_opening, opening, refusal,
};

/// Base64 for writing and reading: it picks the widest vector instructions of this processor, and
/// refuses what no encoder writes (missing padding, stray bits).
static BASE64: LazyLock<Simd> = LazyLock::new(|| Simd::standard(PAD));
