//! The only accept loop, and the only loop that receives datagrams.
//!
//! Both serve until they are dropped; no error ends them.

use std::array;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with};
use tokio::io::Interest;
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::TaskTracker;

use crate::connection::{Connection, Peer, Shutdown, Stream};
use crate::datagram::may_be_answered;
use crate::kernel::ListeningSocket;
use crate::served::Served;
use crate::services::time::TimeService;
use crate::sockets::SocketFile;

/// The longest datagram, or several of one sender that the kernel hands over as one. Only what is
/// used of the buffers takes memory.
const DATAGRAM: usize = 64 << 10;

/// The first and the longest pause after an error that would only repeat itself.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A fault that comes and goes is said so often at most.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// A socket that accepts connections, registered with the reactor.
#[derive(Debug)]
pub struct Listener {
    socket: ListeningSocket,
    family: Family,
}

/// What kind of stream a listener accepts.
#[derive(Debug)]
pub enum Family {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// Unix stream sockets; their file goes with the listener.
    Unix(SocketFile),
}

/// A connection that was just accepted.
enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listener {
    /// Makes a bound socket ready to accept.
    ///
    /// # Errors
    /// If it cannot be watched.
    pub fn new(socket: OwnedFd, family: Family) -> io::Result<Self> {
        Ok(Self { socket: ListeningSocket::new(socket)?, family })
    }

    /// Accepts connections for ever, each served by a task of its own.
    pub async fn accept(self, served: Arc<Served>, shutdown: Shutdown, connections: TaskTracker) {
        let mut pause = Pause::default();
        loop {
            match self.next_connection(&served).await {
                Ok((accepted, place)) => {
                    pause.reset();
                    let (served, shutdown) = (Arc::clone(&served), shutdown.clone());
                    connections.spawn(async move {
                        match accepted {
                            Accepted::Tcp(stream, address) => {
                                serve_tcp(stream, address, &served, shutdown).await;
                            }
                            Accepted::Unix(stream) => serve_unix(stream, &served, shutdown).await,
                        }
                        drop(place);
                    });
                }
                Err(error) if ends_one_connection_only(&error) => {
                    served.counts.aborted.fetch_add(1, Ordering::Relaxed);
                }
                // Without descriptors or memory the connection stays in the queue and the socket
                // stays readable: going on at once would only spin.
                Err(error) => {
                    pause.after(&served.name, "cannot accept connections", &error).await;
                }
            }
        }
    }

    /// Waits for a client, then for a place, and only then accepts: a client that is one too many
    /// waits in the kernel's queue. In this order an idle listener holds no place that another
    /// listener of the same service could use.
    async fn next_connection(
        &self,
        served: &Served,
    ) -> io::Result<(Accepted, OwnedSemaphorePermit)> {
        loop {
            let mut ready = self.socket.readable().await?;
            let place = served.place().await.map_err(io::Error::other)?;
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            if let Ok(accepted) = ready.try_io(|socket| Ok(acceptfrom_with(socket, flags)?)) {
                let (socket, address) = accepted?;
                return Ok((self.register(socket, address)?, place));
            }
        }
    }

    /// Registers a new connection with the reactor. If that fails, it is reset by its close.
    fn register(&self, socket: OwnedFd, address: Option<SocketAddrAny>) -> io::Result<Accepted> {
        if let Family::Unix(_) = self.family {
            return UnixStream::from_std(socket.into()).map(Accepted::Unix);
        }
        let address = address.and_then(|address| SocketAddr::try_from(address).ok());
        let address = address.ok_or(Errno::CONNABORTED)?;
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        Ok(Accepted::Tcp(TcpStream::from_std(socket.into())?, address))
    }
}

async fn serve_tcp(stream: TcpStream, address: SocketAddr, served: &Served, shutdown: Shutdown) {
    // Who is not admitted is reset, as every connection that is dropped without being finished.
    if let Some(guard) = served.admit(address.ip()) {
        serve(stream, Peer::Internet(address), served, shutdown).await;
        drop(guard);
    }
}

async fn serve_unix(stream: UnixStream, served: &Served, shutdown: Shutdown) {
    let user = stream.peer_cred().ok().map(|credentials| credentials.uid());
    serve(stream, Peer::Unix(user), served, shutdown).await;
}

async fn serve<S: Stream>(stream: S, peer: Peer, served: &Served, shutdown: Shutdown) {
    let name = Arc::clone(&served.name);
    let connection = Connection::new(stream, name, peer, served.limits.deadlines, shutdown);
    connection.run(async |connection| served.service.answer(connection).await).await;
}

/// Whether an error of accept(2) is about the connection that was to be accepted, and not about
/// this process. Linux passes on what has happened to the connection meanwhile.
fn ends_one_connection_only(error: &io::Error) -> bool {
    let Some(errno) = Errno::from_io_error(error) else { return false };
    matches!(
        errno,
        Errno::CONNABORTED
            | Errno::INTR
            | Errno::PERM
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NONET
            | Errno::OPNOTSUPP
            | Errno::TIMEDOUT
    )
}

/// Pauses that grow while a fault lasts.
#[derive(Debug, Default)]
struct Pause {
    next: Option<Duration>,
    said: Option<Instant>,
}

impl Pause {
    fn reset(&mut self) {
        self.next = None;
    }

