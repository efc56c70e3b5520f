//! The accept loop for TCP and Unix sockets. There is only one.
//!
//! No accept error ends it: errors of a single connection are skipped, resource exhaustion backs
//! off. A reload replaces the assigned service without closing the socket.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketFlags, acceptfrom_with};
use tokio::io::Interest;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::net::client_limit::ClientGuard;
use crate::net::connection::{Connection, Peer};
use crate::net::instance::ServiceInstance;
use crate::net::linger::{ConnectionGuards, LingeringConnection, linger_all};
use crate::net::permits::Permit;
use crate::net::service::Service;
use crate::net::sockets::{BACKLOG, SocketFile, drop_new_syns};
use crate::net::stream::{Kind, LazySocket};
use crate::sys::RegisteredFd;
use crate::telemetry::counters::Refusal;

/// The first and the longest pause after an error that would only repeat itself.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// How long it takes somebody near, such as a balancer, to end the handshake that was begun.
const HANDSHAKE: Duration = Duration::from_millis(5);

/// What a socket is there for at the moment.
#[derive(Debug)]
pub(crate) struct Assignment<S> {
    pub instance: Arc<ServiceInstance<S>>,
    /// Where connections are counted as under way.
    pub connections: TaskTracker,
    /// The ports at which this daemon receives datagrams.
    pub own_ports: Arc<[u16]>,
}

// Derived, it would require `S: Clone`.
impl<S> Clone for Assignment<S> {
    fn clone(&self) -> Self {
        Self {
            instance: Arc::clone(&self.instance),
            connections: self.connections.clone(),
            own_ports: Arc::clone(&self.own_ports),
        }
    }
}

impl<S> Assignment<S> {
    /// Whether there is nothing different to do.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.instance, &other.instance) && self.own_ports == other.own_ports
    }
}

/// Does what is to be done, anew whenever that changes, until whoever gave the orders has gone.
pub(super) async fn run_until_reassigned<S, F: Future<Output = ()>>(
    mut orders: watch::Receiver<Assignment<S>>,
    mut act: impl FnMut(Assignment<S>) -> F,
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
    socket: RegisteredFd,
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
    socket: LazySocket,
    peer: Peer,
}

