//! A document that is the same for everybody, held as it costs least to send.

use std::fs::File;
use std::io::{self, Write};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::connection::{Broken, Connection, Stream};

/// From this length on, the kernel's copying costs more than a call that spares it.
const WORTH_SPARING: usize = 32 << 10;

/// A whole document in memory.
#[derive(Debug)]
pub enum ReadyMade {
    /// A short one: it and its end leave as one packet.
    Bytes(Vec<u8>),
    /// A file that is only in memory, from which the kernel sends without copying.
    Memory(File, u64),
}

impl ReadyMade {
    /// Makes a document of at most `length` bytes by writing it.
    ///
    /// # Errors
    /// Those of `write`, or if there is not enough memory.
    pub fn make(
        length: usize,
        write: impl Fn(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<Self> {
        // Where there are no such files, or only small ones (RLIMIT_FSIZE), it is copied.
        if length >= WORTH_SPARING
            && let Ok(held) = Self::in_memory_file(&write)
        {
            return Ok(held);
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length)?;
        write(&mut bytes)?;
        Ok(Self::Bytes(bytes))
    }

    fn in_memory_file(write: impl Fn(&mut dyn Write) -> io::Result<()>) -> io::Result<Self> {
        let mut file = File::from(memfd_create("document", MemfdFlags::CLOEXEC)?);
        write(&mut file)?;
        let length = file.metadata()?.len();
        Ok(Self::Memory(file, length))
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Memory(_, length) => *length,
        }
    }

    /// Sends it, and nothing is to follow.
    ///
    /// # Errors
    /// If the client has gone, or takes no byte for the idle time-out.
    pub async fn send<S: Stream>(&self, connection: &mut Connection<S>) -> Result<(), Broken> {
        match self {
            Self::Bytes(bytes) => connection.send_part(bytes).await,
            Self::Memory(file, length) => connection.send_file(file, *length).await,
        }
    }
}
