//! The transport of a connection, as an interface: a socket, or a stream in memory in tests.

use std::io;
use std::task::{Context, Poll};

use tokio::io::AsyncRead;

use crate::net::memfd::MemoryFile;

/// The bytes that follow a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoreToCome {
    /// Unknown. The written bytes are sent at once.
    Unknown,
    /// More bytes or the end follow immediately. A partial packet may wait for them.
    AtOnce,
}

/// The state of a client that received the whole reply, as far as poll(2) shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// No event.
    Silent,
    /// The client closed its side; there is no error.
    Closed,
    /// Input, an error, or an unknown state: a read tells.
    Readable,
}

/// A bidirectional stream. Dropping it resets the connection unless
/// [`close_cleanly`](Self::close_cleanly) was called.
pub trait Stream: AsyncRead + Unpin + Send {
    /// Writes some of `bytes`.
    fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        next: MoreToCome,
    ) -> Poll<io::Result<usize>>;

    /// Writes at most `length` bytes of a file from `offset` on.
    fn poll_write_file(
        &mut self,
        context: &mut Context<'_>,
        file: &MemoryFile,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>>;

    /// Ends the sending side.
    fn half_close(&mut self) -> io::Result<()>;

    /// Returns the number of written bytes that the client has not acknowledged, or once the error
    /// that ended the connection.
    fn unacknowledged(&self) -> io::Result<u64>;

    /// Reads and discards available input without waiting. 0 is the end of the input.
    ///
    /// # Errors
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) if none is available.
    fn try_discard(&mut self) -> io::Result<usize>;

    /// Turns the coming close from a reset into an end. `both_ended`: the client closed its side,
    /// too, and acknowledged the end of this side.
    fn close_cleanly(&self, both_ended: bool) -> io::Result<()>;
}
