//! The difference between what runs and what is configured: which services stay as they are, and
//! where each socket comes from.
//!
//! Everything here is arithmetic on names and addresses; [`crate::daemon::manager`] carries it out. A start
//! is a reload of a daemon that has nothing but the sockets that it inherited.

use std::sync::Arc;

use crate::config::Service;
use crate::net::endpoint::Endpoint;

/// A socket that the daemon has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeldSocket {
    /// Where it listens, as it was configured or inherited.
    pub endpoint: Endpoint,
    /// Its name, if the service manager has passed it.
    pub inherited: Option<String>,
    /// The service that it is for; none yet if it has just been inherited.
    pub service: Option<Arc<str>>,
    /// It serves no longer, as the file of a Unix socket that somebody has removed.
    pub stale: bool,
}

/// What becomes of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
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
pub(crate) enum SocketSource {
    /// It is there: this one of those that are held.
    Held(usize),
    /// It has to be bound.
    Bind(Endpoint),
}

/// A service of the new configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    /// What it is to those that run.
    pub change: Change,
    /// Its sockets.
    pub sockets: Vec<SocketSource>,
}

/// What leads from what runs to what is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReloadPlan {
    /// One for each service of the new configuration, in its order.
    pub steps: Vec<Step>,
    /// The running services that go.
    pub removed: Vec<usize>,
    /// The held sockets that go.
    pub closed: Vec<usize>,
}

/// A configuration that does not fit the inherited sockets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ActivationError {
    /// Clients of this socket would wait for ever.
    #[error(
        "no service listens on {endpoint}, which was inherited from systemd under the name \
         {name:?}: say so in a `listen`, by its address or as \"systemd:{name}\", or take it out of \
         the socket unit and restart that"
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
pub(crate) fn difference(
    running: &[&Service],
    held: &[HeldSocket],
    wanted: &[Service],
) -> Result<ReloadPlan, Vec<ActivationError>> {
    let changes = wanted.iter().map(|wanted| change(running, wanted));
    let stays = |running: &Service| wanted.iter().any(|wanted| wanted.name == running.name);
    let gone = running.iter().enumerate().filter(|(_, running)| !stays(running));
    let removed = gone.map(|(index, _)| index).collect();

    let mut assignment = SocketMatcher { held, taken: vec![false; held.len()] };
    let mut sockets: Vec<Vec<SocketSource>> = wanted.iter().map(|_| Vec::new()).collect();
    let mut mismatches = Vec::new();
    // Addresses before names, and a service's own sockets before others', so that what can stay
    // stays, whatever the order of the services.
    let owned = wanted.iter().map(|service| assignment.own(service)).collect::<Vec<_>>();
    for (owned, sockets) in owned.into_iter().zip(&mut sockets) {
        sockets.extend(assignment.at_addresses(owned));
    }
    for (service, sockets) in wanted.iter().zip(&mut sockets) {
        for name in service.listen.iter().filter_map(|listen| listen.inherited()) {
            let found = assignment.named(name);
            if found.is_empty() {
                let (service, name) = (Arc::clone(&service.name), name.to_owned());
                mismatches.push(ActivationError::Missing { service, name });
            }
            sockets.extend(found.into_iter().map(SocketSource::Held));
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
                mismatches.push(ActivationError::Unnamed { endpoint, name });
            }
        }
    }
    if !mismatches.is_empty() {
        return Err(mismatches);
    }
    let steps = changes.zip(sockets).map(|(change, sockets)| Step { change, sockets }).collect();
    Ok(ReloadPlan { steps, removed, closed })
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
struct SocketMatcher<'a> {
    held: &'a [HeldSocket],
    taken: Vec<bool>,
}

