//! The supervisor: everything is bound and opened, then said to be ready, then served, until the
//! order to stop; then what is under way may finish.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, Endpoint};
use crate::connection::Shutdown;
use crate::listener::{DatagramSocket, Family, Listener};
use crate::served::Served;
use crate::services::Service;
use crate::services::time::TimeService;
use crate::sockets::{self, BindError, Socket};
use crate::systemd;

/// How often what strangers can cause at will is summed up in the log.
const SUM_UP_EVERY: Duration = Duration::from_secs(10);

/// How long connections that are reset may take to go; they only have to be dropped.
const RESET_TIME: Duration = Duration::from_secs(1);

/// Why the daemon could not start, or could not go on.
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
    #[error("{service}: cannot watch a socket")]
    Register {
        /// The service that it is for.
        service: Arc<str>,
        /// The cause.
        source: io::Error,
    },
    /// A listener, or what a service does by itself, ended though nobody had asked it to: a fault
    /// of the program.
    #[error("a part of the daemon ended unasked")]
    Ended(#[source] Option<tokio::task::JoinError>),
}

/// What the daemon is told from outside; by signals, as a rule.
#[derive(Debug, Clone, Default)]
pub struct Orders {
    /// Stop: let the connections finish.
    pub stop: CancellationToken,
    /// Stop now.
    pub stop_now: CancellationToken,
}

/// A daemon that has all it needs, and has not begun to serve.
#[derive(Debug)]
pub struct Daemon {
    grace: Duration,
    served: Vec<Arc<Served>>,
    /// Each socket with the service that it is for.
    sockets: Vec<(Socket, Arc<Served>)>,
}

impl Daemon {
    /// Binds every address and opens every file.
    ///
    /// # Errors
    /// The first that fails, with its service.
    pub fn start(config: &Config) -> Result<Self, Error> {
        let mut sockets = Vec::new();
        let mut served = Vec::new();
        for config in &config.services {
            let service = || Arc::clone(&config.name);
            let started = Service::start(&config.name, &config.settings)
                .map_err(|source| Error::Open { service: service(), source })?;
            let running = Arc::new(Served::new(service(), started, config.limits.clone()));
            for endpoint in &config.listen {
                let socket = sockets::bind(endpoint)
                    .map_err(|source| Error::Bind { service: service(), source })?;
                sockets.push((socket, Arc::clone(&running)));
            }
            served.push(running);
        }
        Ok(Self { grace: config.daemon.grace, served, sockets })
    }

    /// Serves until it is ordered to stop, and returns when the connections have finished or their
    /// grace is over.
    ///
    /// # Errors
    /// If a part of it ended unasked.
    pub async fn run(self, orders: Orders) -> Result<(), Error> {
        raise_descriptor_limit();
        let Self { grace, served, sockets } = self;
        let shutdown = Shutdown::default();
        let connections = TaskTracker::new();
        let status = status(&served, sockets.len());
        let mut tasks = JoinSet::new();
        listen(sockets, &shutdown, &connections, &mut tasks)?;
        for served in &served {
            let served = Arc::clone(served);
            until(&shutdown.drain, &mut tasks, async move { served.service.work().await });
        }
        let alive = tokio::spawn(keep_saying_alive());
        tracing::info!(services = served.len(), "ready: {status}");
        systemd::ready(&status);

        let mut sums = interval_at(Instant::now() + SUM_UP_EVERY, SUM_UP_EVERY);
        let ended = loop {
            tokio::select! {
                () = orders.stop.cancelled() => break Ok(()),
                Some(ended) = tasks.join_next() => break Err(Error::Ended(ended.err())),
                _ = sums.tick() => served.iter().for_each(sum_up),
            }
        };

        systemd::stopping("finishing the connections that are under way");
        let under_way = connections.len();
        tracing::info!(connections = under_way, "stopping: {under_way} connections may finish");
        shutdown.drain.cancel();
        // The sockets are closed when their tasks have gone.
        while tasks.join_next().await.is_some() {}
        connections.close();
        tokio::select! {
            () = connections.wait() => {}
            () = tokio::time::sleep(grace) => {}
            () = orders.stop_now.cancelled() => {}
        }
        let reset = connections.len();
        shutdown.abort.cancel();
        // What does not go in time goes with the process.
        let _ = timeout(RESET_TIME, connections.wait()).await;
        served.iter().for_each(sum_up);
        tracing::info!(reset, "stopped: {reset} connections reset");
        alive.abort();
        ended
    }
}

