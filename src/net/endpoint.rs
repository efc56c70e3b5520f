//! Addresses of sockets, as they are configured, compared and printed. Performs no I/O.

use core::net::SocketAddr;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::net::host_port::split_host_port;

/// Maximum length of the path of a Unix socket with its final NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 108;

/// Maximum length of the name of an inherited socket (systemd.socket(5), `FileDescriptorName=`).
const MAX_SOCKET_NAME: usize = 255;

const EXPECTED: &str =
    "expected HOST:PORT, tcp:HOST:PORT, udp:HOST:PORT, unix:PATH or systemd:NAME";

/// An address of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Endpoint {
    Tcp(SocketAddr),
    Udp(SocketAddr),
    /// A Unix stream socket in the file system.
    Unix(PathBuf),
}

/// A socket that a service listens on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Listen {
    /// Bound to this address, or inherited with it.
    At(Endpoint),
    /// Every inherited socket of this name.
    Inherited(String),
}

/// An element of `listen`: a socket, or a host whose addresses the probe stage resolves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ListenSpec {
    Socket(Listen),
    Host { is_udp: bool, host: String, port: u16 },
}

impl ListenSpec {
    /// Parses `HOST:PORT`, `tcp:HOST:PORT`, `udp:HOST:PORT`, `unix:PATH` or `systemd:NAME`. A
    /// relative path begins at `base_dir`. The error names the expected value.
    pub(crate) fn parse(text: &str, base_dir: &Path) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("systemd:") {
            let is_name = (1..=MAX_SOCKET_NAME).contains(&name.len())
                && name.chars().all(|c| c.is_ascii_graphic() && c != ':');
            return if is_name {
                Ok(Self::Socket(Listen::Inherited(name.to_owned())))
            } else {
                Err("expected the FileDescriptorName= of a socket unit after systemd:".to_owned())
            };
        }
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.contains('\0') {
                return Err("expected a path after unix:".to_owned());
            }
            let path = base_dir.join(path);
            if path.as_os_str().len() >= MAX_SOCKET_PATH {
                return Err(format!("expected a path shorter than {MAX_SOCKET_PATH} bytes"));
            }
            return Ok(Self::Socket(Listen::At(Endpoint::Unix(path))));
        }
        let (is_udp, address) = match text.strip_prefix("udp:") {
            Some(address) => (true, address),
            None => (false, text.strip_prefix("tcp:").unwrap_or(text)),
        };
        if let Ok(address) = address.parse() {
            check_address(address)?;
            return Ok(Self::Socket(Listen::At(Endpoint::new(is_udp, address))));
        }
        let (host, port) = split_host_port(address).ok_or(EXPECTED)?;
        let port = port.ok_or(EXPECTED)?;
        let port = port.parse().map_err(|_| "expected a port from 0 to 65535".to_owned())?;
        // Every valid address in brackets has been parsed above.
        if address.starts_with('[') {
            return Err(EXPECTED.to_owned());
        }
        Ok(Self::Host { is_udp, host: host.to_owned(), port })
    }

    pub(crate) fn is_udp(&self) -> bool {
        match self {
            Self::Socket(listen) => matches!(listen, Listen::At(Endpoint::Udp(_))),
            Self::Host { is_udp, .. } => *is_udp,
        }
    }
}

fn check_address(address: SocketAddr) -> Result<(), String> {
    let SocketAddr::V6(v6) = address else { return Ok(()) };
    if v6.ip().to_ipv4_mapped().is_some() {
        let v4 = SocketAddr::new(address.ip().to_canonical(), address.port());
        return Err(format!("an IPv4-mapped address; expected {v4}"));
    }
    if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 {
        return Err("expected the interface number, too, such as [fe80::1%2]:6789".to_owned());
    }
    Ok(())
}

impl Listen {
    pub(crate) fn endpoint(&self) -> Option<&Endpoint> {
        match self {
            Self::At(endpoint) => Some(endpoint),
            Self::Inherited(_) => None,
        }
    }

    /// Returns the name of an inherited socket.
    pub(crate) fn inherited(&self) -> Option<&str> {
        match self {
            Self::At(_) => None,
            Self::Inherited(name) => Some(name),
        }
    }

    pub(crate) fn conflicts_with(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::At(one), Self::At(two)) => one.conflicts_with(two),
            (Self::Inherited(one), Self::Inherited(two)) => one == two,
            _ => false,
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(endpoint) => endpoint.fmt(f),
            Self::Inherited(name) => write!(f, "systemd:{name}"),
        }
    }
}

