//! Documents of the files, cached within a memory limit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::Weighter;
use sha2::{Digest, Sha256};

use super::FolderService;
use crate::document;
use crate::fs::file::{OpenFile, Stamp};
use crate::services::encoder;

/// Divisor of the cache limit that gives the maximum size of a cached file, so that one file does
/// not evict all others.
const MAX_CACHED_PART: u64 = 4;

/// Multiple of the cache limit that all documents in memory may take. Beyond it, files are encoded
/// while they are sent.
const MEMORY_FACTOR: u64 = 2;

/// Capacity for the end of a document, after the data. An upper bound.
const CLOSING_CAPACITY: usize = 128;

#[derive(Debug)]
pub(super) struct Document {
    pub(super) bytes: Vec<u8>,
    _reservation: Reservation,
}

/// A share of the memory limit. Reserving before allocating keeps concurrent requests within it.
#[derive(Debug)]
struct Reservation {
    bytes: u64,
    memory_used: Arc<AtomicU64>,
}

impl Reservation {
    /// Reserves `bytes` unless that takes the total over `limit`.
    fn new(bytes: u64, limit: u64, memory_used: &Arc<AtomicU64>) -> Option<Self> {
        let add = |now: u64| now.checked_add(bytes).filter(|sum| *sum <= limit);
        memory_used.try_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        Some(Self { bytes, memory_used: Arc::clone(memory_used) })
    }

    /// Releases the memory beyond `bytes`.
    fn shrink_to(&mut self, bytes: u64) {
        let excess = self.bytes.saturating_sub(bytes);
        self.memory_used.fetch_sub(excess, Ordering::Relaxed);
        self.bytes -= excess;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory_used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone)]
pub(super) struct DocumentWeight;

impl Weighter<(String, Stamp), Arc<Document>> for DocumentWeight {
    fn weight(&self, (name, _): &(String, Stamp), document: &Arc<Document>) -> u64 {
        (document.bytes.len() + name.len()) as u64
    }
}

/// Content to send for a file name.
pub(super) enum Response {
    Document(Arc<Document>),
    /// A file to encode while it is sent, with its digest if known.
    File(Arc<OpenFile>, Option<[u8; 32]>),
}

impl FolderService {
    pub(super) async fn find(self: &Arc<Self>, name: &str) -> io::Result<Response> {
        let (service, wanted) = (Arc::clone(self), name.to_owned());
        self.readers.run(name, move || service.find_now(wanted)).await?
    }

    /// Opens the file. Returns its document, cached or new, if the memory limits allow one.
    fn find_now(&self, name: String) -> io::Result<Response> {
        let file = self.settings.folder.file(&name)?;
        let stamp = file.stamp;
        let key = (name, stamp);
        if let Some(document) = self.documents.get(&key) {
            return Ok(Response::Document(document));
        }
        let Some(mut reservation) = self.reserve(&key.0, stamp.size) else {
            return Ok(Response::File(Arc::new(file), self.digests.get(&stamp)));
        };
        let mut bytes = document::file_opening(&key.0, stamp.size, stamp.modified()).into_bytes();
        let data = usize::try_from(stamp.size).ok().and_then(document::encoded_len);
        bytes.reserve_exact(data.unwrap_or_default() + CLOSING_CAPACITY);
        let digest = encoder::write_whole(&file, Some(Sha256::new()), &mut bytes)?;
        let digest = digest.unwrap_or_default().finalize().into();
        bytes.extend_from_slice(document::file_closing(&digest).as_bytes());
        reservation.shrink_to(bytes.len() as u64);
        let document = Arc::new(Document { bytes, _reservation: reservation });
        self.documents.insert(key, Arc::clone(&document));
        Ok(Response::Document(document))
    }

    /// Reserves memory for the document of a file; `None` if the file is too large to be cached
    /// or the limit is reached.
    fn reserve(&self, name: &str, size: u64) -> Option<Reservation> {
        let limit = self.settings.cache_limit;
        if size > limit / MAX_CACHED_PART {
            return None;
        }
        // Base64 takes four bytes for three, and a name up to six bytes for one.
        let max = size.saturating_mul(2).saturating_add(name.len() as u64 * 6 + 512);
        Reservation::new(max, limit.saturating_mul(MEMORY_FACTOR), &self.memory_used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concurrent_documents_stay_within_the_memory_limit() {
        let memory_used = Arc::<AtomicU64>::default();
        let reserve = |bytes| Reservation::new(bytes, 100, &memory_used);
        let (first, mut second) = (reserve(60).unwrap(), reserve(40).unwrap());
        assert!(reserve(1).is_none());
        assert!(reserve(u64::MAX).is_none());
        second.shrink_to(30);
        let third = reserve(10).unwrap();
        assert!(reserve(1).is_none());
        drop((first, second, third));
        assert_eq!(memory_used.load(Ordering::Relaxed), 0);
        assert!(reserve(100).is_some());
    }
}
