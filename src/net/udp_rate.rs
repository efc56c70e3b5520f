//! Rate limits for datagrams, in constant memory.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Instant;

use crate::net::client_limit::client_of;
use crate::net::limits::DatagramLimits;

/// Beyond its rate, a client still gets a reply to one of this many datagrams on average: an
/// attacker who forges its address can slow down its replies, but not suppress them.
const LEAK: u64 = 4;

/// Size of the table of clients. Clients that share a slot share a rate.
const SLOTS: usize = 4096;

/// Rate limits for datagrams, per client and in total.
///
/// Each is a generic cell rate algorithm (ITU-T I.371), whose only state is the time at which the
/// next datagram is due at an even rate. Bursts of one second's worth are admitted.
#[derive(Debug)]
pub(crate) struct DatagramRate {
    limits: DatagramLimits,
    /// Due times in nanoseconds since `epoch`.
    clients: Box<[u64]>,
    all: u64,
    epoch: Instant,
    /// Seeded at random, so that a client cannot choose its slot.
    hasher: RandomState,
    /// Number of datagrams; selects those that leak.
    datagrams: u64,
}

impl DatagramRate {
    pub(crate) fn new(limits: DatagramLimits, now: Instant) -> Self {
        Self {
            limits,
            clients: vec![0; SLOTS].into_boxed_slice(),
            all: 0,
            epoch: now,
            hasher: RandomState::new(),
            datagrams: 0,
        }
    }

    /// Whether a datagram that arrived from `client` at `now` is answered.
    pub(crate) fn admit(&mut self, client: IpAddr, now: Instant) -> bool {
        self.datagrams = self.datagrams.wrapping_add(1);
        let since = now.saturating_duration_since(self.epoch).as_nanos();
        let now = u64::try_from(since).unwrap_or(u64::MAX);

        let hash = self.hasher.hash_one(client_of(client));
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash suffice")]
        let slot = hash as usize % SLOTS;
        let due = self.clients.get_mut(slot).expect("the hash is reduced to the table's size");
        let within_rate = take(due, self.limits.per_client, now);
        let leaked = || self.hasher.hash_one(self.datagrams).is_multiple_of(LEAK);
        (within_rate || leaked()) && take(&mut self.all, self.limits.total, now)
    }
}

/// Advances `due` by one datagram if the rate admits it at `now`.
fn take(due: &mut u64, per_second: NonZeroU32, now: u64) -> bool {
    const SECOND: u64 = 1_000_000_000;
    let interval = SECOND / u64::from(per_second.get());
    let next = (*due).max(now).saturating_add(interval);
    let allowed = next <= now.saturating_add(SECOND);
    if allowed {
        *due = next;
    }
    allowed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn limits(total: u32, per_client: u32) -> DatagramLimits {
        let number = |value| NonZeroU32::new(value).unwrap();
        DatagramLimits { total: number(total), per_client: number(per_client) }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn answers_one_in_four_datagrams_beyond_the_rate_of_a_client() {
        let start = Instant::now();
        let mut rate = DatagramRate::new(limits(1_000_000, 10), start);
        let client = ip("192.0.2.7");
        let at_once = (0..10).filter(|_| rate.admit(client, start)).count();
        assert_eq!(at_once, 10);
        let leaked = (0..10_000).filter(|_| rate.admit(client, start)).count();
        assert!((2_000..3_000).contains(&leaked), "{leaked}");
        assert!(rate.admit(client, start + Duration::from_secs(1)));
    }

    proptest! {
        #[test]
        fn never_exceeds_the_total_rate(
            clients in prop::collection::vec(any::<u32>(), 1..400),
            total in 1u32..100,
            steps_us in prop::collection::vec(0u64..40_000, 1..8),
        ) {
            let start = Instant::now();
            let mut rate = DatagramRate::new(limits(total, 5), start);
            let mut now = start;
            let mut admitted = Vec::new();
            for (client, step) in clients.into_iter().zip(steps_us.into_iter().cycle()) {
                if rate.admit(IpAddr::from(client.to_be_bytes()), now) {
                    admitted.push(now);
                }
                now += Duration::from_micros(step);
            }
            // Between any two admitted datagrams: a burst of one second's worth, then an even rate.
            for (first, from) in admitted.iter().enumerate() {
                for (last, to) in admitted.iter().enumerate().skip(first) {
                    let seconds = to.duration_since(*from).as_secs_f64() + 1.0;
                    let count = u32::try_from(last - first + 1).unwrap();
                    prop_assert!(f64::from(count) <= f64::from(total) * seconds + 1.0);
                }
            }
        }
    }
}
