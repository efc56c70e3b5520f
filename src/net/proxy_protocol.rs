//! Parser for the PROXY protocol, versions 1 and 2, in which a load balancer reports the address of
//! the client (<https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt>).
//!
//! Ambiguous headers are invalid. The caller decides which peers may send a header.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// Maximum length of a header: version 2 with the longest addresses and about as many bytes of
/// extension fields.
pub const MAX_HEADER: usize = 536;

/// Maximum length of a header of version 1 with its CRLF.
const MAX_LINE: usize = 107;

/// First bytes of version 1.
const LINE_PREFIX: &[u8] = b"PROXY ";

/// First bytes of version 2.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Length of the fixed part of version 2: signature, command, family, length of the rest.
const FIXED_LEN: usize = 16;

/// Result of parsing the first bytes of a connection. Further bytes change only `Incomplete`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParsedHeader {
    /// A proper prefix of a possible header.
    Incomplete,
    /// A complete and valid header.
    Header {
        /// The client's address, with a v4-mapped IPv6 address unmapped; `None` for a health check
        /// of the balancer or a client without an Internet address.
        client: Option<SocketAddr>,
        /// The length of the header.
        length: usize,
    },
    /// Not a header, whatever follows.
    Invalid,
}

use ParsedHeader::{Header, Incomplete, Invalid};

impl ParsedHeader {
    /// Parses the first bytes of a connection.
    pub fn parse(bytes: &[u8]) -> Self {
        if matches_prefix(bytes, LINE_PREFIX) {
            Self::parse_line(bytes)
        } else if matches_prefix(bytes, SIGNATURE) {
            Self::parse_binary(bytes)
        } else {
            Invalid
        }
    }

    fn parse_line(bytes: &[u8]) -> Self {
        let bytes = bytes.get(..MAX_LINE).unwrap_or(bytes);
        let Some(end) = memchr::memchr(b'\n', bytes) else {
            return if bytes.len() < MAX_LINE { Incomplete } else { Invalid };
        };
        let length = end + 1;
        let line = bytes.get(LINE_PREFIX.len()..end).and_then(|line| line.strip_suffix(b"\r"));
        let text = line.and_then(|line| str::from_utf8(line).ok());
        let mut words = text.unwrap_or_default().split(' ');
        let client = match words.next() {
            // The specification ignores the rest of the line.
            Some("UNKNOWN") => return Header { client: None, length },
            Some("TCP4") => source_of_line::<Ipv4Addr>(words),
            Some("TCP6") => source_of_line::<Ipv6Addr>(words),
            _ => None,
        };
        client.map_or(Invalid, |client| Header { client: Some(client), length })
    }

    fn parse_binary(bytes: &[u8]) -> Self {
        let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_LEN>() else { return Incomplete };
        let [.., command, family, high, low] = *fixed;
        let announced = usize::from(u16::from_be_bytes([high, low]));
        // Extension fields may follow the addresses; they are skipped.
        let addresses = match (command, family) {
            // LOCAL, as in a health check, or an unspecified address family.
            (0x20, _) | (0x21, 0x00) => 0,
            (0x21, 0x11 | 0x12) => 12,
            (0x21, 0x21 | 0x22) => 36,
            (0x21, 0x31 | 0x32) => 216,
            _ => return Invalid,
        };
        if announced < addresses || FIXED_LEN + announced > MAX_HEADER {
            return Invalid;
        }
        if rest.len() < announced {
            return Incomplete;
        }
        let client = match (command, family) {
            (0x21, 0x11) => source_of_binary::<4, Ipv4Addr>(rest),
            (0x21, 0x21) => source_of_binary::<16, Ipv6Addr>(rest),
            // Unix sockets and datagrams.
            _ => None,
        };
        Header { client, length: FIXED_LEN + announced }
    }
}

/// Whether `bytes` begin with `prefix`, or are too short to differ from it.
fn matches_prefix(bytes: &[u8], prefix: &[u8]) -> bool {
    bytes.iter().zip(prefix).all(|(byte, expected)| byte == expected)
}

/// Reads source and destination addresses, then both ports; returns the source.
fn source_of_line<'a, A: FromStr + Into<IpAddr>>(
    mut words: impl Iterator<Item = &'a str>,
) -> Option<SocketAddr> {
    let client: A = words.next()?.parse().ok()?;
    let _ours: A = words.next()?.parse().ok()?;
    let client_port = port(words.next()?)?;
    let _our_port = port(words.next()?)?;
    let client = SocketAddr::new(client.into().to_canonical(), client_port);
    words.next().is_none().then_some(client)
}

/// Parses a port; unlike `u16::from_str`, refuses a plus sign.
fn port(word: &str) -> Option<u16> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    if digits { word.parse().ok() } else { None }
}

