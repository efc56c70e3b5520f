//! What runs, services and sockets, and how it becomes what another configuration says.
//!
//! A change is prepared whole, in which anything may fail and nothing that runs is touched; then
//! it is carried out, in which nothing can fail. What has to change is [`crate::reload`]'s subject.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::DropGuard;
use tokio_util::task::TaskTracker;

use crate::config::{self, Config, Endpoint};
use crate::connection::Shutdown;
use crate::listener::{DatagramSocket, Duty, Family, Listener};
use crate::metrics::Monitor;
use crate::reload::{Change, Difference, Held, Mismatch, Origin, difference};
use crate::served::Served;
use crate::services::Service;
use crate::sockets::{self, BindError, Inherited, Socket};

/// Why the daemon cannot become what a configuration says.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address could not be bound.
    #[error("{service}")]
    Bind {
        /// The service that wanted it.
        service: Arc<str>,
        /// The endpoint and the cause.
        source: BindError,
    },
    /// What is to be served could not be opened.
    #[error("{service}")]
    Open {
        /// The service that wanted it.
        service: Arc<str>,
        /// The path and the cause.
        source: io::Error,
    },
    /// A socket could not be watched.
    #[error("cannot watch the socket on {endpoint}")]
    Register {
        /// Where it listens.
        endpoint: Endpoint,
        /// The cause.
        source: io::Error,
    },
    /// The configuration does not fit the inherited sockets.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Inherited(Vec<Mismatch>),
    /// A fault of the program.
    #[error("a service could not be started")]
    Lost(#[source] Option<JoinError>),
}

/// Tasks and connections that end together.
#[derive(Debug, Default)]
struct Scope {
    shutdown: Shutdown,
    /// Those that are under way.
    connections: TaskTracker,
    /// The listeners, and what services do by themselves.
    tasks: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Scopes {
    /// What the daemon is there for.
    serving: Scope,
    /// What tells of that, until there is nothing more to tell.
    monitoring: Scope,
}

impl Scopes {
    fn of(&self, service: &Service) -> &Scope {
        if service.is_for_monitoring() { &self.monitoring } else { &self.serving }
    }

    fn of_mut(&mut self, service: &Service) -> &mut Scope {
        if service.is_for_monitoring() { &mut self.monitoring } else { &mut self.serving }
    }
}

/// All that runs.
#[derive(Debug, Default)]
pub struct Running {
    services: Vec<RunningService>,
    sockets: Vec<OpenSocket>,
    scopes: Scopes,
    /// What monitoring is told.
    pub monitor: Arc<Monitor>,
}

#[derive(Debug, Clone)]
struct RunningService {
    config: config::Service,
    served: Arc<Served>,
    /// Dropped, it ends what the service does by itself; none before that has begun.
    work: Option<Arc<DropGuard>>,
}

/// A socket with the task that serves on it.
#[derive(Debug, Clone)]
struct OpenSocket {
    held: Held,
    /// Where it listens, with the port that it has got.
    endpoint: Endpoint,
    socket: Registered,
    /// Dropped, it ends the task; none before that has begun.
    orders: Option<watch::Sender<Duty>>,
}

/// A bound socket, registered with the reactor.
#[derive(Debug, Clone)]
enum Registered {
    Listener(Arc<Listener>),
    Datagrams(Arc<DatagramSocket>),
}

/// A change that can be carried out.
#[derive(Debug)]
pub struct Prepared {
    services: Vec<RunningService>,
    sockets: Vec<OpenSocket>,
    removed: Vec<RunningService>,
    /// Services with what they succeed.
    successions: Vec<(Arc<Served>, Arc<Served>)>,
    summary: Summary,
}

/// How many services a change adds, changes, removes and leaves alone.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// New ones.
    pub added: usize,
    /// Those that serve something else, or by other limits.
    pub changed: usize,
    /// Those that are gone.
    pub removed: usize,
    /// Those that stay as they are.
    pub kept: usize,
}

