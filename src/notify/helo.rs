//! The name that EHLO announces (RFC 5321, 4.1.1.1): the fully qualified name of this machine, or
//! the address literal of the connection if it has none.

use std::net::IpAddr;
use std::time::Duration;

use dns_lookup::AddrInfoHints;

use crate::notify::address::ascii_domain;

/// The longest wait for the resolver. Without an answer the address literal does.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks the value of the `helo` key.
///
/// # Errors
/// If it is neither a fully qualified name nor an address literal.
pub(crate) fn parse(text: &str) -> Result<String, &'static str> {
    let name = ascii_domain(text).filter(|name| name.starts_with('[') || is_fully_qualified(name));
    name.ok_or("expected a full name, as mail.example.org, or an address literal, as [192.0.2.1]")
}

/// The fully qualified name of this machine: its host name, or the name's canonical form as
/// `hostname -f` prints it. The resolver may block, so it runs apart from the event loop.
pub(crate) async fn full_host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_str().unwrap_or_default().to_owned();
    if is_announceable(&name) {
        return Some(name);
    }
    // Anything else with a dot would only lead to a different machine.
    if name.contains('.') || ascii_domain(&name).is_none() {
        return None;
    }
    let lookup = tokio::task::spawn_blocking(move || canonical_name(&name));
    tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await.ok()?.ok()?
}

fn canonical_name(name: &str) -> Option<String> {
    let hints = AddrInfoHints {
        flags: libc::AI_CANONNAME,
        socktype: libc::SOCK_STREAM,
        ..AddrInfoHints::default()
    };
    let mut found = dns_lookup::getaddrinfo(Some(name), None, Some(hints)).ok()?;
    let canonical = found.find_map(|address| address.ok()?.canonname)?;
    let canonical = canonical.trim_end_matches('.');
    is_announceable(canonical).then(|| canonical.to_owned())
}

/// Whether a server can tell this machine by the name: the names of the loopback interface do not
/// qualify, nor do names with `_`, which strict servers refuse.
fn is_announceable(name: &str) -> bool {
    name.is_ascii()
        && ascii_domain(name).is_some_and(|name| is_fully_qualified(&name))
        && !name.contains('_')
        && !name.starts_with("localhost")
}

fn is_fully_qualified(name: &str) -> bool {
    name.contains('.')
}

/// The address literal (RFC 5321, 4.1.3) of a local address.
pub(crate) fn address_literal(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => format!("[{address}]"),
        IpAddr::V6(address) => format!("[IPv6:{address}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helo_key_takes_full_names_and_address_literals() {
        for name in ["mail.example.org", "[192.0.2.1]", "[IPv6:2001:db8::1]"] {
            assert_eq!(parse(name).as_deref(), Ok(name));
        }
        assert_eq!(parse("bücher.example").as_deref(), Ok("xn--bcher-kva.example"));
        for name in ["", "box", "a b.org", "192.0.2.1", "[box]", "a..b", "a.org\r\nRSET"] {
            assert!(parse(name).unwrap_err().starts_with("expected "), "{name:?}");
        }
    }

    #[test]
    fn only_full_names_of_this_machine_are_announced() {
        assert!(is_announceable("mail.example.org"));
        for name in ["", "box", "localhost.localdomain", "my_box.example.org", "10.0.0.1"] {
            assert!(!is_announceable(name), "{name}");
        }
    }

    #[test]
    fn an_address_literal_names_the_family() {
        let literal = |address: &str| address_literal(address.parse().unwrap());
        assert_eq!(literal("192.0.2.1"), "[192.0.2.1]");
        assert_eq!(literal("::ffff:192.0.2.1"), "[192.0.2.1]");
        assert_eq!(literal("2001:db8::1"), "[IPv6:2001:db8::1]");
    }
}
