//! The supervisor: binds and opens everything, reports readiness, then serves and reloads on
//! request until it is stopped, and drains.
//!
//! [`manager`] runs the services, and applies the changes that [`plan`] computes. Requests come
//! from signals and [`control`]; [`systemd`] reports to the service manager, [`health`] and
//! [`gateway`] to the operator. Knows no connection.

pub(crate) mod bound_socket;
pub(crate) mod control;
pub(crate) mod gateway;
pub(crate) mod health;
pub(crate) mod manager;
pub(crate) mod plan;
pub(crate) mod systemd;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Handle;
use tokio::task::JoinError;
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::clock::Health;
use crate::clock::watch::ClockWatch;
use crate::config::{AlertSettings, Config, MirrorSettings, Sources, Validated};
use crate::config_reader::Diagnostics;
use crate::fs::blocking_pool::BlockingPool;
use crate::net::service::Service as _;
use crate::net::sockets::Inherited;
use crate::runtime::{self, Workers};
use crate::telemetry::event::Kind;
use crate::telemetry::logging::Logger;
use crate::telemetry::metrics::Reload;
use crate::text::{agree, counted, error_chain, tally};

use control::{ReloadQueue, Reply};
use gateway::{AlertDispatcher, Mirrors};
use health::HealthMonitor;
use manager::ServiceManager;
use plan::Summary;
use systemd::Notifier;

/// Interval of log lines that summarize events which clients can cause at any rate.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);

/// Time limit for connections to end after a reset.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);

/// Time limit of the creation of the mirrors' folders, whose file systems may hang.
const CREATE_TIMEOUT: Duration = Duration::from_secs(2);

