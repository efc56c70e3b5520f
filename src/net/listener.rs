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

use crate::net::accept_backoff::AcceptBackoff;
use crate::net::client_limit::ClientGuard;
use crate::net::connection::{Connection, Peer};
use crate::net::instance::ServiceInstance;
use crate::net::linger::{ConnectionGuards, LingeringConnection, linger_all};
use crate::net::permits::Permit;
use crate::net::service::Service;
use crate::net::sockets::{BACKLOG, SocketFile, drop_new_syns};
use crate::net::stream::{Kind, LazySocket};
use crate::sys::RegisteredFd;
use crate::telemetry::counters::RejectReason;

/// Time for which pending handshakes of nearby clients, such as a load balancer, may complete.
const HANDSHAKE: Duration = Duration::from_millis(5);

/// The service that a socket currently serves; replaced on reload.
#[derive(Debug)]
pub(crate) struct Assignment<S> {
    pub instance: Arc<ServiceInstance<S>>,
    /// Tracks open connections.
    pub connections: TaskTracker,
    /// The UDP ports of this daemon. Datagrams from them are not answered.
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
    /// Whether both assignments are the same.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.instance, &other.instance) && self.own_ports == other.own_ports
    }
}

/// Runs `act` for the current assignment, restarted when it changes, until the sender of
/// `assignments` is dropped.
pub(super) async fn run_until_reassigned<S, F: Future<Output = ()>>(
    mut assignments: watch::Receiver<Assignment<S>>,
    mut act: impl FnMut(Assignment<S>) -> F,
) {
    loop {
        let current = assignments.borrow_and_update().clone();
        tokio::select! {
            biased;
            changed = assignments.changed() => if changed.is_err() { return },
            () = act(current) => {}
        }
    }
}

/// A listening socket, registered with the reactor.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: RegisteredFd,
    family: Family,
}

/// The socket family of a listener.
#[derive(Debug)]
pub(crate) enum Family {
    Tcp {
        /// The service manager holds the socket, too, and keeps it open.
        inherited: bool,
    },
    /// A socket bound here owns its file.
    Unix(Option<SocketFile>),
}

/// The state of the accept queue when the socket becomes readable.
#[derive(Clone, Copy)]
enum Queue {
    /// A connection was accepted; more may be queued.
    Unknown,
    /// The queue was empty at the last check, so a client arrived since.
    WasEmpty,
}

