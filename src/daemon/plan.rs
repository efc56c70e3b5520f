//! The pure difference between the running services and a configuration: the change of each service
//! and the source of each socket.
//!
//! Compares names, settings and addresses only; [`crate::daemon::manager`] carries the plan out. A
//! start is a reload of a daemon that has nothing but its inherited sockets.

use std::sync::Arc;

use crate::config::Service;
use crate::net::endpoint::Endpoint;

/// An open socket of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeldSocket {
    /// As configured or inherited.
    pub endpoint: Endpoint,
    /// Its name, if the service manager passed it.
    pub inherited: Option<String>,
    /// `None` for an inherited socket before the first plan.
    pub service: Option<Arc<str>>,
    /// Whether clients cannot reach it any more, because the file of a Unix socket was removed.
    pub is_stale: bool,
}

impl HeldSocket {
    /// A socket without a service, with its name if it is inherited.
    pub(crate) fn new(endpoint: Endpoint, inherited: Option<String>) -> Self {
        Self { endpoint, inherited, service: None, is_stale: false }
    }
}

/// The change of a service. Indices refer to the running services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServiceChange {
    Add,
    Keep(usize),
    /// Same settings, other limits.
    SetLimits(usize),
    Replace(usize),
}

/// The source of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SocketSource {
    /// An index of the held sockets.
    Held(usize),
    Bind(Endpoint),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServicePlan {
    pub change: ServiceChange,
    pub sockets: Vec<SocketSource>,
}

/// The steps from the running services to those of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReloadPlan {
    /// In the order of the configuration.
    pub services: Vec<ServicePlan>,
    /// Indices of the running services to remove.
    pub removed: Vec<usize>,
    /// Indices of the held sockets to close.
    pub closed: Vec<usize>,
    pub summary: Summary,
}

/// Numbers of services by their change.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    pub added: usize,
    /// With other settings, limits or addresses.
    pub changed: usize,
    pub removed: usize,
    pub unchanged: usize,
}

/// A contradiction between the configuration and the inherited sockets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ActivationError {
    /// An inherited socket without a service: its clients would wait for ever.
    #[error(
        "no service listens on {endpoint}, which was inherited from systemd under the name \
         {name:?}: add its address or \"systemd:{name}\" to a `listen`, or remove it from the \
         socket unit and restart the unit"
    )]
    Unused { endpoint: Endpoint, name: String },
    #[error(
        "{service}: systemd passed no socket of the name {name:?} besides those of configured \
         addresses: expected a socket unit with FileDescriptorName={name}"
    )]
    Missing { service: Arc<str>, name: String },
    #[error(
        "{service}: answers no datagrams, but systemd passed {endpoint} under the name {name:?}"
    )]
    Datagrams { service: Arc<str>, endpoint: Endpoint, name: String },
}

