//! A running service with the state its listeners share: limits, connected clients, counters.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::net::access::is_among;
use crate::net::client_limit::{ClientGuard, Clients};
use crate::net::connection::{ConnectionContext, Peer, Shutdown};
use crate::net::limits::Limits;
use crate::net::permits::{ConnectionPermits, Permit};
use crate::net::service::Service;
use crate::net::udp_rate::DatagramRate;
use crate::telemetry::counters::{Counts, Datagram, RejectReason};
use crate::telemetry::metrics::ServiceStats;

/// A running service. A reload that changes it creates another instance; open connections end with
/// the instance they began with.
#[derive(Debug)]
pub(crate) struct ServiceInstance<S> {
    pub service: S,
    pub limits: Limits,
    /// The state that the connections share.
    pub context: Arc<ConnectionContext>,
    permits: Arc<ConnectionPermits>,
    clients: Arc<Clients>,
    datagrams: Arc<Mutex<DatagramRate>>,
}

impl<S: Service> ServiceInstance<S> {
    /// Creates a service without connections; `name` is its name in the log, such as `time.clock`.
    pub(crate) fn new(name: Arc<str>, service: S, limits: Limits, shutdown: Shutdown) -> Self {
        Self {
            context: Arc::new(ConnectionContext {
                service: name,
                deadlines: limits.deadlines,
                shutdown,
                counts: Arc::default(),
                log_at_debug: service.is_monitoring(),
            }),
            service,
            permits: Arc::new(ConnectionPermits::new(permits(&limits))),
            clients: Arc::default(),
            datagrams: rate(&limits),
            limits,
        }
    }

    /// Creates the instance that replaces this one after a reload. It keeps the counters, and
    /// connected clients still count; [`Self::take_over`] then changes the number of permits.
    #[must_use]
    pub(crate) fn reconfigured(&self, service: S, limits: Limits, shutdown: Shutdown) -> Self {
        Self {
            context: Arc::new(ConnectionContext {
                deadlines: limits.deadlines,
                shutdown,
                ..ConnectionContext::clone(&self.context)
            }),
            service,
            permits: Arc::clone(&self.permits),
            clients: Arc::clone(&self.clients),
            datagrams: if limits.datagrams == self.limits.datagrams {
                Arc::clone(&self.datagrams)
            } else {
                rate(&limits)
            },
            limits,
        }
    }

    /// Changes the number of permits from that of `before` to that of this instance.
    pub(crate) fn take_over(&self, before: &Self) {
        let [now, before] = [self, before].map(|instance| permits(&instance.limits));
        self.permits.grow(now.saturating_sub(before));
        self.permits.shrink(before.saturating_sub(now));
    }

    /// Returns the name in the log, such as `time.clock`.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.context.service
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.context.counts
    }

    /// Returns the reason why the service cannot serve, if there is one.
    pub(crate) fn problem(&self) -> Option<String> {
        self.listener_problem().or_else(|| self.service.problem())
    }

    /// Returns the reason why its listeners cannot accept, if there is one.
    pub(crate) fn listener_problem(&self) -> Option<String> {
        self.counts().has_recent_fault().then(|| "cannot accept clients".to_owned())
    }

    /// Whether all permits are held.
    pub(crate) fn is_full(&self) -> bool {
        self.permits.available() == 0
    }

    /// Logs, once, that clients wait because all permits are held.
    pub(crate) fn note_limit_reached(&self) {
        if self.counts().note_limit_reached() {
            let (service, limit) = (&**self.name(), self.limits.max_connections);
            let message = format_args!(
                "{service}: connection limit reached ({limit}): new clients wait; \
                 raise max-connections if this persists"
            );
            tracing::warn!(service, limit, "{message}");
        }
    }

    /// Logs, once, that clients no longer wait. Called at regular intervals.
    pub(crate) fn note_limit_recovered(&self) {
        if self.counts().take_limit_recovered(self.is_full()) {
            let (service, limit) = (&**self.name(), self.limits.max_connections);
            let active = self.counts().active();
            let message =
                format_args!("{service}: below the connection limit again ({active} of {limit})");
            tracing::info!(service, active, limit, "{message}");
        }
    }

    /// Logs the rejections and failures since the last call, if there were any.
    pub(crate) fn log_summary(&self) {
        self.counts().log_summary(self.name(), self.limits.max_per_client);
    }

    /// Waits for a permit for one more connection.
    pub(crate) async fn acquire_permit(&self) -> Permit {
        self.permits.acquire().await
    }

    /// Whether more than half of the permits are held.
    pub(crate) fn is_near_limit(&self) -> bool {
        self.permits.available() < permits(&self.limits) / 2
    }

    /// Returns a permit for one more connection, if one is free.
    pub(crate) fn try_acquire_permit(&self) -> Option<Permit> {
        self.permits.try_acquire()
    }

    /// Whether this peer is a load balancer, which connects on behalf of others.
    pub(crate) fn is_balancer(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Internet(address) => is_among(&self.limits.balancers, address.ip()),
            Peer::Unix(_) => false,
        }
    }

    /// Admits a client with this address, or returns the reason for its refusal.
    pub(crate) fn admit(&self, address: IpAddr) -> Result<ClientGuard, RejectReason> {
        if !self.limits.access.permits(address) {
            return Err(RejectReason::Access);
        }
        let guard = self.clients.enter(address, self.limits.max_per_client);
        guard.ok_or(RejectReason::MaxPerClient)
    }

    /// Admits a datagram from this address at `now`, or returns the reason why it is not answered.
    pub(crate) fn admit_datagram(&self, address: IpAddr, now: Instant) -> Result<(), Datagram> {
        if !self.limits.access.permits(address) {
            return Err(Datagram::Access);
        }
        let mut rate = self.datagrams.lock();
        if rate.admit(address, now) { Ok(()) } else { Err(Datagram::Rate) }
    }
}

