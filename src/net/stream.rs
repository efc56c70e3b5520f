//! The socket of an accepted connection, which meets the reactor only when it has to be waited for.
//!
//! A reply that fits into the kernel's buffer is written at once, and the registration, which costs
//! more than the writing, is spared.

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

/// How much is received at one time.
const RECEIVE_BUFFER: usize = 16 << 10;

/// The largest write to a Unix socket. The kernel counts a write as unread (`SIOCOUTQ`) until the peer
/// has read all of it, so that large ones hide the progress of a slow reader. With the kernel's
/// header, this fills an allocation of 8 KiB.
const UNIX_WRITE: usize = 7 << 10;

/// A connected TCP or Unix socket that does not block.
#[derive(Debug)]
pub struct LazySocket {
    socket: Socket,
    kind: Kind,
}

/// What kind of socket was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A TCP connection.
    Tcp,
    /// A Unix stream connection.
    Unix,
}

impl Kind {
    /// Writes up to `length` bytes with `write`, which is given the start and the length of a piece.
    /// The pieces are as large as this kind of socket permits.
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
                // The next call meets it again.
                Err(_) => break,
            }
        }
        Ok(written)
    }
}

#[derive(Debug)]
enum Socket {
    /// It has not been waited for yet.
    Fresh(OwnedFd),
    /// The reactor wakes whoever waits for it.
    RegisteredFd(RegisteredFd),
    /// It could not be registered, and was closed, which resets it.
    Lost,
}

impl LazySocket {
    /// Takes over a socket that does not block.
    pub(crate) fn new(socket: OwnedFd, kind: Kind) -> Self {
        Self { socket: Socket::Fresh(socket), kind }
    }

    /// Its descriptor.
    ///
    /// # Errors
    /// If it could not be registered.
    pub(crate) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.socket {
            Socket::Fresh(socket) => Ok(socket.as_fd()),
            Socket::RegisteredFd(socket) => Ok(socket.as_fd()),
            Socket::Lost => Err(ErrorKind::NotConnected.into()),
        }
    }

    /// What these events, which were polled for after it was answered, say of its client.
    pub(crate) fn heard(&self, events: PollFlags) -> PeerState {
        if events.is_empty() {
            PeerState::Nothing
        } else if self.kind == Kind::Tcp
            && events.contains(PollFlags::HUP)
            && !events.contains(PollFlags::ERR)
        {
            // Both sides have ended, as ours has. What the client has sent need not be read: once
            // it has everything, the kernel has closed the connection (`Stream::close_cleanly`). On
            // a Unix socket, what nobody reads turns the close into a reset.
            PeerState::End
        } else {
            PeerState::Something
        }
    }

    /// Reads the header of a balancer, and nothing of what follows it: who the client is, if that
    /// is somebody else.
    ///
    /// # Errors
    /// If there is none, or the connection has ended.
    pub(crate) async fn read_header(&mut self) -> io::Result<Option<SocketAddr>> {
        let mut header = [0; MAX_HEADER];
        let mut length = 0;
        let mut read = |socket: BorrowedFd<'_>| loop {
            let room = header.get_mut(length..).unwrap_or_default();
            let (more, _) = recv(socket, room, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
            let (taken, whole) =
                match ParsedHeader::parse(header.get(..length + more).unwrap_or_default()) {
                    // All of it belongs to the header. Taken, it leaves the end to be seen.
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

    /// Does what can be done at once, or registers the socket and waits.
    fn poll<R>(
        &mut self,
        context: &mut Context<'_>,
        direction: Interest,
        mut act: impl FnMut(BorrowedFd<'_>) -> rustix::io::Result<R>,
    ) -> Poll<io::Result<R>> {
        if let Socket::Fresh(socket) = &self.socket {
            // A client that always has something to say, and takes every reply, gets its turn as
            // the others do; what the reactor tells of counts as such by itself.
            let turn = ready!(coop::poll_proceed(context));
            match act(socket.as_fd()) {
                Err(Errno::WOULDBLOCK) => {}
                result => {
                    turn.made_progress();
                    return Poll::Ready(result.map_err(io::Error::from));
                }
            }
            if let Socket::Fresh(socket) = std::mem::replace(&mut self.socket, Socket::Lost) {
                let both = Interest::READABLE | Interest::WRITABLE;
                self.socket = Socket::RegisteredFd(
                    RegisteredFd::new(socket, both).map_err(|error| unwatched(&error))?,
                );
            }
        }
        let Socket::RegisteredFd(socket) = &self.socket else {
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

/// Says what to do when the kernel has no room for what is to be watched.
fn unwatched(error: &io::Error) -> io::Error {
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
        // When its client leaves, the queue of a Unix socket is empty, too.
        if self.kind == Kind::Unix {
            fault()?;
        }
        let bytes = sys::unacknowledged(socket)?;
        // After the end of the client's side, no read tells any more that it has gone.
        if self.kind == Kind::Tcp && bytes > 0 {
            fault()?;
        }
        Ok(bytes)
    }

    fn close_cleanly(&self, both_ended: bool) -> io::Result<()> {
        match self.kind {
            // It is closed already, as far as TCP goes (RFC 9293, TIME-WAIT or CLOSED): there is
            // nothing left to be reset.
            Kind::Tcp if both_ended => Ok(()),
            Kind::Tcp => socket2::SockRef::from(&self.fd()?).set_linger(None),
            // These know no reset: the client sees an end, and a document without its end.
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
        // Through memory that need not be cleared first; what clients send is little.
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
    fn a_header_that_is_there_takes_no_reactor_and_what_follows_it_is_left() {
        let (mut balancer, accepted) = connected();
        balancer.write_all(b"PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789\r\nhello.txt\n").unwrap();
        let mut rest = accepted.try_clone().unwrap();
        let mut socket = LazySocket::new(accepted.into(), Kind::Tcp);
        // Where no reactor runs, to wait would be a panic.
        let mut context = Context::from_waker(Waker::noop());
        let read = pin!(socket.read_header()).poll(&mut context);
        let Poll::Ready(Ok(client)) = read else { panic!("{read:?}") };
        assert_eq!(client, "192.0.2.7:4321".parse().ok());
        let mut follows = [0; 20];
        let length = rest.read(&mut follows).unwrap();
        assert_eq!(&follows[..length], b"hello.txt\n");
    }
}