impl SocketMatcher<'_> {
    fn take(&mut self, fits: impl Fn(&HeldSocket) -> bool) -> Option<usize> {
        let free = self.held.iter().zip(&mut self.taken).enumerate();
        let (index, (_, taken)) =
            free.into_iter().find(|(_, (held, taken))| !(**taken || held.stale) && fits(held))?;
        *taken = true;
        Some(index)
    }

    /// For each address of `service`, the socket that it has there already.
    fn own(&mut self, service: &Service) -> Vec<(Endpoint, Option<usize>)> {
        let addresses = service.listen.iter().filter_map(|listen| listen.endpoint());
        let own = |held: &HeldSocket| held.service.as_ref() == Some(&service.name);
        addresses
            .map(|at| (at.clone(), self.take(|held| own(held) && held.endpoint == *at)))
            .collect()
    }

    /// A socket for each address: its own, another's, or a new one.
    fn at_addresses(&mut self, owned: Vec<(Endpoint, Option<usize>)>) -> Vec<SocketSource> {
        let find = |(at, own): (Endpoint, Option<usize>)| {
            let held = own.or_else(|| self.take(|held| held.endpoint == at));
            held.map_or(SocketSource::Bind(at), SocketSource::Held)
        };
        owned.into_iter().map(find).collect()
    }

    /// Every inherited socket of that name that is left.
    fn named(&mut self, name: &str) -> Vec<usize> {
        std::iter::from_fn(|| self.take(|held| held.inherited.as_deref() == Some(name))).collect()
    }
}