/// A bound socket, registered and ready to be served.
enum Ready {
    Listener(Listener),
    Datagrams(DatagramSocket, Arc<TimeService>),
}

/// Begins to serve on every socket.
fn listen(
    sockets: Vec<(Socket, Arc<Served>)>,
    shutdown: &Shutdown,
    connections: &TaskTracker,
    tasks: &mut JoinSet<Option<()>>,
) -> Result<(), Error> {
    let mut listening = Vec::new();
    let mut own_ports = Vec::new();
    for (socket, served) in sockets {
        let register = |socket: Socket| -> io::Result<_> {
            let endpoint = socket.endpoint()?;
            let ready = match (socket, served.service.datagrams()) {
                (Socket::Tcp(socket), _) => {
                    Some(Ready::Listener(Listener::new(socket, Family::Tcp)?))
                }
                (Socket::Unix(socket, file), _) => {
                    Some(Ready::Listener(Listener::new(socket, Family::Unix(file))?))
                }
                (Socket::Udp(socket), Some(time)) => {
                    Some(Ready::Datagrams(DatagramSocket::new(socket)?, time))
                }
                // The configuration does not let a service have it that answers no datagrams.
                (Socket::Udp(_), None) => None,
            };
            Ok((endpoint, ready))
        };
        let service = Arc::clone(&served.name);
        let (endpoint, ready) =
            register(socket).map_err(|source| Error::Register { service, source })?;
        if let Endpoint::Udp(address) = endpoint {
            own_ports.push(address.port());
        }
        listening.push((endpoint, ready, served));
    }
    let own_ports: Arc<[u16]> = own_ports.into();
    for (endpoint, ready, served) in listening {
        let service = Arc::clone(&served.name);
        tracing::info!(service = &*service, address = %endpoint, "{service}: listening on {endpoint}");
        match ready {
            Some(Ready::Listener(listener)) => {
                let accepting = listener.accept(served, shutdown.clone(), connections.clone());
                until(&shutdown.drain, tasks, accepting);
            }
            Some(Ready::Datagrams(socket, time)) => {
                let answering = socket.answer(time, served, Arc::clone(&own_ports));
                until(&shutdown.drain, tasks, answering);
            }
            None => {}
        }
    }
    Ok(())
}

/// Spawns a part of the daemon, which goes on until the drain.
fn until(
    drain: &CancellationToken,
    tasks: &mut JoinSet<Option<()>>,
    part: impl Future<Output = ()> + Send + 'static,
) {
    tasks.spawn(drain.clone().run_until_cancelled_owned(part));
}

async fn keep_saying_alive() {
    let Some(every) = systemd::alive_interval() else { return };
    let mut beats = interval(every);
    loop {
        beats.tick().await;
        systemd::alive();
    }
}

/// The line that the service manager shows.
fn status(served: &[Arc<Served>], addresses: usize) -> String {
    let names: Vec<&str> = served.iter().map(|served| &*served.name).collect();
    let plural = if addresses == 1 { "address" } else { "addresses" };
    format!("serving {} on {addresses} {plural}", names.join(", "))
}

/// Logs what has been counted since the last time, if anything was.
fn sum_up(served: &Arc<Served>) {
    let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
    let (answered, dropped) = (take(&served.counts.answered), take(&served.counts.dropped));
    let aborted = take(&served.counts.aborted);
    let (denied, crowded) = (take(&served.counts.denied), take(&served.counts.crowded));
    let service = &*served.name;
    if answered + dropped > 0 {
        let message = format_args!("{service}: {answered} datagrams answered, {dropped} dropped");
        tracing::info!(service, answered, dropped, "{message}");
    }
    if denied + crowded > 0 {
        let message = format_args!(
            "{service}: connections reset: {denied} not permitted, {crowded} over max-per-client"
        );
        tracing::info!(service, denied, crowded, "{message}");
    }
    if aborted > 0 {
        let message = format_args!("{service}: {aborted} connections given up in the queue");
        tracing::info!(service, aborted, "{message}");
    }
}

/// Raises the soft limit of open files to the hard one: what is open is bounded by the
/// configuration, and the soft limit is there for programs that use select(2).
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // If it fails, the limit is as it was, which the listeners live with.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
