//! The only accept loop, and the only loop that receives datagrams.
//!
//! Both serve until they are dropped; no error ends them.

use std::array;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with};
use tokio::io::Interest;
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::connection::{Connection, Peer, Shutdown, Stream};
use crate::datagram::may_be_answered;
use crate::kernel::ListeningSocket;
use crate::limits::{ClientGuard, Clients, DatagramRate, Limits};
use crate::services::Service;
use crate::services::time::TimeService;

/// How much of a datagram is looked at: more than any reply of ours is long.
const DATAGRAM: usize = 2048;

/// The first and the longest pause after an error that would only repeat itself.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A fault that comes and goes is said so often at most.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// A running service with what its listeners share.
#[derive(Debug)]
pub struct Served {
    /// Its name in the log, as `time.clock`.
    pub name: Arc<str>,
    /// What answers.
    pub service: Service,
    /// What it may take.
    pub limits: Limits,
    /// One permit for each connection that it may have.
    permits: Arc<Semaphore>,
    /// The connections of each client.
    clients: Arc<Clients>,
    /// What is summed up in the log.
    pub counts: Counts,
}

/// What strangers can cause at will: counted, not logged one by one.
#[derive(Debug, Default)]
pub struct Counts {
    /// Datagrams that were answered.
    pub answered: AtomicU64,
    /// Datagrams that were not.
    pub dropped: AtomicU64,
    /// Connections that their clients gave up before they were accepted.
    pub aborted: AtomicU64,
    /// Connections that were reset, as the access lists do not permit them.
    pub denied: AtomicU64,
    /// Connections that were reset, as their client had as many as it may.
    pub crowded: AtomicU64,
}

impl Served {
    /// A service that nobody is connected to yet.
    pub fn new(name: Arc<str>, service: Service, limits: Limits) -> Self {
        let permits = usize::try_from(limits.max_connections.get()).unwrap_or(usize::MAX);
        let permits = Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        let clients = Arc::new(Clients::new(limits.max_per_client));
        Self { name, service, limits, permits, clients, counts: Counts::default() }
    }
}

/// What kind of stream a listener accepts.
#[derive(Debug, Clone, Copy)]
pub enum Family {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// Unix stream sockets.
    Unix,
}

/// Accepts connections for ever, each served by a task of its own.
///
/// # Errors
/// If the socket cannot be watched, before anything was accepted.
pub async fn accept(
    socket: OwnedFd,
    family: Family,
    served: Arc<Served>,
    shutdown: Shutdown,
    connections: TaskTracker,
) -> io::Result<()> {
    let listener = ListeningSocket::new(socket)?;
    let mut pause = Pause::default();
    loop {
        let accepted = match next_connection(&listener, &served).await {
            Ok(accepted) => accepted,
            Err(error) if ends_one_connection_only(&error) => {
                served.counts.aborted.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            // Without descriptors or memory the connection stays in the queue and the socket stays
            // readable: going on at once would only spin.
            Err(error) => {
                pause.after(&served.name, "cannot accept connections", &error).await;
                continue;
            }
        };
        pause.reset();
        let shutdown = shutdown.clone();
        let served = Arc::clone(&served);
        match family {
            Family::Tcp => connections.spawn(serve_tcp(accepted, served, shutdown)),
            Family::Unix => connections.spawn(serve_unix(accepted, served, shutdown)),
        };
    }
}

struct Accepted {
    socket: OwnedFd,
    address: Option<SocketAddrAny>,
    /// Given back when the connection has gone.
    permit: OwnedSemaphorePermit,
}

/// Waits for a client, then for a permit, and only then accepts: a client that is one too many
/// waits in the kernel's queue. In this order an idle listener holds no permit that another
/// listener of the same service could use.
async fn next_connection(listener: &ListeningSocket, served: &Served) -> io::Result<Accepted> {
    loop {
        let mut ready = listener.readable().await?;
        let permit = Arc::clone(&served.permits).acquire_owned().await.map_err(io::Error::other)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        if let Ok(accepted) = ready.try_io(|socket| Ok(acceptfrom_with(socket, flags)?)) {
            return accepted.map(|(socket, address)| Accepted { socket, address, permit });
        }
    }
}

async fn serve_tcp(accepted: Accepted, served: Arc<Served>, shutdown: Shutdown) {
    let Accepted { socket, address, permit } = accepted;
    let address = address.and_then(|address| SocketAddr::try_from(address).ok());
    let stream = TcpStream::from_std(socket.into());
    if let (Some(address), Ok(stream)) = (address, stream) {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        match admit(&served, address.ip()) {
            Ok(guard) => {
                serve(stream, Peer::Internet(address), &served, shutdown).await;
                drop(guard);
            }
            Err(count) => {
                count.fetch_add(1, Ordering::Relaxed);
                stream.reset_on_close();
            }
        }
    }
    drop(permit);
}

/// Whether a client is served; if not, where that is counted.
fn admit(served: &Served, address: IpAddr) -> Result<ClientGuard, &AtomicU64> {
    if !served.limits.access.permits(address) {
        return Err(&served.counts.denied);
    }
    served.clients.enter(address).ok_or(&served.counts.crowded)
}

async fn serve_unix(accepted: Accepted, served: Arc<Served>, shutdown: Shutdown) {
    let Accepted { socket, permit, .. } = accepted;
    if let Ok(stream) = UnixStream::from_std(socket.into()) {
        let user = stream.peer_cred().ok().map(|credentials| credentials.uid());
        serve(stream, Peer::Unix(user), &served, shutdown).await;
    }
    drop(permit);
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

/// Answers datagrams for ever, in one task and in memory that does not grow.
///
/// `own_ports` are the ports at which this daemon receives datagrams.
///
/// # Errors
/// If the socket cannot be watched or cannot say where datagrams were sent to, before anything was
/// received.
pub async fn answer_datagrams(
    socket: std::net::UdpSocket,
    time: Arc<TimeService>,
    served: Arc<Served>,
    own_ports: Arc<[u16]>,
) -> io::Result<()> {
    let socket = UdpSocket::from_std(socket)?;
    // The library asks the kernel for each datagram's destination: on a wildcard address, the
    // answer must leave from where the question went to.
    let state = UdpSocketState::new((&socket).into())?;
    let mut rate = DatagramRate::new(served.limits.datagrams, Instant::now());
    let mut buffer = vec![0; BATCH_SIZE * DATAGRAM];
    let mut metas = [RecvMeta::default(); BATCH_SIZE];
    let mut reply = Vec::with_capacity(DATAGRAM);
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
                    && served.limits.access.permits(meta.addr.ip())
                    && rate.admit(meta.addr.ip(), now)
                    && {
                        reply.clear();
                        time.tell(&mut reply).is_ok()
                    }
                    // A queue that is full drops the answer, as any network may.
                    && state.try_send((&socket).into(), &answer_to(meta, &reply)).is_ok();
                let count = if answered { &served.counts.answered } else { &served.counts.dropped };
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        // A flood of datagrams must not keep the other tasks of this thread waiting.
        tokio::task::consume_budget().await;
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
