//! The supervisor: everything is bound and opened, then said to be ready, then served, changed when
//! a reload is ordered, until the order to stop; then what is under way may finish.

pub(crate) mod control;
pub(crate) mod health;
pub(crate) mod manager;
pub(crate) mod mirrors;
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
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, timeout};
use tokio_util::sync::CancellationToken;

use crate::clock::Health;
use crate::clock::watch::ClockWatch;
use crate::config::{AlertSettings, Config, MirrorSettings, Sources, Validated};
use crate::config_reader::Diagnostics;

use crate::daemon::health::{Alerts, Watch};

use crate::daemon::manager::{Running, Summary};

use crate::daemon::mirrors::Mirrors;

use crate::daemon::systemd::Notifier;
use crate::fs::blocking_pool::BlockingPool;
use crate::net::sockets::Inherited;
use crate::runtime;
use crate::runtime::Workers;
use crate::telemetry::logging::Logger;
use crate::telemetry::metrics::Reload;
use crate::text::error_chain;
use crate::text::{agree, counted, tally};

use control::{ReloadQueue, Reply};

/// How often what strangers can cause at will is summed up in the log.
const SUM_UP_EVERY: Duration = Duration::from_secs(10);

/// How long connections that are reset may take to go; they only have to be dropped.
const RESET_TIME: Duration = Duration::from_secs(1);

/// Maximum time to wait for the folders of mirrors, whose file systems may hang.
const CREATE_TIMEOUT: Duration = Duration::from_secs(2);