/// An accepted connection.
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
    /// Registers a listening socket.
    pub(crate) fn new(socket: OwnedFd, family: Family) -> io::Result<Self> {
        Ok(Self { socket: RegisteredFd::new(socket, Interest::READABLE)?, family })
    }

    /// Accepts connections until the sender of `assignments` is dropped. Then serves the clients in
    /// the accept queue for which permits are free.
    pub(crate) async fn run<S: Service>(
        self: Arc<Self>,
        assignments: watch::Receiver<Assignment<S>>,
    ) {
        let (answered, arriving) = unbounded_channel();
        tokio::spawn(linger_all(arriving));
        let last = assignments.clone();
        run_until_reassigned(assignments, |current| self.accept_for(current, &answered)).await;
        // The close resets clients that the kernel connects after the queue was emptied.
        if matches!(self.family, Family::Tcp { inherited: false }) && drop_new_syns(&*self).is_ok()
        {
            tokio::time::sleep(HANDSHAKE).await;
        }
        let current = last.borrow().clone();
        // At most the length of a queue: clients may keep arriving.
        for _ in 0..BACKLOG {
            let Some(permit) = current.instance.try_acquire_permit() else { break };
            match self.accept_next() {
                Ok(accepted) => serve_connection(accepted, permit, &current, &answered),
                Err(error) if ends_one_connection_only(&error) => {}
                Err(_) => break,
            }
        }
    }

    /// Whether the file of a Unix socket was removed, so that clients cannot find it.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(&self.family, Family::Unix(Some(file)) if file.is_gone())
    }

    /// Whether the accept queue has a client. A failed accept(2) costs ten times as much as this
    /// check, as the kernel creates a socket before it examines the queue.
    fn has_waiting(&self) -> bool {
        let mut queue = [PollFd::new(&self.socket, PollFlags::IN)];
        // accept(2) reports a fault.
        poll(&mut queue, Some(&Timespec::default())) != Ok(0)
    }

    async fn accept_for<S: Service>(
        &self,
        current: Assignment<S>,
        answered: &UnboundedSender<LingeringConnection>,
    ) {
        let mut backoff = AcceptBackoff::default();
        let mut queue = Queue::Unknown;
        loop {
            match self.next_connection(&current.instance, &mut queue).await {
                Ok((accepted, permit)) => {
                    backoff.reset();
                    serve_connection(accepted, permit, &current, answered);
                }
                Err(error) if ends_one_connection_only(&error) => {
                    current.instance.counts().rejections.add(RejectReason::Aborted);
                }
                // Without descriptors or memory the connection stays queued and the socket stays
                // readable: an immediate retry would spin.
                Err(error) => {
                    backoff.wait(&current.instance, "cannot accept connections", &error).await;
                }
            }
        }
    }

    /// Waits for a client, then for a permit, then accepts: excess clients wait in the accept queue
    /// of the kernel. An idle listener thus holds no permit that another listener of the service
    /// could use.
    async fn next_connection<S: Service>(
        &self,
        instance: &ServiceInstance<S>,
        queue: &mut Queue,
    ) -> io::Result<(Accepted, Permit)> {
        loop {
            let mut ready = self.socket.readable().await?;
            let permit = match instance.try_acquire_permit() {
                Some(permit) => permit,
                None if !self.has_waiting() => {
                    ready.clear_ready();
                    *queue = Queue::WasEmpty;
                    continue;
                }
                None => {
                    instance.note_limit_reached();
                    instance.acquire_permit().await
                }
            };
            let accepted = ready.try_io(|_| match queue {
                Queue::Unknown if !self.has_waiting() => Err(ErrorKind::WouldBlock.into()),
                _ => self.accept_next(),
            });
            match accepted {
                Ok(accepted) => {
                    *queue = Queue::Unknown;
                    return Ok((accepted?, permit));
                }
                // The reactor reports the next client.
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

/// Serves a connection, unless its client is not admitted.
fn serve_connection<S: Service>(
    Accepted { socket, peer }: Accepted,
    permit: Permit,
    assignment: &Assignment<S>,
    answered: &UnboundedSender<LingeringConnection>,
) {
    let instance = Arc::clone(&assignment.instance);
    let from_balancer = instance.is_balancer(&peer);
    let client = match peer {
        Peer::Internet(address) if !from_balancer => match instance.admit(address.ip()) {
            Ok(guard) => Some(guard),
            // Dropping the socket resets the connection.
            Err(reason) => return instance.counts().rejections.add(reason),
        },
        Peer::Internet(_) | Peer::Unix(_) => None,
    };
    let guards = ConnectionGuards { permit, client, tracker: assignment.connections.token() };
    let answered = answered.clone();
    let connection = Connection::new(socket, peer, Arc::clone(&instance.context));
    if from_balancer {
        let serve = serve_behind_balancer(connection, guards, instance, answered);
        poll_once_then_spawn(Box::pin(serve));
    } else {
        poll_once_then_spawn(Box::pin(serve_and_linger(connection, guards, instance, answered)));
    }
}

/// Like [`serve_and_linger`], for a connection that begins with a PROXY header.
async fn serve_behind_balancer<S: Service>(
    connection: Connection<LazySocket>,
    mut guards: ConnectionGuards,
    instance: Arc<ServiceInstance<S>>,
    answered: UnboundedSender<LingeringConnection>,
) {
    let connection = connection.read_proxy_header(LazySocket::read_proxy_header).await;
    let Some(connection) = connection else { return };
    if let Peer::Internet(client) = connection.peer() {
        match instance.admit(client.ip()) {
            Ok(guard) => guards.client = Some(guard),
            Err(reason) => return connection.reject(reason),
        }
    }
    serve_and_linger(connection, guards, instance, answered).await;
}

/// Answers a connection, and waits for its end or hands it to [`linger_all`].
async fn serve_and_linger<S: Service>(
    connection: Connection<LazySocket>,
    guards: ConnectionGuards,
    instance: Arc<ServiceInstance<S>>,
    answered: UnboundedSender<LingeringConnection>,
) {
    let service = &instance.service;
    let answer = async |connection: &mut Connection<_>| service.serve(connection).await;
    let Some(connection) = connection.answer(answer).await else { return };
    let client_near_limit = guards.client.as_ref().is_some_and(ClientGuard::is_near_limit);
    let lingering = LingeringConnection { connection, guards };
    if instance.is_near_limit() || client_near_limit {
        // A task notices the end at once, and frees the permit for waiting clients.
        lingering.finish().await;
    } else {
        // `linger_all` runs until the last sender is dropped.
        let _ = answered.send(lingering);
    }
}

/// Polls a connection once, and spawns a task for the rest. Most connections need none.
fn poll_once_then_spawn(mut connection: Pin<Box<impl Future<Output = ()> + Send + 'static>>) {
    // A spawned task polls again, and registers its own waker then.
    let mut context = Context::from_waker(Waker::noop());
    let poll = || connection.as_mut().poll(&mut context);
    // A panic, which the hook has logged, affects this connection only. Its state is only dropped.
    if let Ok(Poll::Pending) = catch_unwind(AssertUnwindSafe(poll)) {
        tokio::spawn(connection);
    }
}

/// Whether an error of accept(2) concerns the accepted connection only. Linux passes pending errors
/// of the connection on (accept(2), "Error handling").
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinguishes_aborted_connections_from_a_lack_of_descriptors() {
        assert!(ends_one_connection_only(&Errno::CONNABORTED.into()));
        assert!(!ends_one_connection_only(&Errno::MFILE.into()));
        assert!(!ends_one_connection_only(&Errno::NOMEM.into()));
    }

    #[tokio::test]
    async fn panics_and_waits_of_a_connection_do_not_delay_the_listener() {
        poll_once_then_spawn(Box::pin(async { panic!("of one connection") }));
        let (start, started) = tokio::sync::oneshot::channel();
        let (done, completed) = tokio::sync::oneshot::channel();
        poll_once_then_spawn(Box::pin(async move {
            let started: Result<(), _> = started.await;
            done.send(started.is_ok()).unwrap();
        }));
        start.send(()).unwrap();
        assert!(completed.await.unwrap());
    }
}
