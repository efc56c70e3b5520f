//! Connections to file services: buffering, timeouts and pipelined requests.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use super::destination::NamedFile;
use super::error::Error;
use super::{FetchObserver, FetchOptions, PORT};
use crate::document::{ReadError, Tail};
use crate::net::idle_timer::{IdleTimer, ready_within};
use crate::sys::unacknowledged;

/// Size of the receive buffer, in bytes.
pub(super) const BUFFER: usize = 256 << 10;

/// Maximum number of pipelined requests.
const MAX_PIPELINED: usize = 16;

/// Time without data after which the observer is notified of the likely cause.
const SILENCE_NOTICE: Duration = Duration::from_secs(2);

/// Maximum time to wait for the server to close the connection after a complete document.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection to a file service, with its receive buffer.
pub(super) struct Session {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Bounds of the received bytes in `buffer` that are not consumed yet.
    start: usize,
    end: usize,
    /// Number of requests without a reply.
    requested: usize,
    limits: TimeLimits,
}

/// Time limits of a session.
#[derive(Clone, Copy)]
pub(super) struct TimeLimits {
    pub(super) deadline: Instant,
    /// Duration that `deadline` was derived from, for error messages.
    timeout: Duration,
    idle_timeout: Duration,
}

impl TimeLimits {
    /// Repeats `io` until it is ready, as long as the server sends or acknowledges bytes. `io` must
    /// be cancel-safe.
    async fn apply(
        self,
        stream: &mut TcpStream,
        mut io: impl AsyncFnMut(&mut TcpStream) -> io::Result<usize>,
    ) -> Result<usize, Error> {
        let mut timer = IdleTimer::new(self.idle_timeout);
        loop {
            let ready = timeout_at(self.deadline, ready_within(timer.interval(), io(stream))).await;
            match ready.map_err(|_| Error::TimedOut(self.timeout))? {
                Ok(done) => return done.map_err(Error::Network),
                Err(waited) => {
                    let bytes = unacknowledged(stream.as_fd()).map_err(Error::Network)?;
                    if timer.is_expired_after(waited, bytes) {
                        return Err(Error::IdleTimedOut(self.idle_timeout));
                    }
                }
            }
        }
    }
}

impl Session {
    pub(super) async fn connect(options: &FetchOptions, deadline: Instant) -> Result<Self, Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        let connecting = options.server.connect(PORT, left.min(options.idle_timeout));
        let stream = timeout_at(deadline, connecting);
        let stream = stream.await.map_err(|_| Error::TimedOut(options.timeout))??;
        Ok(Self {
            stream,
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            requested: 0,
            limits: TimeLimits {
                deadline,
                timeout: options.timeout,
                idle_timeout: options.idle_timeout,
            },
        })
    }

    pub(super) fn limits(&self) -> TimeLimits {
        self.limits
    }

    /// Returns the received bytes that are not consumed yet.
    pub(super) fn received(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    pub(super) fn consume(&mut self, length: usize) {
        self.start += length;
    }

    /// Refills the buffer, which must be consumed completely. Returns false at the end of the
    /// stream.
    pub(super) async fn receive(&mut self) -> Result<bool, Error> {
        let buffer = &mut self.buffer;
        let read = async |stream: &mut TcpStream| stream.read(buffer).await;
        let read = self.limits.apply(&mut self.stream, read).await?;
        (self.start, self.end) = (0, read);
        Ok(read > 0)
    }

    /// Receives the first bytes of a pushed document. Notifies `observer` if they are late, because
    /// a folder service sends nothing before it has received a request.
    pub(super) async fn receive_first(
        &mut self,
        server: &str,
        observer: &mut impl FetchObserver,
    ) -> Result<(), Error> {
        let mut receiving = pin!(self.receive());
        let received = if let Ok(received) = timeout(SILENCE_NOTICE, &mut receiving).await {
            received
        } else {
            observer.stalled(server, SILENCE_NOTICE);
            receiving.await
        };
        if received? { Ok(()) } else { Err(ReadError::Empty.into()) }
    }

    pub(super) async fn send(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let write = async |stream: &mut TcpStream| stream.write(bytes).await;
            let written = self.limits.apply(&mut self.stream, write).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Pipelines requests for the first files of `queue`, which saves a round trip per file.
    pub(super) async fn pipeline_requests(
        &mut self,
        queue: &VecDeque<NamedFile<'_>>,
    ) -> Result<(), Error> {
        if self.requested > MAX_PIPELINED / 2 {
            return Ok(());
        }
        let mut lines = String::new();
        for file in queue.iter().take(MAX_PIPELINED).skip(self.requested) {
            lines.push_str(file.name);
            lines.push('\n');
            self.requested += 1;
        }
        self.send(lines.as_bytes()).await
    }

    /// Records that the oldest request is done.
    pub(super) fn finish_request(&mut self) {
        self.requested = self.requested.saturating_sub(1);
    }

    /// Checks that at most a newline follows a pushed document. Waits only briefly for the end of
    /// the connection, as some servers fail to close it.
    pub(super) async fn expect_end(&mut self) -> Result<(), Error> {
        let mut tail = Tail::default();
        loop {
            tail.feed(self.received())?;
            self.consume(self.received().len());
            match timeout(CLOSE_TIMEOUT, self.receive()).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return Ok(tail.finish()?),
                // The document is complete, so a failure of the connection does no harm.
                Ok(Err(_)) | Err(_) => return Ok(()),
            }
        }
    }
}
