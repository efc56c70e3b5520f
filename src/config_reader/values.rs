//! The values that a configuration writes as strings: durations, sizes, addresses.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use jiff::SignedDuration;

/// The longest duration that makes sense anywhere here; it also keeps deadlines computable.
const MAX_DURATION: Duration = Duration::from_hours(366 * 24);

/// The longest path that the address of a Unix socket can hold (unix(7)), with its final NUL.
const MAX_SOCKET_PATH: usize = 108;

/// Reads a duration such as `30s`, `10m` or `1h 30m`, longer than nothing.
///
/// # Errors
/// Says what was expected.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<SignedDuration>().ok().and_then(|parsed| parsed.try_into().ok());
    match parsed {
        Some(duration) if duration > Duration::ZERO && duration <= MAX_DURATION => Ok(duration),
        Some(_) => Err("expected a duration above 0 and of at most a year".to_owned()),
        None => Err("expected a duration with its unit, as \"30s\", \"10m\" or \"1h\"".to_owned()),
    }
}

/// Reads a size such as `64MiB` or `1GB`, in bytes.
///
/// # Errors
/// Says what was expected.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let expected = || "expected a size with its unit, as \"64MiB\" or \"500kB\"".to_owned();
    // A bare number could be meant in any unit.
    if !text.ends_with(|last: char| last.is_ascii_alphabetic()) {
        return Err(expected());
    }
    text.parse::<ByteSize>().map(|size| size.as_u64()).map_err(|_| expected())
}

/// The longest name of an inherited socket (systemd.socket(5), `FileDescriptorName=`).
const MAX_SOCKET_NAME: usize = 255;

/// Where a service listens, as it is configured.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Listen {
    /// On this address: by a socket that was inherited with it, or by one that is bound.
    At(Endpoint),
    /// On whatever the service manager has passed under this name.
    Inherited(String),
}

impl Listen {
    /// Reads what [`Endpoint::parse`] reads, or `systemd:NAME`.
    ///
    /// # Errors
    /// Says what was expected.
    pub fn parse(text: &str, folder: &Path) -> Result<Vec<Self>, String> {
        let Some(name) = text.strip_prefix("systemd:") else {
            return Ok(Endpoint::parse(text, folder)?.into_iter().map(Self::At).collect());
        };
        let fits = (1..=MAX_SOCKET_NAME).contains(&name.len())
            && name.chars().all(|c| c.is_ascii_graphic() && c != ':');
        if fits {
            Ok(vec![Self::Inherited(name.to_owned())])
        } else {
            Err("expected the FileDescriptorName= of a socket unit after systemd:".to_owned())
        }
    }

    /// The address, if it is one.
    pub fn endpoint(&self) -> Option<&Endpoint> {
        match self {
            Self::At(endpoint) => Some(endpoint),
            Self::Inherited(_) => None,
        }
    }

    /// The name of an inherited socket, if it is one.
    pub fn inherited(&self) -> Option<&str> {
        match self {
            Self::At(_) => None,
            Self::Inherited(name) => Some(name),
        }
    }

    /// Whether both cannot be had at one time.
    pub fn conflicts_with(&self, other: &Self) -> bool {
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

/// An address of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Endpoint {
    /// TCP on one address.
    Tcp(SocketAddr),
    /// UDP on one address.
    Udp(SocketAddr),
    /// A Unix stream socket in the file system.
    Unix(PathBuf),
}

impl Endpoint {
    /// Reads `HOST:PORT`, `tcp:HOST:PORT`, `udp:HOST:PORT` or `unix:PATH`. A host that is a name
    /// is looked up and may stand for several addresses; a path is relative to `folder`.
    ///
    /// # Errors
    /// Says what was expected.
    pub fn parse(text: &str, folder: &Path) -> Result<Vec<Self>, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.contains('\0') {
                return Err("expected a path after unix:".to_owned());
            }
            let path = folder.join(path);
            if path.as_os_str().len() >= MAX_SOCKET_PATH {
                return Err(format!("expected a path shorter than {MAX_SOCKET_PATH} bytes"));
            }
            return Ok(vec![Self::Unix(path)]);
        }
        if let Some(rest) = text.strip_prefix("udp:") {
            return Ok(addresses(rest)?.into_iter().map(Self::Udp).collect());
        }
        let rest = text.strip_prefix("tcp:").unwrap_or(text);
        Ok(addresses(rest)?.into_iter().map(Self::Tcp).collect())
    }

    /// Whether both cannot be bound at one time.
    pub fn conflicts_with(&self, other: &Self) -> bool {
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
            // Escaped, as it is printed and logged.
            Self::Unix(path) => write!(f, "unix:{}", path.to_string_lossy().escape_debug()),
        }
    }
}

