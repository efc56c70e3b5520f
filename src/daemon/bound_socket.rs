//! Sockets that are bound to an address, with the tasks that serve on them.

use std::io;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::daemon::plan::HeldSocket;
use crate::net::endpoint::Endpoint;
use crate::net::listener::{self, Family, Listener};
use crate::net::service::Service as _;
use crate::net::sockets::{self, Inherited, Socket};
use crate::net::udp::DatagramSocket;
use crate::services::Service;

/// The assignment of a service of any kind.
type Assignment = listener::Assignment<Service>;

/// The sockets of one address.
#[derive(Debug, Clone)]
pub(crate) struct BoundSocket {
    pub held: HeldSocket,
    /// The address with the port that the kernel chose.
    pub endpoint: Endpoint,
    /// A single socket, or for TCP a socket per event loop, each with its loop.
    sockets: Vec<(Handle, Registered)>,
    /// `None` before the first assignment.
    tasks: Option<ListenerTasks>,
}

#[derive(Debug, Clone)]
struct ListenerTasks {
    /// Dropping it ends the tasks.
    assignment: watch::Sender<Assignment>,
    handles: Vec<AbortHandle>,
}

/// A socket that is registered with an event loop.
#[derive(Debug, Clone)]
enum Registered {
    Listener(Arc<Listener>),
    Datagrams(Arc<DatagramSocket>),
}

impl Registered {
    /// Registers a socket with the event loop that is entered.
    fn new(socket: Socket, inherited: bool) -> io::Result<Self> {
        let listener = |socket, family| {
            Listener::new(socket, family).map(|listener| Self::Listener(Arc::new(listener)))
        };
        match socket {
            Socket::Tcp(socket) => listener(socket, Family::Tcp { inherited }),
            Socket::Unix(socket, file) => listener(socket, Family::Unix(file)),
            Socket::Udp(socket) => {
                DatagramSocket::new(socket).map(|one| Self::Datagrams(Arc::new(one)))
            }
        }
    }

    fn share_port(&self, is_shared: bool) -> io::Result<()> {
        match self {
            Self::Listener(listener) => sockets::share_port(&**listener, is_shared),
            Self::Datagrams(datagrams) => sockets::share_port(&**datagrams, is_shared),
        }
    }
}

impl BoundSocket {
    /// Registers a socket of the service manager, which serves on a single loop.
    pub(crate) fn inherited<'a>(
        Inherited { socket, endpoint, name }: Inherited,
        loops: &mut impl Iterator<Item = &'a Handle>,
    ) -> io::Result<Self> {
        let held = HeldSocket::new(endpoint.clone(), Some(name));
        Self::new(vec![socket], endpoint, held, loops)
    }

    /// Registers each socket with the next loop.
    pub(crate) fn new<'a>(
        sockets: Vec<Socket>,
        endpoint: Endpoint,
        held: HeldSocket,
        loops: &mut impl Iterator<Item = &'a Handle>,
    ) -> io::Result<Self> {
        let register = |(socket, event_loop): (Socket, &Handle)| {
            let _entered = event_loop.enter();
            Ok((event_loop.clone(), Registered::new(socket, held.inherited.is_some())?))
        };
        let sockets = sockets.into_iter().zip(loops).map(register).collect::<io::Result<_>>()?;
        Ok(Self { held, endpoint, sockets, tasks: None })
    }

    /// Returns the socket as input of the next plan.
    pub(crate) fn as_held(&self) -> HeldSocket {
        let is_stale = self.sockets.iter().any(|(_, socket)| match socket {
            Registered::Listener(listener) => listener.is_unreachable(),
            Registered::Datagrams(_) => false,
        });
        HeldSocket { is_stale, ..self.held.clone() }
    }

    pub(crate) fn assigned_to(mut self, service: &Arc<str>) -> Self {
        self.held.service = Some(Arc::clone(service));
        self
    }

    /// Assigns a service, and starts to serve if this is the first assignment.
    pub(crate) fn assign(&mut self, assignment: Assignment, tasks: &mut JoinSet<()>) {
        if let Some(tasks) = &self.tasks {
            // Listeners with an equal assignment are not woken.
            tasks.assignment.send_if_modified(|before| {
                let is_changed = !before.is(&assignment);
                *before = assignment;
                is_changed
            });
            return;
        }
        self.log_address();
        let (assignment, receiver) = watch::channel(assignment);
        let start = |(event_loop, socket): &(Handle, Registered)| {
            let receiver = receiver.clone();
            match socket.clone() {
                Registered::Listener(one) => tasks.spawn_on(one.run(receiver), event_loop),
                Registered::Datagrams(one) => tasks.spawn_on(one.run(receiver), event_loop),
            }
        };
        let handles = self.sockets.iter().map(start).collect();
        self.tasks = Some(ListenerTasks { assignment, handles });
    }

    pub(crate) fn is_for_monitoring(&self) -> bool {
        let assignment = self.tasks.as_ref().map(|tasks| tasks.assignment.borrow());
        assignment.is_some_and(|assignment| assignment.instance.service.is_monitoring())
    }

    /// Ends the tasks, and returns their handles.
    pub(crate) fn close(self) -> Vec<AbortHandle> {
        self.tasks.map(|tasks| tasks.handles).unwrap_or_default()
    }

    fn log_address(&self) {
        let service = self.held.service.as_deref().unwrap_or_default();
        let address = &self.endpoint;
        let origin = if self.held.inherited.is_some() { " (from systemd)" } else { "" };
        tracing::info!(service, %address, "{service}: listening on {address}{origin}");
    }
}

/// Sockets that are about to be closed, and share their port (`SO_REUSEPORT`) with their successors
/// until this guard is dropped.
#[derive(Debug)]
pub(crate) struct ReusePortGuard<'a>(Vec<&'a BoundSocket>);

impl<'a> ReusePortGuard<'a> {
    /// Shares the ports of those of `closing` that conflict with `endpoint`.
    pub(crate) fn new(endpoint: &Endpoint, closing: &[&'a BoundSocket]) -> Self {
        let conflicting = closing.iter().filter(|socket| socket.endpoint.conflicts_with(endpoint));
        let guard = Self(conflicting.copied().collect());
        guard.share(|_| true);
        guard
    }

    pub(crate) fn is_needed(&self) -> bool {
        !self.0.is_empty()
    }

    fn share(&self, is_shared: impl Fn(&BoundSocket) -> bool) {
        for bound in &self.0 {
            for (_, socket) in &bound.sockets {
                // If this fails, the bind reports it.
                let _ = socket.share_port(is_shared(bound));
            }
        }
    }
}

impl Drop for ReusePortGuard<'_> {
    fn drop(&mut self) {
        // If the change fails, several queues of one address still share it.
        self.share(|bound| bound.sockets.len() > 1);
    }
}
