//! The socket of an accepted connection, registered with the reactor on the first wait.
//!
//! A reply that fits the buffer of the kernel is written without the registration, which costs more
//! than the write.

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::sockopt::socket_error;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::task::coop;

use crate::net::connection::{MoreToCome, PeerState, Stream};
use crate::net::memfd::MemoryFile;
use crate::net::proxy_protocol::{MAX_HEADER, ParsedHeader};
use crate::sys;
use crate::sys::RegisteredFd;

/// Maximum size of a read, in bytes.
const RECEIVE_BUFFER: usize = 16 << 10;

/// Maximum size of a write to a Unix socket, in bytes. The kernel counts a write as unread
/// (`SIOCOUTQ`) until the peer has read all of it, so that a large one hides the progress of a slow
/// reader. With the header of the kernel, this fills an allocation of 8 KiB.
const UNIX_WRITE: usize = 7 << 10;

/// A connected non-blocking TCP or Unix socket.
#[derive(Debug)]
pub struct LazySocket {
    socket: Socket,
    kind: Kind,
}

/// The kind of an accepted socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp,
    Unix,
}

impl Kind {
    /// Writes up to `length` bytes in pieces of the maximum size for this kind of socket. `write`
    /// receives the start and the length of a piece.
    fn write_in_pieces(
        self,
        length: usize,
        mut write: impl FnMut(usize, usize) -> rustix::io::Result<usize>,
    ) -> rustix::io::Result<usize> {
        if self == Self::Tcp {
            return write(0, length);
        }
        let mut written = 0;
        while written < length {
            match write(written, UNIX_WRITE.min(length - written)) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if written == 0 => return Err(error),
                // The next call reports the error.
                Err(_) => break,
            }
        }
        Ok(written)
    }
}

#[derive(Debug)]
enum Socket {
    Unregistered(OwnedFd),
    Registered(RegisteredFd),
    /// The registration failed and closed the socket, which resets the connection.
    Closed,
}

impl LazySocket {
    /// Takes over a non-blocking socket.
    pub(crate) fn new(socket: OwnedFd, kind: Kind) -> Self {
        Self { socket: Socket::Unregistered(socket), kind }
    }

    /// Returns the descriptor, unless the registration failed.
    pub(crate) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.socket {
            Socket::Unregistered(socket) => Ok(socket.as_fd()),
            Socket::Registered(socket) => Ok(socket.as_fd()),
            Socket::Closed => Err(ErrorKind::NotConnected.into()),
        }
    }

    /// Returns the state of the client after an answer, from the events of poll(2).
    pub(crate) fn peer_state(&self, events: PollFlags) -> PeerState {
        if events.is_empty() {
            PeerState::Silent
        } else if self.kind == Kind::Tcp
            && events.contains(PollFlags::HUP)
            && !events.contains(PollFlags::ERR)
        {
            // Both sides are closed, as this one is. Unread input does no harm: once the client has
            // everything, the kernel has closed the connection (`Stream::close_cleanly`). On a Unix
            // socket, unread input turns the close into a reset.
            PeerState::Closed
        } else {
            PeerState::Readable
        }
    }

    /// Reads a PROXY header, and nothing behind it. Returns the client, if it differs from the peer.
    ///
    /// # Errors
    /// If the header is missing or invalid, or the connection ended.
    pub(crate) async fn read_proxy_header(&mut self) -> io::Result<Option<SocketAddr>> {
        let mut header = [0; MAX_HEADER];
        let mut length = 0;
        let mut read = |socket: BorrowedFd<'_>| loop {
            let room = header.get_mut(length..).unwrap_or_default();
            let (more, _) = recv(socket, room, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
            let (taken, whole) =
                match ParsedHeader::parse(header.get(..length + more).unwrap_or_default()) {
                    // All bytes belong to the header. Once taken, the end of the input is visible.
                    ParsedHeader::Incomplete if more > 0 => (more, None),
                    ParsedHeader::Header { client, length: whole } => {
                        (whole - length, Some(client))
                    }
                    ParsedHeader::Incomplete | ParsedHeader::Invalid => return Err(Errno::PROTO),
                };
            let room = header.get_mut(length..length + taken).unwrap_or_default();
            recv(socket, room, RecvFlags::DONTWAIT)?;
            length += taken;
            if let Some(client) = whole {
                return Ok(client);
            }
        };
        poll_fn(|context| self.poll(context, Interest::READABLE, &mut read)).await
    }

    /// Tries `act`, or registers the socket and waits until it is ready.
    fn poll<R>(
        &mut self,
        context: &mut Context<'_>,
        direction: Interest,
        mut act: impl FnMut(BorrowedFd<'_>) -> rustix::io::Result<R>,
    ) -> Poll<io::Result<R>> {
        if let Socket::Unregistered(socket) = &self.socket {
            // A client that never makes the socket wait must not monopolize the thread. The reactor
            // consumes the budget by itself.
            let turn = ready!(coop::poll_proceed(context));
            match act(socket.as_fd()) {
                Err(Errno::WOULDBLOCK) => {}
                result => {
                    turn.made_progress();
                    return Poll::Ready(result.map_err(io::Error::from));
                }
            }
            if let Socket::Unregistered(socket) =
                std::mem::replace(&mut self.socket, Socket::Closed)
            {
                let both = Interest::READABLE | Interest::WRITABLE;
                self.socket = Socket::Registered(
                    RegisteredFd::new(socket, both).map_err(|error| registration_error(&error))?,
                );
            }
        }
        let Socket::Registered(socket) = &self.socket else {
            return Poll::Ready(Err(ErrorKind::NotConnected.into()));
        };
        loop {
            let mut guard = ready!(socket.poll_ready(context, direction))?;
            if let Ok(result) = guard.try_io(|socket| Ok(act(socket.as_fd())?)) {
                return Poll::Ready(result);
            }
        }
    }
}

