//! One connection: every byte owed is delivered, or the connection is reset.
//!
//! A service writes with [`Connection::send`]; whoever runs it ends with [`Connection::finish`].
//! A connection that is dropped without having been finished, whatever the reason (a deadline, a
//! panic, the end of the process), is reset, so that a client never takes a part for the whole.
//! Every connection leaves one line in the log when it is dropped, unless its client took nothing:
//! those are summed up.
//!
//! What services say, and who may connect, is not decided here.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::task::coop::unconstrained;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::net::idle_timer::{IdleTimer, ready_within, timeout_while_running};
use crate::net::memfd::MemoryFile;
use crate::telemetry::counters::{Counts, Ending, Label, Refusal};
pub use crate::telemetry::peer::Peer;

/// How much of what a client sends is read and dropped; beyond it the client waits.
const MAX_DISCARDED: u64 = 16 << 20;

/// How much is read and dropped at one time; it lives on the stack of a poll, so that a waiting
/// connection holds no buffer.
const DISCARD_BUFFER: usize = 16 << 10;

/// How much is sent at one time, so that large documents do not keep the time waiting.
const MAX_SENT: usize = 256 << 10;

/// How much is received at one time, as requests are short.
const RECEIVE_BUFFER: usize = 512;

/// How long a client that has everything may stay silent without closing its side. Closing ours
/// earlier could turn something that it still sends into a reset, and cost it what it has not read.
const LINGER_SILENCE: Duration = Duration::from_secs(5);

/// How long a client that has everything may go on sending.
const LINGER_TOTAL: Duration = Duration::from_secs(30);

/// How long a balancer may take for the header that says who the client is: it sends that at once.
const HEADER_TIME: Duration = Duration::from_secs(5);

/// The same when the daemon is to stop.
const HEADER_TIME_AT_STOP: Duration = Duration::from_secs(1);

/// A kernel acknowledges this much before its program has read anything (`tcp_rmem`). If a reply
/// that is no longer is followed by a reset at once, it was not read: a program that has read
/// everything ends with a FIN.
const PROBE_BYTES: u64 = 64 << 10;

/// The longest connection of a health check or a port scan that does not read; from then on, a reset
/// is worth a line.
const PROBE_TIME: Duration = Duration::from_millis(100);

/// The shortest and the longest wait between two looks at what the client has acknowledged.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// What comes after the bytes that are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoreToCome {
    /// Perhaps nothing for a long time: they are to leave now.
    Unknown,
    /// More, or the end, at once: what does not fill a packet can leave with that.
    AtOnce,
}

/// What was heard of a client that has been answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// Nothing yet.
    Nothing,
    /// It has ended its side, and there is no fault.
    End,
    /// It has sent something, or there is a fault, or nobody knows: it takes a read to see.
    Something,
}

/// A stream socket, or what stands for one in a test, of which the close is a reset until it is
/// told otherwise.
pub trait Stream: AsyncRead + Unpin + Send {
    /// Writes some of `bytes`, of which more [`MoreToCome`] tells.
    fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        next: MoreToCome,
    ) -> Poll<io::Result<usize>>;

    /// Writes some of a file in memory, at most `length` bytes from `offset` on.
    fn poll_write_file(
        &mut self,
        context: &mut Context<'_>,
        file: &MemoryFile,
        offset: u64,
        length: usize,
    ) -> Poll<io::Result<usize>>;

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// If the client has gone.
    fn half_close(&mut self) -> io::Result<()>;

    /// How many bytes written the peer has not acknowledged.
    ///
    /// # Errors
    /// If the peer has gone without them. It is said once.
    fn unacknowledged(&self) -> io::Result<u64>;

    /// Reads what is there, if anything is, and drops it, without waiting; 0 is the end.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if nothing is there, or what a read says.
    fn try_discard(&mut self) -> io::Result<usize>;

    /// Makes the coming close a clean end instead of a reset. `both_ended` says that the client has
    /// ended its side too, and has acknowledged the end of ours.
    ///
    /// # Errors
    /// None is expected of an open socket.
    fn close_cleanly(&self, both_ended: bool) -> io::Result<()>;
}

