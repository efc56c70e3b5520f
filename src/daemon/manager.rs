//! The running services and their sockets, and their change to another configuration.
//!
//! A change is prepared as a whole, which may fail and affects no running service. Then it is
//! applied, which cannot fail. [`crate::daemon::plan`] computes the changes.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::DropGuard;
use tokio_util::task::TaskTracker;

use crate::config;
use crate::config::Config;
use crate::daemon::bound_socket::{BoundSocket, ReusePortGuard};
use crate::daemon::plan::{
    ActivationError, HeldSocket, ReloadPlan, ServiceChange, ServicePlan, SocketSource, Summary,
};
use crate::fs::blocking_pool::{BlockingPool, UNANSWERED};
use crate::net::connection::Shutdown;
use crate::net::endpoint::Endpoint;
use crate::net::instance;
use crate::net::listener::Assignment;
use crate::net::service::Service as _;
use crate::net::sockets::{self, BindError, Inherited};
use crate::runtime::Workers;
use crate::services::{Service, Settings};
use crate::telemetry::metrics::{Monitor, ServiceStats};

/// A running service of any kind.
pub(crate) type ServiceInstance = instance::ServiceInstance<Service>;

/// Interval of the checks whether a removed service has connections.
const DRAIN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Time limit of reading the configuration file, or the files of one service; longer than any file
/// system that still answers.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_mins(1);

