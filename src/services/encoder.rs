//! Base64 encoding of a file while it is sent, in bounded memory: one chunk per connection.

use std::cell::RefCell;
use std::io::{self, Write};
use std::pin::pin;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::document;
use crate::fs::blocking_pool::BlockingPool;
use crate::fs::file::OpenFile;
use crate::net::connection::{Connection, ServeError, Stream};

/// Size of a chunk of a file, in bytes: the unit of reading, encoding and sending. Each connection
/// holds one encoded chunk.
const CHUNK: usize = 32 * 1024 * document::WHOLE_GROUP;

thread_local! {
    /// Read buffer, per thread instead of per connection.
    static READ_BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

/// State of the encoding of a file.
#[derive(Default)]
struct Encoding {
    /// Start of the next chunk.
    offset: u64,
    /// Digest of the file up to `offset`, if requested.
    digest: Option<Sha256>,
    /// The last chunk in base64.
    encoded: Vec<u8>,
}

impl Encoding {
    /// Reads and encodes the next chunk. Returns false, without any change, if `read` does.
    fn encode_next(
        &mut self,
        size: u64,
        read: impl FnOnce(&mut [u8], u64) -> io::Result<bool>,
    ) -> io::Result<bool> {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let left = size.saturating_sub(self.offset);
            let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let chunk = buffer.get_mut(..wanted).unwrap_or_default();
            if !read(chunk, self.offset)? {
                return Ok(false);
            }
            if let Some(digest) = &mut self.digest {
                digest.update(&*chunk);
            }
            self.encoded.clear();
            document::append_encoded(chunk, &mut self.encoded);
            self.offset += wanted as u64;
            Ok(true)
        })
    }
}

/// Sends the content of `file` in base64. Returns `digest` updated with the content.
///
/// Reads that may block run in `readers` under `name`.
///
/// # Errors
/// If the connection fails, or the file changed or cannot be read.
pub(crate) async fn send_encoded<S: Stream>(
    file: &Arc<OpenFile>,
    (readers, name): (&BlockingPool, &str),
    digest: Option<Sha256>,
    connection: &mut Connection<S>,
) -> Result<Option<Sha256>, ServeError> {
    let size = file.stamp.size;
    let mut encoding = Encoding { digest, ..Encoding::default() };
    while encoding.offset < size {
        // Reading from the page cache is faster than switching to another thread.
        let is_cached =
            encoding.encode_next(size, |chunk, offset| file.read_cached_at(chunk, offset));
        if !is_cached.map_err(ServeError::Service)? {
            // This read may block and must not delay other connections.
            let file = Arc::clone(file);
            let reading = readers.run(name, move || {
                let read = encoding
                    .encode_next(size, |chunk, offset| file.read_at(chunk, offset).map(|()| true));
                (encoding, read)
            });
            let reading = connection.with_read_timeout(pin!(reading)).await?;
            let (returned, read) = reading.map_err(ServeError::Service)?;
            encoding = returned;
            read.map_err(ServeError::Service)?;
        }
        connection.send(&encoding.encoded).await?;
        // Lets other connections proceed.
        tokio::task::yield_now().await;
    }
    Ok(encoding.digest)
}

/// Writes the content of `file` in base64 to `document`. Returns `digest` updated with the content.
///
/// # Errors
/// If the file changed or cannot be read, or `document` fails.
pub(crate) fn write_whole(
    file: &OpenFile,
    digest: Option<Sha256>,
    document: &mut impl Write,
) -> io::Result<Option<Sha256>> {
    let size = file.stamp.size;
    let mut encoding = Encoding { digest, ..Encoding::default() };
    while encoding.offset < size {
        encoding.encode_next(size, |chunk, offset| file.read_at(chunk, offset).map(|()| true))?;
        document.write_all(&encoding.encoded)?;
    }
    Ok(encoding.digest)
}
