//! Connections of each client of a service, for `max-per-client`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;

use parking_lot::Mutex;

/// Returns the key of a client: its IPv4 address, or its IPv6 /64, as providers assign at least a
/// /64 to each customer.
pub(crate) fn client_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let network = v6.to_bits() >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Open connections of a service, counted by client.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    /// Contains only clients with a connection, so its size is bounded by the permits.
    connected: Mutex<HashMap<IpAddr, u32>>,
}

/// A counted connection of a client; dropping the guard ends its count.
#[derive(Debug)]
pub(crate) struct ClientGuard {
    clients: Arc<Clients>,
    client: IpAddr,
    is_near_limit: bool,
}

impl ClientGuard {
    /// Whether the client used more than half of its limit when it connected.
    pub(crate) fn is_near_limit(&self) -> bool {
        self.is_near_limit
    }
}

impl Clients {
    /// Counts a connection from this address. Returns `None` if its client already has `max`
    /// connections.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr, max: NonZeroU32) -> Option<ClientGuard> {
        let client = client_of(address);
        let mut connected = self.connected.lock();
        let count = connected.entry(client).or_insert(0);
        if *count >= max.get() {
            return None;
        }
        *count += 1;
        let is_near_limit = *count > max.get() / 2;
        Some(ClientGuard { clients: Arc::clone(self), client, is_near_limit })
    }
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        let mut connected = self.clients.connected.lock();
        if let Entry::Occupied(mut entry) = connected.entry(self.client) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn identifies_clients_by_ipv4_address_or_ipv6_network() {
        assert_eq!(client_of(ip("192.0.2.7")), ip("192.0.2.7"));
        assert_eq!(client_of(ip("::ffff:192.0.2.7")), ip("192.0.2.7"));
        assert_eq!(client_of(ip("2001:db8:1:2:3:4:5:6")), ip("2001:db8:1:2::"));
    }

    #[test]
    fn frees_the_share_of_a_client_when_connections_end() {
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
        fn keeps_each_client_within_the_limit_and_forgets_idle_clients(
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
            prop_assert!(clients.connected.lock().is_empty());
        }
    }
}