impl AsFd for Listener {
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
        Ok(Self { socket: RegisteredFd::new(socket, Interest::READABLE)?, family })
    }

    /// Accepts connections, each of which is served at once as far as it need not wait, until the sender of `orders` is
    /// dropped. Who is in the queue then is still served, as far as there are places.
    pub(crate) async fn run<S: Service>(self: Arc<Self>, orders: watch::Receiver<Assignment<S>>) {
        let (answered, arriving) = unbounded_channel();
        tokio::spawn(linger_all(arriving));
        let last = orders.clone();
        run_until_reassigned(orders, |duty| self.accept_for(duty, &answered)).await;
        // The close resets whom the kernel connects between the last look at the queue and then.
        if matches!(self.family, Family::Tcp { inherited: false }) && drop_new_syns(&*self).is_ok()
        {
            tokio::time::sleep(HANDSHAKE).await;
        }
        let duty = last.borrow().clone();
        // No more than a queue's length, as others may go on coming.
        for _ in 0..BACKLOG {
            let Some(place) = duty.instance.try_acquire_permit() else { break };
            match self.accept_next() {
                Ok(accepted) => serve_connection(accepted, place, &duty, &answered),
                Err(error) if ends_one_connection_only(&error) => {}
                Err(_) => break,
            }
        }
    }

    /// Whether clients cannot find it any more: somebody has removed its file.
    pub(crate) fn is_out_of_reach(&self) -> bool {
        matches!(&self.family, Family::Unix(Some(file)) if file.is_gone())
    }

    /// Whether somebody is in the queue. To accept in vain costs ten times what it costs to ask, as
    /// the kernel makes a socket before it looks for whom.
    fn has_waiting(&self) -> bool {
        let mut queue = [PollFd::new(&self.socket, PollFlags::IN)];
        // If there is a fault, accepting tells.
        poll(&mut queue, Some(&Timespec::default())) != Ok(0)
    }

    async fn accept_for<S: Service>(
        &self,
        duty: Assignment<S>,
        answered: &UnboundedSender<LingeringConnection>,
    ) {
        let mut pause = AcceptBackoff::default();
        let mut queue = Queue::Unknown;
        loop {
            match self.next_connection(&duty.instance, &mut queue).await {
                Ok((accepted, place)) => {
                    pause.reset();
                    serve_connection(accepted, place, &duty, answered);
                }
                Err(error) if ends_one_connection_only(&error) => {
                    duty.instance.counts().refusals.add(Refusal::Aborted);
                }
                // Without descriptors or memory the connection stays in the queue and the socket
                // stays readable: going on at once would only spin.
                Err(error) => {
                    pause.after(&duty.instance, "cannot accept connections", &error).await;
                }
            }
        }
    }

    /// Waits for a client, then for a place, and only then accepts: a client that is one too many
    /// waits in the kernel's queue. In this order an idle listener holds no place that another
    /// listener of the same service could use.
    async fn next_connection<S: Service>(
        &self,
        served: &ServiceInstance<S>,
        queue: &mut Queue,
    ) -> io::Result<(Accepted, Permit)> {
        loop {
            let mut ready = self.socket.readable().await?;
            let place = match served.try_acquire_permit() {
                Some(place) => place,
                None if !self.has_waiting() => {
                    ready.clear_ready();
                    *queue = Queue::WasEmpty;
                    continue;
                }
                None => {
                    served.note_limit_reached();
                    served.acquire_permit().await
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
        Ok(Accepted { socket: LazySocket::new(socket, kind), peer })
    }
}

/// Serves a connection.
fn serve_connection<S: Service>(
    Accepted { socket, peer }: Accepted,
    place: Permit,
    duty: &Assignment<S>,
    answered: &UnboundedSender<LingeringConnection>,
) {
    let served = Arc::clone(&duty.instance);
    let from_balancer = served.is_balancer(&peer);
    let guard = match peer {
        Peer::Internet(address) if !from_balancer => match served.admit(address.ip()) {
            Ok(guard) => Some(guard),
            // Reset, as every connection that is dropped without being finished.
            Err(reason) => return served.counts().refusals.add(reason),
        },
        Peer::Internet(_) | Peer::Unix(_) => None,
    };
    let held = ConnectionGuards { place, guard, under_way: duty.connections.token() };
    let answered = answered.clone();
    // From here on it counts.
    let connection = Connection::new(socket, peer, Arc::clone(&served.context));
    if from_balancer {
        poll_once_then_spawn(Box::pin(serve_behind_balancer(connection, held, served, answered)));
    } else {
        poll_once_then_spawn(Box::pin(serve_and_linger(connection, held, served, answered)));
    }
}

/// The same for a connection of a balancer, which first says whom it is for.
async fn serve_behind_balancer<S: Service>(
    connection: Connection<LazySocket>,
    mut held: ConnectionGuards,
    served: Arc<ServiceInstance<S>>,
    answered: UnboundedSender<LingeringConnection>,
) {
    let introduced = connection.read_proxy_header(LazySocket::read_header).await;
    let Some(connection) = introduced else { return };
    if let Peer::Internet(client) = connection.peer() {
        match served.admit(client.ip()) {
            Ok(guard) => held.guard = Some(guard),
            Err(reason) => return connection.refuse(reason),
        }
    }
    serve_and_linger(connection, held, served, answered).await;
}

/// Answers a connection, and sees to its end or leaves that to others.
async fn serve_and_linger<S: Service>(
    connection: Connection<LazySocket>,
    held: ConnectionGuards,
    served: Arc<ServiceInstance<S>>,
    answered: UnboundedSender<LingeringConnection>,
) {
    let service = &served.service;
    let answer = async |connection: &mut Connection<_>| service.serve(connection).await;
    let Some(connection) = connection.answer(answer).await else { return };
    let one = LingeringConnection { connection, held };
    if served.is_near_limit() || one.held.guard.as_ref().is_some_and(ClientGuard::is_crowded) {
        // Others wait for its place, which is to be free as soon as the client has gone.
        one.finish().await;
    } else {
        // Its end is seen to as long as there are connections.
        let _ = answered.send(one);
    }
}

/// Lets a connection go as far as it can without waiting. What is left then is a task of its own,
/// which most never need.
fn poll_once_then_spawn(mut connection: Pin<Box<impl Future<Output = ()> + Send + 'static>>) {
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
pub(super) struct AcceptBackoff {
    next: Option<Duration>,
}

impl AcceptBackoff {
    pub(super) fn reset(&mut self) {
        self.next = None;
    }

    /// Says what is wrong, not too often, and waits.
    pub(super) async fn after<S: Service>(
        &mut self,
        served: &ServiceInstance<S>,
        act: &'static str,
        error: &io::Error,
    ) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::connection::{ServeError, Shutdown};
    use crate::net::limits::Limits;

    #[derive(Debug)]
    struct Silent;

    impl Service for Silent {
        async fn serve(&self, _: &mut Connection<LazySocket>) -> Result<(), ServeError> {
            Ok(())
        }
    }

    #[test]
    fn an_aborted_connection_is_told_from_a_lack_of_descriptors() {
        assert!(ends_one_connection_only(&Errno::CONNABORTED.into()));
        assert!(!ends_one_connection_only(&Errno::MFILE.into()));
        assert!(!ends_one_connection_only(&Errno::NOMEM.into()));
    }

    #[tokio::test]
    async fn a_connection_that_panics_or_waits_does_not_hold_up_the_listener() {
        poll_once_then_spawn(Box::pin(async { panic!("a connection's own") }));
        let (told, telling) = tokio::sync::oneshot::channel();
        let (done, doing) = tokio::sync::oneshot::channel();
        poll_once_then_spawn(Box::pin(async move {
            let told: Result<(), _> = telling.await;
            done.send(told.is_ok()).unwrap();
        }));
        told.send(()).unwrap();
        assert!(doing.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_a_second_and_begin_anew() {
        let mut pause = AcceptBackoff::default();
        let error = Errno::MFILE.into();
        let limits = Limits::default();
        let served = ServiceInstance::new("t".into(), Silent, limits, Shutdown::default());
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