impl Endpoint {
    pub(crate) fn new(is_udp: bool, address: SocketAddr) -> Self {
        if is_udp { Self::Udp(address) } else { Self::Tcp(address) }
    }

    /// Whether the kernel refuses to bind both at the same time.
    pub(crate) fn conflicts_with(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Unix(one), Self::Unix(two)) => one == two,
            (Self::Tcp(one), Self::Tcp(two)) | (Self::Udp(one), Self::Udp(two)) => {
                let same_family = one.is_ipv4() == two.is_ipv4();
                let overlap = one.ip() == two.ip()
                    || same_family && (one.ip().is_unspecified() || two.ip().is_unspecified());
                // Port 0 is any free port, never the same twice.
                overlap && one.port() == two.port() && one.port() != 0
            }
            _ => false,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Udp(address) => write!(f, "udp:{address}"),
            // Escaped for terminals and logs.
            Self::Unix(path) => write!(f, "unix:{}", path.to_string_lossy().escape_debug()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<ListenSpec, String> {
        ListenSpec::parse(text, Path::new("/base"))
    }

    fn endpoint(text: &str) -> Endpoint {
        match parse(text) {
            Ok(ListenSpec::Socket(Listen::At(endpoint))) => endpoint,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn parses_addresses_paths_hosts_and_names_of_sockets() {
        let address = "127.0.0.1:6789".parse().unwrap();
        assert_eq!(endpoint("127.0.0.1:6789"), Endpoint::Tcp(address));
        assert_eq!(endpoint("tcp:127.0.0.1:6789"), Endpoint::Tcp(address));
        assert_eq!(endpoint("udp:127.0.0.1:6789"), Endpoint::Udp(address));
        assert_eq!(endpoint("unix:run/x.sock"), Endpoint::Unix("/base/run/x.sock".into()));
        assert_eq!(endpoint("unix:/run/x.sock"), Endpoint::Unix("/run/x.sock".into()));
        let host = |is_udp| ListenSpec::Host { is_udp, host: "localhost".to_owned(), port: 80 };
        assert_eq!(parse("localhost:80"), Ok(host(false)));
        assert_eq!(parse("udp:localhost:80"), Ok(host(true)));
        let inherited = Listen::Inherited("clock".to_owned());
        assert_eq!(inherited.to_string(), "systemd:clock");
        assert_eq!(parse("systemd:clock"), Ok(ListenSpec::Socket(inherited)));
    }

    #[test]
    fn refuses_other_texts_and_names_the_expected_form() {
        for bad in ["", "6789", ":6789", "::1:80", "[::1:80", "host", "unix:", "http://x:80"] {
            assert!(parse(bad).unwrap_err().starts_with("expected"), "{bad}");
        }
        assert!(parse("[::ffff:127.0.0.1]:80").unwrap_err().contains("127.0.0.1:80"));
        assert!(parse("[fe80::1]:80").unwrap_err().contains("interface"));
        assert!(parse("[fe80::1%2]:80").is_ok());
        assert!(parse("127.0.0.1:65536").unwrap_err().contains("0 to 65535"));
        assert!(parse(&format!("unix:/{}", "x".repeat(200))).unwrap_err().contains("108"));
        for bad in ["systemd:", "systemd:a b", "systemd:a:b", "systemd:\u{e4}"] {
            assert!(parse(bad).unwrap_err().contains("FileDescriptorName="), "{bad}");
        }
        assert!(parse(&format!("systemd:{}", "x".repeat(256))).is_err());
    }

    #[test]
    fn detects_conflicts_with_wildcards_of_the_same_family_and_protocol() {
        let conflict = |one: &str, two: &str| endpoint(one).conflicts_with(&endpoint(two));
        assert!(conflict("0.0.0.0:80", "127.0.0.1:80"));
        assert!(conflict("[::]:80", "[::1]:80"));
        assert!(conflict("unix:/x", "unix:/x"));
        assert!(!conflict("0.0.0.0:80", "[::]:80"));
        assert!(!conflict("0.0.0.0:80", "udp:0.0.0.0:80"));
        assert!(!conflict("127.0.0.1:0", "127.0.0.1:0"));
        assert!(!conflict("127.0.0.1:80", "127.0.0.2:80"));
    }

    proptest! {
        #[test]
        fn parses_endpoints_as_they_are_printed(ip: IpAddr, port: u16, udp: bool) {
            let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
            prop_assume!(!link_local);
            let printed = Endpoint::new(udp, SocketAddr::new(ip.to_canonical(), port));
            prop_assert_eq!(endpoint(&printed.to_string()), printed);
        }
    }
}