/// A panic of a listener or of the background work of a service, after which the daemon stops.
#[derive(Debug, thiserror::Error)]
#[error("a part of the daemon ended unexpectedly")]
pub(crate) struct TaskFailed(#[source] JoinError);

/// The reason why a reload changed nothing.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error("{0}")]
    Configuration(Diagnostics),
    #[error("cannot read the configuration")]
    Read(#[source] io::Error),
    #[error("cannot read the configuration file: no answer for a minute")]
    ReadTimedOut,
    #[error("cannot change the log settings")]
    Log(#[source] io::Error),
    #[error(transparent)]
    Apply(#[from] manager::Error),
}

/// Cancellation tokens that signals trigger.
#[derive(Debug, Clone, Default)]
pub(crate) struct StopSignals {
    /// Requests a drain and the end of the daemon.
    pub stop: CancellationToken,
    /// Requests the end without waiting for connections.
    pub stop_now: CancellationToken,
}

/// A daemon that is ready to serve.
pub(crate) struct Daemon {
    sources: Sources,
    log: Logger,
    notifier: Arc<Notifier>,
    grace: Duration,
    manager: ServiceManager,
    /// Probes configurations. Separate from the manager's pool, because hanging probes of served
    /// paths remain in it.
    probe_pool: Arc<BlockingPool>,
    mirrors: Mirrors,
    alerts: AlertDispatcher,
    monitor: HealthMonitor,
    /// The kinds of events that are reported to the operator.
    reported: BTreeSet<Kind>,
    /// The fault of the last reload.
    reload_fault: Option<String>,
}

impl Daemon {
    /// Binds every address and opens every file of `config`, which was read from `sources`, and
    /// starts to serve.
    pub(crate) async fn start(
        sources: Sources,
        config: &Config,
        inherited: Vec<Inherited>,
        workers: Workers,
        log: Logger,
    ) -> Result<Self, manager::Error> {
        raise_descriptor_limit();
        let mut manager = ServiceManager::new(workers, inherited)?;
        create_mirror_folders(&manager.pool, &config.mirrors).await;
        let prepared = manager.prepare(config).await?;
        let grace = config.daemon.grace;
        manager.apply(prepared, grace);
        let alerts = AlertDispatcher::default();
        let monitor = HealthMonitor::new(alerts.events());
        let mut daemon = Self {
            sources,
            log,
            notifier: Arc::new(Notifier::from_env()),
            grace,
            manager,
            probe_pool: Arc::default(),
            mirrors: Mirrors::default(),
            alerts,
            monitor,
            reported: BTreeSet::new(),
            reload_fault: None,
        };
        daemon.mirrors.prepare(&config.mirrors).map_err(manager::Error::Mirrors)?;
        daemon.alerts.prepare(&config.alerts).map_err(manager::Error::Alerts)?;
        daemon.apply_alerts(&config.alerts);
        daemon.apply_mirrors(&config.mirrors);
        Ok(daemon)
    }

    /// Serves, and reloads on request, until a signal. Returns when the connections have finished,
    /// or at the end of their grace.
    pub(crate) async fn run(
        mut self,
        signals: StopSignals,
        mut reloads: ReloadQueue,
    ) -> Result<(), TaskFailed> {
        let notifier = Arc::clone(&self.notifier);
        let keep_alives =
            tokio::spawn(send_keep_alives(notifier, self.manager.event_loops().to_vec()));
        let status = self.status();
        tracing::info!("ready: {status}");
        self.notifier.ready(&status);

        let mut summaries = interval_at(Instant::now() + SUMMARY_INTERVAL, SUMMARY_INTERVAL);
        let mut health_checks = interval(health::CHECK_INTERVAL);
        health_checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut clock = ClockWatch::default();
        clock.check(self.serves_time());
        let result = loop {
            tokio::select! {
                () = signals.stop.cancelled() => break Ok(()),
                error = self.manager.failure() => break Err(TaskFailed(error)),
                _ = summaries.tick() => {
                    self.log_summaries();
                    self.manager.instances().for_each(|instance| instance.note_limit_recovered());
                    self.manager.forget_drained();
                    clock.check(self.serves_time());
                }
                _ = health_checks.tick(), if !self.reported.is_empty() => self.check_health(),
                Some(requests) = reloads.next() => tokio::select! {
                    () = signals.stop.cancelled() => break Ok(()),
                    reply = self.reload() => requests.answer(&reply),
                },
            }
        };
        // Clients that wait for a reload learn that the daemon is stopping.
        drop(reloads);
        self.stop(&signals).await;
        keep_alives.abort();
        result
    }

    fn serves_time(&self) -> bool {
        self.manager.instances().any(|instance| instance.service.answers_datagrams())
    }

    /// Applies the current configuration, or keeps the old one and returns the reason.
    async fn reload(&mut self) -> Reply {
        self.notifier.reloading();
        let before = self.status();
        let (status, reply) = match self.try_to_reload().await {
            Ok(summary) => {
                self.manager.monitor.count_reload(Reload::Done);
                self.reload_fault = None;
                let Summary { added, changed, removed, unchanged } = summary;
                let status = self.status();
                let services = [
                    (added, "added"),
                    (changed, "changed"),
                    (removed, "removed"),
                    (unchanged, "unchanged"),
                ];
                let summary = format!("reloaded: {}; {status}", tally("service", &services));
                tracing::info!(added, changed, removed, unchanged, "{summary}");
                (status, Reply::Reloaded { summary })
            }
            Err(error) => {
                self.manager.monitor.count_reload(Reload::Failed);
                let text = error_chain(&error);
                for problem in text.lines() {
                    tracing::error!("reload failed, nothing was changed: {problem}");
                }
                let first = text.lines().next().unwrap_or_default();
                self.reload_fault = Some(first.to_owned());
                let status = format!("{before}; reload failed, nothing was changed: {first}");
                (status, Reply::rejected(&text))
            }
        };
        // Before the reply: `systemctl reload` ends with the client that waits for it.
        self.notifier.ready(&status);
        reply
    }

    async fn try_to_reload(&mut self) -> Result<Summary, ReloadError> {
        let (sources, running) = (self.sources.clone(), self.manager.settings());
        let reading = self.manager.pool.run("", move || Validated::read(&sources));
        let reading =
            timeout(manager::READ_TIMEOUT, reading).await.map_err(|_| ReloadError::ReadTimedOut)?;
        let validated = reading.map_err(ReloadError::Read)?.map_err(ReloadError::Configuration)?;
        let config = validated.probe_to_serve(&self.probe_pool, &running).await;
        let config = config.map_err(ReloadError::Configuration)?;
        let log = self.log.prepare(&config.log).map_err(ReloadError::Log)?;
        let prepared = self.manager.prepare(&config).await?;
        self.mirrors.prepare(&config.mirrors).map_err(manager::Error::Mirrors)?;
        self.alerts.prepare(&config.alerts).map_err(manager::Error::Alerts)?;
        // Nothing below can fail.
        create_mirror_folders(&self.manager.pool, &config.mirrors).await;
        self.log.apply(log);
        self.grace = config.daemon.grace;
        self.apply_alerts(&config.alerts);
        self.apply_mirrors(&config.mirrors);
        Ok(self.manager.apply(prepared, self.grace))
    }

    fn apply_alerts(&mut self, settings: &AlertSettings) {
        self.alerts.apply_config(settings);
        self.manager.monitor.set_alerts(self.alerts.counters());
        self.reported = settings.event_kinds();
        self.monitor.retain_kinds(&self.reported);
        if self.reported.contains(&Kind::ClockUnsynchronized)
            && let Err(error) = Health::read()
        {
            let cause = error.to_string();
            tracing::info!(
                cause,
                "cannot report an unsynchronized clock: its state cannot be read: {cause}: \
                 see clock-state.conf"
            );
        }
    }

    /// Reports health changes to the operator.
    fn check_health(&mut self) {
        let reload = self.reload_fault.as_deref();
        let (services, mirrors) = (self.manager.instances(), self.mirrors.stats());
        self.monitor.check(services, &mirrors, reload, &self.reported);
    }

    fn apply_mirrors(&mut self, wanted: &[MirrorSettings]) {
        self.mirrors.apply_config(wanted, &self.alerts.events());
        self.manager.monitor.set_mirrors(self.mirrors.stats());
    }

    async fn stop(&mut self, signals: &StopSignals) {
        self.mirrors.stop();
        // Changes since the last check are reported, too.
        if !self.reported.is_empty() {
            self.check_health();
        }
        let connections = self.manager.connections();
        let draining = counted(connections.len(), "connection");
        self.notifier.stopping(&format!("draining {draining}"));
        tokio::select! {
            () = self.manager.drain() => {}
            () = signals.stop_now.cancelled() => {}
        }
        let open = connections.len();
        let draining = counted(open, "connection");
        tracing::info!(connections = open, "stopping: {draining} may finish");
        let (mirrors, alerts) = (&mut self.mirrors, &mut self.alerts);
        let outbound = async {
            // The files of their last runs are reported, too.
            mirrors.ended().await;
            alerts.stop();
            alerts.ended().await;
        };
        let finished = async { tokio::join!(connections.wait(), outbound) };
        tokio::select! {
            _ = finished => {}
            () = sleep(self.grace) => {}
            () = signals.stop_now.cancelled() => {}
        }
        let reset = connections.len();
        self.manager.abort(ABORT_TIMEOUT).await;
        self.log_summaries();
        tracing::info!(reset, "stopped: {} reset", counted(reset, "connection"));
    }

    fn log_summaries(&self) {
        self.manager.instances().for_each(|instance| instance.log_summary());
        let all = self.log.lost();
        let lost = all - self.manager.monitor.replace_lost_lines(all);
        if lost > 0 {
            let (lines, were) = (counted(lost, "log line"), agree(lost, "was", "were"));
            tracing::warn!(lost, "{lines} {were} lost: the log's reader is too slow or gone");
        }
    }

    /// Returns the status line for the service manager.
    fn status(&self) -> String {
        let names: Vec<&str> =
            self.manager.instances().map(|instance| &**instance.name()).collect();
        let addresses = self.manager.address_count();
        let addresses = counted(addresses, "address");
        let serving = format!("serving {} on {addresses}", names.join(", "));
        let mirrors = self.mirrors.stats();
        let mirrors: Vec<&str> = mirrors.iter().map(|stats| &*stats.name).collect();
        let mirroring = format!("mirroring {}", mirrors.join(", "));
        match (names.is_empty(), mirrors.is_empty()) {
            (_, true) => serving,
            (true, false) => mirroring,
            (false, false) => format!("{serving}, {mirroring}"),
        }
    }
}

/// Creates the folders of mirrors, so that services find an empty one before the end of the first
/// run. A failure is reported by that run.
async fn create_mirror_folders(pool: &BlockingPool, mirrors: &[MirrorSettings]) {
    if mirrors.is_empty() {
        return;
    }
    let folders: Vec<_> = mirrors.iter().map(|mirror| mirror.folder().to_owned()).collect();
    let create = move || folders.iter().for_each(|folder| drop(fs::create_dir_all(folder)));
    let _ = timeout(CREATE_TIMEOUT, pool.run("", create)).await;
}

/// Sends the keep-alives of the watchdog, and retries failed notifications.
async fn send_keep_alives(notifier: Arc<Notifier>, loops: Vec<Handle>) {
    let keep_alives = async {
        let Some(every) = systemd::watchdog_interval() else { return };
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            runtime::turn(&loops).await;
            notifier.keep_alive();
        }
    };
    tokio::join!(keep_alives, notifier.retry_pending());
}

/// Raises the soft limit of open files to the hard one: the configuration bounds the number of open
/// files, and the soft limit protects programs that use select(2).
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // On failure the old limit applies, and listeners back off when they reach it.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
