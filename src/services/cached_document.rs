//! Complete documents in memory, shared by all connections and stored in the form that is cheapest
//! to send.

use std::io::{self, Write};

use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::memfd::MemoryFile;

/// Minimum length of a document, in bytes, that is stored in a [`MemoryFile`]. For shorter ones,
/// copying costs less than the additional system call.
const MIN_MEMORY_FILE_SIZE: usize = 32 << 10;

/// A complete document in memory.
#[derive(Debug)]
pub(crate) enum CachedDocument {
    /// A short document, which leaves with its end as one packet.
    Bytes(Vec<u8>),
    /// A longer document, which the kernel sends without a copy.
    Memory(MemoryFile),
}

impl CachedDocument {
    /// Creates a document of at most `length` bytes from the output of `write`, which may run
    /// twice.
    ///
    /// # Errors
    /// The errors of `write`; also if there is not enough memory.
    pub(crate) fn build(
        length: usize,
        write: impl Fn(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<Self> {
        // Fails without memfd_create(2) or under a low RLIMIT_FSIZE: then the bytes are copied.
        if length >= MIN_MEMORY_FILE_SIZE
            && let Ok(file) = MemoryFile::make(&write)
        {
            return Ok(Self::Memory(file));
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length)?;
        write(&mut bytes)?;
        Ok(Self::Bytes(bytes))
    }

    /// Returns the length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Memory(file) => file.len(),
        }
    }

    /// Sends the document, which must be the last data of the connection.
    pub(crate) async fn send<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        match self {
            Self::Bytes(bytes) => connection.send_part(bytes).await,
            Self::Memory(file) => connection.send_file(file).await,
        }
    }
}
