//! Answered connections, until their clients have received everything and close their side.
//!
//! Most clients do so immediately. All lingering connections of a listener are therefore checked
//! together after a moment, which costs a fraction of registering each with the reactor. Only slow
//! clients get a task that waits.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::net::client_limit::ClientGuard;
use crate::net::connection::{Connection, PeerState};
use crate::net::permits::Permit;
use crate::net::stream::LazySocket;

/// Time between two checks of all lingering connections.
const CHECK_INTERVAL: Duration = Duration::from_millis(2);

/// Checks before a connection gets a task: enough for a client in the same country. More would help
/// servers with many distant clients, and cost those with few.
const MAX_CHECKS: u32 = 16;

/// An answered connection.
#[derive(Debug)]
pub(crate) struct LingeringConnection {
    pub connection: Connection<LazySocket>,
    pub guards: ConnectionGuards,
}

impl LingeringConnection {
    /// Waits until the client has everything, and returns the permits.
    pub(crate) async fn finish(self) {
        self.connection.finish().await;
        drop(self.guards);
    }
}

/// The share of its service's limits that a connection holds until it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "fields are held for their drop")]
pub(crate) struct ConnectionGuards {
    pub permit: Permit,
    pub client: Option<ClientGuard>,
    pub tracker: TaskTrackerToken,
}

/// A connection and the number of its checks.
type Lingering = (LingeringConnection, u32);

/// Brings every arriving connection to its end. Returns when the last sender is dropped and all
/// connections have ended or got a task.
pub(crate) async fn linger_all(mut arriving: UnboundedReceiver<LingeringConnection>) {
    let mut lingering: Vec<Lingering> = Vec::new();
    loop {
        if lingering.is_empty() {
            let Some(answered) = arriving.recv().await else { return };
            lingering.push((answered, 0));
        }
        tokio::time::sleep(CHECK_INTERVAL).await;
        while let Ok(answered) = arriving.try_recv() {
            lingering.push((answered, 0));
        }
        // In reverse order: `swap_remove` moves the last element, which was checked already.
        for (index, state) in poll_all(&lingering).into_iter().enumerate().rev() {
            let Some((answered, checks)) = lingering.get_mut(index) else { continue };
            *checks += 1;
            if answered.connection.is_over(state) {
                lingering.swap_remove(index);
            } else if *checks >= MAX_CHECKS {
                tokio::spawn(lingering.swap_remove(index).0.finish());
            }
            // Other tasks get their turn between many connections.
            tokio::task::consume_budget().await;
        }
    }
}

/// Returns the states of all clients by one call of poll(2).
fn poll_all(lingering: &[Lingering]) -> Vec<PeerState> {
    let sockets = lingering.iter().map(|(answered, _)| answered.connection.stream().fd());
    let polled = |socket| Ok(PollFd::from_borrowed_fd(socket?, PollFlags::IN));
    let polled: io::Result<Vec<_>> = sockets.map(polled).collect();
    if let Ok(mut polled) = polled
        && poll(&mut polled, Some(&Timespec::default())).is_ok()
    {
        let states = lingering.iter().zip(&polled).map(|((answered, _), polled)| {
            answered.connection.stream().peer_state(polled.revents())
        });
        return states.collect();
    }
    // Interrupted, or without memory: each connection is read.
    vec![PeerState::Readable; lingering.len()]
}