/// Why a connection could not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The client, or the way to it, ended the connection.
    #[error("the client ended the connection")]
    Client(#[source] io::Error),
    /// The client acknowledged no byte for the idle time-out.
    #[error("the client took nothing for too long")]
    Idle,
    /// The service, or this machine, could not go on.
    #[error("the service could not go on")]
    Service(#[source] io::Error),
}

impl ServeError {
    /// Tells the client's errors from this machine's.
    fn of_socket(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe
            | ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NotConnected
            | ErrorKind::TimedOut => Self::Client(error),
            _ => Self::Service(error),
        }
    }
}

/// How a connection ended, as the log says it.
#[derive(Debug)]
enum Outcome {
    Complete,
    ServeError(ServeError),
    MaxDuration,
    Shutdown,
    Refused,
}

impl Outcome {
    /// What is logged and counted; nothing of who never was served.
    fn ending(&self) -> Option<Ending> {
        Some(match self {
            Outcome::Complete => Ending::Complete,
            Outcome::ServeError(ServeError::Client(_)) => Ending::Reset,
            Outcome::ServeError(ServeError::Idle) => Ending::IdleTimeout,
            Outcome::ServeError(ServeError::Service(_)) => Ending::Failed,
            Outcome::MaxDuration => Ending::MaxDuration,
            Outcome::Shutdown => Ending::Shutdown,
            Outcome::Refused => return None,
        })
    }
}

/// The deadlines of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// The longest time in which the client may acknowledge no byte. Pauses of this process do not
    /// count.
    pub idle: Duration,
    /// The longest time for the whole connection, pauses included.
    pub total: Duration,
}

/// What a connection heeds of the end of its service, or of the daemon.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Nothing new is begun, and nobody who has everything is waited for.
    pub drain: CancellationToken,
    /// What is still open is reset.
    pub abort: CancellationToken,
}

impl Shutdown {
    /// A part that ends with the whole, or before it.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { drain: self.drain.child_token(), abort: self.abort.child_token() }
    }
}

/// What the connections of one service have in common.
#[derive(Debug, Clone)]
pub struct ConnectionContext {
    /// The service's name in the log.
    pub service: Arc<str>,
    /// How long they may last.
    pub deadlines: Deadlines,
    /// What ends them early.
    pub shutdown: Shutdown,
    /// Where they are counted.
    pub counts: Arc<Counts>,
    /// Their lines would bury the others': monitoring comes again and again.
    pub log_at_debug: bool,
}

/// A connection that a service answers on.
#[derive(Debug)]
pub struct Connection<S: Stream> {
    stream: S,
    peer: Peer,
    context: Arc<ConnectionContext>,
    started: Instant,
    written: u64,
    discarded: u64,
    /// What the client sends is for the service; else it is read and dropped.
    input_wanted: bool,
    /// The client has ended its side.
    input_ended: bool,
    /// Everything has been sent, and the client was told that nothing more comes.
    half_closed: bool,
    /// Everything was delivered: the close is a clean one.
    finished: bool,
    outcome: Option<Outcome>,
}

impl<S: Stream> Connection<S> {
    /// Takes over a stream that was just accepted.
    pub fn new(stream: S, peer: Peer, context: Arc<ConnectionContext>) -> Self {
        context.counts.begin();
        Self {
            stream,
            peer,
            context,
            started: Instant::now(),
            written: 0,
            discarded: 0,
            input_wanted: false,
            input_ended: false,
            half_closed: false,
            finished: false,
            outcome: None,
        }
    }

    /// Lets `answer` talk to the client, within the deadlines, and says that nothing more comes.
    /// Then it remains to see that everything arrives: by [`Connection::is_over`] now and then, or
    /// by [`Connection::finish`]. Nothing remains if it failed.
    pub async fn answer<F>(mut self, answer: F) -> Option<Self>
    where
        F: AsyncFnOnce(&mut Self) -> Result<(), ServeError>,
    {
        let answered = async |connection: &mut Self| {
            answer(connection).await?;
            connection.stream.half_close().map_err(ServeError::of_socket)?;
            connection.half_closed = true;
            Ok(())
        };
        self.within_deadlines(answered).await;
        self.outcome.is_none().then_some(self)
    }

