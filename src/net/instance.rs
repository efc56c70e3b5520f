//! A running service with what its listeners share: its limits, who is connected, what is counted.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::AcquireError;

use crate::net::connection::{Peer, Shutdown, Terms};
use crate::net::limits::{ClientGuard, Clients, DatagramRate, Limits, is_among};
use crate::net::permits::{Place, Places};
use crate::services::Service;
use crate::telemetry::counters::{Counts, Datagram, Refusal};

/// A running service, as the configuration has it. When a reload changes it, a successor takes its
/// place, and the connections that began with it end with it.
#[derive(Debug)]
pub struct Served {
    /// What answers.
    pub service: Service,
    /// What it may take.
    pub limits: Limits,
    /// What its connections have in common.
    pub terms: Arc<Terms>,
    places: Arc<Places>,
    clients: Arc<Clients>,
    datagrams: Arc<Mutex<DatagramRate>>,
}

impl Served {
    /// A service that nobody is connected to yet; `name` is its name in the log, as `time.clock`.
    pub fn new(name: Arc<str>, service: Service, limits: Limits, shutdown: Shutdown) -> Self {
        Self {
            terms: Arc::new(Terms {
                service: name,
                deadlines: limits.deadlines,
                shutdown,
                counts: Arc::default(),
                log_at_debug: service.is_for_monitoring(),
            }),
            service,
            places: Arc::new(Places::new(limits.max_connections.get())),
            clients: Arc::default(),
            datagrams: rate(&limits),
            limits,
        }
    }

    /// What follows this service after a reload. Who is connected still counts, and counting goes
    /// on; the number of places is changed by [`Served::take_over`].
    #[must_use]
    pub fn successor(&self, service: Service, limits: Limits, shutdown: Shutdown) -> Self {
        Self {
            terms: Arc::new(Terms {
                deadlines: limits.deadlines,
                shutdown,
                ..Terms::clone(&self.terms)
            }),
            service,
            places: Arc::clone(&self.places),
            clients: Arc::clone(&self.clients),
            datagrams: if limits.datagrams == self.limits.datagrams {
                Arc::clone(&self.datagrams)
            } else {
                rate(&limits)
            },
            limits,
        }
    }

    /// Gives the service as many places as it now has, `before` being what it succeeds.
    pub fn take_over(&self, before: &Self) {
        let [now, before] = [self, before].map(|served| served.limits.max_connections.get());
        self.places.change(before, now);
    }

    /// Its name in the log, as `time.clock`.
    pub fn name(&self) -> &Arc<str> {
        &self.terms.service
    }

    /// What it counts.
    pub fn counts(&self) -> &Counts {
        &self.terms.counts
    }

    /// What is not well with it, if anything.
    pub fn trouble(&self) -> Option<String> {
        self.listener_trouble().or_else(|| self.service.trouble())
    }

    /// What is not well with its listeners, if anything.
    pub fn listener_trouble(&self) -> Option<String> {
        self.counts().in_trouble().then(|| "its clients cannot be accepted".to_owned())
    }

    /// Whether all of its places are taken.
    pub fn is_full(&self) -> bool {
        self.places.free() == 0
    }

    /// Logs, once, that clients wait because all connections are in use.
    pub fn note_limit_reached(&self) {
        if self.counts().note_limit_reached() {
            let (service, limit) = (&**self.name(), self.limits.max_connections);
            let message = format_args!(
                "{service}: connection limit reached ({limit}): new clients wait; \
                 raise max-connections if this persists"
            );
            tracing::warn!(service, limit, "{message}");
        }
    }

    /// Logs, once, that clients do not have to wait any more. Called at regular intervals.
    pub fn note_limit_recovered(&self) {
        if self.counts().take_limit_recovered(self.is_full()) {
            let (service, limit) = (&**self.name(), self.limits.max_connections);
            let active = self.counts().active();
            let message =
                format_args!("{service}: below the connection limit again ({active} of {limit})");
            tracing::info!(service, active, limit, "{message}");
        }
    }

    /// Logs what strangers have caused since the last call, if anything.
    pub fn sum_up(&self) {
        self.counts().sum_up(self.name(), self.limits.max_per_client);
    }

    /// Waits for a place for one more connection.
    ///
    /// # Errors
    /// None: the places are never closed.
    pub async fn place(&self) -> Result<Place, AcquireError> {
        self.places.take().await
    }

    /// Whether most of its places are taken.
    pub fn is_crowded(&self) -> bool {
        let few = self.limits.max_connections.get() / 2;
        self.places.free() < usize::try_from(few).unwrap_or(usize::MAX)
    }

