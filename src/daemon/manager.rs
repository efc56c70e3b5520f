//! What runs, services and sockets, and how it becomes what another configuration says.
//!
//! A change is prepared whole, in which anything may fail and nothing that runs is touched; then
//! it is carried out, in which nothing can fail. What has to change is [`crate::daemon::plan`]'s subject.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::DropGuard;
use tokio_util::task::TaskTracker;

use crate::config;
use crate::config::Config;
use crate::daemon::plan::{
    ActivationError, Change, HeldSocket, ReloadPlan, SocketSource, difference,
};
use crate::fs::blocking_pool::{BlockingPool, UNANSWERED};
use crate::net::connection::Shutdown;
use crate::net::endpoint::Endpoint;
use crate::net::instance::Served;
use crate::net::listener::{DatagramSocket, Duty, Family, Listener};
use crate::net::sockets;
use crate::net::sockets::{BindError, Inherited, Socket};
use crate::runtime::Workers;
use crate::services::{Service, Settings};
use crate::telemetry::metrics::Monitor;

/// How often it is seen whether the connections of a service that is gone have ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long the files of a configuration, or what one service serves, may take to be read: longer
/// than any that a file system still reads.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Why the daemon cannot become what a configuration says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
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
    /// The mirrors have no thread.
    #[error("the mirrors cannot be started")]
    Mirrors(#[source] io::Error),
    /// Who tells the operator has no thread.
    #[error("alerts cannot be started")]
    Alerts(#[source] io::Error),
    /// The configuration does not fit the inherited sockets.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Inherited(Vec<ActivationError>),
    /// A fault of the program.
    #[error("a service could not be started")]
    Lost,
}

/// Connections that end together.
#[derive(Debug, Default)]
struct Scope {
    shutdown: Shutdown,
    /// Those that are under way.
    connections: TaskTracker,
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
}

/// All that runs.
#[derive(Debug)]
pub(crate) struct Running {
    workers: Workers,
    services: Vec<RunningService>,
    sockets: Vec<OpenSocket>,
    /// Services that are gone, while connections to them last.
    leaving: Vec<Arc<Served>>,
    /// The listeners, and what services do by themselves.
    tasks: JoinSet<()>,
    scopes: Scopes,
    /// What monitoring is told.
    pub monitor: Arc<Monitor>,
    /// What is to be served is read by these first.
    pub readers: Arc<BlockingPool>,
}

#[derive(Debug, Clone)]
struct RunningService {
    config: config::Service,
    served: Arc<Served>,
    /// Dropped, it ends what the service does by itself; none before that has begun.
    work: Option<Arc<DropGuard>>,
}

/// An address with the tasks that serve on it.
#[derive(Debug, Clone)]
struct OpenSocket {
    held: HeldSocket,
    /// Where it listens, with the port that it has got.
    endpoint: Endpoint,
    /// One, or for TCP one for each event loop, with that loop.
    sockets: Vec<(Handle, Registered)>,
    /// None before they have begun.
    tasks: Option<ListenerTasks>,
}

/// The tasks that serve on the sockets of one address.
#[derive(Debug, Clone)]
struct ListenerTasks {
    /// Dropped, it ends them.
    orders: watch::Sender<Duty>,
    handles: Vec<AbortHandle>,
}

/// A bound socket, registered with the reactor.
#[derive(Debug, Clone)]
enum Registered {
    Listener(Arc<Listener>),
    Datagrams(Arc<DatagramSocket>),
}

/// A change that can be carried out.
#[derive(Debug)]
pub(crate) struct Prepared {
    services: Vec<RunningService>,
    sockets: Vec<OpenSocket>,
    removed: Vec<RunningService>,
    /// Who listens no longer where.
    closed: Vec<(Arc<str>, Endpoint)>,
    /// Services with what they succeed.
    successions: Vec<(Arc<Served>, Arc<Served>)>,
    summary: Summary,
}

/// How many services a change adds, changes, removes and leaves alone.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    /// New ones.
    pub added: usize,
    /// Those that serve something else, elsewhere, or by other limits.
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
    pub(crate) fn new(workers: Workers, inherited: Vec<Inherited>) -> Result<Self, Error> {
        let mut loops = workers.loops().iter().cycle();
        let open = |Inherited { socket, endpoint, name }| {
            let held = HeldSocket {
                endpoint: endpoint.clone(),
                inherited: Some(name),
                service: None,
                stale: false,
            };
            // The service manager has made one socket, which cannot be divided.
            OpenSocket::new(vec![socket], endpoint, held, loops.by_ref())
        };
        let sockets = inherited.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self {
            workers,
            services: Vec::new(),
            sockets,
            leaving: Vec::new(),
            tasks: JoinSet::new(),
            scopes: Scopes::default(),
            monitor: Arc::default(),
            readers: Arc::default(),
        })
    }

    /// The event loops that serve.
    pub(crate) fn loops(&self) -> &[Handle] {
        self.workers.loops()
    }

    /// Every service.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Arc<Served>> {
        self.services.iter().map(|service| &service.served)
    }

    /// What they serve.
    pub(crate) fn settings(&self) -> Vec<Settings> {
        self.services.iter().map(|service| service.config.settings.clone()).collect()
    }

    /// On how many addresses they listen.
    pub(crate) fn addresses(&self) -> usize {
        self.sockets.len()
    }

    /// Prepares to become what `config` says: opens every file and binds every address that is
    /// new.
    ///
    /// # Errors
    /// The first thing that fails.
    pub(crate) async fn prepare(&self, config: &Config) -> Result<Prepared, Error> {
        let running: Vec<_> = self.services.iter().map(|service| &service.config).collect();
        let held: Vec<_> = self.sockets.iter().map(OpenSocket::as_held).collect();
        let ReloadPlan { steps, removed, closed } =
            difference(&running, &held, &config.services).map_err(Error::Inherited)?;
        let closing: Vec<_> = closed.iter().filter_map(|index| self.sockets.get(*index)).collect();

        let removed: Vec<_> =
            removed.iter().filter_map(|index| self.services.get(*index)).cloned().collect();
        let whose = |socket: &&OpenSocket| {
            socket.held.service.clone().map(|service| (service, socket.endpoint.clone()))
        };
        let mut prepared = Prepared {
            services: Vec::new(),
            sockets: Vec::new(),
            closed: closing.iter().filter_map(whose).collect(),
            successions: Vec::new(),
            summary: Summary { removed: removed.len(), ..Summary::default() },
            removed,
        };
        for (config, step) in config.services.iter().zip(&steps) {
            self.prepare_service(config, step.change, &mut prepared).await?;
        }
        // Last and without a pause, as a new socket can take an old one's clients from it.
        let mut bound = Vec::new();
        for (config, step) in config.services.iter().zip(steps) {
            for origin in step.sockets {
                match origin {
                    SocketSource::Held(index) => {
                        let held = self.sockets.get(index).cloned();
                        prepared.sockets.extend(held.map(|socket| socket.of(&config.name)));
                    }
                    SocketSource::Bind(endpoint) => {
                        let giving_way = GivingWay::to(&endpoint, &closing);
                        let socket = sockets::bind(&endpoint, !giving_way.0.is_empty());
                        let socket = socket.map_err(|source| {
                            let service = Arc::clone(&config.name);
                            Error::Bind { service, source }
                        })?;
                        bound.push((&config.name, endpoint, socket, giving_way));
                    }
                }
            }
        }
        // One socket may give way to several.
        let mut giving_way = Vec::new();
        let mut loops = self.workers.loops().iter().cycle();
        for (name, endpoint, socket, way) in bound {
            giving_way.push(way);
            let queues = self.workers.loops().len();
            prepared.sockets.push(listen(name, &endpoint, socket, queues, &mut loops)?.of(name));
        }
        Ok(prepared)
    }

    async fn prepare_service(
        &self,
        config: &config::Service,
        change: Change,
        prepared: &mut Prepared,
    ) -> Result<(), Error> {
        let running = |index| self.services.get(index).ok_or(Error::Lost);
        let summary = &mut prepared.summary;
        let (before, work) = match change {
            Change::Keep(index) => {
                let running = running(index)?.clone();
                let moved = running.config.listen != config.listen;
                *(if moved { &mut summary.changed } else { &mut summary.kept }) += 1;
                prepared.services.push(RunningService { config: config.clone(), ..running });
                return Ok(());
            }
            Change::Add => {
                summary.added += 1;
                // If it was gone and comes back, who is still connected counts.
                (self.leaving.iter().find(|leaving| *leaving.name() == config.name), None)
            }
            Change::Limit(index) => {
                summary.changed += 1;
                let RunningService { served, work, .. } = running(index)?;
                (Some(served), work.clone())
            }
            Change::Replace(index) => {
                summary.changed += 1;
                (Some(&running(index)?.served), None)
            }
        };
        let service = match (change, before) {
            (Change::Limit(_), Some(before)) => before.service.clone(),
            _ => self.start(config).await?,
        };
        let shutdown = match (change, before) {
            (Change::Limit(_) | Change::Replace(_), Some(before)) => before.terms.shutdown.clone(),
            _ => self.scopes.of(&service).shutdown.child(),
        };
        let limits = config.limits.clone();
        let served = Arc::new(match before {
            Some(before) => before.successor(service, limits, shutdown),
            None => Served::new(Arc::clone(&config.name), service, limits, shutdown),
        });
        let succession = before.map(|before| (Arc::clone(&served), Arc::clone(before)));
        prepared.successions.extend(succession);
        prepared.services.push(RunningService { config: config.clone(), served, work });
        Ok(())
    }

    /// Becomes what was prepared. Connections to services that are gone may go on for `grace`.
    pub(crate) fn change(&mut self, prepared: Prepared, grace: Duration) -> Summary {
        let Prepared { services, sockets, removed, closed, successions, summary } = prepared;
        for (now, before) in successions {
            now.take_over(&before);
        }
        // What is not among the new ones ends by being dropped.
        self.services = services;
        for RunningService { config, served, .. } in &self.services {
            served.service.refresh(&config.settings);
        }
        self.sockets = sockets;
        self.begin_work();
        self.give_orders();
        for (service, address) in closed {
            let service = &*service;
            let message = format_args!("{service}: no longer listening on {address}");
            tracing::info!(service, %address, "{message}");
        }
        for RunningService { served, .. } in removed {
            tokio::spawn(drain(Arc::clone(&served), grace));
            self.leaving.push(served);
        }
        self.forget_who_has_left();
        summary
    }

    /// Tells monitoring which services there are, with those that still have connections.
    pub(crate) fn forget_who_has_left(&mut self) {
        let names: Vec<_> = self.services().map(|served| Arc::clone(served.name())).collect();
        // One that came back has its predecessor's counts.
        self.leaving
            .retain(|served| served.counts().active() > 0 && !names.contains(served.name()));
        self.monitor.watch(self.services().chain(&self.leaving).cloned().collect());
    }

    fn begin_work(&mut self) {
        for service in self.services.iter_mut().filter(|service| service.work.is_none()) {
            let served = Arc::clone(&service.served);
            let end = self.scopes.of(&served.service).shutdown.drain.child_token();
            service.work = Some(Arc::new(end.clone().drop_guard()));
            self.tasks.spawn(async move {
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
            let duty = Duty {
                served: Arc::clone(served),
                connections: self.scopes.of(&served.service).connections.clone(),
                own_ports: Arc::clone(&own_ports),
            };
            socket.order(duty, &mut self.tasks);
        }
    }

    /// Waits until a task has failed, which none should; the others end when they are told to.
    pub(crate) async fn failure(&mut self) -> JoinError {
        loop {
            match self.tasks.join_next().await {
                Some(Err(error)) => return error,
                Some(Ok(())) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// The connections that are under way, but for those of monitoring.
    pub(crate) fn under_way(&self) -> TaskTracker {
        self.scopes.serving.connections.clone()
    }

    /// Closes every listener, after those who are in its queue, and lets connections finish what
    /// they have begun. Monitoring goes on.
    pub(crate) async fn drain(&mut self) {
        self.monitor.note_draining();
        let Scope { shutdown, connections } = &self.scopes.serving;
        connections.close();
        shutdown.drain.cancel();
        let closed = self.sockets.extract_if(.., |socket| !socket.is_for_monitoring());
        let ending: Vec<_> =
            closed.filter_map(|socket| socket.tasks).flat_map(|tasks| tasks.handles).collect();
        while ending.iter().any(|task| !task.is_finished()) {
            self.tasks.join_next().await;
        }
    }

    /// Resets what is left, and ends monitoring, which may take so long.
    pub(crate) async fn end(&mut self, time: Duration) {
        let Scopes { serving, monitoring } = &self.scopes;
        serving.shutdown.abort.cancel();
        monitoring.shutdown.drain.cancel();
        self.sockets.clear();
        monitoring.connections.close();
        // What does not go in time goes with the process.
        let all = async { (serving.connections.wait().await, monitoring.connections.wait().await) };
        let _ = timeout(time, all).await;
    }

    /// Starts what is to be served. Files are read, which can take its time.
    async fn start(&self, config: &config::Service) -> Result<Service, Error> {
        let (name, settings) = (Arc::clone(&config.name), config.settings.clone());
        let monitor = Arc::clone(&self.monitor);
        let start = || Service::start(name, settings, monitor);
        let started = match timeout(PATIENCE, self.readers.run(&config.name, start)).await {
            Ok(started) => started.flatten(),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, UNANSWERED)),
        };
        started.map_err(|source| Error::Open { service: Arc::clone(&config.name), source })
    }
}

/// Lets the connections of a service that is gone finish what they have begun.
async fn drain(served: Arc<Served>, grace: Duration) {
    served.sum_up();
    let Shutdown { drain, abort } = &served.terms.shutdown;
    drain.cancel();
    let gone = async {
        while served.counts().active() > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    if timeout(grace, gone).await.is_err() {
        abort.cancel();
    }
    served.sum_up();
}

/// Sockets that are about to be closed and let new ones be bound in their place, until this is
/// dropped.
struct GivingWay<'a>(Vec<&'a OpenSocket>);

impl<'a> GivingWay<'a> {
    /// Those of `closing` that are in the way of a socket on `endpoint`.
    fn to(endpoint: &Endpoint, closing: &[&'a OpenSocket]) -> Self {
        let in_the_way = closing.iter().filter(|socket| socket.endpoint.conflicts_with(endpoint));
        let giving_way = Self(in_the_way.copied().collect());
        giving_way.share(|_| true);
        giving_way
    }

    fn share(&self, shared: impl Fn(&OpenSocket) -> bool) {
        for open in &self.0 {
            for (_, socket) in &open.sockets {
                // If that fails, so does the binding.
                let _ = match socket {
                    Registered::Listener(one) => sockets::share_port(&**one, shared(open)),
                    Registered::Datagrams(one) => sockets::share_port(&**one, shared(open)),
                };
            }
        }
    }
}

impl Drop for GivingWay<'_> {
    fn drop(&mut self) {
        // If they stay after all, several queues of one address go on sharing it.
        self.share(|open| open.sockets.len() > 1);
    }
}

/// Begins to listen on a socket that was bound to `endpoint`.
fn listen<'a>(
    service: &Arc<str>,
    endpoint: &Endpoint,
    socket: Socket,
    queues: usize,
    loops: &mut impl Iterator<Item = &'a Handle>,
) -> Result<OpenSocket, Error> {
    let register = |source| Error::Register { endpoint: endpoint.clone(), source };
    let bound = socket.endpoint(endpoint).map_err(register)?;
    let sockets = sockets::listen(socket, endpoint, queues)
        .map_err(|source| Error::Bind { service: Arc::clone(service), source })?;
    let held =
        HeldSocket { endpoint: endpoint.clone(), inherited: None, service: None, stale: false };
    OpenSocket::new(sockets, bound, held, loops)
}

impl Registered {
    /// Registers a socket with the event loop that is entered.
    fn new(socket: Socket, inherited: bool) -> io::Result<Self> {
        let listener =
            |socket, family| Listener::new(socket, family).map(|one| Self::Listener(Arc::new(one)));
        match socket {
            Socket::Tcp(socket) => listener(socket, Family::Tcp { inherited }),
            Socket::Unix(socket, file) => listener(socket, Family::Unix(file)),
            Socket::Udp(socket) => {
                DatagramSocket::new(socket).map(|one| Self::Datagrams(Arc::new(one)))
            }
        }
    }
}

impl OpenSocket {
    /// Registers each socket with another loop.
    fn new<'a>(
        sockets: Vec<Socket>,
        endpoint: Endpoint,
        held: HeldSocket,
        loops: &mut impl Iterator<Item = &'a Handle>,
    ) -> Result<Self, Error> {
        let register = |(socket, handle): (Socket, &Handle)| {
            let _entered = handle.enter();
            Ok((handle.clone(), Registered::new(socket, held.inherited.is_some())?))
        };
        match sockets.into_iter().zip(loops).map(register).collect() {
            Ok(sockets) => Ok(Self { held, endpoint, sockets, tasks: None }),
            Err(source) => Err(Error::Register { endpoint, source }),
        }
    }

    /// What it is now.
    fn as_held(&self) -> HeldSocket {
        let stale = self.sockets.iter().any(|(_, socket)| match socket {
            Registered::Listener(listener) => listener.is_out_of_reach(),
            Registered::Datagrams(_) => false,
        });
        HeldSocket { stale, ..self.held.clone() }
    }

    /// The same for this service.
    fn of(mut self, service: &Arc<str>) -> Self {
        self.held.service = Some(Arc::clone(service));
        self
    }

    /// Says what it is there for, and begins to serve if that has not begun.
    fn order(&mut self, duty: Duty, tasks: &mut JoinSet<()>) {
        if let Some(tasks) = &self.tasks {
            // Who has the same to do is not disturbed.
            tasks.orders.send_if_modified(|before| {
                let changed = !before.is(&duty);
                *before = duty;
                changed
            });
            return;
        }
        self.say_where();
        let (orders, receiver) = watch::channel(duty);
        let begin = |(event_loop, socket): &(Handle, Registered)| {
            let orders = receiver.clone();
            match socket.clone() {
                Registered::Listener(one) => tasks.spawn_on(one.accept(orders), event_loop),
                Registered::Datagrams(one) => tasks.spawn_on(one.answer(orders), event_loop),
            }
        };
        let handles = self.sockets.iter().map(begin).collect();
        self.tasks = Some(ListenerTasks { orders, handles });
    }

    fn is_for_monitoring(&self) -> bool {
        let duty = self.tasks.as_ref().map(|tasks| tasks.orders.borrow());
        duty.is_some_and(|duty| duty.served.service.is_for_monitoring())
    }

    fn say_where(&self) {
        let service = self.held.service.as_deref().unwrap_or_default();
        let address = &self.endpoint;
        let origin = if self.held.inherited.is_some() { " (from systemd)" } else { "" };
        tracing::info!(service, %address, "{service}: listening on {address}{origin}");
    }
}