    /// Lets `read_proxy_header` find out from the stream who the client is, within the deadlines, if it is
    /// not who has connected. Nothing remains, and it is a refusal, if that is not told.
    pub async fn read_proxy_header<F>(mut self, read_proxy_header: F) -> Option<Self>
    where
        F: AsyncFnOnce(&mut S) -> io::Result<Option<SocketAddr>>,
    {
        let time = HEADER_TIME.min(self.context.deadlines.idle);
        let drain = self.context.shutdown.drain.clone();
        let introduced = async |connection: &mut Self| {
            let introducing =
                timeout_while_running(time, read_proxy_header(&mut connection.stream));
            let at_stop = async {
                drain.cancelled().await;
                tokio::time::sleep(HEADER_TIME_AT_STOP).await;
            };
            let client = tokio::select! {
                biased;
                client = introducing => client.ok_or(ServeError::Idle)?,
                () = at_stop => return Err(ServeError::Idle),
            };
            if let Some(client) = client.map_err(ServeError::of_socket)? {
                connection.peer = Peer::Internet(client);
            }
            Ok(())
        };
        self.within_deadlines(introduced).await;
        match self.outcome {
            None => return Some(self),
            // It is this daemon that ends it.
            Some(Outcome::Shutdown) => {}
            Some(_) => self.refuse(Refusal::ProxyProtocol),
        }
        None
    }

    /// Waits for what the service has to read before it can go on, but no longer than a client may
    /// take nothing: a file system that hangs keeps nobody's place.
    ///
    /// # Errors
    /// If it takes so long.
    pub async fn wait_for<T>(&self, reading: impl Future<Output = T>) -> Result<T, ServeError> {
        timeout_while_running(self.context.deadlines.idle, reading).await.ok_or_else(|| {
            ServeError::Service(io::Error::other("the file system does not answer (idle-timeout)"))
        })
    }

    /// Resets it as one that never was served, for this reason.
    pub fn refuse(mut self, reason: Refusal) {
        self.context.counts.refusals.add(reason);
        self.outcome = Some(Outcome::Refused);
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Waits until the client has everything, within the deadlines.
    pub async fn finish(mut self) {
        self.within_deadlines(Self::deliver).await;
    }

    /// Does a part of what there is to do. If it fails, or a deadline is over, that is the outcome.
    async fn within_deadlines<F>(&mut self, act: F)
    where
        F: AsyncFnOnce(&mut Self) -> Result<(), ServeError>,
    {
        let deadline = self.started + self.context.deadlines.total;
        let abort = self.context.shutdown.abort.clone();
        let outcome = tokio::select! {
            // In this order, nothing is spent on timers for a connection that never waits.
            biased;
            ended = act(self) => match ended {
                Ok(()) => return,
                Err(broken) => Outcome::ServeError(broken),
            },
            // Whatever of its turn the client has used up.
            () = unconstrained(tokio::time::sleep_until(deadline)) => Outcome::MaxDuration,
            () = unconstrained(abort.cancelled()) => Outcome::Shutdown,
        };
        self.end(outcome);
    }

    fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(match outcome {
            // Who has everything is not punished for staying.
            Outcome::MaxDuration | Outcome::Shutdown
                if matches!(self.close_if_delivered(), Ok(true)) =>
            {
                Outcome::Complete
            }
            other => other,
        });
    }

    /// The stream itself.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Looks, without waiting, whether the client has everything and has closed its side, or the
    /// connection has failed. Then there is nothing more to be done.
    pub fn is_over(&mut self, heard: PeerState) -> bool {
        let read = match heard {
            PeerState::Nothing => Ok(()),
            PeerState::End => {
                self.input_ended = true;
                Ok(())
            }
            PeerState::Something => self.discard_a_little(),
        };
        let over = self.input_ended || self.context.shutdown.drain.is_cancelled();
        match read.and_then(|()| if over { self.close_if_delivered() } else { Ok(false) }) {
            Err(broken) => self.end(Outcome::ServeError(broken)),
            Ok(true) => self.end(Outcome::Complete),
            Ok(false) if self.context.shutdown.abort.is_cancelled() => self.end(Outcome::Shutdown),
            Ok(false) => {}
        }
        self.outcome.is_some()
    }

    /// Makes the close a clean one if everything was delivered.
    fn close_if_delivered(&mut self) -> Result<bool, ServeError> {
        if self.half_closed && self.stream.unacknowledged().map_err(ServeError::of_socket)? == 0 {
            self.close_cleanly()?;
        }
        Ok(self.finished)
    }

