//! Egress policy: the hosts and addresses that requests and redirects may reach.
//!
//! Performs no I/O. Hosts named by the operator may have any address, all other hosts only public
//! addresses: a server cannot direct requests to services that trust this machine's network.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use reqwest::Url;

use crate::fs::filename::escape;

/// Maximum length of a URL in bytes.
const MAX_URL: usize = 8192;

/// IPv4 networks outside the public Internet (RFC 6890 and IANA's registry).
const SPECIAL_V4: [Ipv4Net; 15] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),
    v4([192, 88, 99, 0], 24),
    v4([192, 168, 0, 0], 16),
    v4([198, 18, 0, 0], 15),
    v4([198, 51, 100, 0], 24),
    v4([203, 0, 113, 0], 24),
    // Multicast; then reserved, with broadcast.
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
];

/// The global unicast addresses that IANA has allocated.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0], 3);

/// Exceptions in [`GLOBAL_V6`]: protocol assignments with Teredo, documentation, 6to4.
const SPECIAL_V6: [Ipv6Net; 4] = [
    v6([0x2001, 0, 0], 23),
    v6([0x2001, 0xdb8, 0], 32),
    v6([0x2002, 0, 0], 16),
    v6([0x3fff, 0, 0], 20),
];

/// IPv4 addresses behind a translator (RFC 6052), as DNS64 returns them.
const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0], 96);

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6([a, b, c]: [u16; 3], prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

/// Whether an address belongs to the public Internet, also in its mapped and translated forms.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => !SPECIAL_V4.iter().any(|special| special.contains(&address)),
        IpAddr::V6(address) if NAT64.contains(&address) => {
            let [.., a, b, c, d] = address.octets();
            is_public(Ipv4Addr::new(a, b, c, d).into())
        }
        IpAddr::V6(address) => {
            GLOBAL_V6.contains(&address)
                && !SPECIAL_V6.iter().any(|special| special.contains(&address))
        }
    }
}

/// The reason why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("expected a URL such as https://example.org/file: {0}")]
    Url(String),
    #[error("the URL is longer than {MAX_URL} bytes")]
    UrlTooLong,
    #[error("expected http:// or https://")]
    Scheme,
    #[error("the URL contains a user name or a password, which logs would reveal")]
    Credentials,
    #[error("{0} is not a permitted host (`hosts`)")]
    Host(String),
    #[error("{host} has the non-public address {address}: only explicitly named hosts may")]
    Address { host: String, address: IpAddr },
    #[error("the redirect leads from https to http")]
    Downgrade,
}

/// Parses a URL for HTTP(S) without credentials.
pub(crate) fn url(text: &str) -> Result<Url, Refused> {
    check(Url::parse(text).map_err(|error| Refused::Url(error.to_string()))?)
}

/// Resolves a reference against `base`, with the checks of [`url`].
pub(crate) fn join(base: &Url, text: &str) -> Result<Url, Refused> {
    check(base.join(text).map_err(|error| Refused::Url(error.to_string()))?)
}

fn check(mut url: Url) -> Result<Url, Refused> {
    if url.as_str().len() > MAX_URL {
        return Err(Refused::UrlTooLong);
    }
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(Refused::Scheme);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Refused::Credentials);
    }
    url.set_fragment(None);
    Ok(url)
}

/// Returns a URL for messages: on one line and without its query, which may hold secrets.
pub(crate) fn shown(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_query(None);
    let more = if url.query().is_some() { "?…" } else { "" };
    escape(shown.as_str()) + more
}