impl ReloadPlan {
    /// Compares the services in `running` and the sockets in `held` with the services in `wanted`.
    pub(crate) fn new(
        running: &[&Service],
        held: &[HeldSocket],
        wanted: &[Service],
    ) -> Result<Self, Vec<ActivationError>> {
        let mut matcher = SocketMatcher { held, taken: vec![false; held.len()] };
        let mut errors = Vec::new();
        let sockets = matcher.match_all(wanted, &mut errors);
        errors.extend(find_unanswered_datagrams(held, wanted, &sockets));
        let mut closed = Vec::new();
        for (index, (held, taken)) in held.iter().zip(matcher.taken).enumerate() {
            match &held.inherited {
                _ if taken => {}
                None => closed.push(index),
                Some(name) => {
                    let (endpoint, name) = (held.endpoint.clone(), name.clone());
                    errors.push(ActivationError::Unused { endpoint, name });
                }
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let is_removed = |service: &Service| wanted.iter().all(|other| other.name != service.name);
        let removed = running.iter().enumerate().filter(|(_, service)| is_removed(service));
        let removed: Vec<_> = removed.map(|(index, _)| index).collect();
        let mut summary = Summary { removed: removed.len(), ..Summary::default() };
        let plan = |(wanted, sockets)| {
            let (change, count) = compare(running, wanted, &mut summary);
            *count += 1;
            ServicePlan { change, sockets }
        };
        let services = wanted.iter().zip(sockets).map(plan).collect();
        Ok(Self { services, removed, closed, summary })
    }
}

/// Returns the change of a service, and the number that counts it.
fn compare<'a>(
    running: &[&Service],
    wanted: &Service,
    summary: &'a mut Summary,
) -> (ServiceChange, &'a mut usize) {
    let before = running.iter().enumerate().find(|(_, running)| running.name == wanted.name);
    let Some((index, before)) = before else {
        return (ServiceChange::Add, &mut summary.added);
    };
    if before.settings != wanted.settings {
        (ServiceChange::Replace(index), &mut summary.changed)
    } else if before.limits != wanted.limits {
        (ServiceChange::SetLimits(index), &mut summary.changed)
    } else if before.listen != wanted.listen {
        (ServiceChange::Keep(index), &mut summary.changed)
    } else {
        (ServiceChange::Keep(index), &mut summary.unchanged)
    }
}

/// Assigns the held sockets to services.
struct SocketMatcher<'a> {
    held: &'a [HeldSocket],
    taken: Vec<bool>,
}

impl SocketMatcher<'_> {
    /// Returns the sockets of each service. A service's own sockets are assigned before those of
    /// others, and addresses before names, so that a change of the order moves no socket.
    fn match_all(
        &mut self,
        wanted: &[Service],
        errors: &mut Vec<ActivationError>,
    ) -> Vec<Vec<SocketSource>> {
        let own: Vec<_> = wanted.iter().map(|service| self.take_own(service)).collect();
        let mut sockets = Vec::new();
        for own in own {
            let mut sources = Vec::new();
            for (endpoint, own) in own {
                let held = own.or_else(|| self.take(|held| held.endpoint == endpoint));
                sources.push(held.map_or(SocketSource::Bind(endpoint), SocketSource::Held));
            }
            sockets.push(sources);
        }
        for (service, sockets) in wanted.iter().zip(&mut sockets) {
            for name in service.listen.iter().filter_map(|listen| listen.inherited()) {
                let is_named = |held: &HeldSocket| held.inherited.as_deref() == Some(name);
                let named: Vec<_> = std::iter::from_fn(|| self.take(is_named)).collect();
                if named.is_empty() {
                    let (service, name) = (Arc::clone(&service.name), name.to_owned());
                    errors.push(ActivationError::Missing { service, name });
                }
                sockets.extend(named.into_iter().map(SocketSource::Held));
            }
        }
        sockets
    }

    /// Returns the addresses of `service`, each with the socket that the service has there.
    fn take_own(&mut self, service: &Service) -> Vec<(Endpoint, Option<usize>)> {
        let endpoints = service.listen.iter().filter_map(|listen| listen.endpoint());
        let is_own = |held: &HeldSocket| held.service.as_ref() == Some(&service.name);
        endpoints
            .map(|at| (at.clone(), self.take(|held| is_own(held) && held.endpoint == *at)))
            .collect()
    }

    fn take(&mut self, matches: impl Fn(&HeldSocket) -> bool) -> Option<usize> {
        let mut free = self.held.iter().zip(&mut self.taken).enumerate();
        let (index, (_, taken)) =
            free.find(|(_, (held, taken))| !**taken && !held.is_stale && matches(held))?;
        *taken = true;
        Some(index)
    }
}