fn addresses(text: &str) -> Result<Vec<SocketAddr>, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return match address {
            SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
                let v4 = SocketAddr::new(address.ip().to_canonical(), address.port());
                Err(format!("an IPv4 address; expected it as {v4}"))
            }
            SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 => {
                Err("expected the number of its interface too, as [fe80::1%2]:6789".to_owned())
            }
            address => Ok(vec![address]),
        };
    }
    let expected = "expected HOST:PORT, tcp:HOST:PORT, udp:HOST:PORT, unix:PATH or systemd:NAME";
    let (host, port) = text.rsplit_once(':').ok_or(expected)?;
    let port: u16 = port.parse().map_err(|_| "expected a port from 0 to 65535".to_owned())?;
    if host.is_empty() || host.contains([':', '[', ']', '/']) {
        return Err(expected.to_owned());
    }
    let found = (host, port)
        .to_socket_addrs()
        .map_err(|error| format!("cannot look up {host:?}: {error}; expected HOST:PORT"))?;
    let mut found: Vec<_> = found.collect();
    found.sort();
    found.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::IpAddr;

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("10m"), Ok(Duration::from_mins(10)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_mins(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "30", "s", "-3s", "0s", "3 lightyears", "9000000000h", "30s garbage"] {
            assert!(duration(bad).unwrap_err().starts_with("expected a duration"), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("1kB"), Ok(1000));
        assert_eq!(size("0B"), Ok(0));
        for bad in ["", "64", "MiB", "-1MiB", "1 parsec"] {
            assert!(size(bad).unwrap_err().starts_with("expected a size"), "{bad}");
        }
    }

    fn endpoint(text: &str) -> Result<Vec<Endpoint>, String> {
        Endpoint::parse(text, Path::new("/base"))
    }

    fn one(text: &str) -> Endpoint {
        endpoint(text).unwrap().remove(0)
    }

    #[test]
    fn endpoints_are_of_three_kinds() {
        let address = "127.0.0.1:6789".parse().unwrap();
        assert_eq!(endpoint("127.0.0.1:6789"), Ok(vec![Endpoint::Tcp(address)]));
        assert_eq!(endpoint("tcp:127.0.0.1:6789"), Ok(vec![Endpoint::Tcp(address)]));
        assert_eq!(endpoint("udp:127.0.0.1:6789"), Ok(vec![Endpoint::Udp(address)]));
        assert_eq!(one("unix:run/x.sock"), Endpoint::Unix("/base/run/x.sock".into()));
        assert_eq!(one("unix:/run/x.sock"), Endpoint::Unix("/run/x.sock".into()));
        assert!(endpoint("localhost:80").unwrap().contains(&one("127.0.0.1:80")));
    }

    #[test]
    fn what_is_no_endpoint_is_refused_with_what_was_expected() {
        for bad in ["", "6789", ":6789", "::1:80", "[::1:80", "host", "unix:", "http://x:80"] {
            assert!(endpoint(bad).unwrap_err().starts_with("expected"), "{bad}");
        }
        assert!(endpoint("[::ffff:127.0.0.1]:80").unwrap_err().contains("127.0.0.1:80"));
        assert!(endpoint("[fe80::1]:80").unwrap_err().contains("interface"));
        assert!(endpoint("[fe80::1%2]:80").is_ok());
        assert!(endpoint("127.0.0.1:65536").unwrap_err().contains("0 to 65535"));
        assert!(endpoint(&format!("unix:/{}", "x".repeat(200))).unwrap_err().contains("108"));
    }

    #[test]
    fn an_inherited_socket_has_the_name_that_its_unit_gives_it() {
        let parse = |text: &str| Listen::parse(text, Path::new("/base"));
        assert_eq!(parse("systemd:clock"), Ok(vec![Listen::Inherited("clock".to_owned())]));
        assert_eq!(parse("systemd:clock").unwrap()[0].to_string(), "systemd:clock");
        assert_eq!(parse("127.0.0.1:80"), Ok(vec![Listen::At(one("127.0.0.1:80"))]));
        for bad in ["systemd:", "systemd:a b", "systemd:a:b", "systemd:\u{e4}"] {
            assert!(parse(bad).unwrap_err().contains("FileDescriptorName="), "{bad}");
        }
        assert!(parse(&format!("systemd:{}", "x".repeat(256))).is_err());
    }

    #[test]
    fn a_wildcard_conflicts_within_its_family_and_protocol() {
        let conflict = |one_: &str, two: &str| one(one_).conflicts_with(&one(two));
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
        fn an_endpoint_prints_as_it_is_read(ip: IpAddr, port: u16, udp: bool) {
            let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
            prop_assume!(!link_local);
            let address = SocketAddr::new(ip.to_canonical(), port);
            let endpoint = if udp { Endpoint::Udp(address) } else { Endpoint::Tcp(address) };
            let read = Endpoint::parse(&endpoint.to_string(), Path::new("/"));
            prop_assert_eq!(read, Ok(vec![endpoint]));
        }

        #[test]
        fn junk_is_refused_without_a_panic(text in "[^.a-z]{0,40}") {
            let _ = duration(&text);
            let _ = size(&text);
        }
    }
}