    /// Says what is wrong, not too often, and waits.
    async fn after(&mut self, service: &str, act: &'static str, error: &io::Error) {
        if self.said.is_none_or(|said| said.elapsed() >= SAY_AGAIN) {
            self.said = Some(Instant::now());
            let remedy = match Errno::from_io_error(error) {
                Some(Errno::MFILE) => "raise LimitNOFILE= (ulimit -n) or lower max-connections",
                Some(Errno::NFILE) => "raise the sysctl fs.file-max",
                Some(Errno::NOBUFS | Errno::NOMEM) => {
                    "give it more memory or lower max-connections"
                }
                Some(Errno::NOSPC) => "raise the sysctl fs.epoll.max_user_watches",
                _ => "it is tried again",
            };
            let message = format_args!("{service}: {act}: {error}: {remedy}");
            tracing::error!(service, cause = %error, remedy, "{message}");
        }
        let pause = self.next.unwrap_or(PAUSE.0);
        self.next = Some((pause * 2).min(PAUSE.1));
        tokio::time::sleep(pause).await;
    }
}

/// A socket that receives datagrams, registered with the reactor.
#[derive(Debug)]
pub struct DatagramSocket {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl DatagramSocket {
    /// Makes a bound socket ready to receive.
    ///
    /// # Errors
    /// If it cannot be watched, or cannot say where datagrams were sent to.
    pub fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let socket = UdpSocket::from_std(socket)?;
        // The library asks the kernel for each datagram's destination: on a wildcard address, the
        // answer must leave from where the question went to.
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket, state })
    }

    /// Answers datagrams for ever, in one task and in memory that does not grow.
    ///
    /// `own_ports` are the ports at which this daemon receives datagrams.
    pub async fn answer(self, time: Arc<TimeService>, served: Arc<Served>, own_ports: Arc<[u16]>) {
        let Self { socket, state } = self;
        let mut buffer = vec![0; BATCH_SIZE * DATAGRAM];
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let mut reply = Vec::new();
        let mut pause = Pause::default();
        loop {
            let received = socket.async_io(Interest::READABLE, || {
                let mut pieces = buffer.chunks_mut(DATAGRAM);
                let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
                    array::from_fn(|_| IoSliceMut::new(pieces.next().unwrap_or_default()));
                state.recv((&socket).into(), &mut slices, &mut metas)
            });
            let received = match received.await {
                Ok(received) => received,
                Err(error) => {
                    pause.after(&served.name, "cannot receive datagrams", &error).await;
                    continue;
                }
            };
            pause.reset();
            let now = Instant::now();
            for (meta, payload) in metas.iter().zip(buffer.chunks(DATAGRAM)).take(received) {
                let payload = payload.get(..meta.len).unwrap_or_default();
                // The kernel may hand over several datagrams of one sender as one.
                for datagram in segments(payload, meta.stride) {
                    let resembles = || time.resembles_reply(datagram);
                    let answered = may_be_answered(meta.addr, meta.dst_ip, &own_ports, resembles)
                        && served.admit_datagram(meta.addr.ip(), now)
                        && {
                            reply.clear();
                            time.tell(&mut reply).is_ok()
                        }
                        // A queue that is full drops the answer, as any network may.
                        && state.try_send((&socket).into(), &answer_to(meta, &reply)).is_ok();
                    let counts = &served.counts;
                    let count = if answered { &counts.answered } else { &counts.dropped };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            // A flood of datagrams must not keep the other tasks of this thread waiting.
            tokio::task::consume_budget().await;
        }
    }
}

fn segments(payload: &[u8], stride: usize) -> impl Iterator<Item = &[u8]> {
    // An empty datagram is one, too.
    let empty = payload.is_empty().then_some(payload);
    empty.into_iter().chain(payload.chunks(stride.max(1)))
}

fn answer_to<'a>(meta: &RecvMeta, reply: &'a [u8]) -> Transmit<'a> {
    Transmit {
        destination: meta.addr,
        ecn: None,
        contents: reply,
        segment_size: None,
        src_ip: meta.dst_ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aborted_connection_is_told_from_a_lack_of_descriptors() {
        assert!(ends_one_connection_only(&Errno::CONNABORTED.into()));
        assert!(!ends_one_connection_only(&Errno::MFILE.into()));
        assert!(!ends_one_connection_only(&Errno::NOMEM.into()));
    }

    #[test]
    fn coalesced_datagrams_are_told_apart() {
        let told = |payload, stride| segments(payload, stride).collect::<Vec<_>>();
        assert_eq!(told(b"", 0), [b""]);
        assert_eq!(told(b"a", 1), [b"a"]);
        assert_eq!(told(b"aabbc", 2), [&b"aa"[..], b"bb", b"c"]);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_a_second_and_begin_anew() {
        let mut pause = Pause::default();
        let error = Errno::MFILE.into();
        let start = tokio::time::Instant::now();
        for _ in 0..10 {
            pause.after("time.clock", "cannot accept connections", &error).await;
        }
        let waited = start.elapsed();
        assert!((Duration::from_secs(4)..Duration::from_secs(5)).contains(&waited), "{waited:?}");
        pause.reset();
        let start = tokio::time::Instant::now();
        pause.after("time.clock", "cannot accept connections", &error).await;
        assert!(start.elapsed() < Duration::from_millis(20));
    }
}
