//! Connections that have been answered, until their clients have everything and close their side.
//!
//! Most clients do so at once. So all of a listener's are looked at together, a moment later, which
//! costs a fraction of what it costs to have the reactor tell of each. Only who takes longer gets
//! a task that waits.

use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::connection::{Connection, Stream};
use crate::limits::ClientGuard;

/// How often they are looked at, while there are any.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// How often one is looked at before it gets a task.
const LOOKS: u32 = 4;

/// A connection that has been answered.
#[derive(Debug)]
pub struct Answered<S: Stream> {
    /// The connection, of which nothing more is to be sent.
    pub connection: Connection<S>,
    /// What it has of its service's limits, until its end.
    pub held: Held,
}

impl<S: Stream> Answered<S> {
    /// Waits until the client has everything.
    pub async fn finish(self) {
        self.connection.finish().await;
        drop(self.held);
    }
}

/// What a connection has of its service's limits.
#[derive(Debug)]
pub struct Held {
    /// One of the service's places.
    pub place: OwnedSemaphorePermit,
    /// Its client's, if that is limited.
    pub guard: Option<ClientGuard>,
    /// That it is under way.
    pub under_way: TaskTrackerToken,
}

/// Sees every connection that arrives to its end, until no more can arrive.
pub async fn see_to_the_end<S: Stream + 'static>(mut arriving: UnboundedReceiver<Answered<S>>) {
    let mut lingering: Vec<(Answered<S>, u32)> = Vec::new();
    loop {
        if lingering.is_empty() {
            let Some(answered) = arriving.recv().await else { return };
            lingering.push((answered, 0));
        }
        tokio::time::sleep(LOOK_EVERY).await;
        while let Ok(answered) = arriving.try_recv() {
            lingering.push((answered, 0));
        }
        let mut next = 0;
        while let Some((answered, looks)) = lingering.get_mut(next) {
            *looks += 1;
            if answered.connection.is_over() {
                lingering.swap_remove(next);
            } else if *looks >= LOOKS {
                tokio::spawn(lingering.swap_remove(next).0.finish());
            } else {
                next += 1;
            }
            // However many they are, others get their turn.
            tokio::task::consume_budget().await;
        }
    }
}
