//! The client name in EHLO (RFC 5321, 4.1.1.1): the fully qualified name of this machine, or the
//! address literal of the connection.

use std::net::IpAddr;
use std::time::Duration;

use dns_lookup::AddrInfoHints;

use crate::notify::address::ascii_domain;

/// Maximum wait for the resolver before the address literal is used.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks the value of the `helo` key.
pub(crate) fn parse(text: &str) -> Result<String, &'static str> {
    let name = ascii_domain(text).filter(|name| name.starts_with('[') || is_fully_qualified(name));
    name.ok_or("expected a full name, as mail.example.org, or an address literal, as [192.0.2.1]")
}

/// Returns the fully qualified name of this machine: its host name, or its canonical name like
/// `hostname -f`. Runs the resolver on a blocking thread.
pub(crate) async fn full_host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_str().unwrap_or_default().to_owned();
    if is_announceable(&name) {
        return Some(name);
    }
    // The resolver would return a different machine.
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

/// Whether a server accepts the name: no name of the loopback interface, and no `_`, which strict
/// servers refuse.
fn is_announceable(name: &str) -> bool {
    name.is_ascii()
        && ascii_domain(name).is_some_and(|name| is_fully_qualified(&name))
        && !name.contains('_')
        && !name.starts_with("localhost")
}

fn is_fully_qualified(name: &str) -> bool {
    name.contains('.')
}

/// Formats an address literal (RFC 5321, 4.1.3).
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
    fn accepts_full_names_and_address_literals() {
        for name in ["mail.example.org", "[192.0.2.1]", "[IPv6:2001:db8::1]"] {
            assert_eq!(parse(name).as_deref(), Ok(name));
        }
        assert_eq!(parse("bücher.example").as_deref(), Ok("xn--bcher-kva.example"));
        for name in ["", "box", "a b.org", "192.0.2.1", "[box]", "a..b", "a.org\r\nRSET"] {
            assert!(parse(name).unwrap_err().starts_with("expected "), "{name:?}");
        }
    }

    #[test]
    fn announces_full_names_only() {
        assert!(is_announceable("mail.example.org"));
        for name in ["", "box", "localhost.localdomain", "my_box.example.org", "10.0.0.1"] {
            assert!(!is_announceable(name), "{name}");
        }
    }

    #[test]
    fn formats_address_literals() {
        let literal = |address: &str| address_literal(address.parse().unwrap());
        assert_eq!(literal("192.0.2.1"), "[192.0.2.1]");
        assert_eq!(literal("::ffff:192.0.2.1"), "[192.0.2.1]");
        assert_eq!(literal("2001:db8::1"), "[IPv6:2001:db8::1]");
    }
}
