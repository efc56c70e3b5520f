//! Documents in kernel memory, which sendfile(2) sends without a copy through user space.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{MemfdFlags, memfd_create, sendfile};

/// A file in kernel memory that no longer changes.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    length: u64,
}

impl MemoryFile {
    /// Creates the file and lets `write` fill it.
    ///
    /// # Errors
    /// The errors of `write`; `EMFILE` or `EFBIG` if a resource limit of the process is reached.
    pub fn make(write: impl Fn(&mut dyn Write) -> io::Result<()>) -> io::Result<Self> {
        let mut file = File::from(memfd_create("document", MemfdFlags::CLOEXEC)?);
        write(&mut file)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Sends at most `length` bytes from `offset` to a non-blocking socket; returns the number of
    /// bytes that it took.
    ///
    /// # Errors
    /// The errors of the socket.
    pub fn send(
        &self,
        socket: BorrowedFd<'_>,
        mut offset: u64,
        length: usize,
    ) -> rustix::io::Result<usize> {
        sendfile(socket, &self.file, Some(&mut offset), length)
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, server)
    }

    /// Sends the file in calls for `chunk` bytes and returns the received bytes.
    fn received(file: &MemoryFile, chunk: usize) -> Vec<u8> {
        let (mut client, server) = connected();
        let mut received = Vec::new();
        let mut offset = 0;
        while offset < file.len() {
            match file.send(server.as_fd(), offset, chunk) {
                Ok(sent) => offset += sent as u64,
                Err(error) => assert_eq!(error, rustix::io::Errno::AGAIN),
            }
            let mut new = vec![0; usize::try_from(offset).unwrap() - received.len()];
            client.read_exact(&mut new).unwrap();
            received.extend(new);
        }
        drop(server);
        client.read_to_end(&mut received).unwrap();
        received
    }

    #[test]
    fn sends_the_whole_file_in_chunks_of_any_size() {
        for length in [0, 1, 4095, 4096, 4097, 250_000] {
            let content: Vec<u8> = (0..=250).cycle().take(length).collect();
            let file = MemoryFile::make(|to| to.write_all(&content)).unwrap();
            for chunk in [1000, length.max(1), length + 1] {
                assert!(received(&file, chunk) == content, "{length} {chunk}");
            }
        }
    }
}
