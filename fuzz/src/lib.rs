//! Helpers of the fuzz targets: inputs in pieces, streams in memory, a folder for files, and a check
//! of printed text.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use handout::internals::{
    Connection, ConnectionContext, Deadlines, MemoryFile, MoreToCome, Peer, Shutdown, Stream,
};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Folder for files. The caller sets `TMPDIR` and removes it, because a target never ends
/// normally.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

pub fn folder() -> &'static Path {
    FOLDER.path()
}

/// Splits an input into pieces of two alternating sizes from 1 to 16 bytes, selected by `how`.
pub fn pieces(how: u8, mut input: &[u8]) -> impl Iterator<Item = &[u8]> {
    let sizes = [1 + usize::from(how & 15), 1 + usize::from(how >> 4)];
    sizes.into_iter().cycle().map_while(move |size| {
        let (piece, rest) = input.split_at(size.min(input.len()));
        input = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Returns whether a text is one line without characters that change the text direction (UAX #9).
pub fn is_one_line(text: &str) -> bool {
    let moves = |c| matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !text.contains(|c: char| c.is_control() || moves(c))
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// A peer in memory: sends its pieces, records everything and closes its side.
#[derive(Debug)]
pub struct Memory {
    says: VecDeque<Vec<u8>>,
    pub heard: Vec<u8>,
}

impl Memory {
    pub fn saying<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self { says: pieces.into_iter().map(<[u8]>::to_vec).collect(), heard: Vec::new() }
    }

    pub fn unsaid(&self) -> Vec<u8> {
        self.says.iter().flatten().copied().collect()
    }
}

impl AsyncRead for Memory {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(mut piece) = self.says.pop_front() {
            let later = piece.split_off(piece.len().min(buffer.remaining()));
            buffer.put_slice(&piece);
            if !later.is_empty() {
                self.says.push_front(later);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Memory {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.heard.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Stream for Memory {
    fn poll_write(
        &mut self,
        _: &mut Context<'_>,
        bytes: &[u8],
        _: MoreToCome,
    ) -> Poll<io::Result<usize>> {
        // Returns less than requested, where possible.
        let now = bytes.len().div_ceil(2);
        self.heard.extend_from_slice(&bytes[..now]);
        Poll::Ready(Ok(now))
    }

    fn poll_write_file(
        &mut self,
        _: &mut Context<'_>,
        _: &MemoryFile,
        _: u64,
        _: usize,
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(ErrorKind::Unsupported.into()))
    }

    fn half_close(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn unacknowledged(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn try_discard(&mut self) -> io::Result<usize> {
        Ok(self.says.pop_front().map_or(0, |piece| piece.len()))
    }

    fn close_cleanly(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the reply to a client that sends these pieces.
pub fn answered<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    answer: impl AsyncFnOnce(&mut Connection<Memory>) -> Result<(), handout::internals::ServeError>,
) -> Vec<u8> {
    let hour = Duration::from_secs(3600);
    let terms = ConnectionContext {
        service: "fuzzed".into(),
        deadlines: Deadlines { idle: hour, total: hour },
        shutdown: Shutdown::default(),
        counts: Arc::default(),
        log_at_debug: true,
    };
    let peer = Peer::Internet(SocketAddr::from((Ipv4Addr::LOCALHOST, 40_000)));
    block_on(async {
        let connection = Connection::new(Memory::saying(pieces), peer, Arc::new(terms));
        let connection = connection.answer(answer).await.expect("it was not brought to its end");
        let heard = connection.stream().heard.clone();
        connection.finish().await;
        heard
    })
}
