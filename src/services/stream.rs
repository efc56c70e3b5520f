//! A file in base64, encoded as it is sent, in the memory of one piece.

use std::io;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::connection::{Broken, Connection, Stream};
use crate::document;
use crate::files::OpenFile;

/// How much of a file is read, encoded and sent at one time; each connection holds one such
/// piece, encoded.
const PIECE: usize = 16 * 1024 * document::WHOLE_GROUP;

/// Sends the content of `file` in base64. If `digest` is given, it is fed what is sent, and comes
/// back.
///
/// # Errors
/// If the client went away, or the file cannot be read to its end as it was when it was opened.
pub async fn send_encoded<S: Stream>(
    file: &Arc<OpenFile>,
    mut digest: Option<Sha256>,
    connection: &mut Connection<S>,
) -> Result<Option<Sha256>, Broken> {
    let mut encoded = Vec::new();
    let mut offset = 0;
    while offset < file.stamp.size {
        let file = Arc::clone(file);
        // A file can keep a reader waiting, and must not keep the other connections waiting.
        let reading = tokio::task::spawn_blocking(move || {
            encoded.clear();
            encode_piece(&file, offset, digest.as_mut(), &mut encoded)
                .map(|read| (read, digest, encoded))
        });
        let read = reading.await.map_err(io::Error::other).and_then(|read| read);
        let (read, fed, piece) = read.map_err(Broken::Service)?;
        connection.send_part(&piece).await?;
        (digest, encoded) = (fed, piece);
        offset += read;
    }
    Ok(digest)
}

/// Reads the piece at `offset` and appends it to `encoded`; returns how many bytes of the file it was.
fn encode_piece(
    file: &OpenFile,
    offset: u64,
    digest: Option<&mut Sha256>,
    encoded: &mut Vec<u8>,
) -> io::Result<u64> {
    #[expect(clippy::large_stack_arrays, reason = "the stack of a pool's thread has room")]
    let mut piece = [0; PIECE];
    let left = file.stamp.size.saturating_sub(offset);
    let wanted = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
    let piece = piece.get_mut(..wanted).unwrap_or_default();
    file.read_at(piece, offset)?;
    if let Some(digest) = digest {
        digest.update(&*piece);
    }
    document::append_encoded(piece, encoded);
    Ok(wanted as u64)
}

/// Appends the content of `file` in base64 to `document`, and feeds it to `digest`, if given.
///
/// # Errors
/// If the file cannot be read to its end as it was when it was opened.
pub fn append_whole(
    file: &OpenFile,
    mut digest: Option<&mut Sha256>,
    document: &mut Vec<u8>,
) -> io::Result<()> {
    let mut offset = 0;
    while offset < file.stamp.size {
        offset += encode_piece(file, offset, digest.as_deref_mut(), document)?;
    }
    Ok(())
}
