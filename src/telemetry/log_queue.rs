//! The queue between the callers of log macros and the thread that writes, which the reader of
//! standard error or the journal can block.
//!
//! `tracing-appender` is not used: if the queue is full when the process ends, its guard reports
//! that on standard output, which may be full, too.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait to be written; more are lost, because logging must not delay the services.
const MAX_WAITING_LINES: usize = 10_000;

/// Time for the lines that wait when the queue is closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between two attempts to close a full queue.
const CLOSE_INTERVAL: Duration = Duration::from_millis(5);

enum Message {
    Line(Vec<u8>),
    /// Write and flush everything before, then answer.
    Close(SyncSender<()>),
}

/// The receiving end and its thread. Dropped, it waits a bounded time until the lines are written.
pub(crate) struct Queue {
    sender: Sender,
}

/// Adds lines to a queue without waiting.
#[derive(Clone)]
pub(crate) struct Sender {
    messages: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl Queue {
    /// Starts a thread that writes each line to `target` and flushes it when no line waits.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn start(target: impl Write + Send + 'static) -> io::Result<Self> {
        let (messages, waiting) = sync_channel(MAX_WAITING_LINES);
        let lost = Arc::new(AtomicU64::new(0));
        let sender = Sender { messages, lost: Arc::clone(&lost) };
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&waiting, target, &lost))?;
        Ok(Self { sender })
    }

    /// Returns the handle that adds lines to the queue.
    pub(crate) fn sender(&self) -> &Sender {
        &self.sender
    }

    /// Returns the number of lines that found no room or could not be written.
    pub(crate) fn lost(&self) -> u64 {
        self.sender.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let start = Instant::now();
        let (done, closed) = sync_channel(1);
        let mut close = Message::Close(done);
        while let Err(TrySendError::Full(message)) = self.sender.messages.try_send(close) {
            if start.elapsed() >= CLOSE_TIMEOUT {
                return;
            }
            close = message;
            thread::sleep(CLOSE_INTERVAL);
        }
        // If it fails, the reader is gone or too slow, and the lines are lost.
        let _ = closed.recv_timeout(CLOSE_TIMEOUT.saturating_sub(start.elapsed()));
    }
}

fn write_lines(messages: &Receiver<Message>, mut target: impl Write, lost: &AtomicU64) {
    while let Ok(first) = messages.recv() {
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Line(line) => {
                    if target.write_all(&line).is_err() {
                        lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Message::Close(done) => {
                    let _ = target.flush();
                    let _ = done.send(());
                }
            }
            next = messages.try_recv().ok();
        }
        // Bytes that a failed flush leaves in the buffer are written with the next line.
        let _ = target.flush();
    }
}

impl Write for Sender {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.messages.try_send(Message::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Sender {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::PipeWriter;

    fn full_pipe() -> (io::PipeReader, PipeWriter) {
        let (reader, mut writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        while writer.write(&[b'x'; 4096]).is_ok() {}
        while writer.write(b"x").is_ok() {}
        rustix::io::ioctl_fionbio(&writer, false).unwrap();
        (reader, writer)
    }

    #[test]
    fn dropping_a_full_queue_does_not_wait_for_the_reader() {
        let (_reader, writer) = full_pipe();
        let queue = Queue::start(writer).unwrap();
        let mut sender = queue.sender().clone();
        for _ in 0..MAX_WAITING_LINES + 10 {
            sender.write_all(b"line\n").unwrap();
        }
        assert!(queue.lost() > 0);
        // Returns although the reader takes nothing.
        drop(queue);
    }

    #[test]
    fn dropping_the_queue_writes_waiting_lines() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = Queue::start(io::BufWriter::new(writer)).unwrap();
        let mut sender = queue.sender().clone();
        for _ in 0..100 {
            sender.write_all(b"line\n").unwrap();
        }
        drop(queue);
        let mut written = [0; 500];
        io::Read::read_exact(&mut reader, &mut written).unwrap();
        assert_eq!(written.to_vec(), b"line\n".repeat(100));
    }
}
