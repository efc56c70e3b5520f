//! Files that are only in memory, from which the kernel sends without copying.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, memfd_create, sendfile};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice, tee};

/// A file that is handed on by its pages is at most so long: one turn of a connection.
const MAX_HANDED_ON: usize = 256 << 10;

/// A file in memory, which does not change any more.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    length: u64,
    /// All of its pages, to be handed on together: sendfile(2) looks each up anew, which is a tenth
    /// of what it costs to send a picture.
    pages: Option<OwnedFd>,
}

impl MemoryFile {
    /// Makes one by writing it.
    ///
    /// # Errors
    /// Those of `write`, or if this process may have no such file, or only shorter ones
    /// (`RLIMIT_FSIZE`).
    pub fn make(write: impl Fn(&mut dyn Write) -> io::Result<()>) -> io::Result<Self> {
        let mut file = File::from(memfd_create("document", MemfdFlags::CLOEXEC)?);
        write(&mut file)?;
        let length = file.metadata()?.len();
        // A user may have so much in pipes only (pipe(7), pipe-user-pages-soft).
        let pages = pages_of(&file, length).ok().flatten();
        Ok(Self { file, length, pages })
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Sends at most `length` bytes from `offset` on to a socket that does not block, as far as it
    /// takes them; returns how many those are.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(
        &self,
        socket: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> rustix::io::Result<usize> {
        if let Some(pages) = &self.pages
            && offset == 0
            && length as u64 >= self.length
            && let Some(sent) = hand_on(pages, length, socket)
        {
            return sent;
        }
        sendfile(socket, &self.file, Some(&mut offset.clone()), length)
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A pipe with all pages of the file; none if it is too long.
fn pages_of(file: &File, length: u64) -> io::Result<Option<OwnedFd>> {
    let Some(length) = usize::try_from(length).ok().filter(|length| *length <= MAX_HANDED_ON)
    else {
        return Ok(None);
    };
    let pipe = Pipe::new(length)?;
    let (mut offset, mut left) = (0, length);
    while left > 0 {
        let moved =
            splice(file, Some(&mut offset), &pipe.input, None, left, SpliceFlags::NONBLOCK)?;
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= moved;
    }
    Ok(Some(pipe.output))
}

#[derive(Debug)]
struct Pipe {
    output: OwnedFd,
    input: OwnedFd,
}

impl Pipe {
    /// One that has room for so many bytes, from the beginning of a page on.
    fn new(length: usize) -> io::Result<Self> {
        let (output, input) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&input, length)?;
        Ok(Self { output, input })
    }
}

thread_local! {
    /// An empty pipe, through which pages go on their way to a socket.
    static EMPTY: Cell<Option<Pipe>> = const { Cell::new(None) };
}

/// Sends these pages, as far as the socket takes them. None if that cannot be tried now.
fn hand_on(
    pages: &OwnedFd,
    length: usize,
    socket: BorrowedFd<'_>,
) -> Option<rustix::io::Result<usize>> {
    let pipe = EMPTY.take().or_else(|| Pipe::new(MAX_HANDED_ON).ok())?;
    // A reference to each is all that is copied.
    let taken = tee(pages, &pipe.input, length, SpliceFlags::NONBLOCK).ok()?;
    let sent = splice(&pipe.output, None, socket, None, taken, SpliceFlags::NONBLOCK);
    // What the socket did not take goes with the pipe, and is sent from the file.
    if sent == Ok(taken) {
        EMPTY.set(Some(pipe));
    }
    Some(sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    fn content(length: usize) -> Vec<u8> {
        (0..=250).cycle().take(length).collect()
    }

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, server)
    }

    /// Sends all of a file, in calls for so many bytes, and returns what arrives.
    fn sent(file: &MemoryFile, at_once: usize) -> Vec<u8> {
        let (mut client, server) = connected();
        let mut received = Vec::new();
        let mut offset = 0;
        while offset < file.len() {
            match file.send(server.as_fd(), offset, at_once) {
                Ok(sent) => offset += sent as u64,
                Err(error) => assert_eq!(error, rustix::io::Errno::AGAIN),
            }
            let mut some = vec![0; usize::try_from(offset).unwrap() - received.len()];
            client.read_exact(&mut some).unwrap();
            received.extend(some);
        }
        drop(server);
        client.read_to_end(&mut received).unwrap();
        received
    }

    #[test]
    fn what_arrives_is_the_file_whatever_its_length_and_however_it_is_asked_for() {
        for length in [0, 1, 4095, 4096, 4097, 250_000, MAX_HANDED_ON, MAX_HANDED_ON + 1] {
            let content = content(length);
            let file = MemoryFile::make(|to| to.write_all(&content)).unwrap();
            assert_eq!(file.pages.is_some(), length <= MAX_HANDED_ON, "{length}");
            for at_once in [1000, length.max(1), length + 1] {
                assert!(sent(&file, at_once) == content, "{length} {at_once}");
            }
        }
    }

    #[test]
    fn what_one_socket_does_not_take_never_comes_to_another() {
        let [one, other] = [b'1', b'2'].map(|byte| vec![byte; 200_000]);
        let file = |content: &Vec<u8>| MemoryFile::make(|to| to.write_all(content)).unwrap();
        let (_client, full) = connected();
        let one = file(&one);
        while one.send(full.as_fd(), 0, 1000).is_ok() {}
        assert_eq!(one.send(full.as_fd(), 0, 200_000), Err(rustix::io::Errno::AGAIN));
        assert!(sent(&file(&other), 200_000) == other);
    }

    #[test]
    fn the_pipes_are_used_again() {
        let file = MemoryFile::make(|to| to.write_all(&content(100_000))).unwrap();
        sent(&file, 100_000);
        let pipe = EMPTY.take().expect("an empty pipe");
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&pipe.input);
        EMPTY.set(Some(pipe));
        sent(&file, 100_000);
        let pipe = EMPTY.take().expect("an empty pipe");
        assert_eq!(std::os::fd::AsRawFd::as_raw_fd(&pipe.input), descriptor);
    }
}
