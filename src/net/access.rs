//! Access lists: networks from which clients may connect.

use std::net::IpAddr;

use ipnet::IpNet;

/// The access lists of a service. Unix sockets are governed by the permissions of their folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// Permitted networks; if empty, all.
    pub allow: Vec<IpNet>,
    /// Refused networks; takes precedence over `allow`.
    pub deny: Vec<IpNet>,
}

impl Access {
    /// Whether a client with this address may connect.
    pub(crate) fn permits(&self, address: IpAddr) -> bool {
        let among = |networks| is_among(networks, address);
        !among(&self.deny) && (self.allow.is_empty() || among(&self.allow))
    }
}

/// Whether an address is in one of the networks.
pub(crate) fn is_among(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// Parses a network such as `10.0.0.0/8` or `2001:db8::/32`, or a single address. The error names
/// the expected value.
pub(crate) fn parse_network(text: &str) -> Result<IpNet, String> {
    let expected = || "expected a network or an address, such as \"10.0.0.0/8\"".to_owned();
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    let network: IpNet = text.parse().map_err(|_| expected())?;
    // In `10.1.2.3/8`, either part may be a mistake.
    if network.trunc() == network {
        Ok(network)
    } else {
        Err(format!("expected a network without host bits, such as \"{}\"", network.trunc()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn prefers_deny_to_allow_and_permits_all_without_lists() {
        let networks =
            |texts: &[&str]| texts.iter().map(|text| parse_network(text).unwrap()).collect();
        let unrestricted = Access::default();
        assert!(unrestricted.permits(ip("192.0.2.7")));
        let restricted = Access {
            allow: networks(&["10.0.0.0/8", "2001:db8::/32", "192.0.2.7"]),
            deny: networks(&["10.9.0.0/16"]),
        };
        for yes in ["10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1", "192.0.2.7"] {
            assert!(restricted.permits(ip(yes)), "{yes}");
        }
        for no in ["10.9.1.1", "::ffff:10.9.1.1", "192.0.2.8", "2001:db9::1", "::1"] {
            assert!(!restricted.permits(ip(no)), "{no}");
        }
    }

    #[test]
    fn refuses_networks_with_host_bits() {
        assert!(parse_network("10.0.0.0/8").is_ok());
        assert!(parse_network("10.1.0.0/8").unwrap_err().contains("\"10.0.0.0/8\""));
        for bad in ["", "10.0.0.0/33", "example.org", "10.0.0", "::/129"] {
            assert!(parse_network(bad).unwrap_err().starts_with("expected a network"), "{bad}");
        }
    }
}
