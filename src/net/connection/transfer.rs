//! Receiving requests and sending replies.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, ReadBuf};

use super::{Connection, MoreToCome, ServeError, Stream};
use crate::net::idle_timer::{IdleTimer, ready_within};
use crate::net::memfd::MemoryFile;

/// Maximum input that is discarded, in bytes. After that the client waits.
const MAX_DISCARDED: u64 = 16 << 20;

/// Size of the buffer for discarded input. It is on the stack, so that a waiting connection holds
/// no buffer.
const DISCARD_BUFFER: usize = 16 << 10;

/// Maximum size of a write, so that large documents do not delay other connections.
const MAX_WRITE: usize = 256 << 10;

/// Size of a read of a request.
const RECEIVE_BUFFER: usize = 512;

impl<S: Stream> Connection<S> {
    /// Appends received bytes to `input`. Returns 0 at the end of the input and on drain. From the
    /// first call on, [`send`](Self::send) leaves input for the next call.
    pub async fn receive(&mut self, input: &mut BytesMut) -> Result<usize, ServeError> {
        self.input_wanted = true;
        input.reserve(RECEIVE_BUFFER);
        let mut timer = IdleTimer::new(self.context.deadlines.idle);
        let received = loop {
            let received = tokio::select! {
                biased;
                received = ready_within(timer.interval(), self.stream.read_buf(input)) => received,
                () = self.context.shutdown.drain.cancelled() => return Ok(0),
            };
            match received {
                Ok(received) => break received.map_err(ServeError::of_socket)?,
                // The client may still be reading an earlier reply.
                Err(waited) => self.check_idle(&mut timer, waited)?,
            }
        };
        self.input_ended |= received == 0;
        Ok(received)
    }

    /// Sends all of `bytes`. Meanwhile input is discarded, unless the service receives it: a client
    /// that sends before it reads would wait for the server, and the server for the client.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), ServeError> {
        self.send_before(MoreToCome::Unknown, bytes).await
    }

    /// Like [`send`](Self::send), for bytes that more bytes or the end follow immediately. A short
    /// reply and its end then share a packet.
    pub async fn send_part(&mut self, bytes: &[u8]) -> Result<(), ServeError> {
        self.send_before(MoreToCome::AtOnce, bytes).await
    }

    async fn send_before(&mut self, next: MoreToCome, mut bytes: &[u8]) -> Result<(), ServeError> {
        while !bytes.is_empty() {
            let now = bytes.get(..MAX_WRITE).unwrap_or(bytes);
            let next = if now.len() < bytes.len() { MoreToCome::AtOnce } else { next };
            let write =
                |stream: &mut S, context: &mut Context<'_>| stream.poll_write(context, now, next);
            let sent = self.write_some(write).await?;
            bytes = bytes.get(sent..).unwrap_or_default();
            if !bytes.is_empty() {
                // The kernel may accept a whole document without waiting, which takes its time.
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Sends a file like [`send`](Self::send), without copying it.
    pub async fn send_file(&mut self, file: &MemoryFile) -> Result<(), ServeError> {
        let length = file.len();
        let mut offset = 0;
        while offset < length {
            let left = usize::try_from(length - offset).unwrap_or(MAX_WRITE).min(MAX_WRITE);
            let write = |stream: &mut S, context: &mut Context<'_>| {
                stream.poll_write_file(context, file, offset, left)
            };
            offset += self.write_some(write).await? as u64;
            if offset < length {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Waits for a successful write. Returns its length, at least 1.
    async fn write_some(
        &mut self,
        mut write: impl FnMut(&mut S, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Result<usize, ServeError> {
        let mut timer = IdleTimer::new(self.context.deadlines.idle);
        let sent = loop {
            let written = std::future::poll_fn(|context| self.poll_send(context, &mut write));
            match ready_within(timer.interval(), written).await {
                Ok(sent) => break sent.map_err(ServeError::of_socket)?,
                Err(waited) => self.check_idle(&mut timer, waited)?,
            }
        };
        self.written += sent as u64;
        self.context.counts.add_sent(sent as u64);
        Ok(sent)
    }

    /// Fails if the client acknowledged no byte for the idle timeout, `waited` included.
    fn check_idle(&self, timer: &mut IdleTimer, waited: Duration) -> Result<(), ServeError> {
        let unacknowledged = self.stream.unacknowledged().map_err(ServeError::of_socket)?;
        if timer.is_expired_after(waited, unacknowledged) { Err(ServeError::Idle) } else { Ok(()) }
    }

    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        write: &mut impl FnMut(&mut S, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match write(&mut self.stream, context) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
            Poll::Ready(result) => return Poll::Ready(result),
            Poll::Pending => {}
        }
        while self.is_draining_input() && !self.input_wanted {
            match self.poll_discard(context) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => break,
            }
        }
        Poll::Pending
    }

    /// Whether input is still read, until its end or [`MAX_DISCARDED`].
    pub(super) fn is_draining_input(&self) -> bool {
        !self.input_ended && self.discarded < MAX_DISCARDED
    }

    pub(super) fn poll_discard(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut buffer = [MaybeUninit::uninit(); DISCARD_BUFFER];
        let mut buffer = ReadBuf::uninit(&mut buffer);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
        let read = buffer.filled().len();
        self.note_discarded(read);
        Poll::Ready(Ok(()))
    }

    /// Accounts for a read of discarded input; 0 is its end.
    pub(super) fn note_discarded(&mut self, read: usize) {
        self.discarded += read as u64;
        self.input_ended |= read == 0;
    }
}
