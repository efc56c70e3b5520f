//! The only accept loop, and the only loop that receives datagrams.
//!
//! Both go on until they are let go; no error ends them. What they serve can change meanwhile,
//! without the socket being closed.

use std::array;
use std::future::pending;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketFlags, acceptfrom_with};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::net::connection::{Connection, Peer};
use crate::net::instance::Served;
use crate::net::limits::ClientGuard;
use crate::net::linger::{Answered, Held, see_to_the_end};
use crate::net::permits::Place;
use crate::net::sockets::{BACKLOG, SocketFile, turn_away};
use crate::net::stream::{AcceptedSocket, Kind};
use crate::net::udp_filter::may_be_answered;
use crate::services::time::TimeService;
use crate::sys::Watched;
use crate::telemetry::counters::{Datagram, Refusal};

/// The longest datagram, or several of one sender that the kernel hands over as one. Only what is
/// used of the buffers takes memory.
const DATAGRAM: usize = 64 << 10;

/// The first and the longest pause after an error that would only repeat itself.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// How long it takes somebody near, such as a balancer, to end the handshake that was begun.
const HANDSHAKE: Duration = Duration::from_millis(5);

/// What a socket is there for at the moment.
#[derive(Debug, Clone)]
pub(crate) struct Duty {
    /// The service that answers.
    pub served: Arc<Served>,
    /// Where connections are counted as under way.
    pub connections: TaskTracker,
    /// The ports at which this daemon receives datagrams.
    pub own_ports: Arc<[u16]>,
}

impl Duty {
    /// Whether there is nothing different to do.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.served, &other.served) && self.own_ports == other.own_ports
    }
}

/// Does what is to be done, anew whenever that changes, until whoever gave the orders has gone.
async fn follow<F: Future<Output = ()>>(
    mut orders: watch::Receiver<Duty>,
    mut act: impl FnMut(Duty) -> F,
) {
    loop {
        let duty = orders.borrow_and_update().clone();
        tokio::select! {
            biased;
            changed = orders.changed() => if changed.is_err() { return },
            () = act(duty) => {}
        }
    }
}

/// A socket that accepts connections, registered with the reactor.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Watched,
    family: Family,
}

/// What kind of stream a listener accepts.
#[derive(Debug)]
pub(crate) enum Family {
    /// TCP over IPv4 or IPv6.
    Tcp {
        /// The service manager has it as well, and keeps it open.
        inherited: bool,
    },
    /// Unix stream sockets; a file of ours goes with the listener.
    Unix(Option<SocketFile>),
}

/// What is known of a listener's queue when it is readable.
#[derive(Clone, Copy)]
enum Queue {
    /// One was taken from it; there may be more.
    Unknown,
    /// It was empty at the last look: somebody has come since.
    WasEmpty,
}