/// Adds a remedy to the error of a failed registration.
fn registration_error(error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        ErrorKind::StorageFull => " (raise the sysctl fs.epoll.max_user_watches)",
        _ => "",
    };
    io::Error::new(error.kind(), format!("the client cannot be waited for: {error}{remedy}"))
}

impl Stream for LazySocket {
    fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        next: MoreToCome,
    ) -> Poll<io::Result<usize>> {
        let more = if next == MoreToCome::AtOnce { SendFlags::MORE } else { SendFlags::empty() };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL | more;
        let kind = self.kind;
        self.poll(context, Interest::WRITABLE, |socket| {
            kind.write_in_pieces(bytes.len(), |start, length| {
                let piece = bytes.get(start..start + length).unwrap_or_default();
                send(socket, piece, flags)
            })
        })
    }

    fn poll_write_file(
        &mut self,
        context: &mut Context<'_>,
        file: &MemoryFile,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>> {
        let kind = self.kind;
        self.poll(context, Interest::WRITABLE, |socket| {
            kind.write_in_pieces(length, |start, length| {
                file.send(socket, offset + start as u64, length)
            })
        })
    }

    fn half_close(&mut self) -> io::Result<()> {
        Ok(shutdown(self.fd()?, Shutdown::Write)?)
    }

    fn unacknowledged(&self) -> io::Result<u64> {
        let socket = self.fd()?;
        let fault = || socket_error(socket)?;
        // The queue of a Unix socket is empty, too, after its client left.
        if self.kind == Kind::Unix {
            fault()?;
        }
        let bytes = sys::unacknowledged(socket)?;
        // After the end of the input, no read reports that the client left.
        if self.kind == Kind::Tcp && bytes > 0 {
            fault()?;
        }
        Ok(bytes)
    }

    fn close_cleanly(&self, both_ended: bool) -> io::Result<()> {
        match self.kind {
            // TCP has closed the connection (RFC 9293, TIME-WAIT or CLOSED): a close cannot reset it.
            Kind::Tcp if both_ended => Ok(()),
            Kind::Tcp => socket2::SockRef::from(&self.fd()?).set_linger(None),
            // Unix sockets have no reset: the client sees the end of an incomplete document.
            Kind::Unix => Ok(()),
        }
    }

    fn try_discard(&mut self) -> io::Result<usize> {
        let mut received = [MaybeUninit::uninit(); RECEIVE_BUFFER];
        let (_, length) = recv(self.fd()?, &mut received, RecvFlags::DONTWAIT)?;
        Ok(length)
    }
}

impl AsyncRead for LazySocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Into uninitialized memory, and copied: clients send little.
        let mut received = [MaybeUninit::uninit(); RECEIVE_BUFFER];
        let wanted = buffer.remaining().min(RECEIVE_BUFFER);
        self.poll(context, Interest::READABLE, |socket| {
            let room = received.get_mut(..wanted).unwrap_or_default();
            let ((filled, _), _) = recv(socket, room, RecvFlags::DONTWAIT)?;
            buffer.put_slice(filled);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::pin::pin;
    use std::task::Waker;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let balancer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        accepted.set_nonblocking(true).unwrap();
        (balancer, accepted)
    }

    #[test]
    fn reads_an_available_header_without_the_reactor_and_nothing_behind_it() {
        let (mut balancer, accepted) = connected();
        balancer.write_all(b"PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789\r\nhello.txt\n").unwrap();
        let mut rest = accepted.try_clone().unwrap();
        let mut socket = LazySocket::new(accepted.into(), Kind::Tcp);
        // A registration would panic without a reactor.
        let mut context = Context::from_waker(Waker::noop());
        let read = pin!(socket.read_proxy_header()).poll(&mut context);
        let Poll::Ready(Ok(client)) = read else { panic!("{read:?}") };
        assert_eq!(client, "192.0.2.7:4321".parse().ok());
        let mut follows = [0; 20];
        let length = rest.read(&mut follows).unwrap();
        assert_eq!(&follows[..length], b"hello.txt\n");
    }
}
