//! The difference between what runs and what is configured: which services stay as they are, and
//! where each socket comes from.
//!
//! Everything here is arithmetic on names and addresses; [`crate::daemon`] carries it out. A start
//! is a reload of a daemon that has nothing but the sockets that it inherited.

use std::sync::Arc;

use crate::config::{Endpoint, Listen, Service};

/// A socket that the daemon has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Where it listens, as it was configured or inherited.
    pub endpoint: Endpoint,
    /// Its name, if the service manager has passed it.
    pub inherited: Option<String>,
    /// The service that it is for; none yet if it has just been inherited.
    pub service: Option<Arc<str>>,
}

/// What becomes of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is new.
    Add,
    /// It stays as it is: this one of those that run.
    Keep(usize),
    /// What it serves stays, what it may take changes.
    Limit(usize),
    /// Another takes its place.
    Replace(usize),
}

/// Where a socket comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// It is there: this one of those that are held.
    Held(usize),
    /// It has to be bound.
    Bind(Endpoint),
}

/// A service of the new configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What it is to those that run.
    pub change: Change,
    /// Its sockets.
    pub sockets: Vec<Origin>,
}

/// What leads from what runs to what is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// One for each service of the new configuration, in its order.
    pub steps: Vec<Step>,
    /// The running services that go.
    pub removed: Vec<usize>,
    /// The held sockets that go.
    pub closed: Vec<usize>,
}

/// A configuration that does not fit the inherited sockets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Clients of this socket would wait for ever.
    #[error(
        "no service listens on {endpoint}, which was inherited from systemd under the name \
         {name:?}: name it in a `listen`, or take it out of the socket unit and restart that"
    )]
    Unnamed {
        /// The socket's address.
        endpoint: Endpoint,
        /// Its `FileDescriptorName=`.
        name: String,
    },
    /// Nothing was inherited under this name.
    #[error(
        "{service}: systemd passed no socket of the name {name:?} that no address names: expected \
         a socket unit with FileDescriptorName={name}"
    )]
    Missing {
        /// The service that wanted it.
        service: Arc<str>,
        /// The name that it asked for.
        name: String,
    },
    /// The socket receives datagrams, which the service does not answer.
    #[error(
        "{service}: answers no datagrams, but systemd passed {endpoint} under the name {name:?}"
    )]
    Datagrams {
        /// The service that wanted it.
        service: Arc<str>,
        /// The socket's address.
        endpoint: Endpoint,
        /// Its `FileDescriptorName=`.
        name: String,
    },
}

/// What leads from the services in `running` and the sockets in `held` to the services in `wanted`.
///
/// # Errors
/// Every inherited socket that does not fit.
pub fn difference(
    running: &[&Service],
    held: &[Held],
    wanted: &[Service],
) -> Result<Difference, Vec<Mismatch>> {
    let changes = wanted.iter().map(|wanted| change(running, wanted));
    let removed = (0..running.len())
        .filter(|index| !wanted.iter().any(|wanted| Some(&wanted.name) == name(running, *index)))
        .collect();

    let mut assignment = Assignment { held, taken: vec![false; held.len()] };
    let mut sockets: Vec<Vec<Origin>> = wanted.iter().map(|_| Vec::new()).collect();
    let mut mismatches = Vec::new();
    // Addresses before names, and a service's own sockets before others', so that what can stay
    // stays, whatever the order of the services.
    let owned = wanted.iter().map(|service| assignment.own(service)).collect::<Vec<_>>();
    for (owned, sockets) in owned.into_iter().zip(&mut sockets) {
        sockets.extend(assignment.at_addresses(owned));
    }
    for (service, sockets) in wanted.iter().zip(&mut sockets) {
        for name in service.listen.iter().filter_map(Listen::inherited) {
            let found = assignment.named(name);
            if found.is_empty() {
                let (service, name) = (Arc::clone(&service.name), name.to_owned());
                mismatches.push(Mismatch::Missing { service, name });
            }
            sockets.extend(found.into_iter().map(Origin::Held));
        }
    }
    mismatches.extend(datagrams_unanswered(held, wanted, &sockets));

    let mut closed = Vec::new();
    for (index, (held, taken)) in held.iter().zip(assignment.taken).enumerate() {
        match &held.inherited {
            _ if taken => {}
            None => closed.push(index),
            Some(name) => {
                let (endpoint, name) = (held.endpoint.clone(), name.clone());
                mismatches.push(Mismatch::Unnamed { endpoint, name });
            }
        }
    }
    if !mismatches.is_empty() {
        return Err(mismatches);
    }
    let steps = changes.zip(sockets).map(|(change, sockets)| Step { change, sockets }).collect();
    Ok(Difference { steps, removed, closed })
}

fn name<'a>(running: &[&'a Service], index: usize) -> Option<&'a Arc<str>> {
    running.get(index).map(|service| &service.name)
}

fn change(running: &[&Service], wanted: &Service) -> Change {
    let before = running.iter().enumerate().find(|(_, running)| running.name == wanted.name);
    match before {
        None => Change::Add,
        Some((index, before)) if before.settings != wanted.settings => Change::Replace(index),
        Some((index, before)) if before.limits != wanted.limits => Change::Limit(index),
        Some((index, _)) => Change::Keep(index),
    }
}

/// Which of the held sockets have found their service.
struct Assignment<'a> {
    held: &'a [Held],
    taken: Vec<bool>,
}

impl Assignment<'_> {
    fn take(&mut self, fits: impl Fn(&Held) -> bool) -> Option<usize> {
        let free = self.held.iter().zip(&mut self.taken).enumerate();
        let (index, (_, taken)) =
            free.into_iter().find(|(_, (held, taken))| !**taken && fits(held))?;
        *taken = true;
        Some(index)
    }

    /// For each address of `service`, the socket that it has there already.
    fn own(&mut self, service: &Service) -> Vec<(Endpoint, Option<usize>)> {
        let addresses = service.listen.iter().filter_map(Listen::endpoint);
        let own = |held: &Held| held.service.as_ref() == Some(&service.name);
        addresses
            .map(|at| (at.clone(), self.take(|held| own(held) && held.endpoint == *at)))
            .collect()
    }

    /// A socket for each address: its own, another's, or a new one.
    fn at_addresses(&mut self, owned: Vec<(Endpoint, Option<usize>)>) -> Vec<Origin> {
        let find = |(at, own): (Endpoint, Option<usize>)| {
            let held = own.or_else(|| self.take(|held| held.endpoint == at));
            held.map_or(Origin::Bind(at), Origin::Held)
        };
        owned.into_iter().map(find).collect()
    }

    /// Every inherited socket of that name that is left.
    fn named(&mut self, name: &str) -> Vec<usize> {
        std::iter::from_fn(|| self.take(|held| held.inherited.as_deref() == Some(name))).collect()
    }
}

fn datagrams_unanswered<'a>(
    held: &'a [Held],
    wanted: &'a [Service],
    sockets: &'a [Vec<Origin>],
) -> impl Iterator<Item = Mismatch> + 'a {
    let silent = wanted.iter().zip(sockets).filter(|(service, _)| !service.settings.datagrams());
    silent.flat_map(move |(service, sockets)| {
        sockets.iter().filter_map(move |origin| {
            let Origin::Held(index) = origin else { return None };
            let Held { endpoint, inherited, .. } = held.get(*index)?;
            let (Endpoint::Udp(_), Some(name)) = (endpoint, inherited) else { return None };
            Some(Mismatch::Datagrams {
                service: Arc::clone(&service.name),
                endpoint: endpoint.clone(),
                name: name.clone(),
            })
        })
    })
}