    /// A place for one more connection, if there is one.
    pub fn free_place(&self) -> Option<Place> {
        self.places.try_take()
    }

    /// Whether somebody is a balancer, which does not connect for itself.
    pub fn is_balancer(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Internet(address) => is_among(&self.limits.balancers, address.ip()),
            Peer::Unix(_) => false,
        }
    }

    /// Lets a client with this address in.
    ///
    /// # Errors
    /// Why it is not served.
    pub fn admit(&self, address: IpAddr) -> Result<ClientGuard, Refusal> {
        if !self.limits.access.permits(address) {
            return Err(Refusal::Access);
        }
        let guard = self.clients.enter(address, self.limits.max_per_client);
        guard.ok_or(Refusal::MaxPerClient)
    }

    /// Whether a datagram from this address is answered at `now`.
    ///
    /// # Errors
    /// Why it is not.
    pub fn admit_datagram(&self, address: IpAddr, now: Instant) -> Result<(), Datagram> {
        if !self.limits.access.permits(address) {
            return Err(Datagram::Access);
        }
        let mut rate = self.datagrams.lock().unwrap_or_else(PoisonError::into_inner);
        if rate.admit(address, now) { Ok(()) } else { Err(Datagram::Rate) }
    }
}

fn rate(limits: &Limits) -> Arc<Mutex<DatagramRate>> {
    Arc::new(Mutex::new(DatagramRate::new(limits.datagrams, Instant::now())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Format;
    use crate::net::limits::Access;
    use crate::services::time::{Settings, TimeService};
    use jiff::tz::TimeZone;
    use proptest::prelude::*;
    use std::num::NonZeroU32;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::{Context, Poll, Waker};

    fn service() -> Service {
        let settings = Settings {
            format: Format::Python,
            timezone: "UTC".to_owned(),
            zone: TimeZone::UTC,
            newline: true,
        };
        Service::Time(Arc::new(TimeService::new("time.clock".into(), settings)))
    }

    /// What one connection has, as the listener takes it.
    struct Connected {
        client: u8,
        _place: Place,
        _guard: ClientGuard,
    }

    /// What can happen to a service, in any order. Numbers choose among those who are there.
    #[derive(Debug, Clone)]
    enum Event {
        /// A client comes. It is refused, or waits in the queue if there is no place.
        Arrives(u8),
        /// A listener waits for a place, for whoever comes next.
        Waits,
        /// Those who wait have their turn to see whether they wait in vain.
        Look,
        /// One waits no longer, as it has other orders.
        GivesUp(usize),
        /// A connection ends.
        Ends(usize),
        /// A connection ends by a panic.
        Panics(usize),
        /// So many places and so many for a client from now on, by a reload.
        Reload(u32, u32),
    }

    fn event() -> impl Strategy<Value = Event> {
        let which = 0_usize..8;
        prop_oneof![
            5 => (0..4_u8).prop_map(Event::Arrives),
            2 => Just(Event::Waits),
            3 => Just(Event::Look),
            1 => which.clone().prop_map(Event::GivesUp),
            3 => which.clone().prop_map(Event::Ends),
            1 => which.prop_map(Event::Panics),
            2 => (1..6_u32, 1..4_u32).prop_map(|(places, each)| Event::Reload(places, each)),
        ]
    }

    /// May never ask, whatever is free.
    const DENIED: u8 = 3;

    fn address(client: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, client])
    }

    fn limits(places: u32, each: u32) -> Limits {
        let number = |value| NonZeroU32::new(value).unwrap();
        Limits {
            max_connections: number(places),
            max_per_client: number(each),
            access: Access { deny: vec![address(DENIED).into()], ..Access::default() },
            ..Limits::default()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn whatever_happens_limits_hold_and_everything_is_given_back(
            events in prop::collection::vec(event(), 1..80),
        ) {
            let (shutdown, service) = (Shutdown::default(), service());
            let (mut places, mut each) = (3, 2);
            let mut served = Arc::new(
                Served::new("t".into(), service.clone(), limits(places, each), shutdown.clone())
            );
            let mut connected: Vec<Connected> = Vec::new();
            let mut idle: Vec<Place> = Vec::new();
            let mut waiting = Vec::new();
            let mut context = Context::from_waker(Waker::noop());
            for event in events {
                let before = connected.len() + idle.len();
                match event {
                    Event::Arrives(client) => {
                        let has = connected.iter().filter(|one| one.client == client).count();
                        if let Some(place) = idle.pop().or_else(|| served.free_place()) {
                            let guard = served.admit(address(client));
                            let may = client != DENIED && has < each as usize;
                            prop_assert_eq!(guard.is_ok(), may);
                            let one = |guard| Connected { client, _place: place, _guard: guard };
                            connected.extend(guard.map(one));
                        } else {
                            prop_assert!(before >= places as usize || !waiting.is_empty());
                        }
                    }
                    Event::Waits => {
                        let served = Arc::clone(&served);
                        let mut one = Box::pin(async move { served.place().await.unwrap() });
                        match one.as_mut().poll(&mut context) {
                            Poll::Ready(place) => idle.push(place),
                            Poll::Pending => waiting.push(one),
                        }
                    }
                    Event::Look => {
                        waiting.retain_mut(|one| match one.as_mut().poll(&mut context) {
                            Poll::Ready(place) => { idle.push(place); false }
                            Poll::Pending => true,
                        });
                        // Nobody waits while there is a place.
                        let now = connected.len() + idle.len();
                        prop_assert!(waiting.is_empty() || now >= places as usize);
                        prop_assert_eq!(served.is_full(), now >= places as usize);
                    }
                    Event::GivesUp(which) if !waiting.is_empty() => {
                        drop(waiting.remove(which % waiting.len()));
                    }
                    Event::Ends(which) if !connected.is_empty() => {
                        drop(connected.swap_remove(which % connected.len()));
                    }
                    Event::Panics(which) if !connected.is_empty() => {
                        let one = connected.swap_remove(which % connected.len());
                        let panic = AssertUnwindSafe(|| {
                            let _one = one;
                            // Without a message, which would only be in the way.
                            resume_unwind(Box::new(()));
                        });
                        prop_assert!(catch_unwind(panic).is_err());
                    }
                    Event::Reload(new_places, new_each) => {
                        (places, each) = (new_places, new_each);
                        let successor = served.successor(service.clone(), limits(places, each), shutdown.clone());
                        successor.take_over(&served);
                        served = Arc::new(successor);
                    }
                    Event::GivesUp(_) | Event::Ends(_) | Event::Panics(_) => {}
                }
                // No more than there may be; after a reload to fewer, no more than there were.
                let now = connected.len() + idle.len();
                prop_assert!(now <= before.max(places as usize), "{now} of {places}");
            }

            // All of it is there again: every place, and as many for each client as it may have.
            drop((connected, idle, waiting));
            let again: Vec<_> = std::iter::from_fn(|| served.free_place()).collect();
            prop_assert_eq!(again.len(), places as usize);
            for client in 0..DENIED {
                let guards: Vec<_> = std::iter::from_fn(|| served.admit(address(client)).ok()).collect();
                prop_assert_eq!(guards.len(), each as usize);
            }
        }
    }

    #[test]
    fn threads_that_come_and_go_at_once_never_have_more_than_there_may_be() {
        const MOST: [u32; 2] = [4, 2];
        let shutdown = Shutdown::default();
        let first = Served::new("t".into(), service(), limits(4, 2), shutdown.clone());
        let served = Mutex::new(Arc::new(first));
        let now = || Arc::clone(&served.lock().unwrap());
        let (in_all, of_client) = (AtomicU32::new(0), [const { AtomicU32::new(0) }; 3]);
        std::thread::scope(|scope| {
            for thread in 0..8_u8 {
                let (now, in_all, of_client) = (&now, &in_all, &of_client);
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                scope.spawn(move || {
                    for round in 0..2_000_u32 {
                        let served = now();
                        let waited =
                            (round % 3 == 0).then(|| runtime.block_on(served.place()).unwrap());
                        let Some(place) = waited.or_else(|| served.free_place()) else { continue };
                        assert!(in_all.fetch_add(1, Ordering::SeqCst) < MOST[0]);
                        let client = thread % 3;
                        if let Ok(guard) = served.admit(address(client)) {
                            let count = &of_client[usize::from(client)];
                            assert!(count.fetch_add(1, Ordering::SeqCst) < MOST[1]);
                            std::thread::yield_now();
                            count.fetch_sub(1, Ordering::SeqCst);
                            drop(guard);
                        }
                        in_all.fetch_sub(1, Ordering::SeqCst);
                        drop(place);
                    }
                });
            }
            // Meanwhile the number of places goes down and up, but not above the first.
            for round in 0..500 {
                let limits = limits(if round % 2 == 0 { 1 + round % 3 } else { 4 }, 2);
                let before = now();
                let successor = before.successor(service(), limits, shutdown.clone());
                successor.take_over(&before);
                *served.lock().unwrap() = Arc::new(successor);
                std::thread::yield_now();
            }
        });
        let served = now();
        let again: Vec<_> = std::iter::from_fn(|| served.free_place()).collect();
        assert_eq!(again.len(), 4);
        assert!((0..3).all(|client| served.admit(address(client)).is_ok()));
    }
}