/// A listener, or what a service does by itself, ended though nobody had asked it to: a fault of
/// the program, after which it cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("a part of the daemon ended unasked")]
pub(crate) struct Ended(#[source] JoinError);

/// Why a reload changed nothing.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error("{0}")]
    Configuration(Diagnostics),
    #[error("the configuration, or what it names, cannot be read")]
    Lost(#[source] io::Error),
    #[error("the configuration's file, or many of the paths in it, did not answer for a minute")]
    Hangs,
    #[error("the log cannot be changed")]
    Log(#[source] io::Error),
    #[error(transparent)]
    Running(#[from] manager::Error),
}

/// What the daemon is told from outside; by signals, as a rule.
#[derive(Debug, Clone, Default)]
pub(crate) struct Orders {
    /// Stop: let the connections finish.
    pub stop: CancellationToken,
    /// Stop now.
    pub stop_now: CancellationToken,
}

/// A daemon that serves, or is ready to.
pub(crate) struct Daemon {
    /// Where the configuration comes from.
    sources: Sources,
    log: Logger,
    notifier: Arc<Notifier>,
    grace: Duration,
    running: Running,
    mirrors: Mirrors,
    /// Their names, as the status has them.
    mirrored: Vec<Arc<str>>,
    alerts: Alerts,
    watch: Watch,
    /// What anybody is told of.
    told: BTreeSet<health::Kind>,
    /// Why the last reload failed, if it did.
    reload_trouble: Option<String>,
}

impl Daemon {
    /// Binds every address and opens every file of `config`, which was read from `sources`, and
    /// begins to serve.
    ///
    /// # Errors
    /// The first that fails, with its service.
    pub(crate) async fn start(
        sources: Sources,
        config: &Config,
        inherited: Vec<Inherited>,
        workers: Workers,
        log: Logger,
    ) -> Result<Self, manager::Error> {
        raise_descriptor_limit();
        let mut running = Running::new(workers, inherited)?;
        create_mirror_folders(&running.readers, &config.mirrors).await;
        let prepared = running.prepare(config).await?;
        let grace = config.daemon.grace;
        running.change(prepared, grace);
        let (mirrors, mirrored) = (Mirrors::default(), Vec::new());
        let alerts = Alerts::default();
        let watch = Watch::new(alerts.reporter());
        let mut daemon = Self {
            sources,
            log,
            notifier: Arc::new(Notifier::from_env()),
            grace,
            running,
            mirrors,
            mirrored,
            alerts,
            watch,
            told: BTreeSet::new(),
            reload_trouble: None,
        };
        daemon.mirrors.prepare(&config.mirrors).map_err(manager::Error::Mirrors)?;
        daemon.alerts.prepare(&config.alerts).map_err(manager::Error::Alerts)?;
        daemon.change_alerts(&config.alerts);
        daemon.change_mirrors(&config.mirrors);
        Ok(daemon)
    }

    /// Serves until it is ordered to stop, and returns when the connections have finished or their
    /// grace is over. Requests in `reloads` are carried out.
    ///
    /// # Errors
    /// If a part of it ended unasked.
    pub(crate) async fn run(
        mut self,
        orders: Orders,
        mut reloads: ReloadQueue,
    ) -> Result<(), Ended> {
        let notifier = Arc::clone(&self.notifier);
        let notifying = tokio::spawn(send_keep_alives(notifier, self.running.loops().to_vec()));
        let status = self.status();
        tracing::info!("ready: {status}");
        self.notifier.ready(&status);

        let mut sums = interval_at(Instant::now() + SUM_UP_EVERY, SUM_UP_EVERY);
        let mut looks = interval(health::LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut clock = ClockWatch::default();
        clock.check(self.serves_time());
        let ended = loop {
            tokio::select! {
                () = orders.stop.cancelled() => break Ok(()),
                error = self.running.failure() => break Err(Ended(error)),
                _ = sums.tick() => {
                    self.sum_up();
                    self.running.services().for_each(|served| served.note_limit_recovered());
                    self.running.forget_who_has_left();
                    clock.check(self.serves_time());
                }
                _ = looks.tick(), if !self.told.is_empty() => self.look(),
                Some(waiting) = reloads.next() => tokio::select! {
                    () = orders.stop.cancelled() => break Ok(()),
                    reply = self.reload() => waiting.answer(&reply),
                },
            }
        };
        // Clients that wait for a reload learn that there will be none.
        drop(reloads);
        self.stop(&orders).await;
        notifying.abort();
        ended
    }

    fn serves_time(&self) -> bool {
        self.running.services().any(|served| served.service.datagrams().is_some())
    }

    /// Becomes what the configuration now says, or stays as it is and says why.
    async fn reload(&mut self) -> Reply {
        self.notifier.reloading();
        let before = self.status();
        let (status, reply) = match self.try_to_reload().await {
            Ok(summary) => {
                self.running.monitor.count_reload(Reload::Done);
                self.reload_trouble = None;
                let Summary { added, changed, removed, kept } = summary;
                let status = self.status();
                let services = [
                    (added, "added"),
                    (changed, "changed"),
                    (removed, "removed"),
                    (kept, "unchanged"),
                ];
                let summary = format!("reloaded: {}; {status}", tally("service", &services));
                tracing::info!(added, changed, removed, kept, "{summary}");
                (status, Reply::Reloaded { summary })
            }
            Err(error) => {
                self.running.monitor.count_reload(Reload::Failed);
                let text = error_chain(&error);
                for problem in text.lines() {
                    tracing::error!("reload failed, nothing was changed: {problem}");
                }
                let first = text.lines().next().unwrap_or_default();
                self.reload_trouble = Some(first.to_owned());
                let status = format!("{before}; reload failed, nothing was changed: {first}");
                (status, Reply::rejected(&text))
            }
        };
        // Before the reply: `systemctl reload` ends with the client that waits for it.
        self.notifier.ready(&status);
        reply
    }

    async fn try_to_reload(&mut self) -> Result<Summary, ReloadError> {
        let (sources, running) = (self.sources.clone(), self.running.settings());
        let pool = Arc::clone(&self.running.readers);
        let reading = pool.run("", move || Validated::read(&sources));
        let reading = timeout(manager::PATIENCE, reading).await.map_err(|_| ReloadError::Hangs)?;
        let validated = reading.map_err(ReloadError::Lost)?.map_err(ReloadError::Configuration)?;
        let config = validated.probe_to_serve(&pool, &running).await;
        let config = config.map_err(ReloadError::Configuration)?;
        let log = self.log.prepare(&config.log).map_err(ReloadError::Log)?;
        let prepared = self.running.prepare(&config).await?;
        self.mirrors.prepare(&config.mirrors).map_err(manager::Error::Mirrors)?;
        self.alerts.prepare(&config.alerts).map_err(manager::Error::Alerts)?;
        // Nothing can fail from here on.
        create_mirror_folders(&self.running.readers, &config.mirrors).await;
        self.log.change(log);
        self.grace = config.daemon.grace;
        self.change_alerts(&config.alerts);
        self.change_mirrors(&config.mirrors);
        Ok(self.running.change(prepared, self.grace))
    }

    fn change_alerts(&mut self, settings: &AlertSettings) {
        self.alerts.change(settings);
        self.running.monitor.watch_alerts(self.alerts.counts());
        self.told = settings.told();
        self.watch.forget_all_but(&self.told);
        if self.told.contains(&health::Kind::ClockUnsynchronized)
            && let Err(error) = Health::read()
        {
            let cause = error.to_string();
            tracing::info!(
                cause,
                "nobody is told if the clock is not synchronized: its state may not be read \
                 ({cause}; see clock-state.conf)"
            );
        }
    }

    /// Looks at what is not well, for those who are to be told.
    fn look(&mut self) {
        let reload = self.reload_trouble.as_deref();
        let (services, mirrors) = (self.running.services(), self.mirrors.counts());
        self.watch.look(services, &mirrors, reload, &self.told);
    }

    fn change_mirrors(&mut self, wanted: &[MirrorSettings]) {
        let had = !self.mirrored.is_empty();
        let mirrors::Summary { started, changed, ended, kept } =
            self.mirrors.change(wanted, &self.alerts.reporter());
        self.mirrored = wanted.iter().map(|mirror| Arc::clone(mirror.name())).collect();
        self.running.monitor.watch_mirrors(self.mirrors.counts());
        if had || !wanted.is_empty() {
            tracing::info!(
                started,
                changed,
                ended,
                kept,
                "mirrors: {started} started, {changed} changed, {ended} ended, {kept} unchanged"
            );
        }
    }

    async fn stop(&mut self, orders: &Orders) {
        self.mirrors.stop();
        // What has happened since the last look is told, too.
        if !self.told.is_empty() {
            self.look();
        }
        self.notifier.stopping("finishing the connections that are under way");
        let connections = self.running.under_way();
        tokio::select! {
            () = self.running.drain() => {}
            () = orders.stop_now.cancelled() => {}
        }
        let under_way = connections.len();
        let draining = counted(under_way, "connection");
        tracing::info!(connections = under_way, "stopping: {draining} may finish");
        let (mirrors, alerts) = (&mut self.mirrors, &mut self.alerts);
        let outbound = async {
            // What they have brought is told, too.
            mirrors.ended().await;
            alerts.stop();
            alerts.ended().await;
        };
        let finished = async { tokio::join!(connections.wait(), outbound) };
        tokio::select! {
            _ = finished => {}
            () = tokio::time::sleep(self.grace) => {}
            () = orders.stop_now.cancelled() => {}
        }
        let reset = connections.len();
        self.running.end(RESET_TIME).await;
        self.sum_up();
        tracing::info!(reset, "stopped: {} reset", counted(reset, "connection"));
    }

    fn sum_up(&self) {
        self.running.services().for_each(|served| served.sum_up());
        let all = self.log.lost();
        let lost = all - self.running.monitor.note_lost_lines(all);
        if lost > 0 {
            let (lines, were) = (counted(lost, "log line"), agree(lost, "was", "were"));
            tracing::warn!(lost, "{lines} {were} lost: the log's reader is too slow or gone");
        }
    }

    /// The line that the service manager shows.
    fn status(&self) -> String {
        let names: Vec<&str> = self.running.services().map(|served| &**served.name()).collect();
        let addresses = self.running.addresses();
        let addresses = counted(addresses, "address");
        let serving = format!("serving {} on {addresses}", names.join(", "));
        let mirroring = format!("mirroring {}", self.mirrored.join(", "));
        match (names.is_empty(), self.mirrored.is_empty()) {
            (_, true) => serving,
            (true, false) => mirroring,
            (false, false) => format!("{serving}, {mirroring}"),
        }
    }
}

/// Creates the folders that mirrors fill, so that a service finds an empty one before the first run
/// has ended. A folder that cannot be created is reported by the mirror's first run.
async fn create_mirror_folders(readers: &BlockingPool, mirrors: &[MirrorSettings]) {
    if mirrors.is_empty() {
        return;
    }
    let folders: Vec<_> = mirrors.iter().map(|mirror| mirror.folder().to_owned()).collect();
    let create = move || folders.iter().for_each(|folder| drop(fs::create_dir_all(folder)));
    let _ = timeout(CREATE_TIMEOUT, readers.run("", create)).await;
}

/// Sends the watchdog's keep-alives, and retries notifications that the manager did not take.
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

/// Raises the soft limit of open files to the hard one: what is open is bounded by the
/// configuration, and the soft limit is there for programs that use select(2).
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // If it fails, the limit is as it was, which the listeners live with.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