/// Reads source and destination addresses of `N` bytes, then both ports; returns the source.
fn source_of_binary<const N: usize, A: From<[u8; N]> + Into<IpAddr>>(
    addresses: &[u8],
) -> Option<SocketAddr> {
    let (client, rest) = addresses.split_first_chunk::<N>()?;
    let port = rest.get(N..)?.first_chunk()?;
    let client: IpAddr = A::from(*client).into();
    Some(SocketAddr::new(client.to_canonical(), u16::from_be_bytes(*port)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proxy_header::{ParseConfig, ProxiedAddress, ProxyHeader, Tlv};

    fn header(client: &str, length: usize) -> ParsedHeader {
        Header { client: Some(client.parse().unwrap()), length }
    }

    fn unknown(length: usize) -> ParsedHeader {
        Header { client: None, length }
    }

    /// A header of version 2.
    fn binary(command: u8, family: u8, announced: usize, rest: &[u8]) -> Vec<u8> {
        let announced = u16::try_from(announced).unwrap().to_be_bytes();
        [SIGNATURE, &[command, family], &announced, rest].concat()
    }

    const V4: [u8; 12] = [192, 0, 2, 7, 10, 0, 0, 1, 0x10, 0xe1, 0x1a, 0x85];

    #[test]
    fn reads_the_client_from_a_line() {
        let line = b"PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789\r\n";
        assert_eq!(ParsedHeader::parse(line), header("192.0.2.7:4321", line.len()));
        let line = b"PROXY TCP6 2001:db8::7 2001:db8::1 65535 0\r\nhello.txt\n";
        assert_eq!(ParsedHeader::parse(line), header("[2001:db8::7]:65535", line.len() - 10));
        let line = b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:10.0.0.1 4321 6789\r\n";
        assert_eq!(ParsedHeader::parse(line), header("192.0.2.7:4321", line.len()));
        assert_eq!(ParsedHeader::parse(b"PROXY UNKNOWN\r\n"), unknown(15));
        let line = b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n";
        assert_eq!(ParsedHeader::parse(line), unknown(line.len()));
    }

    #[test]
    fn refuses_malformed_lines() {
        for line in [
            "\n",
            "GET / HTTP/1.1\r\n",
            "proxy TCP4 192.0.2.7 10.0.0.1 4321 6789\r\n",
            "PROXY\r\n",
            "PROXY \r\n",
            "PROXY  TCP4 192.0.2.7 10.0.0.1 4321 6789\r\n",
            "PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789\n",
            "PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789 \r\n",
            "PROXY TCP4 192.0.2.7 10.0.0.1 4321\r\n",
            "PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789 1\r\n",
            "PROXY TCP4 192.0.2.7 10.0.0.1 +4321 6789\r\n",
            "PROXY TCP4 192.0.2.7 10.0.0.1 65536 6789\r\n",
            "PROXY TCP4 192.0.2.7 10.0.0.1  6789\r\n",
            "PROXY TCP4 192.0.2.256 10.0.0.1 4321 6789\r\n",
            "PROXY TCP4 2001:db8::7 2001:db8::1 4321 6789\r\n",
            "PROXY TCP6 192.0.2.7 10.0.0.1 4321 6789\r\n",
            "PROXY TCP5 192.0.2.7 10.0.0.1 4321 6789\r\n",
            "PROXY UNKNOWN2\r\n",
            "PROXY TCP4 localhost 10.0.0.1 4321 6789\r\n",
        ] {
            assert_eq!(ParsedHeader::parse(line.as_bytes()), Invalid, "{line:?}");
        }
        assert_eq!(ParsedHeader::parse(b"PROXY UNKNOWN \xff\r\n"), Invalid);
    }

    #[test]
    fn limits_lines_to_107_bytes() {
        let line = |length: usize| format!("PROXY UNKNOWN{}\r\n", " ".repeat(length - 15));
        assert_eq!(ParsedHeader::parse(line(107).as_bytes()), unknown(107));
        assert_eq!(ParsedHeader::parse(line(108).as_bytes()), Invalid);
        assert_eq!(ParsedHeader::parse(&line(108).as_bytes()[..106]), Incomplete);
    }

    #[test]
    fn reads_the_client_from_a_binary_header() {
        let bytes = binary(0x21, 0x11, 12, &V4);
        assert_eq!(ParsedHeader::parse(&bytes), header("192.0.2.7:4321", 28));
        let (client, ours) = ("2001:db8::7".parse::<Ipv6Addr>().unwrap(), Ipv6Addr::LOCALHOST);
        let v6 = [&client.octets()[..], &ours.octets(), &V4[8..], b"list\n"].concat();
        let bytes = binary(0x21, 0x21, 36, &v6);
        assert_eq!(ParsedHeader::parse(&bytes), header("[2001:db8::7]:4321", 52));
        let mapped = Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped();
        let v6 = [&mapped.octets()[..], &ours.octets(), &V4[8..]].concat();
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x21, 36, &v6)), header("192.0.2.7:4321", 52));
    }

    #[test]
    fn accepts_headers_without_an_internet_address() {
        // LOCAL, whatever else it says; no address, Unix sockets, datagrams.
        assert_eq!(ParsedHeader::parse(&binary(0x20, 0x00, 0, b"")), unknown(16));
        assert_eq!(ParsedHeader::parse(&binary(0x20, 0x11, 0, b"")), unknown(16));
        assert_eq!(ParsedHeader::parse(&binary(0x20, 0xff, 3, b"abc")), unknown(19));
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x00, 0, b"")), unknown(16));
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x31, 216, &[0; 216])), unknown(232));
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x12, 12, &V4)), unknown(28));
    }

    #[test]
    fn refuses_malformed_binary_headers() {
        // Version 1 or 3, an unknown command, an unknown family or transport, too short.
        for (command, family) in [(0x11, 0x11), (0x31, 0x11), (0x22, 0x11), (0x21, 0x41)] {
            assert_eq!(ParsedHeader::parse(&binary(command, family, 12, &V4)), Invalid);
        }
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x13, 12, &V4)), Invalid);
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x11, 11, &V4)), Invalid);
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x21, 35, &[0; 36])), Invalid);
        assert_eq!(ParsedHeader::parse(b"\r\n\r\n\0\r\nQUIT\r"), Invalid);
    }

    #[test]
    fn skips_extension_fields_up_to_the_maximum_length() {
        let rest = [&V4[..], &[0xea; MAX_HEADER - FIXED_LEN - 12]].concat();
        let longest = binary(0x21, 0x11, rest.len(), &rest);
        assert_eq!(ParsedHeader::parse(&longest), header("192.0.2.7:4321", MAX_HEADER));
        // The announced length suffices to refuse it.
        assert_eq!(ParsedHeader::parse(&binary(0x21, 0x11, rest.len() + 1, b"")), Invalid);
        assert_eq!(ParsedHeader::parse(&binary(0x20, 0x00, 0xffff, b"")), Invalid);
    }

    /// Parses ever longer prefixes; returns the first final result and the length of its prefix.
    fn byte_by_byte(bytes: &[u8]) -> (ParsedHeader, usize) {
        let known = (0..=bytes.len()).find_map(|length| {
            let parsed = ParsedHeader::parse(&bytes[..length]);
            (parsed != Incomplete).then_some((parsed, length))
        });
        known.unwrap_or((Incomplete, bytes.len()))
    }

    /// Headers with a few changed bytes.
    fn mutated_headers() -> impl Strategy<Value = Vec<u8>> {
        let lines = prop::sample::select(vec![
            b"PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789\r\nhello.txt\n".to_vec(),
            b"PROXY TCP6 2001:db8::7 2001:db8::1 1 2\r\n".to_vec(),
            b"PROXY UNKNOWN\r\n".to_vec(),
            binary(0x21, 0x11, 12, &V4),
            binary(0x21, 0x21, 40, &[7; 50]),
            binary(0x20, 0x00, 0, b"list"),
        ]);
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        (lines, changes).prop_map(|(mut bytes, changes)| {
            for (index, byte) in changes {
                *index.get_mut(&mut bytes) = byte;
            }
            bytes
        })
    }

    proptest! {
        #[test]
        fn parses_independently_of_how_the_bytes_are_split(
            bytes in prop_oneof![mutated_headers(), prop::collection::vec(any::<u8>(), 0..600)],
        ) {
            let (found, length) = byte_by_byte(&bytes);
            prop_assert_eq!(found, ParsedHeader::parse(&bytes));
            if let Header { length: parsed, .. } = found {
                prop_assert_eq!(parsed, length);
                prop_assert!(parsed <= MAX_HEADER);
            }
            prop_assert!(found != Incomplete || bytes.len() < MAX_HEADER);
        }

        #[test]
        fn reads_headers_written_by_proxy_header(
            client: SocketAddr,
            port: u16,
            version_2: bool,
            field in prop::option::of(prop::collection::vec(any::<u8>(), 0..400)),
            follows in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let ours: IpAddr = if client.is_ipv4() { [127, 0, 0, 1].into() } else { Ipv6Addr::LOCALHOST.into() };
            let client = SocketAddr::new(client.ip(), client.port());
            let addresses = ProxiedAddress::stream(client, SocketAddr::new(ours, port));
            let mut bytes = Vec::new();
            if version_2 {
                let fields = field.map(|field| Tlv::Custom(0xea, field.into()));
                ProxyHeader::with_tlvs(Some(addresses), fields).encode_v2(&mut bytes).unwrap();
            } else {
                ProxyHeader::with_address(addresses).encode_v1(&mut bytes).unwrap();
            }
            let length = bytes.len();
            bytes.extend(follows);
            let canonical = SocketAddr::new(client.ip().to_canonical(), client.port());
            prop_assert_eq!(ParsedHeader::parse(&bytes), Header { client: Some(canonical), length });
        }

        #[test]
        fn agrees_with_proxy_header_on_accepted_headers(bytes in mutated_headers()) {
            if let Header { client: Some(client), length } = ParsedHeader::parse(&bytes) {
                let (header, taken) = ProxyHeader::parse(&bytes, ParseConfig::default()).unwrap();
                let source = header.proxied_address().unwrap().source;
                prop_assert_eq!(source.ip().to_canonical(), client.ip());
                prop_assert_eq!((source.port(), taken), (client.port(), length));
            }
        }
    }
}
