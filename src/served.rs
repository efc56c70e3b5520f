//! A running service with what its listeners share: its limits, who is connected, what is counted.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::limits::{ClientGuard, Clients, DatagramRate, Limits};
use crate::services::Service;

/// A running service.
#[derive(Debug)]
pub struct Served {
    /// Its name in the log, as `time.clock`.
    pub name: Arc<str>,
    /// What answers.
    pub service: Service,
    /// What it may take.
    pub limits: Limits,
    /// What is summed up in the log.
    pub counts: Counts,
    /// One permit for each connection that it may have.
    permits: Arc<Semaphore>,
    clients: Arc<Clients>,
    datagrams: Mutex<DatagramRate>,
}

/// What strangers can cause at will: counted, not logged one by one.
#[derive(Debug, Default)]
pub struct Counts {
    /// Datagrams that were answered.
    pub answered: AtomicU64,
    /// Datagrams that were not.
    pub dropped: AtomicU64,
    /// Connections that their clients gave up before they were accepted.
    pub aborted: AtomicU64,
    /// Connections that were reset, as the access lists do not permit them.
    pub denied: AtomicU64,
    /// Connections that were reset, as their client had as many as it may.
    pub crowded: AtomicU64,
}

impl Served {
    /// A service that nobody is connected to yet.
    pub fn new(name: Arc<str>, service: Service, limits: Limits) -> Self {
        let permits = usize::try_from(limits.max_connections.get()).unwrap_or(usize::MAX);
        Self {
            name,
            service,
            counts: Counts::default(),
            permits: Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS))),
            clients: Arc::new(Clients::new(limits.max_per_client)),
            datagrams: Mutex::new(DatagramRate::new(limits.datagrams, Instant::now())),
            limits,
        }
    }

    /// Waits for a place for one more connection.
    ///
    /// # Errors
    /// None: the places are never closed.
    pub async fn place(&self) -> Result<OwnedSemaphorePermit, AcquireError> {
        Arc::clone(&self.permits).acquire_owned().await
    }

    /// Whether a client with this address is served, which is counted if not.
    pub fn admit(&self, address: IpAddr) -> Option<ClientGuard> {
        if !self.limits.access.permits(address) {
            self.counts.denied.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let guard = self.clients.enter(address);
        if guard.is_none() {
            self.counts.crowded.fetch_add(1, Ordering::Relaxed);
        }
        guard
    }

    /// Whether a datagram from this address is answered at `now`.
    pub fn admit_datagram(&self, address: IpAddr, now: Instant) -> bool {
        let rate = || self.datagrams.lock().unwrap_or_else(PoisonError::into_inner);
        self.limits.access.permits(address) && rate().admit(address, now)
    }
}
