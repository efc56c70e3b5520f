//! Which datagrams are answered: none that could be part of a loop or of an amplification.
//!
//! A datagram's sender is forged with ease. An answer goes to whoever the datagram names, so that
//! a careless server can be set on a victim, on another server or on itself.

use std::net::{IpAddr, SocketAddr};

/// Ports below this one belong to services, which would take the answer for a question; among
/// them are chargen, daytime and DNS.
const FIRST_CLIENT_PORT: u16 = 1024;

/// Whether a datagram that `source` sent to `destination`, with `payload`, may be answered.
///
/// `own_ports` are the UDP ports of this daemon, and so, by custom, of others like it;
/// `resembles_reply` tells what could be such a daemon's reply. `destination` is unknown if the
/// kernel does not say.
pub fn may_be_answered(
    source: SocketAddr,
    destination: Option<IpAddr>,
    own_ports: &[u16],
    resembles_reply: impl FnOnce() -> bool,
) -> bool {
    source.port() >= FIRST_CLIENT_PORT
        && !own_ports.contains(&source.port())
        && is_one_host(source.ip())
        && destination.is_none_or(is_one_host)
        && !resembles_reply()
}

/// Whether an address belongs to one host. A network's own broadcast address cannot be told from
/// outside; the kernel does not send there from a socket that did not ask for it.
fn is_one_host(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let reserved = v4.octets()[0] == 0 || v4.octets()[0] >= 240;
            !(reserved || v4.is_multicast())
        }
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_multicast()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(source: &str) -> bool {
        may_be_answered(source.parse().unwrap(), None, &[6789, 5000], || false)
    }

    #[test]
    fn a_client_is_answered() {
        assert!(answered("192.0.2.7:1024"));
        assert!(answered("192.0.2.7:65535"));
        assert!(answered("[2001:db8::7]:40000"));
    }

    #[test]
    fn ports_of_services_and_our_own_are_not() {
        for source in ["192.0.2.7:0", "192.0.2.7:37", "192.0.2.7:1023", "[2001:db8::7]:123"] {
            assert!(!answered(source), "{source}");
        }
        for source in ["192.0.2.7:6789", "[2001:db8::7]:5000"] {
            assert!(!answered(source), "{source}");
        }
    }

    #[test]
    fn sources_that_are_not_one_host_are_not() {
        for source in [
            "0.0.0.0:4000",
            "0.1.2.3:4000",
            "224.0.0.1:4000",
            "255.255.255.255:4000",
            "240.0.0.1:4000",
            "[::]:4000",
            "[ff02::1]:4000",
            "[::ffff:224.0.0.1]:4000",
        ] {
            assert!(!answered(source), "{source}");
        }
    }

    #[test]
    fn datagrams_sent_to_many_hosts_are_not() {
        let to = |destination: &str| {
            let source = "192.0.2.7:4000".parse().unwrap();
            may_be_answered(source, Some(destination.parse().unwrap()), &[], || false)
        };
        assert!(to("192.0.2.1"));
        assert!(!to("255.255.255.255"));
        assert!(!to("224.0.0.251"));
        assert!(!to("ff02::fb"));
    }

    #[test]
    fn what_resembles_a_reply_is_not() {
        let source = "192.0.2.7:4000".parse().unwrap();
        assert!(!may_be_answered(source, None, &[], || true));
    }
}