impl Running {
    /// Nothing but the sockets that were inherited.
    ///
    /// # Errors
    /// If one cannot be watched.
    pub fn new(inherited: Vec<Inherited>) -> Result<Self, Error> {
        let open = |Inherited { socket, endpoint, name }| {
            let held = Held { endpoint: endpoint.clone(), inherited: Some(name), service: None };
            OpenSocket::new(socket, endpoint, held)
        };
        let sockets = inherited.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { sockets, ..Self::default() })
    }

    /// Every service.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Served>> {
        self.services.iter().map(|service| &service.served)
    }

    /// On how many addresses they listen.
    pub fn addresses(&self) -> usize {
        self.sockets.len()
    }

    /// Prepares to become what `config` says: opens every file and binds every address that is
    /// new.
    ///
    /// # Errors
    /// The first thing that fails.
    pub async fn prepare(&self, config: &Config) -> Result<Prepared, Error> {
        let running: Vec<_> = self.services.iter().map(|service| &service.config).collect();
        let held: Vec<_> = self.sockets.iter().map(|socket| socket.held.clone()).collect();
        let Difference { steps, removed, closed } =
            difference(&running, &held, &config.services).map_err(Error::Inherited)?;
        let closing: Vec<_> = closed.iter().filter_map(|index| self.sockets.get(*index)).collect();

        let mut prepared = Prepared {
            services: Vec::new(),
            sockets: Vec::new(),
            removed: removed
                .iter()
                .filter_map(|index| self.services.get(*index))
                .cloned()
                .collect(),
            successions: Vec::new(),
            summary: Summary { removed: removed.len(), ..Summary::default() },
        };
        for (config, step) in config.services.iter().zip(steps) {
            for origin in step.sockets {
                let socket = match origin {
                    Origin::Held(index) => self.sockets.get(index).cloned(),
                    Origin::Bind(endpoint) => Some(bind(&config.name, endpoint, &closing)?),
                };
                prepared.sockets.extend(socket.map(|socket| socket.of(&config.name)));
            }
            self.prepare_service(config, step.change, &mut prepared).await?;
        }
        Ok(prepared)
    }

    async fn prepare_service(
        &self,
        config: &config::Service,
        change: Change,
        prepared: &mut Prepared,
    ) -> Result<(), Error> {
        let running = |index| self.services.get(index).ok_or(Error::Lost(None));
        let limits = config.limits.clone();
        let summary = &mut prepared.summary;
        let (served, work) = match change {
            Change::Add => {
                summary.added += 1;
                let service = self.start(config).await?;
                let shutdown = self.scopes.of(&service).shutdown.child();
                (Served::new(Arc::clone(&config.name), service, limits, shutdown), None)
            }
            Change::Keep(index) => {
                summary.kept += 1;
                let config = config.clone();
                prepared.services.push(RunningService { config, ..running(index)?.clone() });
                return Ok(());
            }
            Change::Limit(index) => {
                summary.changed += 1;
                let RunningService { served, work, .. } = running(index)?;
                (served.successor(served.service.clone(), limits), work.clone())
            }
            Change::Replace(index) => {
                summary.changed += 1;
                (running(index)?.served.successor(self.start(config).await?, limits), None)
            }
        };
        let served = Arc::new(served);
        if let Change::Limit(index) | Change::Replace(index) = change {
            let before = Arc::clone(&running(index)?.served);
            prepared.successions.push((Arc::clone(&served), before));
        }
        prepared.services.push(RunningService { config: config.clone(), served, work });
        Ok(())
    }

    /// Becomes what was prepared. Connections to services that are gone may go on for `grace`.
    pub fn change(&mut self, prepared: Prepared, grace: Duration) -> Summary {
        let Prepared { services, sockets, removed, successions, summary } = prepared;
        for (now, before) in successions {
            now.take_over(&before);
        }
        // What is not among the new ones ends by being dropped.
        self.services = services;
        self.sockets = sockets;
        self.begin_work();
        self.give_orders();
        self.monitor.watch(self.services().cloned().collect());
        for gone in removed {
            drain(&gone.served, grace);
        }
        summary
    }

    fn begin_work(&mut self) {
        for service in self.services.iter_mut().filter(|service| service.work.is_none()) {
            let served = Arc::clone(&service.served);
            let scope = self.scopes.of_mut(&served.service);
            let end = scope.shutdown.drain.child_token();
            service.work = Some(Arc::new(end.clone().drop_guard()));
            scope.tasks.spawn(async move {
                end.run_until_cancelled(served.service.work()).await;
            });
        }
    }

    /// Says to every socket what it is there for.
    fn give_orders(&mut self) {
        let ports = self.sockets.iter().filter_map(|socket| match &socket.endpoint {
            Endpoint::Udp(address) => Some(address.port()),
            _ => None,
        });
        let own_ports: Arc<[u16]> = ports.collect();
        for socket in &mut self.sockets {
            let name = socket.held.service.as_ref();
            let service = self.services.iter().find(|service| Some(&service.config.name) == name);
            let Some(RunningService { served, .. }) = service else { continue };
            let scope = self.scopes.of_mut(&served.service);
            let duty = Duty {
                served: Arc::clone(served),
                connections: scope.connections.clone(),
                own_ports: Arc::clone(&own_ports),
            };
            socket.order(duty, &mut scope.tasks);
        }
    }

    /// Waits until a task has failed, which none should; the others end when they are told to.
    pub async fn failure(&mut self) -> JoinError {
        let Scopes { serving, monitoring } = &mut self.scopes;
        loop {
            let ended = tokio::select! {
                Some(ended) = serving.tasks.join_next() => ended,
                Some(ended) = monitoring.tasks.join_next() => ended,
                else => std::future::pending().await,
            };
            if let Err(error) = ended {
                return error;
            }
        }
    }

    /// Closes every listener, after those who are in its queue, and lets connections finish what
    /// they have begun, which are returned. Monitoring goes on.
    pub async fn drain(&mut self) -> TaskTracker {
        self.monitor.note_draining();
        let scope = &mut self.scopes.serving;
        scope.shutdown.drain.cancel();
        self.sockets.retain(OpenSocket::is_for_monitoring);
        while scope.tasks.join_next().await.is_some() {}
        scope.connections.close();
        scope.connections.clone()
    }

    /// Resets what is left, and ends monitoring, which may take so long.
    pub async fn end(&mut self, time: Duration) {
        let Scopes { serving, monitoring } = &self.scopes;
        serving.shutdown.abort.cancel();
        monitoring.shutdown.drain.cancel();
        self.sockets.clear();
        monitoring.connections.close();
        // What does not go in time goes with the process.
        let all = async { (serving.connections.wait().await, monitoring.connections.wait().await) };
        let _ = tokio::time::timeout(time, all).await;
    }

    /// Starts what is to be served. Files are read, which can take its time.
    async fn start(&self, config: &config::Service) -> Result<Service, Error> {
        let (name, settings) = (Arc::clone(&config.name), config.settings.clone());
        let monitor = Arc::clone(&self.monitor);
        let starting = tokio::task::spawn_blocking(|| Service::start(name, settings, monitor));
        let started = starting.await.map_err(|error| Error::Lost(Some(error)))?;
        started.map_err(|source| Error::Open { service: Arc::clone(&config.name), source })
    }
}

