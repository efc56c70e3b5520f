//! A running service with what its listeners share: its limits, who is connected, what is counted.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::connection::{Peer, Shutdown, Terms};
use crate::counts::{Counts, Datagram, Refusal};
use crate::limits::{ClientGuard, Clients, DatagramRate, Limits, is_among};
use crate::services::Service;

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
    /// One permit for each connection that it may have.
    permits: Arc<Semaphore>,
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
            permits: Arc::new(Semaphore::new(places(&limits))),
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

    /// Gives the service as many places as it now has, `before` being what it succeeds.
    pub fn take_over(&self, before: &Self) {
        let [now, before] = [self, before].map(|served| places(&served.limits));
        if now >= before {
            self.permits.add_permits(now - before);
        } else {
            let fewer = u32::try_from(before - now).unwrap_or(u32::MAX);
            // Places that are taken go when they are given back. As a semaphore is fair, nobody gets
            // one before that who has not queued before: so this queues now, not when it is run.
            let mut fewer = Box::pin(Arc::clone(&self.permits).acquire_many_owned(fewer));
            match fewer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(gone) => gone.into_iter().for_each(OwnedSemaphorePermit::forget),
                Poll::Pending => drop(tokio::spawn(async move {
                    fewer.await.into_iter().for_each(OwnedSemaphorePermit::forget);
                })),
            }
        }
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
        self.permits.available_permits() == 0
    }

    /// Waits for a place for one more connection.
    ///
    /// # Errors
    /// None: the places are never closed.
    pub async fn place(&self) -> Result<OwnedSemaphorePermit, AcquireError> {
        Arc::clone(&self.permits).acquire_owned().await
    }

    /// Whether most of its places are taken.
    pub fn is_crowded(&self) -> bool {
        self.permits.available_permits() < places(&self.limits) / 2
    }

    /// A place for one more connection, if there is one.
    pub fn free_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).try_acquire_owned().ok()
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

fn places(limits: &Limits) -> usize {
    let places = limits.max_connections.get();
    usize::try_from(places).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

fn rate(limits: &Limits) -> Arc<Mutex<DatagramRate>> {
    Arc::new(Mutex::new(DatagramRate::new(limits.datagrams, Instant::now())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Format;
    use crate::services::time::{Settings, TimeService};
    use jiff::tz::TimeZone;
    use proptest::prelude::*;
    use std::num::NonZeroU32;

    fn limits(max: u32) -> Limits {
        Limits { max_connections: NonZeroU32::new(max).unwrap(), ..Limits::default() }
    }

    fn service() -> Service {
        let settings = Settings { format: Format::Python, zone: TimeZone::UTC, newline: true };
        Service::Time(Arc::new(TimeService::new(settings)))
    }

    proptest! {
        #[test]
        fn there_are_as_many_places_as_the_last_reload_says(
            steps in prop::collection::vec((1_u32..6, 0_usize..4), 1..40),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let shutdown = Shutdown::default();
                let mut served = Served::new("t".into(), service(), limits(3), shutdown.clone());
                let mut held = Vec::new();
                for (max, given_back) in steps {
                    let successor = served.successor(service(), limits(max), shutdown.clone());
                    successor.take_over(&served);
                    served = successor;
                    held.truncate(held.len().saturating_sub(given_back));
                    tokio::task::yield_now().await;
                    let before = held.len();
                    held.extend(std::iter::from_fn(|| served.free_place()));
                    assert_eq!(held.len(), before.max(max as usize));
                }
            });
        }
    }
}
