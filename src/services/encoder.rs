//! A file in base64, encoded as it is sent, in the memory of one piece.

use std::cell::RefCell;
use std::io::{self, Write};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::document;
use crate::fs::blocking_pool::BlockingPool;
use crate::fs::file::OpenFile;
use crate::net::connection::{Connection, ServeError, Stream};

/// How much of a file is read, encoded and sent at one time; each connection holds one such
/// piece, encoded.
const PIECE: usize = 32 * 1024 * document::WHOLE_GROUP;

thread_local! {
    /// Where pieces are read before they are encoded: one for each thread, not for each connection.
    static READ: RefCell<Vec<u8>> = RefCell::new(vec![0; PIECE]);
}

/// What is at hand while a file is sent.
#[derive(Default)]
struct Sending {
    /// Where the next piece begins.
    offset: u64,
    /// Fed what is sent, if somebody wants to know.
    digest: Option<Sha256>,
    /// The piece that is to be sent.
    encoded: Vec<u8>,
}

impl Sending {
    /// Reads and encodes the next piece; or does nothing and says false, if `read` does.
    fn next(
        &mut self,
        size: u64,
        read: impl FnOnce(&mut [u8], u64) -> io::Result<bool>,
    ) -> io::Result<bool> {
        READ.with_borrow_mut(|buffer| {
            let left = size.saturating_sub(self.offset);
            let wanted = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let piece = buffer.get_mut(..wanted).unwrap_or_default();
            if !read(piece, self.offset)? {
                return Ok(false);
            }
            if let Some(digest) = &mut self.digest {
                digest.update(&*piece);
            }
            self.encoded.clear();
            document::append_encoded(piece, &mut self.encoded);
            self.offset += wanted as u64;
            Ok(true)
        })
    }
}

/// Sends the content of `file` in base64; what has to be waited for is read by `readers` under
/// `name`. If `digest` is given, it is fed what is sent, and comes back.
///
/// # Errors
/// If the client went away, or the file cannot be read to its end as it was when it was opened.
pub(crate) async fn send_encoded<S: Stream>(
    file: &Arc<OpenFile>,
    (readers, name): (&BlockingPool, &str),
    digest: Option<Sha256>,
    connection: &mut Connection<S>,
) -> Result<Option<Sha256>, ServeError> {
    let size = file.stamp.size;
    let mut sending = Sending { digest, ..Sending::default() };
    while sending.offset < size {
        // What the kernel has in memory is had faster than another thread.
        let at_hand = sending.next(size, |piece, offset| file.read_cached_at(piece, offset));
        if !at_hand.map_err(ServeError::Service)? {
            // A file can keep a reader waiting, and must not keep the other connections waiting.
            let file = Arc::clone(file);
            let reading = readers.run(name, move || {
                let read =
                    sending.next(size, |piece, offset| file.read_at(piece, offset).map(|()| true));
                (sending, read)
            });
            let reading = connection.with_read_timeout(reading).await?;
            let (returned, read) = reading.map_err(ServeError::Service)?;
            sending = returned;
            read.map_err(ServeError::Service)?;
        }
        connection.send(&sending.encoded).await?;
        // The other connections' turn.
        tokio::task::yield_now().await;
    }
    Ok(sending.digest)
}

/// Writes the content of `file` in base64 to `document`, and feeds it to `digest`, if given, which
/// comes back.
///
/// # Errors
/// If the file cannot be read to its end as it was when it was opened.
pub(crate) fn write_whole(
    file: &OpenFile,
    digest: Option<Sha256>,
    document: &mut impl Write,
) -> io::Result<Option<Sha256>> {
    let size = file.stamp.size;
    let mut sending = Sending { digest, ..Sending::default() };
    while sending.offset < size {
        sending.next(size, |piece, offset| file.read_at(piece, offset).map(|()| true))?;
        document.write_all(&sending.encoded)?;
    }
    Ok(sending.digest)
}