/// Lets the connections of a service that is gone finish what they have begun.
fn drain(served: &Served, grace: Duration) {
    served.counts().sum_up(served.name());
    let Shutdown { drain, abort } = served.terms.shutdown.clone();
    drain.cancel();
    tokio::spawn(async move {
        tokio::time::sleep(grace).await;
        abort.cancel();
    });
}

/// Binds a new socket, also where one is in the way that is about to be closed.
fn bind(
    service: &Arc<str>,
    endpoint: Endpoint,
    closing: &[&OpenSocket],
) -> Result<OpenSocket, Error> {
    let in_the_way = closing.iter().filter(|closing| closing.endpoint.conflicts_with(&endpoint));
    let mut shared = false;
    for socket in in_the_way {
        shared = true;
        // If that fails, so does the binding.
        let _ = match &socket.socket {
            Registered::Listener(listener) => sockets::share_port(&**listener),
            Registered::Datagrams(datagrams) => sockets::share_port(&**datagrams),
        };
    }
    let socket = sockets::bind(&endpoint, shared)
        .map_err(|source| Error::Bind { service: Arc::clone(service), source })?;
    let bound = socket.endpoint(&endpoint);
    let bound = bound.map_err(|source| Error::Register { endpoint: endpoint.clone(), source })?;
    OpenSocket::new(socket, bound, Held { endpoint, inherited: None, service: None })
}

impl OpenSocket {
    fn new(socket: Socket, endpoint: Endpoint, held: Held) -> Result<Self, Error> {
        let listener = |socket, family| {
            Listener::new(socket, family).map(|one| Registered::Listener(Arc::new(one)))
        };
        let registered = match socket {
            Socket::Tcp(socket) => listener(socket, Family::Tcp),
            Socket::Unix(socket, file) => listener(socket, Family::Unix(file)),
            Socket::Udp(socket) => {
                DatagramSocket::new(socket).map(|one| Registered::Datagrams(Arc::new(one)))
            }
        };
        match registered {
            Ok(socket) => Ok(Self { held, endpoint, socket, orders: None }),
            Err(source) => Err(Error::Register { endpoint, source }),
        }
    }

    /// The same for this service.
    fn of(mut self, service: &Arc<str>) -> Self {
        self.held.service = Some(Arc::clone(service));
        self
    }

    /// Says what it is there for, and begins to serve if that has not begun.
    fn order(&mut self, duty: Duty, tasks: &mut JoinSet<()>) {
        if let Some(orders) = &self.orders {
            // Who has the same to do is not disturbed.
            orders.send_if_modified(|before| {
                let changed = !before.is(&duty);
                *before = duty;
                changed
            });
            return;
        }
        self.say_where();
        let (orders, receiver) = watch::channel(duty);
        self.orders = Some(orders);
        match self.socket.clone() {
            Registered::Listener(listener) => tasks.spawn(listener.accept(receiver)),
            Registered::Datagrams(datagrams) => tasks.spawn(datagrams.answer(receiver)),
        };
    }

    fn is_for_monitoring(&self) -> bool {
        let duty = self.orders.as_ref().map(|orders| orders.borrow());
        duty.is_some_and(|duty| duty.served.service.is_for_monitoring())
    }

    fn say_where(&self) {
        let service = self.held.service.as_deref().unwrap_or_default();
        let address = &self.endpoint;
        let origin = if self.held.inherited.is_some() { " (from systemd)" } else { "" };
        tracing::info!(service, %address, "{service}: listening on {address}{origin}");
    }
}
