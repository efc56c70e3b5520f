//! A document that is the same for everybody, held as it costs least to send.

use std::io::{self, Write};

use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::memfd::MemoryFile;

/// From this length on, the kernel's copying costs more than a call that spares it.
const WORTH_SPARING: usize = 32 << 10;

/// A whole document in memory.
#[derive(Debug)]
pub(crate) enum ReadyMade {
    /// A short one: it and its end leave as one packet.
    Bytes(Vec<u8>),
    /// A longer one, which the kernel sends without copying it.
    Memory(MemoryFile),
}

impl ReadyMade {
    /// Makes a document of at most `length` bytes by writing it.
    ///
    /// # Errors
    /// Those of `write`, or if there is not enough memory.
    pub(crate) fn make(
        length: usize,
        write: impl Fn(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<Self> {
        // Where there are no such files, or only small ones (RLIMIT_FSIZE), it is copied.
        if length >= WORTH_SPARING
            && let Ok(file) = MemoryFile::make(&write)
        {
            return Ok(Self::Memory(file));
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length)?;
        write(&mut bytes)?;
        Ok(Self::Bytes(bytes))
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Memory(file) => file.len(),
        }
    }

    /// Sends it, and nothing is to follow.
    ///
    /// # Errors
    /// If the client has gone, or takes no byte for the idle time-out.
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
