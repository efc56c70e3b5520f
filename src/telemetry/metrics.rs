//! Metrics in the `OpenMetrics` text format, which Prometheus reads, and the health of the daemon.
//!
//! Each request encodes the current counters of the services; nothing is stored for monitoring.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use jiff::Timestamp;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::clock::Health;
use crate::telemetry::counters::{Counter, Counts, Label};
use crate::telemetry::event;
use crate::telemetry::mirror_stats::MirrorStats;

/// The media type of [`Monitor::metrics`].
pub(crate) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The outcome of a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// The configuration is in force.
    Done,
    /// The configuration has a fault; nothing was changed.
    Failed,
}

impl Label for Reload {
    const NAMED: &'static [(Self, &'static str)] =
        &[(Self::Done, "done"), (Self::Failed, "failed")];
}

/// The measurements of a running service.
pub(crate) trait ServiceStats: Send + Sync + fmt::Debug {
    /// Name of the service, such as `time.clock`.
    fn name(&self) -> &str;
    fn counts(&self) -> &Counts;
    fn max_connections(&self) -> u32;
    fn answers_datagrams(&self) -> bool;
    fn file_version(&self) -> Option<Timestamp>;
    /// Returns the reason why the service is not healthy.
    fn problem(&self) -> Option<String>;
}

/// The state of the daemon for monitoring.
#[derive(Debug, Default)]
pub struct Monitor {
    /// Weak, because the metrics service holds this monitor.
    services: Mutex<Vec<Weak<dyn ServiceStats>>>,
    mirrors: Mutex<Vec<Arc<MirrorStats>>>,
    alerts: Mutex<Vec<Arc<event::ChannelCounters>>>,
    reloads: Counter<Reload>,
    last_reload_failed: AtomicBool,
    draining: AtomicBool,
    lost_lines: AtomicU64,
}

impl Monitor {
    /// Replaces the services to report.
    pub(crate) fn set_services(&self, services: Vec<Weak<dyn ServiceStats>>) {
        *self.services.lock() = services;
    }

    /// Replaces the mirrors to report.
    pub(crate) fn set_mirrors(&self, mirrors: Vec<Arc<MirrorStats>>) {
        *self.mirrors.lock() = mirrors;
    }

    /// Replaces the alert channels to report.
    pub fn set_alerts(&self, alerts: Vec<Arc<event::ChannelCounters>>) {
        *self.alerts.lock() = alerts;
    }

    /// Counts a reload that has ended.
    pub fn count_reload(&self, reload: Reload) {
        self.reloads.add(reload);
        self.last_reload_failed.store(reload == Reload::Failed, Ordering::Relaxed);
    }

    /// Sets the total number of lost log lines. Returns the previous number.
    pub fn replace_lost_lines(&self, lost: u64) -> u64 {
        self.lost_lines.swap(lost, Ordering::Relaxed)
    }

    /// Records that the daemon is stopping.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn services(&self) -> Vec<Arc<dyn ServiceStats>> {
        self.services.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Returns the current problems, one line each.
    pub fn problems(&self) -> Vec<String> {
        let draining = self.draining.load(Ordering::Relaxed);
        let draining = draining.then(|| "the daemon is stopping".to_owned());
        let services = self.services();
        let of_services = services.iter().filter_map(|service| {
            service.problem().map(|problem| format!("{}: {problem}", service.name()))
        });
        draining.into_iter().chain(of_services).collect()
    }