fn find_unanswered_datagrams<'a>(
    held: &'a [HeldSocket],
    wanted: &'a [Service],
    sockets: &'a [Vec<SocketSource>],
) -> impl Iterator<Item = ActivationError> + 'a {
    let streams =
        wanted.iter().zip(sockets).filter(|(service, _)| !service.settings.answers_datagrams());
    let sources = streams.flat_map(|(service, sources)| sources.iter().map(move |s| (service, s)));
    sources.filter_map(|(service, source)| {
        let SocketSource::Held(index) = source else { return None };
        let HeldSocket { endpoint, inherited, .. } = held.get(*index)?;
        let (Endpoint::Udp(_), Some(name)) = (endpoint, inherited) else { return None };
        let (service, endpoint) = (Arc::clone(&service.name), endpoint.clone());
        Some(ActivationError::Datagrams { service, endpoint, name: name.clone() })
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
        HeldSocket::new(tcp(port), Some(name.to_owned()))
    }

    /// The held sockets after a plan was carried out.
    fn carry_out(held: &[HeldSocket], wanted: &[Service], plan: &ReloadPlan) -> Vec<HeldSocket> {
        let sockets = wanted.iter().zip(&plan.services).flat_map(|(service, step)| {
            step.sockets.iter().map(|source| {
                let socket = match source {
                    SocketSource::Held(index) => held[*index].clone(),
                    SocketSource::Bind(endpoint) => HeldSocket::new(endpoint.clone(), None),
                };
                HeldSocket { service: Some(Arc::clone(&service.name)), ..socket }
            })
        });
        sockets.collect()
    }

    fn started(held: &[HeldSocket], wanted: &[Service]) -> Vec<HeldSocket> {
        carry_out(held, wanted, &ReloadPlan::new(&[], held, wanted).unwrap())
    }

    #[test]
    fn binds_at_the_start_the_sockets_that_were_not_inherited() {
        let wanted = [service("time.a", &[at(1), at(2)], true, 1)];
        let plan = ReloadPlan::new(&[], &[inherited(2, "x.socket")], &wanted).unwrap();
        let sockets = vec![SocketSource::Bind(tcp(1)), SocketSource::Held(0)];
        assert_eq!(plan.services, [ServicePlan { change: ServiceChange::Add, sockets }]);
    }

    #[test]
    fn assigns_a_name_every_inherited_socket_that_no_address_names() {
        let named = Listen::Inherited("x".to_owned());
        let wanted = [service("time.a", &[named], true, 1), service("time.b", &[at(2)], true, 1)];
        let held = [inherited(1, "x"), inherited(2, "x"), inherited(3, "x")];
        let plan = ReloadPlan::new(&[], &held, &wanted).unwrap();
        assert_eq!(plan.services[0].sockets, [SocketSource::Held(0), SocketSource::Held(2)]);
        assert_eq!(plan.services[1].sockets, [SocketSource::Held(1)]);
    }

    #[test]
    fn refuses_unused_inherited_sockets_and_names_without_a_socket() {
        let wanted = [service("time.a", &[Listen::Inherited("y".to_owned())], true, 1)];
        let errors = ReloadPlan::new(&[], &[inherited(1, "x")], &wanted).unwrap_err();
        let messages: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert!(messages[0].starts_with("time.a: systemd passed no socket of the name \"y\""));
        assert!(messages[1].starts_with("no service listens on 127.0.0.1:1"), "{messages:?}");
        assert_eq!(messages.len(), 2);
    }

    #[test]
    fn refuses_datagram_sockets_for_stream_services() {
        let mut file = service("file.a", &[Listen::Inherited("x".to_owned())], true, 1);
        let folder = std::env::temp_dir();
        file.settings = Settings::Folder(crate::services::folder::Settings {
            folder: crate::fs::folder::Folder::open(&folder).unwrap(),
            cache_limit: 0,
            max_files: NonZeroU32::MIN,
        });
        let udp = Endpoint::Udp(([127, 0, 0, 1], 1).into());
        let held = [HeldSocket { endpoint: udp, ..inherited(1, "x") }];
        let errors = ReloadPlan::new(&[], &held, &[file]).unwrap_err();
        assert!(errors[0].to_string().contains("answers no datagrams"), "{errors:?}");
    }

    #[test]
    fn closes_stale_sockets_and_binds_them_again() {
        let wanted = [service("time.a", &[at(1)], true, 1)];
        let mut held = started(&[], &wanted);
        held[0].is_stale = true;
        let plan = ReloadPlan::new(&[&wanted[0]], &held, &wanted).unwrap();
        assert_eq!(plan.services[0].sockets, [SocketSource::Bind(tcp(1))]);
        assert_eq!(plan.closed, [0]);
    }

    #[test]
    fn distinguishes_settings_from_limits() {
        let before = service("time.a", &[at(1)], true, 1);
        let change = |after: &Service| compare(&[&before], after, &mut Summary::default()).0;
        assert_eq!(change(&before), ServiceChange::Keep(0));
        assert_eq!(change(&service("time.a", &[at(2)], true, 1)), ServiceChange::Keep(0));
        assert_eq!(change(&service("time.a", &[at(1)], true, 2)), ServiceChange::SetLimits(0));
        assert_eq!(change(&service("time.a", &[at(1)], false, 2)), ServiceChange::Replace(0));
        assert_eq!(change(&service("time.b", &[at(1)], true, 1)), ServiceChange::Add);
    }

    #[test]
    fn moves_sockets_with_their_address_to_another_service() {
        let before = [service("time.a", &[at(1), at(2)], true, 1)];
        let held = started(&[], &before);
        let after = [service("time.b", &[at(2)], true, 1), service("time.a", &[at(3)], true, 1)];
        let plan = ReloadPlan::new(&[&before[0]], &held, &after).unwrap();
        assert_eq!(plan.services[0].sockets, [SocketSource::Held(1)]);
        assert_eq!(plan.services[1].sockets, [SocketSource::Bind(tcp(3))]);
        assert_eq!(plan.closed, [0]);
        assert!(plan.removed.is_empty());
    }

    /// Addresses of every kind.
    fn address(number: u16) -> Endpoint {
        match number {
            1..=4 => tcp(number),
            5 | 6 => Endpoint::Udp(([127, 0, 0, 1], number).into()),
            _ => Endpoint::Unix(format!("/run/{number}").into()),
        }
    }

    /// Up to four services on different addresses.
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

    /// Two configurations: unrelated, equal in another order, or different in one service.
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

    /// Sorts services and their addresses, whose order has no meaning.
    fn sorted(services: &[Service]) -> Vec<Service> {
        let mut services = services.to_vec();
        services.sort_by(|one, other| one.name.cmp(&other.name));
        for service in &mut services {
            service.listen.sort_by_key(|listen| listen.endpoint().cloned());
        }
        services
    }

    /// The services with their addresses.
    fn listeners(held: &[HeldSocket]) -> BTreeSet<(Arc<str>, Endpoint)> {
        held.iter().map(|held| (held.service.clone().unwrap(), held.endpoint.clone())).collect()
    }

    /// Whether the plan changes nothing.
    fn is_empty(plan: &ReloadPlan, held: &[HeldSocket], wanted: &[Service]) -> bool {
        let is_kept = |step: &ServicePlan| {
            let are_held = |source: &SocketSource| matches!(source, SocketSource::Held(_));
            matches!(step.change, ServiceChange::Keep(_)) && step.sockets.iter().all(are_held)
        };
        plan.services.iter().all(is_kept)
            && plan.removed.is_empty()
            && plan.closed.is_empty()
            && listeners(&carry_out(held, wanted, plan)) == listeners(held)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn leads_to_the_wanted_configuration(
            (before, after) in before_and_after(),
            passed in any::<[bool; 8]>(),
            stale in any::<[bool; 8]>(),
        ) {
            // Some sockets are inherited, and named by both configurations; some are stale.
            let passed = (1..=8).zip(passed).filter(|(_, passed)| *passed).map(|(number, _)| {
                HeldSocket { endpoint: address(number), ..inherited(number, "x") }
            });
            let passed: Vec<_> = passed
                .filter(|held| [&before, &after].iter().all(|all| listens(all, &held.endpoint)))
                .collect();
            let mut held = started(&passed, &before);
            for (held, stale) in held.iter_mut().zip(stale) {
                held.is_stale = stale && held.inherited.is_none();
            }
            let running: Vec<_> = before.iter().collect();
            let plan = ReloadPlan::new(&running, &held, &after).unwrap();

            // Kept and new services together are those wanted, equal ones do not change, and each
            // running one is kept, replaced or removed.
            let mut ran = plan.removed.clone();
            prop_assert_eq!(plan.services.len(), after.len());
            for (wanted, step) in after.iter().zip(&plan.services) {
                let (is_of, settings, limits) = match step.change {
                    ServiceChange::Add => (None, &wanted.settings, &wanted.limits),
                    ServiceChange::Keep(was) => (Some(was), &before[was].settings, &before[was].limits),
                    ServiceChange::SetLimits(was) => {
                        prop_assert_ne!(&before[was].limits, &wanted.limits);
                        (Some(was), &before[was].settings, &wanted.limits)
                    }
                    ServiceChange::Replace(was) => {
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

            // Each service has its sockets, and no socket is stale.
            let now = carry_out(&held, &after, &plan);
            let wanted: BTreeSet<_> = after
                .iter()
                .flat_map(|service| {
                    let name = &service.name;
                    service.listen.iter().map(|at| (name.clone(), at.endpoint().unwrap().clone()))
                })
                .collect();
            prop_assert_eq!(now.len(), wanted.len());
            prop_assert_eq!(listeners(&now), wanted);
            prop_assert!(now.iter().all(|held| !held.is_stale));

            // No usable socket is closed or bound again, and none is used twice.
            let is_usable = |at: &Endpoint| held.iter().any(|held| held.endpoint == *at && !held.is_stale);
            let mut used = plan.closed.clone();
            for source in plan.services.iter().flat_map(|step| &step.sockets) {
                match source {
                    SocketSource::Held(index) => used.push(*index),
                    SocketSource::Bind(at) => prop_assert!(!is_usable(at)),
                }
            }
            used.sort_unstable();
            prop_assert_eq!(used, (0..held.len()).collect::<Vec<_>>());
        }

        #[test]
        fn is_empty_if_and_only_if_nothing_changed((before, after) in before_and_after()) {
            let held = started(&[], &before);
            let running: Vec<_> = before.iter().collect();
            let plan = ReloadPlan::new(&running, &held, &after).unwrap();
            let same = sorted(&before) == sorted(&after);
            prop_assert_eq!(is_empty(&plan, &held, &after), same);
        }

        #[test]
        fn never_closes_inherited_sockets(
            before in services(),
            after in services(),
            passed in prop::sample::subsequence((1..=8u16).collect::<Vec<_>>(), 0..=8),
        ) {
            let passed: Vec<_> = passed
                .into_iter()
                .map(|number| HeldSocket { endpoint: address(number), ..inherited(number, "x") })
                .collect();
            let Ok(start) = ReloadPlan::new(&[], &passed, &before) else { return Ok(()) };
            let held = carry_out(&passed, &before, &start);
            let running: Vec<_> = before.iter().collect();
            match ReloadPlan::new(&running, &held, &after) {
                Ok(plan) => {
                    prop_assert!(plan.closed.iter().all(|at| held[*at].inherited.is_none()));
                }
                Err(errors) => {
                    let inherited = held.iter().filter(|held| held.inherited.is_some());
                    let unnamed = inherited.filter(|held| !listens(&after, &held.endpoint));
                    prop_assert_eq!(errors.len(), unnamed.count());
                }
            }
        }
    }
}