    /// Makes the coming close a clean end: everything was delivered.
    fn close_cleanly(&mut self) -> Result<(), ServeError> {
        self.stream.close_cleanly(self.input_ended).map_err(ServeError::Service)?;
        self.finished = true;
        Ok(())
    }

    /// Appends something that the client sent to `input`; 0 is the end of its side. From then on,
    /// what it sends is left for the next call, and it has to read what it is sent meanwhile.
    /// When the daemon is to stop, nothing more is received, as at the end.
    ///
    /// # Errors
    /// If the client has gone, or neither sends nor acknowledges a byte for the idle time-out.
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

    /// Whether the client has ended its side.
    pub fn input_ended(&self) -> bool {
        self.input_ended
    }

    /// Sends all of `bytes`. What the client sends meanwhile is read and dropped (unless the
    /// service asks for it), so that a client that sends before it reads does not wait for us while
    /// we wait for it.
    ///
    /// # Errors
    /// If the client has gone, or acknowledges no byte for the idle time-out.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), ServeError> {
        self.send_before(MoreToCome::Unknown, bytes).await
    }

    /// The same for bytes that more follow at once, or the end: the reply and its end are then one
    /// packet, if they fit.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub async fn send_part(&mut self, bytes: &[u8]) -> Result<(), ServeError> {
        self.send_before(MoreToCome::AtOnce, bytes).await
    }

    async fn send_before(&mut self, next: MoreToCome, mut bytes: &[u8]) -> Result<(), ServeError> {
        while !bytes.is_empty() {
            let now = bytes.get(..MAX_SENT).unwrap_or(bytes);
            let next = if now.len() < bytes.len() { MoreToCome::AtOnce } else { next };
            let sent = self.step(|stream, context| stream.poll_write(context, now, next)).await?;
            bytes = bytes.get(sent..).unwrap_or_default();
            if !bytes.is_empty() {
                // Others' turn: a kernel takes a whole document at once, which takes its time.
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Sends a file in memory as [`Connection::send`] does, without copying it.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub async fn send_file(&mut self, file: &MemoryFile) -> Result<(), ServeError> {
        let length = file.len();
        let mut offset = 0;
        while offset < length {
            let left = usize::try_from(length - offset).unwrap_or(MAX_SENT).min(MAX_SENT);
            let write = |stream: &mut S, context: &mut Context<'_>| {
                stream.poll_write_file(context, file, offset, left)
            };
            offset += self.step(write).await? as u64;
            if offset < length {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Waits until something is sent; returns how many bytes, at least one.
    async fn step(
        &mut self,
        mut write: impl FnMut(&mut S, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Result<usize, ServeError> {
        let mut timer = IdleTimer::new(self.context.deadlines.idle);
        let sent = loop {
            let step = std::future::poll_fn(|context| self.poll_send(context, &mut write));
            match ready_within(timer.interval(), step).await {
                Ok(sent) => break sent.map_err(ServeError::of_socket)?,
                Err(waited) => self.check_idle(&mut timer, waited)?,
            }
        };
        self.written += sent as u64;
        self.context.counts.add_sent(sent as u64);
        Ok(sent)
    }

    /// Checks after a wait of `waited` whether the client still acknowledges bytes.
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
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Poll::Ready(result) => return Poll::Ready(result),
            Poll::Pending => {}
        }
        while self.listens() && !self.input_wanted {
            match self.poll_discard(context) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => break,
            }
        }
        Poll::Pending
    }

    /// Whether what the client sends is still read: beyond the bound it waits, in its own memory.
    fn listens(&self) -> bool {
        !self.input_ended && self.discarded < MAX_DISCARDED
    }

    /// Reads something and drops it.
    fn poll_discard(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut buffer = [MaybeUninit::uninit(); DISCARD_BUFFER];
        let mut buffer = ReadBuf::uninit(&mut buffer);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
        let read = buffer.filled().len();
        self.note_discarded(read);
        Poll::Ready(Ok(()))
    }

    /// So much was read and dropped; 0 is the end of the client's side.
    fn note_discarded(&mut self, read: usize) {
        self.discarded += read as u64;
        self.input_ended |= read == 0;
    }

    /// Reads and drops until `time` is over or the input ends. Returns whether the client sent
    /// something, and how much of `time` counts against it.
    async fn discard_for(&mut self, time: Duration) -> Result<(bool, Duration), ServeError> {
        let before = self.discarded;
        let discard = async {
            if !self.listens() {
                return std::future::pending().await;
            }
            while self.listens() {
                std::future::poll_fn(|context| self.poll_discard(context)).await?;
            }
            Ok(())
        };
        let waited = match ready_within(time, discard).await {
            Ok(discarded) => discarded.map(|()| Duration::ZERO).map_err(ServeError::of_socket)?,
            Err(waited) => waited,
        };
        Ok((self.discarded > before, waited))
    }

    /// Reads and drops some of what is there, without waiting: whoever sends much is not worth a
    /// look's time.
    fn discard_a_little(&mut self) -> Result<(), ServeError> {
        // A last word, and the end.
        for _ in 0..2 {
            if !self.listens() {
                break;
            }
            match self.stream.try_discard() {
                Ok(read) => self.note_discarded(read),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(ServeError::of_socket(error)),
            }
        }
        Ok(())
    }

    /// Waits until the client, which was told that nothing more comes, has everything.
    ///
    /// Closing at once could lose the end: a kernel that holds input which nobody read answers the
    /// close with a reset and throws the send queue away. So the client's input is read and
    /// dropped, within bounds, until it closes its side and the send queue is empty.
    async fn deliver(&mut self) -> Result<(), ServeError> {
        let idle = self.context.deadlines.idle;
        let mut timer = IdleTimer::new(idle);
        let longest_pause = timer.interval().clamp(LOOK_AGAIN.0, LOOK_AGAIN.1);
        let (mut lingered, mut silent) = (Duration::ZERO, Duration::ZERO);
        let mut pause = if self.listens() { LOOK_AGAIN.0 } else { Duration::ZERO };
        loop {
            let (heard, waited) = self.discard_for(pause).await?;
            lingered += waited;
            silent = if heard { Duration::ZERO } else { silent + waited };
            pause = (pause * 2).clamp(LOOK_AGAIN.0, longest_pause);

            let unacknowledged = self.stream.unacknowledged().map_err(ServeError::of_socket)?;
            if unacknowledged == 0 {
                let waited_enough = !self.listens()
                    || silent >= LINGER_SILENCE.min(idle)
                    || lingered >= LINGER_TOTAL
                    || self.context.shutdown.drain.is_cancelled();
                if waited_enough {
                    self.close_cleanly()?;
                    self.end(Outcome::Complete);
                    return Ok(());
                }
            } else if timer.is_expired_after(waited, unacknowledged) {
                return Err(ServeError::Idle);
            }
        }
    }
}

impl<S: Stream> Connection<S> {
    /// Whether the connection ended before the client took anything, as health checks and port
    /// scans do. `bytes` were acknowledged; [`PROBE_BYTES`] says why that alone does not tell.
    fn is_unserved(&self, ending: Ending, bytes: u64) -> bool {
        let only_buffered = ending == Ending::Reset
            && self.half_closed
            && bytes == self.written
            && bytes <= PROBE_BYTES
            && self.started.elapsed() <= PROBE_TIME;
        !matches!(ending, Ending::Failed | Ending::Panic) && (bytes == 0 || only_buffered)
    }
}

impl<S: Stream> Drop for Connection<S> {
    fn drop(&mut self) {
        let mut bytes = self.written;
        if !self.finished {
            bytes = bytes.saturating_sub(self.stream.unacknowledged().unwrap_or(0));
        }
        let duration = self.started.elapsed();
        let ending = match &self.outcome {
            Some(outcome) => outcome.ending(),
            None if std::thread::panicking() => Some(Ending::Panic),
            None => Some(Ending::Shutdown),
        };
        let Some(ending) = ending else { return self.context.counts.take_back() };
        self.context.counts.end(ending, duration);

        let duration = duration.as_secs_f64();
        let (service, peer, outcome) = (&*self.context.service, self.peer, ending.name());
        if let Some(Outcome::ServeError(ServeError::Service(cause))) = &self.outcome {
            let message = format_args!("{service}: {peer} {outcome}: {cause}");
            tracing::warn!(service, %peer, bytes, duration, outcome, %cause, "{message}");
            return;
        }
        // The message alone is what `journalctl` shows.
        let message = format_args!("{service}: {peer} {outcome}");
        let unserved = self.is_unserved(ending, bytes);
        if unserved && !self.context.log_at_debug {
            self.context.counts.add_unserved(ending, self.peer);
        }
        if unserved || self.context.log_at_debug {
            tracing::debug!(service, %peer, bytes, duration, outcome, "{message}");
        } else {
            tracing::info!(service, %peer, bytes, duration, outcome, "{message}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use tokio::io::{AsyncWrite, AsyncWriteExt, DuplexStream};

    /// A stream with a tiny buffer, which finds what a big one hides.
    struct Memory {
        stream: DuplexStream,
        unacknowledged: Arc<AtomicU64>,
        reset: Arc<AtomicBool>,
    }

    impl Stream for Memory {
        fn poll_write(
            &mut self,
            context: &mut Context<'_>,
            bytes: &[u8],
            _: MoreToCome,
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.stream).poll_write(context, bytes)
        }

        fn poll_write_file(
            &mut self,
            context: &mut Context<'_>,
            file: &MemoryFile,
            offset: u64,
            length: usize,
        ) -> Poll<io::Result<usize>> {
            let mut bytes = vec![0; length];
            let read = rustix::io::pread(file, &mut bytes, offset)?;
            Pin::new(&mut self.stream).poll_write(context, &bytes[..read])
        }

        fn half_close(&mut self) -> io::Result<()> {
            let mut context = Context::from_waker(std::task::Waker::noop());
            match Pin::new(&mut self.stream).poll_shutdown(&mut context) {
                Poll::Ready(result) => result,
                Poll::Pending => Err(ErrorKind::WouldBlock.into()),
            }
        }

        fn unacknowledged(&self) -> io::Result<u64> {
            Ok(self.unacknowledged.load(Ordering::Relaxed))
        }

        fn try_discard(&mut self) -> io::Result<usize> {
            let mut buffer = [0; 16];
            let mut buffer = ReadBuf::new(&mut buffer);
            let mut context = Context::from_waker(std::task::Waker::noop());
            match Pin::new(&mut self.stream).poll_read(&mut context, &mut buffer) {
                Poll::Ready(result) => result.map(|()| buffer.filled().len()),
                Poll::Pending => Err(ErrorKind::WouldBlock.into()),
            }
        }

        fn close_cleanly(&self, _: bool) -> io::Result<()> {
            self.reset.store(false, Ordering::Relaxed);
            Ok(())
        }
    }

    impl AsyncRead for Memory {
        fn poll_read(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_read(context, buffer)
        }
    }

    struct Tried {
        client: DuplexStream,
        connection: Connection<Memory>,
        unacknowledged: Arc<AtomicU64>,
        reset: Arc<AtomicBool>,
        shutdown: Shutdown,
    }

    fn connected(idle: u64, total: u64) -> Tried {
        let (client, stream) = tokio::io::duplex(8);
        let reset = Arc::new(AtomicBool::new(true));
        let unacknowledged = Arc::<AtomicU64>::default();
        let shutdown = Shutdown::default();
        let deadlines =
            Deadlines { idle: Duration::from_secs(idle), total: Duration::from_secs(total) };
        let memory = Memory {
            stream,
            unacknowledged: Arc::clone(&unacknowledged),
            reset: Arc::clone(&reset),
        };
        let peer = Peer::Unix(None);
        let context = ConnectionContext {
            service: "test.one".into(),
            deadlines,
            shutdown: shutdown.clone(),
            counts: Arc::default(),
            log_at_debug: false,
        };
        let connection = Connection::new(memory, peer, Arc::new(context));
        Tried { client, connection, unacknowledged, reset, shutdown }
    }

    async fn run(
        connection: Connection<Memory>,
        answer: impl AsyncFnOnce(&mut Connection<Memory>) -> Result<(), ServeError>,
    ) {
        if let Some(connection) = connection.answer(answer).await {
            connection.finish().await;
        }
    }

    const DOCUMENT: &[u8] = &[b'd'; 1000];

    async fn push(connection: &mut Connection<Memory>) -> Result<(), ServeError> {
        connection.send(DOCUMENT).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_before_it_reads_gets_everything() {
        let Tried { mut client, connection, reset, .. } = connected(30, 3600);
        let serving = tokio::spawn(run(connection, push));
        client.write_all(&[b'x'; 5000]).await.unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        drop(client);
        serving.await.unwrap();
        assert_eq!(received, DOCUMENT);
        assert!(!reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_in_memory_arrives_whole() {
        let Tried { mut client, connection, reset, .. } = connected(30, 3600);
        let content: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let file = MemoryFile::make(|file| file.write_all(&content)).unwrap();
        let serving = tokio::spawn(run(connection, async move |connection: &mut Connection<_>| {
            connection.send_file(&file).await
        }));
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        drop(client);
        serving.await.unwrap();
        assert!(received == content);
        assert!(!reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn resets_clients_that_acknowledge_nothing_for_the_idle_time_out() {
        let Tried { client, connection, reset, .. } = connected(30, 3600);
        let start = Instant::now();
        run(connection, push).await;
        // Within the time-out and one check.
        assert!((30..=38).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        assert!(reset.load(Ordering::Relaxed));
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn serves_clients_that_acknowledge_bytes_while_nothing_can_be_written() {
        let Tried { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
        unacknowledged.store(100, Ordering::Relaxed);
        let serving = tokio::spawn(run(connection, push));
        for left in (0..10).rev() {
            tokio::time::sleep(Duration::from_secs(25)).await;
            assert!(!serving.is_finished());
            unacknowledged.store(left, Ordering::Relaxed);
        }
        client.read_to_end(&mut Vec::new()).await.unwrap();
        serving.await.unwrap();
        assert!(!reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn bounds_clients_that_acknowledge_bytes_by_the_total_time() {
        let Tried { client, connection, unacknowledged, reset, .. } = connected(30, 100);
        let start = Instant::now();
        let serving = tokio::spawn(run(connection, push));
        while !serving.is_finished() {
            tokio::time::sleep(Duration::from_secs(5)).await;
            unacknowledged.fetch_add(1, Ordering::Relaxed);
        }
        assert!((100..=105).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        assert!(reset.load(Ordering::Relaxed));
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_hold_a_pause_of_the_process_against_clients() {
        for half_closed in [false, true] {
            let Tried { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
            unacknowledged.store(100, Ordering::Relaxed);
            let serving = tokio::spawn(run(connection, push));
            let mut received = vec![0; if half_closed { DOCUMENT.len() } else { 1 }];
            client.read_exact(&mut received).await.unwrap();
            tokio::time::sleep(Duration::from_secs(10)).await;
            tokio::time::advance(Duration::from_secs(1000)).await;
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert!(!serving.is_finished());
            unacknowledged.store(0, Ordering::Relaxed);
            client.read_to_end(&mut received).await.unwrap();
            drop(client);
            serving.await.unwrap();
            assert_eq!(received.len(), DOCUMENT.len());
            assert!(!reset.load(Ordering::Relaxed));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_requests_while_earlier_replies_are_acknowledged() {
        let Tried { client, connection, unacknowledged, .. } = connected(30, 3600);
        let converse = async |connection: &mut Connection<Memory>| {
            connection.receive(&mut BytesMut::new()).await.map(drop)
        };
        let serving = tokio::spawn(run(connection, converse));
        for left in [300, 200, 100] {
            tokio::time::sleep(Duration::from_secs(25)).await;
            assert!(!serving.is_finished());
            unacknowledged.store(left, Ordering::Relaxed);
        }
        let start = Instant::now();
        serving.await.unwrap();
        assert!((30..=38).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_a_little_now_and_then_is_reset_after_the_total_time() {
        let Tried { mut client, connection, reset, .. } = connected(30, 100);
        let start = Instant::now();
        let serving = tokio::spawn(run(connection, push));
        let mut byte = [0];
        while client.read(&mut byte).await.unwrap() == 1 {
            tokio::time::sleep(Duration::from_secs(20)).await;
        }
        serving.await.unwrap();
        // The rest of the tiny buffer is still there to be read; the server left at 100.
        assert!(start.elapsed().as_secs() >= 100);
        assert!(reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_has_everything_and_stays_silent_is_let_go_cleanly() {
        let Tried { mut client, connection, reset, .. } = connected(30, 3600);
        let serving = tokio::spawn(run(connection, push));
        let start = Instant::now();
        client.read_to_end(&mut Vec::new()).await.unwrap();
        serving.await.unwrap();
        assert!(start.elapsed() >= LINGER_SILENCE && start.elapsed() < LINGER_SILENCE * 2);
        assert!(!reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_stops_sending_is_let_go_within_the_bounds() {
        let Tried { client, connection, reset, .. } = connected(30, 3600);
        let serving = tokio::spawn(run(connection, push));
        let (mut reader, mut writer) = tokio::io::split(client);
        let sending = tokio::spawn(async move {
            while writer.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let start = Instant::now();
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        serving.await.unwrap();
        assert_eq!(received, DOCUMENT);
        assert!(start.elapsed() >= LINGER_TOTAL && start.elapsed() < LINGER_TOTAL * 2);
        assert!(!reset.load(Ordering::Relaxed));
        sending.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_acknowledged_is_waited_for_also_when_the_client_has_closed_its_side() {
        let Tried { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
        unacknowledged.store(100, Ordering::Relaxed);
        let serving = tokio::spawn(run(connection, push));
        client.read_to_end(&mut Vec::new()).await.unwrap();
        client.shutdown().await.unwrap();
        let start = Instant::now();
        // Some progress every 20 seconds keeps it alive beyond the idle time-out.
        for left in [60, 20, 0] {
            tokio::time::sleep(Duration::from_secs(20)).await;
            assert!(!serving.is_finished());
            unacknowledged.store(left, Ordering::Relaxed);
        }
        serving.await.unwrap();
        assert!(start.elapsed().as_secs() >= 60);
        assert!(!reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_never_acknowledged_ends_in_a_reset_after_the_idle_time_out() {
        let Tried { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
        unacknowledged.store(100, Ordering::Relaxed);
        let serving = tokio::spawn(run(connection, push));
        client.read_to_end(&mut Vec::new()).await.unwrap();
        let start = Instant::now();
        serving.await.unwrap();
        assert!((29..=33).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        assert!(reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn the_total_time_does_not_reset_who_has_everything() {
        let Tried { mut client, connection, reset, .. } = connected(30, 2);
        let serving = tokio::spawn(run(connection, push));
        client.read_to_end(&mut Vec::new()).await.unwrap();
        serving.await.unwrap();
        assert!(!reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_a_conversation_that_waits_for_requests() {
        let Tried { client, connection, shutdown, reset, .. } = connected(30, 3600);
        let converse = async |connection: &mut Connection<Memory>| {
            while connection.receive(&mut BytesMut::new()).await? > 0 {}
            Ok(())
        };
        let serving = tokio::spawn(run(connection, converse));
        shutdown.drain.cancel();
        let start = Instant::now();
        serving.await.unwrap();
        assert!(start.elapsed() <= LOOK_AGAIN.1);
        assert!(!reset.load(Ordering::Relaxed));
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_nobody_who_has_everything() {
        let Tried { mut client, connection, shutdown, reset, .. } = connected(30, 3600);
        let serving = tokio::spawn(run(connection, push));
        client.read_to_end(&mut Vec::new()).await.unwrap();
        shutdown.drain.cancel();
        let start = Instant::now();
        serving.await.unwrap();
        assert!(start.elapsed() <= LOOK_AGAIN.1);
        assert!(!reset.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn an_abort_resets_what_is_under_way() {
        let Tried { client, connection, shutdown, reset, .. } = connected(30, 3600);
        let serving = tokio::spawn(run(connection, push));
        shutdown.abort.cancel();
        serving.await.unwrap();
        assert!(reset.load(Ordering::Relaxed));
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_resets_its_own_connection() {
        let Tried { client, connection, reset, .. } = connected(30, 3600);
        let serving = tokio::spawn(run(connection, async |_: &mut Connection<Memory>| panic!("x")));
        assert!(serving.await.unwrap_err().is_panic());
        assert!(reset.load(Ordering::Relaxed));
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_cannot_finish_ends_in_a_reset() {
        let Tried { client, connection, reset, .. } = connected(30, 3600);
        let failing = async |connection: &mut Connection<Memory>| {
            connection.send(b"{").await?;
            Err(ServeError::Service(io::Error::other("the file shrank")))
        };
        run(connection, failing).await;
        assert!(reset.load(Ordering::Relaxed));
        drop(client);
    }
}