/// The reason why a configuration cannot be applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{service}")]
    Bind { service: Arc<str>, source: BindError },
    #[error("{service}")]
    Open { service: Arc<str>, source: io::Error },
    #[error("cannot register the socket on {endpoint}")]
    Register { endpoint: Endpoint, source: io::Error },
    #[error("cannot start the mirrors")]
    Mirrors(#[source] io::Error),
    #[error("cannot start the alerts")]
    Alerts(#[source] io::Error),
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Activation(Vec<ActivationError>),
}

/// Connections that drain together.
#[derive(Debug, Default)]
struct DrainGroup {
    shutdown: Shutdown,
    connections: TaskTracker,
}

#[derive(Debug, Default)]
struct DrainGroups {
    serving: DrainGroup,
    /// Services for monitoring, which also serve during the drain.
    monitoring: DrainGroup,
}

impl DrainGroups {
    fn of(&self, service: &Service) -> &DrainGroup {
        if service.is_monitoring() { &self.monitoring } else { &self.serving }
    }
}

/// The running services with their sockets.
#[derive(Debug)]
pub(crate) struct ServiceManager {
    workers: Workers,
    services: Vec<RunningService>,
    sockets: Vec<BoundSocket>,
    /// Removed services that still have connections.
    draining: Vec<Arc<ServiceInstance>>,
    /// Listeners, and the background work of services.
    tasks: JoinSet<()>,
    groups: DrainGroups,
    pub monitor: Arc<Monitor>,
    /// Reads the configuration, and the files of services that start.
    pub pool: Arc<BlockingPool>,
}

#[derive(Debug, Clone)]
struct RunningService {
    config: config::Service,
    instance: Arc<ServiceInstance>,
    /// Dropping it ends the background work of the service; `None` before the work has started.
    work: Option<Arc<DropGuard>>,
}

/// A change that cannot fail any more.
#[derive(Debug)]
pub(crate) struct PreparedChange {
    services: Vec<RunningService>,
    sockets: Vec<BoundSocket>,
    /// Indices of the running services to remove, and of the sockets to close.
    removed: Vec<usize>,
    closed: Vec<usize>,
    summary: Summary,
}

impl ServiceManager {
    /// Creates a manager that has nothing but inherited sockets.
    pub(crate) fn new(workers: Workers, inherited: Vec<Inherited>) -> Result<Self, Error> {
        let mut loops = workers.loops().iter().cycle();
        let register = |inherited: Inherited| {
            let endpoint = inherited.endpoint.clone();
            BoundSocket::inherited(inherited, loops.by_ref())
                .map_err(|source| Error::Register { endpoint, source })
        };
        let sockets = inherited.into_iter().map(register).collect::<Result<_, _>>()?;
        Ok(Self {
            workers,
            services: Vec::new(),
            sockets,
            draining: Vec::new(),
            tasks: JoinSet::new(),
            groups: DrainGroups::default(),
            monitor: Arc::default(),
            pool: Arc::default(),
        })
    }

    pub(crate) fn event_loops(&self) -> &[Handle] {
        self.workers.loops()
    }

    pub(crate) fn instances(&self) -> impl Iterator<Item = &Arc<ServiceInstance>> {
        self.services.iter().map(|service| &service.instance)
    }

    pub(crate) fn settings(&self) -> Vec<Settings> {
        self.services.iter().map(|service| service.config.settings.clone()).collect()
    }

    pub(crate) fn address_count(&self) -> usize {
        self.sockets.len()
    }

    /// Opens the files and binds the addresses that are new in `config`.
    pub(crate) async fn prepare(&self, config: &Config) -> Result<PreparedChange, Error> {
        let running: Vec<_> = self.services.iter().map(|service| &service.config).collect();
        let held: Vec<_> = self.sockets.iter().map(BoundSocket::as_held).collect();
        let plan = ReloadPlan::new(&running, &held, &config.services);
        let ReloadPlan { services: plans, removed, closed, summary } =
            plan.map_err(Error::Activation)?;
        let mut services = Vec::new();
        for (config, plan) in config.services.iter().zip(&plans) {
            services.push(self.prepare_service(config, plan.change).await?);
        }
        // Last and without an await, as a new socket can take clients from the old one.
        let sockets = self.prepare_sockets(&config.services, plans, &closed)?;
        Ok(PreparedChange { services, sockets, removed, closed, summary })
    }

    async fn prepare_service(
        &self,
        config: &config::Service,
        change: ServiceChange,
    ) -> Result<RunningService, Error> {
        let running = |index| self.services.get(index).expect("the plan names running services");
        let before = match change {
            ServiceChange::Keep(index) => {
                return Ok(RunningService { config: config.clone(), ..running(index).clone() });
            }
            ServiceChange::SetLimits(index) | ServiceChange::Replace(index) => {
                Some(&running(index).instance)
            }
            // The connections that it had before it was removed still count.
            ServiceChange::Add => self.draining.iter().find(|one| *one.name() == config.name),
        };
        let (service, work) = match change {
            ServiceChange::SetLimits(index) => {
                let RunningService { instance, work, .. } = running(index);
                (instance.service.clone(), work.clone())
            }
            _ => (self.start(config).await?, None),
        };
        let shutdown = match (change, before) {
            (ServiceChange::Add, _) | (_, None) => self.groups.of(&service).shutdown.child(),
            (_, Some(before)) => before.context.shutdown.clone(),
        };
        let limits = config.limits.clone();
        let instance = Arc::new(match before {
            Some(before) => before.reconfigured(service, limits, shutdown),
            None => ServiceInstance::new(Arc::clone(&config.name), service, limits, shutdown),
        });
        Ok(RunningService { config: config.clone(), instance, work })
    }

    fn prepare_sockets(
        &self,
        services: &[config::Service],
        plans: Vec<ServicePlan>,
        closed: &[usize],
    ) -> Result<Vec<BoundSocket>, Error> {
        let held = |index: usize| self.sockets.get(index).expect("the plan names held sockets");
        let closing: Vec<_> = closed.iter().map(|index| held(*index)).collect();
        let (mut sockets, mut bound, mut guards) = (Vec::new(), Vec::new(), Vec::new());
        for (service, plan) in services.iter().zip(plans) {
            let name = &service.name;
            for source in plan.sockets {
                match source {
                    SocketSource::Held(index) => {
                        sockets.push(held(index).clone().assigned_to(name));
                    }
                    SocketSource::Bind(endpoint) => {
                        let guard = ReusePortGuard::new(&endpoint, &closing);
                        let socket = sockets::bind(&endpoint, guard.is_needed());
                        let socket = socket.map_err(|source| bind_error(name, source))?;
                        bound.push((name, endpoint, socket));
                        // Several new sockets may replace one.
                        guards.push(guard);
                    }
                }
            }
        }
        // New sockets accept no client until all are bound.
        let mut loops = self.workers.loops().iter().cycle();
        for (name, configured, socket) in bound {
            let register = |source| Error::Register { endpoint: configured.clone(), source };
            let endpoint = socket.endpoint(&configured).map_err(register)?;
            let queues = sockets::listen(socket, &configured, self.workers.loops().len())
                .map_err(|source| bind_error(name, source))?;
            let held = HeldSocket::new(configured.clone(), None);
            let socket = BoundSocket::new(queues, endpoint, held, &mut loops).map_err(register)?;
            sockets.push(socket.assigned_to(name));
        }
        Ok(sockets)
    }

    /// Applies a prepared change. Connections of removed services have `grace` to finish.
    pub(crate) fn apply(&mut self, change: PreparedChange, grace: Duration) -> Summary {
        let PreparedChange { services, sockets, removed, closed, summary } = change;
        for RunningService { instance, config, .. } in &services {
            let mut known = self.instances().chain(&self.draining);
            if let Some(before) = known.find(|before| before.name() == instance.name()) {
                instance.take_over(before);
            }
            instance.service.refresh(&config.settings);
        }
        let removed: Vec<_> = self
            .instances()
            .enumerate()
            .filter(|(index, _)| removed.contains(index))
            .map(|(_, instance)| Arc::clone(instance))
            .collect();
        for index in closed {
            let socket = self.sockets.get(index).expect("the plan names held sockets");
            let (service, address) = (socket.held.service.as_deref(), &socket.endpoint);
            let service = service.unwrap_or_default();
            tracing::info!(service, %address, "{service}: no longer listening on {address}");
        }
        // Old services and sockets that are not among the new ones end when they are dropped.
        self.services = services;
        self.sockets = sockets;
        self.start_work();
        self.assign_listeners();
        for instance in removed {
            tokio::spawn(drain(Arc::clone(&instance), grace));
            self.draining.push(instance);
        }
        self.forget_drained();
        summary
    }

    /// Forgets removed services without connections, and updates the list of monitored services.
    pub(crate) fn forget_drained(&mut self) {
        let names: Vec<_> = self.instances().map(|instance| Arc::clone(instance.name())).collect();
        // A service that was added again has the counters of its predecessor.
        self.draining.retain(|one| one.counts().active() > 0 && !names.contains(one.name()));
        let stats = |instance| {
            let stats: Weak<ServiceInstance> = Arc::downgrade(instance);
            stats as Weak<dyn ServiceStats>
        };
        self.monitor.set_services(self.instances().chain(&self.draining).map(stats).collect());
    }

    /// Starts the background work of new services.
    fn start_work(&mut self) {
        for service in self.services.iter_mut().filter(|service| service.work.is_none()) {
            let instance = Arc::clone(&service.instance);
            let end = self.groups.of(&instance.service).shutdown.drain.child_token();
            service.work = Some(Arc::new(end.clone().drop_guard()));
            self.tasks.spawn(async move {
                end.run_until_cancelled(instance.service.background()).await;
            });
        }
    }

    /// Assigns each socket the current instance of its service.
    fn assign_listeners(&mut self) {
        let ports = self.sockets.iter().filter_map(|socket| match &socket.endpoint {
            Endpoint::Udp(address) => Some(address.port()),
            _ => None,
        });
        let own_ports: Arc<[u16]> = ports.collect();
        for socket in &mut self.sockets {
            let name = socket.held.service.as_ref();
            let service = self.services.iter().find(|service| Some(&service.config.name) == name);
            let instance = &service.expect("each socket has a service").instance;
            let assignment = Assignment {
                instance: Arc::clone(instance),
                connections: self.groups.of(&instance.service).connections.clone(),
                own_ports: Arc::clone(&own_ports),
            };
            socket.assign(assignment, &mut self.tasks);
        }
    }

    /// Waits for a task to panic. Other tasks end with their services.
    pub(crate) async fn failure(&mut self) -> JoinError {
        loop {
            match self.tasks.join_next().await {
                Some(Err(error)) => return error,
                Some(Ok(())) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Returns the tracker of all connections except those of monitoring.
    pub(crate) fn connections(&self) -> TaskTracker {
        self.groups.serving.connections.clone()
    }

    /// Serves the clients in the accept queues, closes every listener except those of monitoring,
    /// and lets connections finish.
    pub(crate) async fn drain(&mut self) {
        self.monitor.set_draining();
        self.groups.serving.connections.close();
        self.groups.serving.shutdown.drain.cancel();
        let closed = self.sockets.extract_if(.., |socket| !socket.is_for_monitoring());
        let ending: Vec<_> = closed.flat_map(BoundSocket::close).collect();
        while ending.iter().any(|task| !task.is_finished()) {
            self.tasks.join_next().await;
        }
    }

    /// Resets the remaining connections and ends monitoring, within `time_limit`.
    pub(crate) async fn abort(&mut self, time_limit: Duration) {
        let DrainGroups { serving, monitoring } = &self.groups;
        serving.shutdown.abort.cancel();
        monitoring.shutdown.drain.cancel();
        self.sockets.clear();
        monitoring.connections.close();
        // The end of the process ends the rest.
        let all = async { tokio::join!(serving.connections.wait(), monitoring.connections.wait()) };
        let _ = timeout(time_limit, all).await;
    }

    /// Starts a service, which may read its files.
    async fn start(&self, config: &config::Service) -> Result<Service, Error> {
        let (name, settings) = (Arc::clone(&config.name), config.settings.clone());
        let monitor = Arc::clone(&self.monitor);
        let start = move || Service::start(name, settings, monitor);
        let started = match timeout(READ_TIMEOUT, self.pool.run(&config.name, start)).await {
            Ok(started) => started.flatten(),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, UNANSWERED)),
        };
        started.map_err(|source| Error::Open { service: Arc::clone(&config.name), source })
    }
}

fn bind_error(service: &Arc<str>, source: BindError) -> Error {
    Error::Bind { service: Arc::clone(service), source }
}

/// Lets the connections of a removed service finish.
async fn drain(instance: Arc<ServiceInstance>, grace: Duration) {
    instance.log_summary();
    let Shutdown { drain, abort } = &instance.context.shutdown;
    drain.cancel();
    let all_closed = async {
        while instance.counts().active() > 0 {
            sleep(DRAIN_CHECK_INTERVAL).await;
        }
    };
    if timeout(grace, all_closed).await.is_err() {
        abort.cancel();
    }
    instance.log_summary();
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::SocketAddr;

    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::config::Sources;

    const CLOCK: &str = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
    const FILES: &str = "[file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \".\"\n";

    struct Fixture {
        manager: ServiceManager,
        dir: TempDir,
    }

    impl Fixture {
        async fn start(text: &str) -> Self {
            let manager = ServiceManager::new(Workers::start().unwrap(), Vec::new()).unwrap();
            let mut fixture = Self { manager, dir: tempfile::tempdir().unwrap() };
            fixture.reload(text).await.unwrap();
            fixture
        }

        async fn reload(&mut self, text: &str) -> Result<Summary, Error> {
            let path = self.dir.path().join("handout.toml");
            fs::write(&path, text).unwrap();
            let config = Config::load(&Sources { file: Some(path), ..Sources::default() });
            let prepared = self.manager.prepare(&config.unwrap()).await?;
            Ok(self.manager.apply(prepared, Duration::from_secs(5)))
        }

        fn address(&self, service: &str) -> SocketAddr {
            let is_of = |socket: &&BoundSocket| socket.held.service.as_deref() == Some(service);
            match &self.manager.sockets.iter().find(is_of).expect("a socket of it").endpoint {
                Endpoint::Tcp(address) => *address,
                other => panic!("{other}"),
            }
        }
    }

    async fn read_time(address: SocketAddr) -> Option<String> {
        let mut reply = String::new();
        let mut stream = TcpStream::connect(address).await.ok()?;
        stream.read_to_string(&mut reply).await.ok().map(|_| reply)
    }

    fn summary(added: usize, changed: usize, removed: usize, unchanged: usize) -> Summary {
        Summary { added, changed, removed, unchanged }
    }

    #[tokio::test]
    async fn keeps_the_sockets_and_instances_of_unchanged_services() {
        let mut fixture = Fixture::start(CLOCK).await;
        let clock = fixture.address("time.clock");
        let instance = Arc::clone(fixture.manager.instances().next().unwrap());
        let both = format!("{FILES}{CLOCK}");
        assert_eq!(fixture.reload(&both).await.unwrap(), summary(1, 0, 0, 1));
        assert_eq!(fixture.address("time.clock"), clock);
        assert!(fixture.manager.instances().any(|one| Arc::ptr_eq(one, &instance)));
        assert_eq!(fixture.reload(&both).await.unwrap(), summary(0, 0, 0, 2));
    }

    #[tokio::test]
    async fn replaces_a_service_on_its_socket() {
        let mut fixture = Fixture::start(CLOCK).await;
        let clock = fixture.address("time.clock");
        let text = format!("{CLOCK}format = \"unix\"\nnewline = false\n");
        assert_eq!(fixture.reload(&text).await.unwrap(), summary(0, 1, 0, 0));
        assert_eq!(fixture.address("time.clock"), clock);
        assert!(read_time(clock).await.unwrap().parse::<f64>().is_ok());
    }

    #[tokio::test]
    async fn changes_nothing_if_any_address_cannot_be_bound() {
        let mut fixture = Fixture::start(CLOCK).await;
        let clock = fixture.address("time.clock");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = taken.local_addr().unwrap();
        let text = format!("{FILES}[time.other]\nlisten = [\"127.0.0.1:0\", \"{taken}\"]\n");
        let error = fixture.reload(&text).await.unwrap_err();
        assert!(matches!(&error, Error::Bind { service, .. } if **service == *"time.other"));
        assert_eq!((fixture.manager.address_count(), fixture.address("time.clock")), (1, clock));
        assert!(read_time(clock).await.is_some());
    }

    #[tokio::test]
    async fn replaces_an_address_by_a_wildcard_on_its_port() {
        let mut fixture = Fixture::start(CLOCK).await;
        let port = fixture.address("time.clock").port();
        for host in ["0.0.0.0", "127.0.0.1", "0.0.0.0"] {
            let text = format!("[time.clock]\nlisten = [\"{host}:{port}\"]\n");
            assert_eq!(fixture.reload(&text).await.unwrap(), summary(0, 1, 0, 0));
            assert!(read_time(([127, 0, 0, 1], port).into()).await.is_some(), "{host}");
        }
    }

    #[tokio::test]
    async fn drains_the_connections_of_removed_services() {
        let mut fixture = Fixture::start(&format!("{CLOCK}{FILES}")).await;
        let files = fixture.address("file.files");
        let mut client = TcpStream::connect(files).await.unwrap();
        client.write_all(b"handout.toml\n").await.unwrap();
        client.read_u8().await.unwrap();
        assert_eq!(fixture.reload(CLOCK).await.unwrap(), summary(0, 0, 1, 1));
        assert_eq!(fixture.manager.draining.len(), 1);
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        drop(client);
        while !fixture.manager.draining.is_empty() {
            sleep(Duration::from_millis(10)).await;
            fixture.manager.forget_drained();
        }
        assert!(TcpStream::connect(files).await.is_err());
    }

    #[tokio::test]
    async fn serves_monitoring_until_the_end_of_the_drain() {
        let text = format!("{CLOCK}[metrics]\nlisten = [\"127.0.0.1:0\"]\n");
        let mut fixture = Fixture::start(&text).await;
        let (clock, metrics) = (fixture.address("time.clock"), fixture.address("metrics"));
        fixture.manager.drain().await;
        assert!(TcpStream::connect(clock).await.is_err());
        assert!(TcpStream::connect(metrics).await.is_ok());
        fixture.manager.abort(Duration::from_secs(5)).await;
        assert_eq!(fixture.manager.address_count(), 0);
    }
}
