//! Services: their tables, and the sockets that they listen on.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config_reader::{
    Diagnostic, Findings, PathKind, Question, Reported, Spanned, Table, values_of,
};
use crate::net::access::parse_network;
use crate::net::connection::Deadlines;
use crate::net::endpoint::{Endpoint, Listen, ListenSpec};
use crate::net::limits::Limits;
use crate::services::{Kind, Settings};

/// Maximum number of addresses of all services together.
const MAX_ADDRESSES: usize = 1024;

/// The settings of a service.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Service {
    /// Its kind and name, such as `time.clock`.
    pub name: Arc<str>,
    /// At least one socket.
    pub listen: Vec<Spanned<Listen>>,
    pub limits: Limits,
    pub settings: Settings,
}

/// A valid table of a service, before the probe stage.
#[derive(Debug)]
pub(super) struct ServiceSpec {
    name: Arc<str>,
    listen: Vec<Spanned<ListenSpec>>,
    limits: Limits,
    settings: Settings,
}

impl ServiceSpec {
    pub(super) fn read_named(
        kind: &Kind,
        name: &str,
        table: Table<'_>,
        limits: &Limits,
    ) -> Result<Self, Reported> {
        let checked = table.check_name(name);
        let read = Self::read(kind, format!("{}.{name}", kind.name).into(), table, limits);
        checked.and(read)
    }

    /// Reads `[metrics]`, whose clients are few and quick.
    pub(super) fn read_metrics(
        kind: &Kind,
        table: Table<'_>,
        limits: &Limits,
    ) -> Result<Self, Reported> {
        const MAX_CONNECTIONS: NonZeroU32 = NonZeroU32::new(64).unwrap();
        const MAX_PER_CLIENT: NonZeroU32 = NonZeroU32::new(32).unwrap();
        let limits = Limits {
            max_connections: MAX_CONNECTIONS,
            max_per_client: MAX_PER_CLIENT,
            deadlines: Deadlines { idle: Duration::from_secs(5), total: Duration::from_secs(10) },
            ..limits.clone()
        };
        Self::read(kind, kind.name.into(), table, &limits)
    }

    fn read(
        kind: &Kind,
        name: Arc<str>,
        mut table: Table<'_>,
        limits: &Limits,
    ) -> Result<Self, Reported> {
        let listen = read_listen(kind, &mut table);
        let limits = Limits::read(&mut table, limits);
        // Not a key of `[limits]`: monitoring connects without a header.
        let balancers = table.texts("proxy-protocol", parse_network);
        let settings = (kind.read)(&mut table);
        table.finish();
        Ok(Self {
            name,
            listen: listen?,
            limits: Limits { balancers: values_of(balancers?), ..limits? },
            settings: settings?,
        })
    }

    /// Completes the service by the answers to its probes; `None` if one is missing.
    pub(super) fn complete(self, findings: &Findings) -> Option<Service> {
        let Self { name, listen, limits, settings } = self;
        let mut resolved = Vec::new();
        for Spanned { value, origin } in listen {
            match value {
                ListenSpec::Socket(value) => resolved.push(Spanned { value, origin }),
                ListenSpec::Host { is_udp, host, port } => {
                    let addresses = findings.addresses.get(&(host, port))?.iter();
                    resolved.extend(addresses.map(|address| Spanned {
                        value: Listen::At(Endpoint::new(is_udp, *address)),
                        origin: origin.clone(),
                    }));
                }
            }
        }
        let settings = settings.complete(findings)?;
        Some(Service { name, listen: resolved, limits, settings })
    }
}

fn read_listen(kind: &Kind, table: &mut Table<'_>) -> Result<Vec<Spanned<ListenSpec>>, Reported> {
    let base_dir = table.base_dir();
    let listen = table.texts_or("listen", kind.default_listen, |text| {
        let spec = ListenSpec::parse(text, base_dir)?;
        if spec.is_udp() && !kind.answers_datagrams {
            let kind = kind.name;
            return Err(format!("a {kind} service answers no datagrams; expected TCP or unix:"));
        }
        Ok((text.to_owned(), spec))
    })?;
    if listen.is_empty() {
        return Err(table.report("listen", "empty; expected at least one address"));
    }
    if listen.len() > MAX_ADDRESSES {
        return Err(table.report("listen", too_many()));
    }
    let resolve = |spanned: Spanned<(String, ListenSpec)>| {
        if let (text, ListenSpec::Host { host, port, .. }) = &spanned.value {
            let question = Question::Resolve { host: host.clone(), port: *port };
            table.probe_at(spanned.origin.clone(), text, question);
        }
        spanned.map(|(_, spec)| spec)
    };
    Ok(listen.into_iter().map(resolve).collect())
}

fn too_many() -> String {
    format!("expected at most {MAX_ADDRESSES} addresses in total")
}

/// Finds addresses that are configured twice, in one service or in two.
pub(super) fn find_conflicts(services: &[Service]) -> Vec<Diagnostic> {
    let mut diagnostics = Vec::new();
    let mut taken: Vec<(&Service, &Listen)> = Vec::new();
    let listens =
        services.iter().flat_map(|service| service.listen.iter().map(move |l| (service, l)));
    for (service, listen) in listens {
        if taken.len() == MAX_ADDRESSES {
            diagnostics.push(listen.origin.diagnostic(too_many()));
            break;
        }
        match taken.iter().find(|(_, taken)| taken.conflicts_with(listen)) {
            None => taken.push((service, &listen.value)),
            Some((other, taken)) => {
                let (wanted, other) = (&listen.value, &other.name);
                diagnostics.push(listen.origin.diagnostic(format_args!(
                    "{wanted} conflicts with {taken} of {other}; expected another address"
                )));
            }
        }
    }
    diagnostics
}

/// The paths of running services. They are valid while their file systems hang.
pub(super) fn served_paths(running: &[Settings]) -> HashMap<PathBuf, PathKind> {
    let served = running.iter().filter_map(Settings::served_path);
    served.map(|(path, kind)| (path.to_owned(), kind)).collect()
}
