use std::io::ErrorKind;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};

use super::linger::{CHECK_INTERVAL, LINGER_SILENCE, LINGER_TOTAL};
use super::*;
use crate::net::memfd::MemoryFile;

/// A stream with a buffer of 8 bytes, so that every write is partial.
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

struct Fixture {
    client: DuplexStream,
    connection: Connection<Memory>,
    unacknowledged: Arc<AtomicU64>,
    reset: Arc<AtomicBool>,
    shutdown: Shutdown,
}

fn connected(idle: u64, total: u64) -> Fixture {
    let (client, stream) = tokio::io::duplex(8);
    let reset = Arc::new(AtomicBool::new(true));
    let unacknowledged = Arc::<AtomicU64>::default();
    let shutdown = Shutdown::default();
    let deadlines =
        Deadlines { idle: Duration::from_secs(idle), total: Duration::from_secs(total) };
    let memory =
        Memory { stream, unacknowledged: Arc::clone(&unacknowledged), reset: Arc::clone(&reset) };
    let peer = Peer::Unix(None);
    let context = ConnectionContext {
        service: "test.one".into(),
        deadlines,
        shutdown: shutdown.clone(),
        counts: Arc::default(),
        log_at_debug: false,
    };
    let connection = Connection::new(memory, peer, Arc::new(context));
    Fixture { client, connection, unacknowledged, reset, shutdown }
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
async fn serves_clients_that_send_before_they_read() {
    let Fixture { mut client, connection, reset, .. } = connected(30, 3600);
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
async fn sends_files_completely() {
    let Fixture { mut client, connection, reset, .. } = connected(30, 3600);
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
    let Fixture { client, connection, reset, .. } = connected(30, 3600);
    let start = Instant::now();
    run(connection, push).await;
    // Within the time-out and one check.
    assert!((30..=38).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(reset.load(Ordering::Relaxed));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn serves_clients_that_acknowledge_bytes_while_nothing_can_be_written() {
    let Fixture { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
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
    let Fixture { client, connection, unacknowledged, reset, .. } = connected(30, 100);
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
        let Fixture { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
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
    let Fixture { client, connection, unacknowledged, .. } = connected(30, 3600);
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
async fn resets_slow_readers_after_the_total_time() {
    let Fixture { mut client, connection, reset, .. } = connected(30, 100);
    let start = Instant::now();
    let serving = tokio::spawn(run(connection, push));
    let mut byte = [0];
    while client.read(&mut byte).await.unwrap() == 1 {
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    serving.await.unwrap();
    // The client still reads the rest of the buffer after the reset.
    assert!(start.elapsed().as_secs() >= 100);
    assert!(reset.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn closes_cleanly_after_the_silence_of_a_served_client() {
    let Fixture { mut client, connection, reset, .. } = connected(30, 3600);
    let serving = tokio::spawn(run(connection, push));
    let start = Instant::now();
    client.read_to_end(&mut Vec::new()).await.unwrap();
    serving.await.unwrap();
    assert!(start.elapsed() >= LINGER_SILENCE && start.elapsed() < LINGER_SILENCE * 2);
    assert!(!reset.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn bounds_the_linger_of_clients_that_keep_sending() {
    let Fixture { client, connection, reset, .. } = connected(30, 3600);
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
async fn waits_for_acknowledgements_after_the_client_closed_its_side() {
    let Fixture { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
    unacknowledged.store(100, Ordering::Relaxed);
    let serving = tokio::spawn(run(connection, push));
    client.read_to_end(&mut Vec::new()).await.unwrap();
    client.shutdown().await.unwrap();
    let start = Instant::now();
    // Progress every 20 s keeps the connection beyond the idle timeout.
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
async fn resets_after_the_idle_timeout_without_acknowledgements() {
    let Fixture { mut client, connection, unacknowledged, reset, .. } = connected(30, 3600);
    unacknowledged.store(100, Ordering::Relaxed);
    let serving = tokio::spawn(run(connection, push));
    client.read_to_end(&mut Vec::new()).await.unwrap();
    let start = Instant::now();
    serving.await.unwrap();
    assert!((29..=33).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(reset.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn completes_served_clients_at_the_total_time() {
    let Fixture { mut client, connection, reset, .. } = connected(30, 2);
    let serving = tokio::spawn(run(connection, push));
    client.read_to_end(&mut Vec::new()).await.unwrap();
    serving.await.unwrap();
    assert!(!reset.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn drain_ends_a_wait_for_requests() {
    let Fixture { client, connection, shutdown, reset, .. } = connected(30, 3600);
    let converse = async |connection: &mut Connection<Memory>| {
        while connection.receive(&mut BytesMut::new()).await? > 0 {}
        Ok(())
    };
    let serving = tokio::spawn(run(connection, converse));
    shutdown.drain.cancel();
    let start = Instant::now();
    serving.await.unwrap();
    assert!(start.elapsed() <= CHECK_INTERVAL.1);
    assert!(!reset.load(Ordering::Relaxed));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn drain_ends_the_linger_of_served_clients() {
    let Fixture { mut client, connection, shutdown, reset, .. } = connected(30, 3600);
    let serving = tokio::spawn(run(connection, push));
    client.read_to_end(&mut Vec::new()).await.unwrap();
    shutdown.drain.cancel();
    let start = Instant::now();
    serving.await.unwrap();
    assert!(start.elapsed() <= CHECK_INTERVAL.1);
    assert!(!reset.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn abort_resets_open_connections() {
    let Fixture { client, connection, shutdown, reset, .. } = connected(30, 3600);
    let serving = tokio::spawn(run(connection, push));
    shutdown.abort.cancel();
    serving.await.unwrap();
    assert!(reset.load(Ordering::Relaxed));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn resets_the_connection_of_a_panic() {
    let Fixture { client, connection, reset, .. } = connected(30, 3600);
    let serving = tokio::spawn(run(connection, async |_: &mut Connection<Memory>| panic!("x")));
    assert!(serving.await.unwrap_err().is_panic());
    assert!(reset.load(Ordering::Relaxed));
    drop(client);
}

#[tokio::test(start_paused = true)]
async fn resets_connections_of_a_failed_service() {
    let Fixture { client, connection, reset, .. } = connected(30, 3600);
    let failing = async |connection: &mut Connection<Memory>| {
        connection.send(b"{").await?;
        Err(ServeError::Service(io::Error::other("the file shrank")))
    };
    run(connection, failing).await;
    assert!(reset.load(Ordering::Relaxed));
    drop(client);
}