fn datagrams_unanswered<'a>(
    held: &'a [HeldSocket],
    wanted: &'a [Service],
    sockets: &'a [Vec<SocketSource>],
) -> impl Iterator<Item = ActivationError> + 'a {
    let silent = wanted.iter().zip(sockets).filter(|(service, _)| !service.settings.datagrams());
    silent.flat_map(move |(service, sockets)| {
        sockets.iter().filter_map(move |origin| {
            let SocketSource::Held(index) = origin else { return None };
            let HeldSocket { endpoint, inherited, .. } = held.get(*index)?;
            let (Endpoint::Udp(_), Some(name)) = (endpoint, inherited) else { return None };
            Some(ActivationError::Datagrams {
                service: Arc::clone(&service.name),
                endpoint: endpoint.clone(),
                name: name.clone(),
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Format;
    use crate::config_reader::{Origin, Position, Spanned};
    use crate::net::endpoint::Listen;
    use crate::net::limits::Limits;
    use crate::services::{Settings, time};
    use jiff::tz::TimeZone;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::num::NonZeroU32;

    fn service(name: &str, listen: &[Listen], newline: bool, max: u32) -> Service {
        let settings = time::Settings {
            format: Format::Python,
            timezone: "UTC".to_owned(),
            zone: TimeZone::UTC,
            newline,
        };
        let max_connections = NonZeroU32::new(max).unwrap();
        Service {
            name: name.into(),
            listen: listen.iter().cloned().map(spanned).collect(),
            limits: Limits { max_connections, ..Limits::default() },
            settings: Settings::Time(settings),
        }
    }

    fn spanned(value: Listen) -> Spanned<Listen> {
        let position = Position::Argument("--time".to_owned());
        let origin = Origin { position, key: "listen".to_owned(), is_default: false };
        Spanned { value, origin }
    }

    fn tcp(port: u16) -> Endpoint {
        Endpoint::Tcp(([127, 0, 0, 1], port).into())
    }

    fn at(port: u16) -> Listen {
        Listen::At(tcp(port))
    }

    fn inherited(port: u16, name: &str) -> HeldSocket {
        HeldSocket {
            endpoint: tcp(port),
            inherited: Some(name.to_owned()),
            service: None,
            stale: false,
        }
    }

    /// What is held after a difference was carried out, and by whom.
    fn carried_out(
        held: &[HeldSocket],
        wanted: &[Service],
        difference: &ReloadPlan,
    ) -> Vec<HeldSocket> {
        let sockets = wanted.iter().zip(&difference.steps).flat_map(|(service, step)| {
            step.sockets.iter().map(|origin| {
                let socket = match origin {
                    SocketSource::Held(index) => held[*index].clone(),
                    SocketSource::Bind(endpoint) => HeldSocket {
                        endpoint: endpoint.clone(),
                        inherited: None,
                        service: None,
                        stale: false,
                    },
                };
                HeldSocket { service: Some(Arc::clone(&service.name)), ..socket }
            })
        });
        sockets.collect()
    }

    fn started(held: &[HeldSocket], wanted: &[Service]) -> Vec<HeldSocket> {
        carried_out(held, wanted, &difference(&[], held, wanted).unwrap())
    }

    #[test]
    fn a_start_binds_what_was_not_inherited() {
        let wanted = [service("time.a", &[at(1), at(2)], true, 1)];
        let difference = difference(&[], &[inherited(2, "x.socket")], &wanted).unwrap();
        let sockets = vec![SocketSource::Bind(tcp(1)), SocketSource::Held(0)];
        assert_eq!(difference.steps, [Step { change: Change::Add, sockets }]);
    }

    #[test]
    fn a_name_stands_for_every_inherited_socket_that_no_address_names() {
        let named = Listen::Inherited("x".to_owned());
        let wanted = [service("time.a", &[named], true, 1), service("time.b", &[at(2)], true, 1)];
        let held = [inherited(1, "x"), inherited(2, "x"), inherited(3, "x")];
        let difference = difference(&[], &held, &wanted).unwrap();
        assert_eq!(difference.steps[0].sockets, [SocketSource::Held(0), SocketSource::Held(2)]);
        assert_eq!(difference.steps[1].sockets, [SocketSource::Held(1)]);
    }

    #[test]
    fn an_inherited_socket_that_nothing_names_is_a_mismatch_and_so_is_a_name_without_one() {
        let wanted = [service("time.a", &[Listen::Inherited("y".to_owned())], true, 1)];
        let mismatches = difference(&[], &[inherited(1, "x")], &wanted).unwrap_err();
        let said: Vec<_> = mismatches.iter().map(ToString::to_string).collect();
        assert!(said[0].starts_with("time.a: systemd passed no socket of the name \"y\""));
        assert!(said[1].starts_with("no service listens on 127.0.0.1:1"), "{said:?}");
        assert_eq!(said.len(), 2);
    }

    #[test]
    fn a_service_that_answers_no_datagrams_is_given_none() {
        let mut file = service("file.a", &[Listen::Inherited("x".to_owned())], true, 1);
        let folder = std::env::temp_dir();
        file.settings = Settings::Folder(crate::services::folder::Settings {
            folder: crate::fs::folder::Folder::open(&folder).unwrap(),
            cache_limit: 0,
            max_files: NonZeroU32::MIN,
        });
        let udp = Endpoint::Udp(([127, 0, 0, 1], 1).into());
        let held = [HeldSocket { endpoint: udp, ..inherited(1, "x") }];
        let mismatches = difference(&[], &held, &[file]).unwrap_err();
        assert!(mismatches[0].to_string().contains("answers no datagrams"), "{mismatches:?}");
    }

    #[test]
    fn a_socket_that_serves_no_longer_is_closed_and_bound_anew() {
        let wanted = [service("time.a", &[at(1)], true, 1)];
        let mut held = started(&[], &wanted);
        held[0].stale = true;
        let difference = difference(&[&wanted[0]], &held, &wanted).unwrap();
        assert_eq!(difference.steps[0].sockets, [SocketSource::Bind(tcp(1))]);
        assert_eq!(difference.closed, [0]);
    }

    #[test]
    fn what_changed_is_told_from_what_it_may_take() {
        let before = service("time.a", &[at(1)], true, 1);
        let change = |after: &Service| change(&[&before], after);
        assert_eq!(change(&before), Change::Keep(0));
        assert_eq!(change(&service("time.a", &[at(2)], true, 1)), Change::Keep(0));
        assert_eq!(change(&service("time.a", &[at(1)], true, 2)), Change::Limit(0));
        assert_eq!(change(&service("time.a", &[at(1)], false, 2)), Change::Replace(0));
        assert_eq!(change(&service("time.b", &[at(1)], true, 1)), Change::Add);
    }

    #[test]
    fn a_socket_goes_with_its_address_to_another_service() {
        let before = [service("time.a", &[at(1), at(2)], true, 1)];
        let held = started(&[], &before);
        let after = [service("time.b", &[at(2)], true, 1), service("time.a", &[at(3)], true, 1)];
        let difference = difference(&[&before[0]], &held, &after).unwrap();
        assert_eq!(difference.steps[0].sockets, [SocketSource::Held(1)]);
        assert_eq!(difference.steps[1].sockets, [SocketSource::Bind(tcp(3))]);
        assert_eq!(difference.closed, [0]);
        assert!(difference.removed.is_empty());
    }

    /// Addresses of every kind.
    fn address(number: u16) -> Endpoint {
        match number {
            1..=4 => tcp(number),
            5 | 6 => Endpoint::Udp(([127, 0, 0, 1], number).into()),
            _ => Endpoint::Unix(format!("/run/{number}").into()),
        }
    }

    /// Up to four services on addresses of their own.
    fn services() -> impl Strategy<Value = Vec<Service>> {
        let numbers = Just((1..=8).collect::<Vec<u16>>()).prop_shuffle();
        let names = prop::sample::subsequence(vec!["time.a", "time.b", "time.c", "time.d"], 0..=4);
        let settings = prop::collection::vec((any::<bool>(), 1u32..3, 1usize..=2), 4);
        (names.prop_shuffle(), numbers, settings).prop_map(|(names, numbers, settings)| {
            let mut addresses = numbers.into_iter().map(|number| Listen::At(address(number)));
            let each = names.into_iter().zip(settings);
            let service = |(name, (newline, max, count)): (&str, (bool, u32, usize))| {
                let listen: Vec<_> = addresses.by_ref().take(count).collect();
                service(name, &listen, newline, max)
            };
            each.map(service).collect()
        })
    }

    /// Two configurations that may have nothing in common, say the same in another order, or differ
    /// in one service.
    fn before_and_after() -> impl Strategy<Value = (Vec<Service>, Vec<Service>)> {
        let one_changes = (services(), any::<prop::sample::Index>(), any::<bool>(), 1u32..3);
        prop_oneof![
            (services(), services()),
            services().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle())),
            one_changes.prop_map(|(before, which, newline, max)| {
                let mut after = before.clone();
                if !before.is_empty() {
                    let one = after.swap_remove(which.index(before.len()));
                    let listen: Vec<_> =
                        one.listen.iter().map(|listen| listen.value.clone()).collect();
                    after.push(service(&one.name, &listen, newline, max));
                }
                (before, after)
            }),
        ]
    }

    fn listens(services: &[Service], at: &Endpoint) -> bool {
        services
            .iter()
            .any(|service| service.listen.iter().any(|listen| listen.endpoint() == Some(at)))
    }

    /// What a configuration says, whatever its order.
    fn meaning(services: &[Service]) -> Vec<Service> {
        let mut services = services.to_vec();
        services.sort_by(|one, other| one.name.cmp(&other.name));
        for service in &mut services {
            service.listen.sort_by_key(|listen| listen.endpoint().cloned());
        }
        services
    }

    /// Who listens where.
    fn listeners(held: &[HeldSocket]) -> BTreeSet<(Arc<str>, Endpoint)> {
        held.iter().map(|held| (held.service.clone().unwrap(), held.endpoint.clone())).collect()
    }

    /// Whether there is nothing to be done.
    fn is_empty(difference: &ReloadPlan, held: &[HeldSocket], wanted: &[Service]) -> bool {
        let stays = |step: &Step| {
            let are_held = |origin: &SocketSource| matches!(origin, SocketSource::Held(_));
            matches!(step.change, Change::Keep(_)) && step.sockets.iter().all(are_held)
        };
        difference.steps.iter().all(stays)
            && difference.removed.is_empty()
            && difference.closed.is_empty()
            && listeners(&carried_out(held, wanted, difference)) == listeners(held)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn carried_out_it_leads_to_what_is_wanted(
            (before, after) in before_and_after(),
            passed in any::<[bool; 8]>(),
            stale in any::<[bool; 8]>(),
        ) {
            // Some sockets were inherited, which both configurations name; some serve no longer.
            let passed = (1..=8).zip(passed).filter(|(_, passed)| *passed).map(|(number, _)| {
                HeldSocket { endpoint: address(number), ..inherited(number, "x") }
            });
            let passed: Vec<_> = passed
                .filter(|held| [&before, &after].iter().all(|all| listens(all, &held.endpoint)))
                .collect();
            let mut held = started(&passed, &before);
            for (held, stale) in held.iter_mut().zip(stale) {
                held.stale = stale && held.inherited.is_none();
            }
            let running: Vec<_> = before.iter().collect();
            let difference = difference(&running, &held, &after).unwrap();

            // The services: what is kept and what is new are together what is wanted, nothing is
            // changed that is the same, and whatever ran goes on, is succeeded or is removed.
            let mut ran = difference.removed.clone();
            prop_assert_eq!(difference.steps.len(), after.len());
            for (wanted, step) in after.iter().zip(&difference.steps) {
                let (is_of, settings, limits) = match step.change {
                    Change::Add => (None, &wanted.settings, &wanted.limits),
                    Change::Keep(was) => (Some(was), &before[was].settings, &before[was].limits),
                    Change::Limit(was) => {
                        prop_assert_ne!(&before[was].limits, &wanted.limits);
                        (Some(was), &before[was].settings, &wanted.limits)
                    }
                    Change::Replace(was) => {
                        prop_assert_ne!(&before[was].settings, &wanted.settings);
                        (Some(was), &wanted.settings, &wanted.limits)
                    }
                };
                prop_assert_eq!((settings, limits), (&wanted.settings, &wanted.limits));
                prop_assert!(is_of.is_none_or(|was| before[was].name == wanted.name));
                ran.extend(is_of);
            }
            ran.sort_unstable();
            prop_assert_eq!(ran, (0..before.len()).collect::<Vec<_>>());

            // The sockets: exactly those that are wanted, for those who want them, and all of use.
            let now = carried_out(&held, &after, &difference);
            let wanted: BTreeSet<_> = after
                .iter()
                .flat_map(|service| {
                    let name = &service.name;
                    service.listen.iter().map(|at| (name.clone(), at.endpoint().unwrap().clone()))
                })
                .collect();
            prop_assert_eq!(now.len(), wanted.len());
            prop_assert_eq!(listeners(&now), wanted);
            prop_assert!(now.iter().all(|held| !held.stale));

            // No socket that is still of use is closed or bound anew, and none is used twice.
            let of_use = |at: &Endpoint| held.iter().any(|held| held.endpoint == *at && !held.stale);
            let mut used = difference.closed.clone();
            for origin in difference.steps.iter().flat_map(|step| &step.sockets) {
                match origin {
                    SocketSource::Held(index) => used.push(*index),
                    SocketSource::Bind(at) => prop_assert!(!of_use(at)),
                }
            }
            used.sort_unstable();
            prop_assert_eq!(used, (0..held.len()).collect::<Vec<_>>());
        }

        #[test]
        fn it_is_empty_if_both_say_the_same_and_only_then((before, after) in before_and_after()) {
            let held = started(&[], &before);
            let running: Vec<_> = before.iter().collect();
            let difference = difference(&running, &held, &after).unwrap();
            let same = meaning(&before) == meaning(&after);
            prop_assert_eq!(is_empty(&difference, &held, &after), same);
        }

        #[test]
        fn an_inherited_socket_is_never_closed(
            before in services(),
            after in services(),
            passed in prop::sample::subsequence((1..=8u16).collect::<Vec<_>>(), 0..=8),
        ) {
            let passed: Vec<_> = passed
                .into_iter()
                .map(|number| HeldSocket { endpoint: address(number), ..inherited(number, "x") })
                .collect();
            let Ok(start) = difference(&[], &passed, &before) else { return Ok(()) };
            let held = carried_out(&passed, &before, &start);
            let running: Vec<_> = before.iter().collect();
            match difference(&running, &held, &after) {
                Ok(difference) => {
                    prop_assert!(difference.closed.iter().all(|at| held[*at].inherited.is_none()));
                }
                Err(mismatches) => {
                    let inherited = held.iter().filter(|held| held.inherited.is_some());
                    let unnamed = inherited.filter(|held| !listens(&after, &held.endpoint));
                    prop_assert_eq!(mismatches.len(), unnamed.count());
                }
            }
        }
    }
}
