//! What one service may take, and who may ask it: connections at one time, in all and for one
//! client, their deadlines, datagrams per second, access lists.
//!
//! Here are the numbers and the arithmetic. Who waits for a permit is the listener's business, and
//! the deadlines are kept by the connection.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::config_reader::{Reported, Table, values, values_of};
use crate::net::connection::Deadlines;

/// The limits of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one time; over it, clients wait in the kernel's queue.
    pub max_connections: NonZeroU32,
    /// Connections of one client at one time; one more is reset.
    pub max_per_client: NonZeroU32,
    /// Who may ask.
    pub access: Access,
    /// The balancers, which say in a PROXY header whom they speak for, and must.
    pub balancers: Vec<IpNet>,
    /// How long a connection may last.
    pub deadlines: Deadlines,
    /// Datagrams answered per second.
    pub datagrams: DatagramLimits,
}

/// How many datagrams a service answers per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatagramLimits {
    /// In all.
    pub total: NonZeroU32,
    /// To one IPv4 address or one IPv6 /64, beyond which one in [`LEAK`] is still answered.
    pub per_client: NonZeroU32,
}

impl Default for Limits {
    fn default() -> Self {
        #[expect(clippy::unwrap_used, reason = "the compiler does it")]
        const fn number(value: u32) -> NonZeroU32 {
            NonZeroU32::new(value).unwrap()
        }
        Self {
            max_connections: const { number(4096) },
            max_per_client: const { number(1024) },
            access: Access::default(),
            balancers: Vec::new(),
            deadlines: Deadlines { idle: Duration::from_secs(30), total: Duration::from_hours(1) },
            datagrams: DatagramLimits {
                total: const { number(10_000) },
                per_client: const { number(50) },
            },
        }
    }
}

impl Limits {
    /// Reads the keys of `[limits]`, which each service can override; `base` has the defaults.
    pub(crate) fn read(table: &mut Table<'_>, base: &Self) -> Result<Self, Reported> {
        let max_connections = table.number_or("max-connections", base.max_connections);
        let max_per_client = table.number_or("max-per-client", base.max_per_client);
        let allow = table.texts("allow", network);
        let deny = table.texts("deny", network);
        let idle = table.text("idle-timeout", values::duration);
        let total = table.text("max-duration", values::duration);
        let datagrams = table.number_or("max-datagrams", base.datagrams.total);
        let per_client = table.number_or("max-datagrams-per-client", base.datagrams.per_client);
        let networks = |set: Option<_>, base: &Vec<_>| match set {
            Some(set) => values_of(Some(set)),
            None => base.clone(),
        };
        Ok(Self {
            max_connections: max_connections?,
            max_per_client: max_per_client?,
            balancers: base.balancers.clone(),
            access: Access {
                allow: networks(allow?, &base.access.allow),
                deny: networks(deny?, &base.access.deny),
            },
            deadlines: Deadlines {
                idle: idle?.unwrap_or(base.deadlines.idle),
                total: total?.unwrap_or(base.deadlines.total),
            },
            datagrams: DatagramLimits { total: datagrams?, per_client: per_client? },
        })
    }
}

/// What counts as one client: an IPv4 address, or an IPv6 /64, of which one customer of a
/// provider has them all.
pub(crate) fn client_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let network = v6.to_bits() >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Who may ask a service, by Internet address. A Unix socket has the permissions of its folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// The networks that may; if there are none, everybody may.
    pub allow: Vec<IpNet>,
    /// The networks that may not, whatever `allow` says.
    pub deny: Vec<IpNet>,
}

impl Access {
    /// Whether a client with this address may ask.
    pub fn permits(&self, address: IpAddr) -> bool {
        let among = |networks| is_among(networks, address);
        !among(&self.deny) && (self.allow.is_empty() || among(&self.allow))
    }
}

/// Whether an address is in one of the networks.
pub(crate) fn is_among(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// Reads a network such as `10.0.0.0/8` or `2001:db8::/32`, or an address alone.
///
/// # Errors
/// Says what was expected.
pub(crate) fn network(text: &str) -> Result<IpNet, String> {
    let expected = || "expected a network or an address, as \"10.0.0.0/8\"".to_owned();
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    let network: IpNet = text.parse().map_err(|_| expected())?;
    // `10.1.2.3/8` may be a slip of either part.
    if network.trunc() == network {
        Ok(network)
    } else {
        Err(format!("expected a network without bits of a host, as \"{}\"", network.trunc()))
    }
}

/// The connections of each client of a service at this moment.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    /// Only those who have one.
    connected: Mutex<HashMap<IpAddr, u32>>,
}

/// A client's connection, which counts until it is dropped.
#[derive(Debug)]
pub struct ClientGuard {
    clients: Arc<Clients>,
    client: IpAddr,
    crowded: bool,
}

impl ClientGuard {
    /// Whether the client had half of what it may have, or more, when it came.
    pub fn is_crowded(&self) -> bool {
        self.crowded
    }
}

impl Clients {
    /// Counts a connection from this address, or `None` if its client has `max` already.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr, max: NonZeroU32) -> Option<ClientGuard> {
        let client = client_of(address);
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        let count = connected.entry(client).or_insert(0);
        if *count >= max.get() {
            return None;
        }
        *count += 1;
        let crowded = *count > max.get() / 2;
        Some(ClientGuard { clients: Arc::clone(self), client, crowded })
    }
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        let mut connected = self.clients.connected.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut entry) = connected.entry(self.client) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

/// Beyond its rate, a client is still answered once in so many datagrams: whoever forges a
/// client's address can slow that client's answers down, but not silence it.
const LEAK: u64 = 4;