/// A connection that was just accepted.
struct Accepted {
    socket: AcceptedSocket,
    peer: Peer,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsFd for DatagramSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Listener {
    /// Makes a bound socket ready to accept.
    ///
    /// # Errors
    /// If it cannot be watched.
    pub(crate) fn new(socket: OwnedFd, family: Family) -> io::Result<Self> {
        Ok(Self { socket: Watched::new(socket, Interest::READABLE)?, family })
    }

    /// Accepts connections, each of which is served at once as far as it need not wait, until the sender of `orders` is
    /// dropped. Who is in the queue then is still served, as far as there are places.
    pub(crate) async fn accept(self: Arc<Self>, orders: watch::Receiver<Duty>) {
        let (answered, arriving) = unbounded_channel();
        tokio::spawn(see_to_the_end(arriving));
        let last = orders.clone();
        follow(orders, |duty| self.accept_for(duty, &answered)).await;
        // The close resets whom the kernel connects between the last look at the queue and then.
        if matches!(self.family, Family::Tcp { inherited: false }) && turn_away(&*self).is_ok() {
            tokio::time::sleep(HANDSHAKE).await;
        }
        let duty = last.borrow().clone();
        // No more than a queue's length, as others may go on coming.
        for _ in 0..BACKLOG {
            let Some(place) = duty.served.free_place() else { break };
            match self.accept_next() {
                Ok(accepted) => begin(accepted, place, &duty, &answered),
                Err(error) if ends_one_connection_only(&error) => {}
                Err(_) => break,
            }
        }
    }

    /// Whether clients cannot find it any more: somebody has removed its file.
    pub(crate) fn is_out_of_reach(&self) -> bool {
        matches!(&self.family, Family::Unix(Some(file)) if !file.is_there())
    }

    /// Whether somebody is in the queue. To accept in vain costs ten times what it costs to ask, as
    /// the kernel makes a socket before it looks for whom.
    fn has_waiting(&self) -> bool {
        let mut queue = [PollFd::new(&self.socket, PollFlags::IN)];
        // If there is a fault, accepting tells.
        poll(&mut queue, Some(&Timespec::default())) != Ok(0)
    }

    async fn accept_for(&self, duty: Duty, answered: &UnboundedSender<Answered>) {
        let mut pause = Pause::default();
        let mut queue = Queue::Unknown;
        loop {
            match self.next_connection(&duty.served, &mut queue).await {
                Ok((accepted, place)) => {
                    pause.reset();
                    begin(accepted, place, &duty, answered);
                }
                Err(error) if ends_one_connection_only(&error) => {
                    duty.served.counts().refusals.add(Refusal::Aborted);
                }
                // Without descriptors or memory the connection stays in the queue and the socket
                // stays readable: going on at once would only spin.
                Err(error) => {
                    pause.after(&duty.served, "cannot accept connections", &error).await;
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
        queue: &mut Queue,
    ) -> io::Result<(Accepted, Place)> {
        loop {
            let mut ready = self.socket.readable().await?;
            let place = match served.free_place() {
                Some(place) => place,
                None if !self.has_waiting() => {
                    ready.clear_ready();
                    *queue = Queue::WasEmpty;
                    continue;
                }
                None => {
                    served.note_limit_reached();
                    served.place().await.map_err(io::Error::other)?
                }
            };
            let accepted = ready.try_io(|_| match queue {
                Queue::Unknown if !self.has_waiting() => Err(ErrorKind::WouldBlock.into()),
                _ => self.accept_next(),
            });
            match accepted {
                Ok(accepted) => {
                    *queue = Queue::Unknown;
                    return Ok((accepted?, place));
                }
                // The reactor will tell of the next.
                Err(_) => *queue = Queue::WasEmpty,
            }
        }
    }

    fn accept_next(&self) -> io::Result<Accepted> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, address) = acceptfrom_with(&self.socket, flags)?;
        let (kind, peer) = match self.family {
            Family::Unix(_) => {
                let user = socket_peercred(&socket).ok().map(|peer| peer.uid.as_raw());
                (Kind::Unix, Peer::Unix(user))
            }
            Family::Tcp { .. } => {
                let address = address.and_then(|address| SocketAddr::try_from(address).ok());
                let address = address.ok_or(Errno::CONNABORTED)?;
                let address = SocketAddr::new(address.ip().to_canonical(), address.port());
                (Kind::Tcp, Peer::Internet(address))
            }
        };
        Ok(Accepted { socket: AcceptedSocket::new(socket, kind), peer })
    }
}

/// Serves a connection.
fn begin(
    Accepted { socket, peer }: Accepted,
    place: Place,
    duty: &Duty,
    answered: &UnboundedSender<Answered>,
) {
    let served = Arc::clone(&duty.served);
    let from_balancer = served.is_balancer(&peer);
    let guard = match peer {
        Peer::Internet(address) if !from_balancer => match served.admit(address.ip()) {
            Ok(guard) => Some(guard),
            // Reset, as every connection that is dropped without being finished.
            Err(reason) => return served.counts().refusals.add(reason),
        },
        Peer::Internet(_) | Peer::Unix(_) => None,
    };
    let held = Held { place, guard, under_way: duty.connections.token() };
    let answered = answered.clone();
    // From here on it counts.
    let connection = Connection::new(socket, peer, Arc::clone(&served.terms));
    if from_balancer {
        first_turn(Box::pin(answer_behind_balancer(connection, held, served, answered)));
    } else {
        first_turn(Box::pin(answer(connection, held, served, answered)));
    }
}

/// The same for a connection of a balancer, which first says whom it is for.
async fn answer_behind_balancer(
    connection: Connection<AcceptedSocket>,
    mut held: Held,
    served: Arc<Served>,
    answered: UnboundedSender<Answered>,
) {
    let introduced = connection.introduce(AcceptedSocket::read_header).await;
    let Some(connection) = introduced else { return };
    if let Peer::Internet(client) = connection.peer() {
        match served.admit(client.ip()) {
            Ok(guard) => held.guard = Some(guard),
            Err(reason) => return connection.refuse(reason),
        }
    }
    answer(connection, held, served, answered).await;
}

/// Answers a connection, and sees to its end or leaves that to others.
async fn answer(
    connection: Connection<AcceptedSocket>,
    held: Held,
    served: Arc<Served>,
    answered: UnboundedSender<Answered>,
) {
    let service = &served.service;
    let answer = async |connection: &mut Connection<_>| service.answer(connection).await;
    let Some(connection) = connection.answer(answer).await else { return };
    let one = Answered { connection, held };
    if served.is_crowded() || one.held.guard.as_ref().is_some_and(ClientGuard::is_crowded) {
        // Others wait for its place, which is to be free as soon as the client has gone.
        one.finish().await;
    } else {
        // Its end is seen to as long as there are connections.
        let _ = answered.send(one);
    }
}

/// Lets a connection go as far as it can without waiting. What is left then is a task of its own,
/// which most never need.
fn first_turn(mut connection: Pin<Box<impl Future<Output = ()> + Send + 'static>>) {
    // Nobody is to be woken: a task looks for itself at what it is to wait for.
    let mut context = Context::from_waker(Waker::noop());
    let turn = || connection.as_mut().poll(&mut context);
    // A panic is this connection's alone, as it is in a task. Its message has been logged, and what
    // it leaves is only dropped.
    if let Ok(Poll::Pending) = catch_unwind(AssertUnwindSafe(turn)) {
        tokio::spawn(connection);
    }
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
}

impl Pause {
    fn reset(&mut self) {
        self.next = None;
    }

    /// Says what is wrong, not too often, and waits.
    async fn after(&mut self, served: &Served, act: &'static str, error: &io::Error) {
        if served.counts().note_trouble() {
            let service = &**served.name();
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
pub(crate) struct DatagramSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    /// Used by one task after the other: memory that was written once stays.
    buffer: tokio::sync::Mutex<Vec<u8>>,
}

impl DatagramSocket {
    /// Makes a bound socket ready to receive.
    ///
    /// # Errors
    /// If it cannot be watched, or cannot say where datagrams were sent to.
    pub(crate) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let socket = UdpSocket::from_std(socket)?;
        // The library asks the kernel for each datagram's destination: on a wildcard address, the
        // answer must leave from where the question went to.
        let state = UdpSocketState::new((&socket).into())?;
        let buffer = vec![0; BATCH_SIZE * DATAGRAM].into();
        Ok(Self { socket, state, buffer })
    }

    /// Answers datagrams, in one task and in memory that does not grow, until the sender of
    /// `orders` is dropped.
    pub(crate) async fn answer(self: Arc<Self>, orders: watch::Receiver<Duty>) {
        follow(orders, |duty| self.answer_for(duty)).await;
    }

    async fn answer_for(&self, duty: Duty) {
        // The configuration does not give such a socket to a service that answers no datagrams.
        let Some(time) = duty.served.service.datagrams() else { return pending().await };
        let mut buffer = self.buffer.lock().await;
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let mut reply = Vec::new();
        let mut pause = Pause::default();
        loop {
            let received = self.socket.async_io(Interest::READABLE, || {
                let mut pieces = buffer.chunks_mut(DATAGRAM);
                let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
                    array::from_fn(|_| IoSliceMut::new(pieces.next().unwrap_or_default()));
                self.state.recv((&self.socket).into(), &mut slices, &mut metas)
            });
            let received = match received.await {
                Ok(received) => received,
                Err(error) => {
                    pause.after(&duty.served, "cannot receive datagrams", &error).await;
                    continue;
                }
            };
            pause.reset();
            let now = Instant::now();
            for (meta, payload) in metas.iter().zip(buffer.chunks(DATAGRAM)).take(received) {
                let payload = payload.get(..meta.len).unwrap_or_default();
                // The kernel may hand over several datagrams of one sender as one.
                for datagram in segments(payload, meta.stride) {
                    let answered = self.answer_one(meta, datagram, now, &duty, time, &mut reply);
                    let became = answered.err().unwrap_or(Datagram::Answered);
                    duty.served.counts().datagrams.add(became);
                }
            }
            // A flood of datagrams must not keep the other tasks of this thread waiting.
            tokio::task::consume_budget().await;
        }
    }

    /// Answers a datagram if it may be; or says why not.
    fn answer_one(
        &self,
        meta: &RecvMeta,
        datagram: &[u8],
        now: Instant,
        duty: &Duty,
        time: &TimeService,
        reply: &mut Vec<u8>,
    ) -> Result<(), Datagram> {
        let resembles_reply = || time.resembles_reply(datagram);
        if !may_be_answered(meta.addr, meta.dst_ip, &duty.own_ports, resembles_reply) {
            return Err(Datagram::Unanswerable);
        }
        duty.served.admit_datagram(meta.addr.ip(), now)?;
        reply.clear();
        time.tell(reply).map_err(|_| Datagram::Failed)?;
        if !time.outranks(reply, datagram) {
            return Err(Datagram::Unanswerable);
        }
        // A queue that is full drops the answer, as any network may.
        let sent = self.state.try_send((&self.socket).into(), &answer_to(meta, reply));
        sent.map_err(|_| Datagram::Failed)
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
    use crate::clock::Format;
    use crate::net::connection::Shutdown;
    use crate::net::limits::Limits;
    use crate::services::Service;
    use crate::services::time::Settings;

    #[test]
    fn an_aborted_connection_is_told_from_a_lack_of_descriptors() {
        assert!(ends_one_connection_only(&Errno::CONNABORTED.into()));
        assert!(!ends_one_connection_only(&Errno::MFILE.into()));
        assert!(!ends_one_connection_only(&Errno::NOMEM.into()));
    }

    #[tokio::test]
    async fn a_connection_that_panics_or_waits_does_not_hold_up_the_listener() {
        first_turn(Box::pin(async { panic!("a connection's own") }));
        let (told, telling) = tokio::sync::oneshot::channel();
        let (done, doing) = tokio::sync::oneshot::channel();
        first_turn(Box::pin(async move {
            let told: Result<(), _> = telling.await;
            done.send(told.is_ok()).unwrap();
        }));
        told.send(()).unwrap();
        assert!(doing.await.unwrap());
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
        let settings = Settings {
            format: Format::Python,
            timezone: "UTC".to_owned(),
            zone: jiff::tz::TimeZone::UTC,
            newline: true,
        };
        let service = Service::Time(TimeService::new("time.clock".into(), settings).into());
        let limits = Limits::default();
        let served = Served::new("time.clock".into(), service, limits, Shutdown::default());
        let start = tokio::time::Instant::now();
        for _ in 0..10 {
            pause.after(&served, "cannot accept connections", &error).await;
        }
        let waited = start.elapsed();
        assert!((Duration::from_secs(4)..Duration::from_secs(5)).contains(&waited), "{waited:?}");
        pause.reset();
        let start = tokio::time::Instant::now();
        pause.after(&served, "cannot accept connections", &error).await;
        assert!(start.elapsed() < Duration::from_millis(20));
    }
}