impl<S: Service + fmt::Debug> ServiceStats for ServiceInstance<S> {
    fn name(&self) -> &str {
        &self.context.service
    }

    fn counts(&self) -> &Counts {
        &self.context.counts
    }

    fn max_connections(&self) -> u32 {
        self.limits.max_connections.get()
    }

    fn answers_datagrams(&self) -> bool {
        self.service.answers_datagrams()
    }

    fn file_version(&self) -> Option<Timestamp> {
        self.service.file_version()
    }

    fn problem(&self) -> Option<String> {
        self.problem()
    }
}

fn permits(limits: &Limits) -> usize {
    usize::try_from(limits.max_connections.get()).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

fn rate(limits: &Limits) -> Arc<Mutex<DatagramRate>> {
    Arc::new(Mutex::new(DatagramRate::new(limits.datagrams, Instant::now())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::access::Access;
    use crate::net::connection::{Connection, ServeError};
    use crate::net::stream::LazySocket;
    use proptest::prelude::*;
    use std::num::NonZeroU32;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::{Context, Poll, Waker};

    #[derive(Debug, Clone)]
    struct Silent;

    impl Service for Silent {
        async fn serve(&self, _: &mut Connection<LazySocket>) -> Result<(), ServeError> {
            Ok(())
        }
    }

    fn service() -> Silent {
        Silent
    }

    /// The guards that a listener holds for one connection.
    struct Connected {
        client: u8,
        _permit: Permit,
        _guard: ClientGuard,
    }

    /// An event of a service. Numbers choose among the connections or waiting listeners.
    #[derive(Debug, Clone)]
    enum Event {
        /// A client connects. It is refused, or waits in the queue if no permit is free.
        Connect(u8),
        /// A listener waits for a permit before it accepts.
        Wait,
        /// Every waiting listener is polled.
        PollWaiting,
        /// A waiting listener is reassigned and waits no longer.
        CancelWait(usize),
        Close(usize),
        /// A connection task panics.
        Panic(usize),
        /// A reload sets the connection limit and the limit per client.
        Reload(u32, u32),
    }

    fn event() -> impl Strategy<Value = Event> {
        let which = 0_usize..8;
        prop_oneof![
            5 => (0..4_u8).prop_map(Event::Connect),
            2 => Just(Event::Wait),
            3 => Just(Event::PollWaiting),
            1 => which.clone().prop_map(Event::CancelWait),
            3 => which.clone().prop_map(Event::Close),
            1 => which.prop_map(Event::Panic),
            2 => (1..6_u32, 1..4_u32).prop_map(|(max, each)| Event::Reload(max, each)),
        ]
    }

    /// A client that the access rules deny.
    const DENIED: u8 = 3;

    fn address(client: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, client])
    }

    fn limits(max: u32, each: u32) -> Limits {
        let number = |value| NonZeroU32::new(value).unwrap();
        Limits {
            max_connections: number(max),
            max_per_client: number(each),
            access: Access { deny: vec![address(DENIED).into()], ..Access::default() },
            ..Limits::default()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn any_sequence_of_events_holds_the_limits_and_returns_every_permit(
            events in prop::collection::vec(event(), 1..80),
        ) {
            let (shutdown, service) = (Shutdown::default(), service());
            let (mut max, mut each) = (3, 2);
            let mut instance = Arc::new(
                ServiceInstance::new("t".into(), service.clone(), limits(max, each), shutdown.clone())
            );
            let mut connected: Vec<Connected> = Vec::new();
            let mut idle: Vec<Permit> = Vec::new();
            let mut waiting = Vec::new();
            let mut context = Context::from_waker(Waker::noop());
            for event in events {
                let before = connected.len() + idle.len();
                match event {
                    Event::Connect(client) => {
                        let has = connected.iter().filter(|one| one.client == client).count();
                        if let Some(permit) = idle.pop().or_else(|| instance.try_acquire_permit()) {
                            let guard = instance.admit(address(client));
                            let may = client != DENIED && has < each as usize;
                            prop_assert_eq!(guard.is_ok(), may);
                            let one = |guard| Connected { client, _permit: permit, _guard: guard };
                            connected.extend(guard.map(one));
                        } else {
                            prop_assert!(before >= max as usize || !waiting.is_empty());
                        }
                    }
                    Event::Wait => {
                        let instance = Arc::clone(&instance);
                        let mut one = Box::pin(async move { instance.acquire_permit().await });
                        match one.as_mut().poll(&mut context) {
                            Poll::Ready(permit) => idle.push(permit),
                            Poll::Pending => waiting.push(one),
                        }
                    }
                    Event::PollWaiting => {
                        waiting.retain_mut(|one| match one.as_mut().poll(&mut context) {
                            Poll::Ready(permit) => { idle.push(permit); false }
                            Poll::Pending => true,
                        });
                        // No listener waits while a permit is free.
                        let now = connected.len() + idle.len();
                        prop_assert!(waiting.is_empty() || now >= max as usize);
                        prop_assert_eq!(instance.is_full(), now >= max as usize);
                    }
                    Event::CancelWait(which) if !waiting.is_empty() => {
                        drop(waiting.remove(which % waiting.len()));
                    }
                    Event::Close(which) if !connected.is_empty() => {
                        drop(connected.swap_remove(which % connected.len()));
                    }
                    Event::Panic(which) if !connected.is_empty() => {
                        let one = connected.swap_remove(which % connected.len());
                        let panic = AssertUnwindSafe(|| {
                            let _one = one;
                            // Unlike `panic!`, prints nothing.
                            resume_unwind(Box::new(()));
                        });
                        prop_assert!(catch_unwind(panic).is_err());
                    }
                    Event::Reload(new_max, new_each) => {
                        (max, each) = (new_max, new_each);
                        let reconfigured = instance.reconfigured(service.clone(), limits(max, each), shutdown.clone());
                        reconfigured.take_over(&instance);
                        instance = Arc::new(reconfigured);
                    }
                    Event::CancelWait(_) | Event::Close(_) | Event::Panic(_) => {}
                }
                // After a reload to a lower limit, connections only become fewer.
                let now = connected.len() + idle.len();
                prop_assert!(now <= before.max(max as usize), "{now} of {max}");
            }

            // Everything was returned.
            drop((connected, idle, waiting));
            let again: Vec<_> = std::iter::from_fn(|| instance.try_acquire_permit()).collect();
            prop_assert_eq!(again.len(), max as usize);
            for client in 0..DENIED {
                let guards: Vec<_> = std::iter::from_fn(|| instance.admit(address(client)).ok()).collect();
                prop_assert_eq!(guards.len(), each as usize);
            }
        }
    }

    #[test]
    fn concurrent_threads_never_exceed_a_limit() {
        const LIMITS: [u32; 2] = [4, 2];
        let shutdown = Shutdown::default();
        let first = ServiceInstance::new("t".into(), service(), limits(4, 2), shutdown.clone());
        let instance = Mutex::new(Arc::new(first));
        let now = || Arc::clone(&instance.lock());
        let (in_all, of_client) = (AtomicU32::new(0), [const { AtomicU32::new(0) }; 3]);
        std::thread::scope(|scope| {
            for thread in 0..8_u8 {
                let (now, in_all, of_client) = (&now, &in_all, &of_client);
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                scope.spawn(move || {
                    for round in 0..2_000_u32 {
                        let instance = now();
                        let waited =
                            (round % 3 == 0).then(|| runtime.block_on(instance.acquire_permit()));
                        let Some(permit) = waited.or_else(|| instance.try_acquire_permit()) else {
                            continue;
                        };
                        assert!(in_all.fetch_add(1, Ordering::SeqCst) < LIMITS[0]);
                        let client = thread % 3;
                        if let Ok(guard) = instance.admit(address(client)) {
                            let count = &of_client[usize::from(client)];
                            assert!(count.fetch_add(1, Ordering::SeqCst) < LIMITS[1]);
                            std::thread::yield_now();
                            count.fetch_sub(1, Ordering::SeqCst);
                            drop(guard);
                        }
                        in_all.fetch_sub(1, Ordering::SeqCst);
                        drop(permit);
                    }
                });
            }
            // Meanwhile the limit falls and rises again, but never exceeds its first value.
            for round in 0..500 {
                let limits = limits(if round % 2 == 0 { 1 + round % 3 } else { 4 }, 2);
                let before = now();
                let reconfigured = before.reconfigured(service(), limits, shutdown.clone());
                reconfigured.take_over(&before);
                *instance.lock() = Arc::new(reconfigured);
                std::thread::yield_now();
            }
        });
        let instance = now();
        let again: Vec<_> = std::iter::from_fn(|| instance.try_acquire_permit()).collect();
        assert_eq!(again.len(), 4);
        assert!((0..3).all(|client| instance.admit(address(client)).is_ok()));
    }
}