fn canonical(host: &str) -> String {
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

/// Returns the host of a URL in its canonical form.
pub(crate) fn host_of(url: &Url) -> String {
    canonical(url.host_str().unwrap_or_default())
}

fn address_of(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Whether a host is this machine, without a DNS query.
pub(crate) fn is_loopback(host: &str) -> bool {
    host == "localhost" || address_of(host).is_some_and(|ip| ip.to_canonical().is_loopback())
}

/// A pattern of permitted hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A single host, in its canonical form.
    Exact(String),
    /// A suffix that starts with a dot.
    Below(String),
}

impl Host {
    /// Parses a name, an address, or `*.example.org` for all hosts below a domain.
    pub fn parse(text: &str) -> Result<Self, String> {
        let expected = || "expected a host such as cdn.example.org or *.example.org".to_owned();
        let (below, name) = text.strip_prefix("*.").map_or((false, text), |name| (true, name));
        let name =
            if name.parse::<Ipv6Addr>().is_ok() { format!("[{name}]") } else { name.to_owned() };
        if name.contains(['/', '?', '#', '@', '\\', '*']) {
            return Err(expected());
        }
        let url = Url::parse(&format!("http://{name}/")).map_err(|_| expected())?;
        if name.contains("]:") || name.contains(':') && !name.starts_with('[') {
            return Err("expected a host without a port: all its ports are permitted".to_owned());
        }
        let host = host_of(&url);
        let is_address = host.starts_with('[') || host.parse::<Ipv4Addr>().is_ok();
        match (below, is_address, host.is_empty()) {
            (_, _, true) | (true, true, _) => Err(expected()),
            (true, ..) => Ok(Self::Below(format!(".{host}"))),
            (false, ..) => Ok(Self::Exact(host)),
        }
    }
}

/// The hosts and addresses that a client may connect to.
#[derive(Debug, Clone, Default)]
pub struct EgressPolicy {
    /// Hosts that may have any address.
    named: HashSet<String>,
    /// Suffixes of hosts that must have public addresses.
    suffixes: Vec<String>,
    /// Whether all hosts with public addresses are permitted.
    allow_any_public: bool,
}

impl EgressPolicy {
    /// Permits the hosts of `urls` and `hosts`, and on request all with public addresses.
    pub fn new<'a>(
        urls: impl IntoIterator<Item = &'a Url>,
        hosts: impl IntoIterator<Item = &'a Host>,
        allow_any_public: bool,
    ) -> Self {
        let mut policy = Self { allow_any_public, ..Self::default() };
        policy.named.extend(urls.into_iter().map(host_of));
        for host in hosts {
            match host {
                Host::Exact(name) => drop(policy.named.insert(name.clone())),
                Host::Below(end) => policy.suffixes.push(end.clone()),
            }
        }
        policy
    }

    /// Checks the host of a URL, and its address if it is a literal: the resolver never sees one.
    pub fn check_url(&self, url: &Url) -> Result<(), Refused> {
        let host = host_of(url);
        if self.named.contains(&host) {
            return Ok(());
        }
        if !self.allow_any_public && !self.suffixes.iter().any(|end| host.ends_with(end)) {
            return Err(Refused::Host(escape(&host)));
        }
        match address_of(&host) {
            Some(address) => self.check_addresses(&host, [address]),
            None => Ok(()),
        }
    }

    /// Checks the resolved addresses of a host: all must be public unless the host is named.
    pub fn check_addresses(
        &self,
        host: &str,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Result<(), Refused> {
        if self.named.contains(&canonical(host)) {
            return Ok(());
        }
        match addresses.into_iter().find(|address| !is_public(*address)) {
            Some(address) => Err(Refused::Address { host: escape(host), address }),
            None => Ok(()),
        }
    }

    /// Resolves and checks the target of a redirect.
    pub fn check_redirect(&self, from: &Url, location: &str) -> Result<Url, Refused> {
        let to = join(from, location)?;
        if from.scheme() == "https" && to.scheme() != "https" {
            return Err(Refused::Downgrade);
        }
        self.check_url(&to).map(|()| to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn permits_public_addresses() {
        for public in [
            "8.8.8.8",
            "1.1.1.1",
            "100.63.0.1",
            "100.128.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00::1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
        ] {
            assert!(is_public(address(public)), "{public}");
        }
    }

    #[test]
    fn refuses_private_and_special_addresses() {
        for special in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
            "64:ff9b:1::808:808",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!is_public(address(special)), "{special}");
        }
    }

    #[test]
    fn accepts_only_http_urls_without_credentials() {
        assert_eq!(url("https://Example.org/a#b").unwrap().as_str(), "https://example.org/a");
        assert_eq!(url("ftp://example.org/"), Err(Refused::Scheme));
        assert_eq!(url("file:///etc/passwd"), Err(Refused::Scheme));
        assert_eq!(url("data:,x"), Err(Refused::Scheme));
        assert_eq!(url("https://me@example.org/"), Err(Refused::Credentials));
        assert_eq!(url("https://:secret@example.org/"), Err(Refused::Credentials));
        let long = format!("https://example.org/{}", "x".repeat(9000));
        assert_eq!(url(&long), Err(Refused::UrlTooLong));
        for bad in ["", "example.org", "http://", "/a"] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hides_queries_in_messages() {
        assert_eq!(shown(&url("https://a.org/b?key=secret").unwrap()), "https://a.org/b?…");
        assert_eq!(shown(&url("https://a.org/b").unwrap()), "https://a.org/b");
    }

    #[test]
    fn parses_exact_hosts_and_domain_patterns() {
        assert_eq!(Host::parse("CDN.example.org."), Ok(Host::Exact("cdn.example.org".to_owned())));
        assert_eq!(Host::parse("*.example.org"), Ok(Host::Below(".example.org".to_owned())));
        assert_eq!(Host::parse("127.1"), Ok(Host::Exact("127.0.0.1".to_owned())));
        assert_eq!(Host::parse("::1"), Ok(Host::Exact("[::1]".to_owned())));
        assert_eq!(Host::parse("[::1]"), Ok(Host::Exact("[::1]".to_owned())));
        for bad in [
            "",
            "*",
            "*.",
            "a.*.org",
            "http://a",
            "a/b",
            "a:80",
            "[::1]:80",
            "u@a",
            "*.127.0.0.1",
            "a b",
        ] {
            assert!(Host::parse(bad).unwrap_err().starts_with("expected a host"), "{bad}");
        }
    }

    fn mirror() -> EgressPolicy {
        let source = url("http://api.example.org/list").unwrap();
        let hosts = ["cdn.example.net", "*.example.com"].map(|host| Host::parse(host).unwrap());
        EgressPolicy::new([&source], &hosts, false)
    }

    #[test]
    fn permits_only_configured_hosts() {
        let may = |text: &str| mirror().check_url(&url(text).unwrap());
        for good in [
            "http://api.example.org/x",
            "https://API.example.org.:8443/",
            "https://cdn.example.net/",
            "https://a.example.com/",
        ] {
            assert_eq!(may(good), Ok(()), "{good}");
        }
        for bad in [
            "https://example.com/",
            "https://evil-example.com/",
            "https://example.org/",
            "http://8.8.8.8/",
        ] {
            assert!(matches!(may(bad), Err(Refused::Host(_))), "{bad}");
        }
    }

    #[test]
    fn permits_private_addresses_only_for_named_hosts() {
        let private = [address("10.0.0.1")];
        assert_eq!(mirror().check_addresses("api.example.org", private), Ok(()));
        assert_eq!(mirror().check_addresses("cdn.example.net.", private), Ok(()));
        assert!(mirror().check_addresses("a.example.com", private).is_err());
        // Any of several addresses may be used for the connection.
        let both = [address("8.8.8.8"), address("::1")];
        assert!(mirror().check_addresses("a.example.com", both).is_err());
        assert_eq!(mirror().check_addresses("a.example.com", [address("8.8.8.8")]), Ok(()));
    }

    #[test]
    fn checks_literal_addresses_in_every_notation() {
        let policy = EgressPolicy::new([&url("http://127.0.0.1:8080/").unwrap()], [], true);
        let may = |text: &str| policy.check_url(&url(text).unwrap());
        assert_eq!(may("http://127.0.0.1:9/"), Ok(()));
        assert_eq!(may("http://8.8.8.8/"), Ok(()));
        for bad in [
            "http://127.0.0.2/",
            "http://10.1/",
            "http://0x7f000002/",
            "http://[::1]/",
            "http://[::ffff:10.0.0.1]/",
            "http://2852039166/",
        ] {
            assert!(matches!(may(bad), Err(Refused::Address { .. })), "{bad}");
        }
    }

    #[test]
    fn refuses_redirects_to_http_and_to_other_hosts() {
        let hop = |from: &str, to: &str| {
            mirror().check_redirect(&url(from).unwrap(), to).map(|to| to.to_string())
        };
        assert_eq!(
            hop("https://api.example.org/a/b", "../c"),
            Ok("https://api.example.org/c".to_owned())
        );
        assert_eq!(
            hop("http://api.example.org/", "https://a.example.com/").unwrap(),
            "https://a.example.com/"
        );
        assert_eq!(
            hop("https://api.example.org/", "http://api.example.org/"),
            Err(Refused::Downgrade)
        );
        assert_eq!(hop("https://api.example.org/", "ftp://api.example.org/"), Err(Refused::Scheme));
        assert!(matches!(hop("https://api.example.org/", "//evil.org/"), Err(Refused::Host(_))));
        assert_eq!(
            hop("https://api.example.org/", "//u:p@api.example.org/"),
            Err(Refused::Credentials)
        );
    }

    proptest! {
        #[test]
        fn treats_mapped_ipv4_addresses_like_ipv4(bits: u32) {
            let [a, b, c, d] = bits.to_be_bytes();
            let v4 = Ipv4Addr::from(bits);
            let translated = format!("64:ff9b::{:x}:{:x}", u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            prop_assert_eq!(is_public(v4.into()), is_public(v4.to_ipv6_mapped().into()));
            prop_assert_eq!(is_public(v4.into()), is_public(address(&translated)));
            prop_assert!(!is_public(v4.to_ipv6_compatible().into()));
        }

        #[test]
        fn follows_no_redirect_out_of_the_permitted_hosts(location in "\\PC{0,40}|(https?:)?//[a-z0-9.@:\\[\\]]{0,20}/x") {
            let from = url("https://api.example.org/").unwrap();
            if let Ok(to) = mirror().check_redirect(&from, &location) {
                prop_assert_eq!(to.scheme(), "https");
                prop_assert!(mirror().check_url(&to).is_ok());
                prop_assert!(to.username().is_empty());
            }
        }
    }
}