    /// Returns all metrics as text.
    pub fn metrics(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("handout");
        registry.register_collector(Box::new(Snapshot {
            services: self.services(),
            mirrors: self.mirrors.lock().clone(),
            alerts: self.alerts.lock().clone(),
            reloads: self.reloads.each().collect(),
            last_reload_successful: !self.last_reload_failed.load(Ordering::Relaxed),
            lost_lines: self.lost_lines.load(Ordering::Relaxed),
            clock: Health::read().ok(),
        }));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// The values of one reply.
#[derive(Debug)]
struct Snapshot {
    services: Vec<Arc<dyn ServiceStats>>,
    mirrors: Vec<Arc<MirrorStats>>,
    alerts: Vec<Arc<event::ChannelCounters>>,
    reloads: Vec<(Reload, u64)>,
    last_reload_successful: bool,
    lost_lines: u64,
    /// `None` if the kernel refuses access to its clock state.
    clock: Option<Health>,
}

impl Collector for Snapshot {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        self.connections(&mut to)?;
        self.by_label(
            &mut to,
            ("datagrams", "Received datagrams, by outcome"),
            "outcome",
            |service| service.answers_datagrams().then_some(&service.counts().datagrams),
        )?;
        self.files(&mut to)?;
        // Omitted, with their descriptions, in a daemon without mirrors.
        if !self.mirrors.is_empty() {
            self.mirrors(&mut to)?;
        }
        if !self.alerts.is_empty() {
            self.alerts(&mut to)?;
        }
        self.daemon(&mut to)
    }
}

impl Snapshot {
    fn connections(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.by_label(
            to,
            ("connections", "Closed connections, by outcome"),
            "outcome",
            |service| Some(&service.counts().outcomes),
        )?;
        self.by_label(
            to,
            ("refused", "Connections rejected before they were served, by reason"),
            "reason",
            |service| Some(&service.counts().rejections),
        )?;
        self.gauges(to, ("connections_active", "Open connections"), None, |service| {
            Some(service.counts().active())
        })?;
        self.gauges(
            to,
            ("connections_max", "Maximum number of simultaneous connections (max-connections)"),
            None,
            |service| Some(service.max_connections().into()),
        )?;
        let help = "Bytes passed to the kernel for clients";
        let mut sent =
            to.encode_descriptor("sent", help, Some(&Unit::Bytes), MetricType::Counter)?;
        for service in &self.services {
            let number = ConstCounter::new(service.counts().sent());
            number.encode(sent.encode_family(&[("service", service.name())])?)?;
        }
        let help = "Duration of connections from accept to close";
        let kind = MetricType::Histogram;
        let mut durations =
            to.encode_descriptor("connection_duration", help, Some(&Unit::Seconds), kind)?;
        for service in &self.services {
            let (sum, buckets) = service.counts().durations.read();
            let count = buckets.iter().map(|(_, count)| count).sum();
            durations
                .encode_family(&[("service", service.name())])?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn files(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Modification time of the served version of the file, since 1970";
        self.gauges(to, ("file_version_timestamp", help), Some(&Unit::Seconds), |service| {
            service.file_version().and_then(|modified| modified.as_second().try_into().ok())
        })?;
        let help = "1 if the service can accept clients and read its files";
        self.gauges(to, ("service_healthy", help), None, |service| {
            Some(u64::from(service.problem().is_none()))
        })
    }

    fn mirrors(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = MetricType::Counter;
        let help = "Files of mirrors, by the outcome of each sync";
        let mut files = to.encode_descriptor("mirror_files", help, None, kind)?;
        for mirror in &self.mirrors {
            for (outcome, count) in mirror.files.each() {
                let labels = [("mirror", &*mirror.name), ("outcome", outcome.name())];
                ConstCounter::new(count).encode(files.encode_family(&labels)?)?;
            }
        }
        let help = "Syncs of mirrors, by outcome";
        let mut runs = to.encode_descriptor("mirror_runs", help, None, kind)?;
        for mirror in &self.mirrors {
            for (outcome, count) in mirror.syncs.each() {
                let labels = [("mirror", &*mirror.name), ("outcome", outcome.name())];
                ConstCounter::new(count).encode(runs.encode_family(&labels)?)?;
            }
        }
        let help = "Bytes of files received by mirrors";
        let mut received =
            to.encode_descriptor("mirror_received", help, Some(&Unit::Bytes), kind)?;
        for mirror in &self.mirrors {
            let labels = [("mirror", &*mirror.name)];
            ConstCounter::new(mirror.received.load(Ordering::Relaxed))
                .encode(received.encode_family(&labels)?)?;
        }
        let (kind, unit) = (MetricType::Gauge, Some(&Unit::Seconds));
        let help = "End of the last complete sync of a mirror, since 1970";
        let mut last = to.encode_descriptor("mirror_last_success_timestamp", help, unit, kind)?;
        for mirror in &self.mirrors {
            if let Some(seconds) = mirror.last().success {
                let labels = [("mirror", &*mirror.name)];
                ConstGauge::new(seconds).encode(last.encode_family(&labels)?)?;
            }
        }
        let help = "Duration of the last sync of a mirror";
        let mut took = to.encode_descriptor("mirror_run", help, unit, kind)?;
        for mirror in &self.mirrors {
            if let Some(duration) = mirror.last().duration {
                let labels = [("mirror", &*mirror.name)];
                ConstGauge::new(duration.as_secs_f64()).encode(took.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn alerts(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Alerts and attempts to send them, by outcome";
        let mut alerts = to.encode_descriptor("alerts", help, None, MetricType::Counter)?;
        for counts in &self.alerts {
            for (outcome, count) in counts.outcomes.each() {
                let labels = [("channel", &*counts.channel), ("outcome", outcome.name())];
                ConstCounter::new(count).encode(alerts.encode_family(&labels)?)?;
            }
        }
        let help = "Alerts waiting to be sent";
        let mut queued = to.encode_descriptor("alerts_queued", help, None, MetricType::Gauge)?;
        for counts in &self.alerts {
            let labels = [("channel", &*counts.channel)];
            ConstGauge::new(counts.queued()).encode(queued.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn daemon(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Reloads, by outcome";
        let mut reloads = to.encode_descriptor("reloads", help, None, MetricType::Counter)?;
        for (reload, count) in &self.reloads {
            let number = ConstCounter::new(*count);
            number.encode(reloads.encode_family(&[("outcome", reload.name())])?)?;
        }
        let help = "Log lines discarded because their reader was too slow or gone";
        let lost = to.encode_descriptor("log_lines_lost", help, None, MetricType::Counter)?;
        ConstCounter::new(self.lost_lines).encode(lost)?;
        let mut gauge = |name, help, unit: Option<&Unit>, value: f64| -> fmt::Result {
            let gauge = to.encode_descriptor(name, help, unit, MetricType::Gauge)?;
            ConstGauge::new(value).encode(gauge)
        };
        let truth = |truth| if truth { 1.0 } else { 0.0 };
        let help = "1 if the last reload succeeded, or none was requested yet";
        let successful = truth(self.last_reload_successful);
        gauge("config_last_reload_successful", help, None, successful)?;
        if let Some(clock) = self.clock {
            let help = "1 if the kernel reports its clock as synchronized";
            gauge("clock_synchronized", help, None, truth(clock.synchronized))?;
            let help = "Maximum error of the clock as reported by the kernel";
            #[expect(clippy::cast_precision_loss, reason = "the kernel stops at 16 seconds")]
            let seconds = clock.max_error_us as f64 / 1e6;
            gauge("clock_max_error", help, Some(&Unit::Seconds), seconds)?;
        }
        // A gauge that is always 1, as in Prometheus itself: not all readers know the type `info`.
        let help = "Version of handout";
        let mut build = to.encode_descriptor("build_info", help, None, MetricType::Gauge)?;
        let labels = [("version", env!("CARGO_PKG_VERSION"))];
        ConstGauge::new(1_u64).encode(build.encode_family(&labels)?)
    }

    /// Encodes a counter with one value for each label, for the services that have it.
    fn by_label<L: Label>(
        &self,
        to: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        label: &str,
        counter: impl Fn(&dyn ServiceStats) -> Option<&Counter<L>>,
    ) -> fmt::Result {
        let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
        for service in &self.services {
            for (value, count) in counter(&**service).into_iter().flat_map(Counter::each) {
                let labels = [("service", service.name()), (label, value.name())];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    /// Encodes a gauge for the services that have a value.
    fn gauges(
        &self,
        to: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        unit: Option<&Unit>,
        value: impl Fn(&dyn ServiceStats) -> Option<u64>,
    ) -> fmt::Result {
        let mut family: MetricEncoder<'_> =
            to.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for service in &self.services {
            if let Some(value) = value(&**service) {
                let labels = [("service", service.name())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
