//! Connections that have been answered, until their clients have everything and close their side.
//!
//! Most clients do so at once. So all of a listener's are looked at together, a moment later, which
//! costs a fraction of what it costs to have the reactor tell of each. Only who takes longer gets
//! a task that waits.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::net::client_limit::ClientGuard;
use crate::net::connection::{Connection, PeerState};
use crate::net::permits::Permit;
use crate::net::stream::LazySocket;

/// How often they are looked at, while there are any.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// How often one is looked at before it gets a task: long enough for a client in the same country.
/// More would pay where many come from far away, and cost where few do.
const LOOKS: u32 = 16;

/// A connection that has been answered.
#[derive(Debug)]
pub(crate) struct LingeringConnection {
    /// The connection, of which nothing more is to be sent.
    pub connection: Connection<LazySocket>,
    /// What it has of its service's limits, until its end.
    pub held: ConnectionGuards,
}

impl LingeringConnection {
    /// Waits until the client has everything.
    pub(crate) async fn finish(self) {
        self.connection.finish().await;
        drop(self.held);
    }
}

/// The share of its service's limits that a connection holds until it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "fields are held for their drop")]
pub(crate) struct ConnectionGuards {
    pub(crate) place: Permit,
    pub(crate) guard: Option<ClientGuard>,
    pub(crate) under_way: TaskTrackerToken,
}

/// A connection, and how often it has been looked at.
type Lingering = (LingeringConnection, u32);

/// Sees every connection that arrives to its end, until no more can arrive.
pub(crate) async fn linger_all(mut arriving: UnboundedReceiver<LingeringConnection>) {
    let mut lingering: Vec<Lingering> = Vec::new();
    loop {
        if lingering.is_empty() {
            let Some(answered) = arriving.recv().await else { return };
            lingering.push((answered, 0));
        }
        tokio::time::sleep(LOOK_EVERY).await;
        while let Ok(answered) = arriving.try_recv() {
            lingering.push((answered, 0));
        }
        // From the last to the first, as the last takes the place of one that goes.
        for (index, heard) in listen_to_all(&lingering).into_iter().enumerate().rev() {
            let Some((answered, looks)) = lingering.get_mut(index) else { continue };
            *looks += 1;
            if answered.connection.is_over(heard) {
                lingering.swap_remove(index);
            } else if *looks >= LOOKS {
                tokio::spawn(lingering.swap_remove(index).0.finish());
            }
            // However many they are, others get their turn.
            tokio::task::consume_budget().await;
        }
    }
}

/// Asks the kernel about all of them at once.
fn listen_to_all(lingering: &[Lingering]) -> Vec<PeerState> {
    let sockets = lingering.iter().map(|(answered, _)| answered.connection.stream().fd());
    let polled = |socket| Ok(PollFd::from_borrowed_fd(socket?, PollFlags::IN));
    let polled: io::Result<Vec<_>> = sockets.map(polled).collect();
    if let Ok(mut polled) = polled
        && poll(&mut polled, Some(&Timespec::default())).is_ok()
    {
        let heard = lingering
            .iter()
            .zip(&polled)
            .map(|((answered, _), polled)| answered.connection.stream().heard(polled.revents()));
        return heard.collect();
    }
    // Interrupted, or without memory: it is seen from each.
    vec![PeerState::Something; lingering.len()]
}