/// How many clients are told apart. The table never grows; clients that share a slot share a rate.
const SLOTS: usize = 4096;

/// Keeps the rates of datagrams: one for every client, one for all.
///
/// Each is the generic cell rate algorithm (ITU-T I.371): all that is kept is the time at which
/// the next one would be due if they came evenly; a second's worth may come at once.
#[derive(Debug)]
pub(crate) struct DatagramRate {
    limits: DatagramLimits,
    /// Nanoseconds since `epoch` at which the next datagram is due.
    clients: Box<[u64]>,
    all: u64,
    epoch: Instant,
    /// Seeded at random, so that nobody can choose whom to share a slot with.
    hasher: RandomState,
    asked: u64,
}

impl DatagramRate {
    /// Begins with every client's full rate.
    pub(crate) fn new(limits: DatagramLimits, now: Instant) -> Self {
        Self {
            limits,
            clients: vec![0; SLOTS].into_boxed_slice(),
            all: 0,
            epoch: now,
            hasher: RandomState::new(),
            asked: 0,
        }
    }

    /// Whether a datagram from `client` may be answered at `now`.
    pub(crate) fn admit(&mut self, client: IpAddr, now: Instant) -> bool {
        self.asked = self.asked.wrapping_add(1);
        let since = now.saturating_duration_since(self.epoch).as_nanos();
        let now = u64::try_from(since).unwrap_or(u64::MAX);

        let hash = self.hasher.hash_one(client_of(client));
        #[expect(clippy::cast_possible_truncation, reason = "any part of the hash will do")]
        let slot = hash as usize % SLOTS;
        let Some(due) = self.clients.get_mut(slot) else { return false };
        let within_rate = take(due, self.limits.per_client, now);
        let leaked = || self.hasher.hash_one(self.asked).is_multiple_of(LEAK);
        (within_rate || leaked()) && take(&mut self.all, self.limits.total, now)
    }
}

/// Takes one from the rate whose next is due at `due`, if the rate allows.
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

    fn limits(total: u32, per_client: u32) -> DatagramLimits {
        let number = |value| NonZeroU32::new(value).unwrap();
        DatagramLimits { total: number(total), per_client: number(per_client) }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_an_ipv6_network() {
        assert_eq!(client_of(ip("192.0.2.7")), ip("192.0.2.7"));
        assert_eq!(client_of(ip("::ffff:192.0.2.7")), ip("192.0.2.7"));
        assert_eq!(client_of(ip("2001:db8:1:2:3:4:5:6")), ip("2001:db8:1:2::"));
    }

    #[test]
    fn deny_wins_over_allow_and_no_list_is_everybody() {
        let networks = |texts: &[&str]| texts.iter().map(|text| network(text).unwrap()).collect();
        let everybody = Access::default();
        assert!(everybody.permits(ip("192.0.2.7")));
        let some = Access {
            allow: networks(&["10.0.0.0/8", "2001:db8::/32", "192.0.2.7"]),
            deny: networks(&["10.9.0.0/16"]),
        };
        for yes in ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1", "192.0.2.7"] {
            assert!(some.permits(ip(yes)), "{yes}");
        }
        for no in ["10.9.1.1", "::ffff:10.9.1.1", "192.0.2.8", "2001:db9::1", "::1"] {
            assert!(!some.permits(ip(no)), "{no}");
        }
    }

    #[test]
    fn a_network_has_no_bits_of_a_host() {
        assert!(network("10.0.0.0/8").is_ok());
        assert!(network("10.1.0.0/8").unwrap_err().contains("\"10.0.0.0/8\""));
        for bad in ["", "10.0.0.0/33", "example.org", "10.0.0", "::/129"] {
            assert!(network(bad).unwrap_err().starts_with("expected a network"), "{bad}");
        }
    }

    #[test]
    fn a_client_has_its_connections_back_when_they_end() {
        let clients = Arc::<Clients>::default();
        let enter = |address| clients.enter(ip(address), NonZeroU32::new(2).unwrap());
        let first = enter("192.0.2.7").unwrap();
        let _second = enter("::ffff:192.0.2.7").unwrap();
        assert!(enter("192.0.2.7").is_none());
        let _another = enter("192.0.2.8").unwrap();
        drop(first);
        assert!(enter("192.0.2.7").is_some());
        let guards = ["2001:db8::1", "2001:db8::2", "2001:db8::3"].map(enter);
        assert!(guards[1].is_some() && guards[2].is_none());
    }

    proptest! {
        #[test]
        fn nobody_has_more_than_the_limit_and_nothing_is_kept_of_those_who_left(
            steps in prop::collection::vec((0u8..5, any::<bool>()), 0..200),
        ) {
            let clients = Arc::<Clients>::default();
            let max = NonZeroU32::new(3).unwrap();
            let mut guards: Vec<Vec<ClientGuard>> = (0..5).map(|_| Vec::new()).collect();
            for (client, enters) in steps {
                let own = &mut guards[usize::from(client)];
                if enters {
                    let entered = clients.enter(IpAddr::from([10, 0, 0, client]), max);
                    prop_assert_eq!(entered.is_some(), own.len() < 3);
                    own.extend(entered);
                } else {
                    own.pop();
                }
            }
            drop(guards);
            prop_assert!(clients.connected.lock().unwrap().is_empty());
        }
    }

    #[test]
    fn beyond_its_rate_a_client_is_answered_one_time_in_a_few() {
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
        fn the_total_rate_is_exceeded_at_no_time(
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
            // From whichever to whichever: one second's worth at once, then evenly.
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
