//! Filter against reply loops and reflection: source addresses of datagrams are easily forged, so
//! a reply must reach neither another service nor more than one host.

use std::net::{IpAddr, SocketAddr};

/// Lower ports belong to services such as chargen, daytime and DNS, which would answer the reply.
const FIRST_CLIENT_PORT: u16 = 1024;

/// Whether a datagram from `source` to `destination` may be answered.
///
/// `own_ports` are the UDP ports of this daemon, which other instances of it are likely to use too;
/// `resembles_reply` recognizes their replies. `destination` is `None` if the kernel does not
/// report it.
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

/// Whether an address belongs to one host. Broadcast addresses of subnets look like any other
/// address; the kernel refuses to send to them without `SO_BROADCAST`.
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
    fn answers_clients() {
        assert!(answered("192.0.2.7:1024"));
        assert!(answered("192.0.2.7:65535"));
        assert!(answered("[2001:db8::7]:40000"));
    }

    #[test]
    fn ignores_ports_of_services_and_of_this_daemon() {
        for source in ["192.0.2.7:0", "192.0.2.7:37", "192.0.2.7:1023", "[2001:db8::7]:123"] {
            assert!(!answered(source), "{source}");
        }
        for source in ["192.0.2.7:6789", "[2001:db8::7]:5000"] {
            assert!(!answered(source), "{source}");
        }
    }

    #[test]
    fn ignores_sources_that_are_not_one_host() {
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
    fn ignores_datagrams_to_many_hosts() {
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
    fn ignores_datagrams_that_resemble_replies() {
        let source = "192.0.2.7:4000".parse().unwrap();
        assert!(!may_be_answered(source, None, &[], || true));
    }
}
