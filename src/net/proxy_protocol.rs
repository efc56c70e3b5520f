//! The PROXY protocol, versions 1 and 2: with whose words a balancer begins a connection, so that
//! the client keeps its own address behind it.
//!
//! It is read as its document says
//! (<https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt>), and what may be read one way or
//! the other is refused. Whose headers are believed is not decided here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// The longest header that is taken: the one of version 2 with the longest addresses, and room for
/// as much again in fields that we do not ask for.
pub const MAX_HEADER: usize = 536;

/// The longest line of version 1, with its end.
const MAX_LINE: usize = 107;

/// What version 1 begins with.
const LINE: &[u8] = b"PROXY ";

/// What version 2 begins with; no text, and no request of ours.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The signature, the command, the family, and how much follows.
const FIXED: usize = 16;

/// What the bytes at the beginning of a connection are. Once they are more than `Incomplete`,
/// whatever follows changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// They can become a header.
    Incomplete,
    /// A whole header.
    Header {
        /// The client's address, with a v4-mapped IPv6 address unmapped; none if the balancer speaks
        /// for itself, or for somebody without an Internet address.
        client: Option<SocketAddr>,
        /// How many of the bytes are the header.
        length: usize,
    },
    /// They are none, whatever follows.
    Invalid,
}

use Beginning::{Header, Incomplete, Invalid};

impl Beginning {
    /// Reads the bytes with which a connection begins.
    pub fn of(bytes: &[u8]) -> Self {
        if could_begin_with(bytes, LINE) {
            Self::of_line(bytes)
        } else if could_begin_with(bytes, SIGNATURE) {
            Self::of_binary(bytes)
        } else {
            Invalid
        }
    }

    fn of_line(bytes: &[u8]) -> Self {
        let bytes = bytes.get(..MAX_LINE).unwrap_or(bytes);
        let Some(end) = memchr::memchr(b'\n', bytes) else {
            return if bytes.len() < MAX_LINE { Incomplete } else { Invalid };
        };
        let length = end + 1;
        let line = bytes.get(LINE.len()..end).and_then(|line| line.strip_suffix(b"\r"));
        let text = line.and_then(|line| str::from_utf8(line).ok());
        let mut words = text.unwrap_or_default().split(' ');
        let client = match words.next() {
            // The rest is to be ignored.
            Some("UNKNOWN") => return Header { client: None, length },
            Some("TCP4") => client_of_line::<Ipv4Addr>(words),
            Some("TCP6") => client_of_line::<Ipv6Addr>(words),
            _ => None,
        };
        client.map_or(Invalid, |client| Header { client: Some(client), length })
    }

    fn of_binary(bytes: &[u8]) -> Self {
        let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else { return Incomplete };
        let [.., command, family, high, low] = *fixed;
        let announced = usize::from(u16::from_be_bytes([high, low]));
        // Who announces more than the addresses may add fields, which are skipped.
        let addresses = match (command, family) {
            // The balancer itself, as when it looks whether we are there; or nobody knows who.
            (0x20, _) | (0x21, 0x00) => 0,
            (0x21, 0x11 | 0x12) => 12,
            (0x21, 0x21 | 0x22) => 36,
            (0x21, 0x31 | 0x32) => 216,
            _ => return Invalid,
        };
        if announced < addresses || FIXED + announced > MAX_HEADER {
            return Invalid;
        }
        if rest.len() < announced {
            return Incomplete;
        }
        let client = match (command, family) {
            (0x21, 0x11) => client_of_binary::<4, Ipv4Addr>(rest),
            (0x21, 0x21) => client_of_binary::<16, Ipv6Addr>(rest),
            // Also datagrams, which are not what came.
            _ => None,
        };
        Header { client, length: FIXED + announced }
    }
}

/// Whether the bytes begin with `start`, as far as they go.
fn could_begin_with(bytes: &[u8], start: &[u8]) -> bool {
    bytes.iter().zip(start).all(|(byte, expected)| byte == expected)
}

/// The client's address, from the addresses and then the ports of both sides.
fn client_of_line<'a, A: FromStr + Into<IpAddr>>(
    mut words: impl Iterator<Item = &'a str>,
) -> Option<SocketAddr> {
    let client: A = words.next()?.parse().ok()?;
    let _ours: A = words.next()?.parse().ok()?;
    let client_port = port(words.next()?)?;
    let _our_port = port(words.next()?)?;
    let client = SocketAddr::new(client.into().to_canonical(), client_port);
    words.next().is_none().then_some(client)
}

/// A port, which has no sign.
fn port(word: &str) -> Option<u16> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    if digits { word.parse().ok() } else { None }
}

/// The client's address, of `N` bytes, from the addresses and ports of both sides.
fn client_of_binary<const N: usize, A: From<[u8; N]> + Into<IpAddr>>(
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

    fn header(client: &str, length: usize) -> Beginning {
        Header { client: Some(client.parse().unwrap()), length }
    }

    fn unknown(length: usize) -> Beginning {
        Header { client: None, length }
    }

    /// A header of version 2.
    fn binary(command: u8, family: u8, announced: usize, rest: &[u8]) -> Vec<u8> {
        let announced = u16::try_from(announced).unwrap().to_be_bytes();
        [SIGNATURE, &[command, family], &announced, rest].concat()
    }

    const V4: [u8; 12] = [192, 0, 2, 7, 10, 0, 0, 1, 0x10, 0xe1, 0x1a, 0x85];

    #[test]
    fn a_line_tells_the_client() {
        let line = b"PROXY TCP4 192.0.2.7 10.0.0.1 4321 6789\r\n";
        assert_eq!(Beginning::of(line), header("192.0.2.7:4321", line.len()));
        let line = b"PROXY TCP6 2001:db8::7 2001:db8::1 65535 0\r\nhello.txt\n";
        assert_eq!(Beginning::of(line), header("[2001:db8::7]:65535", line.len() - 10));
        let line = b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:10.0.0.1 4321 6789\r\n";
        assert_eq!(Beginning::of(line), header("192.0.2.7:4321", line.len()));
        assert_eq!(Beginning::of(b"PROXY UNKNOWN\r\n"), unknown(15));
        let line = b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n";
        assert_eq!(Beginning::of(line), unknown(line.len()));
    }

    #[test]
    fn a_line_that_is_not_quite_one_is_refused() {
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
            assert_eq!(Beginning::of(line.as_bytes()), Invalid, "{line:?}");
        }
        assert_eq!(Beginning::of(b"PROXY UNKNOWN \xff\r\n"), Invalid);
    }

    #[test]
    fn a_line_has_its_end_in_107_bytes() {
        let line = |length: usize| format!("PROXY UNKNOWN{}\r\n", " ".repeat(length - 15));
        assert_eq!(Beginning::of(line(107).as_bytes()), unknown(107));
        assert_eq!(Beginning::of(line(108).as_bytes()), Invalid);
        assert_eq!(Beginning::of(&line(108).as_bytes()[..106]), Incomplete);
    }

    #[test]
    fn a_binary_header_tells_the_client() {
        let bytes = binary(0x21, 0x11, 12, &V4);
        assert_eq!(Beginning::of(&bytes), header("192.0.2.7:4321", 28));
        let (client, ours) = ("2001:db8::7".parse::<Ipv6Addr>().unwrap(), Ipv6Addr::LOCALHOST);
        let v6 = [&client.octets()[..], &ours.octets(), &V4[8..], b"list\n"].concat();
        let bytes = binary(0x21, 0x21, 36, &v6);
        assert_eq!(Beginning::of(&bytes), header("[2001:db8::7]:4321", 52));
        let mapped = Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped();
        let v6 = [&mapped.octets()[..], &ours.octets(), &V4[8..]].concat();
        assert_eq!(Beginning::of(&binary(0x21, 0x21, 36, &v6)), header("192.0.2.7:4321", 52));
    }

    #[test]
    fn a_balancer_may_speak_for_itself_and_of_others_without_an_address() {
        // LOCAL, whatever else it says; no address, Unix sockets, datagrams.
        assert_eq!(Beginning::of(&binary(0x20, 0x00, 0, b"")), unknown(16));
        assert_eq!(Beginning::of(&binary(0x20, 0x11, 0, b"")), unknown(16));
        assert_eq!(Beginning::of(&binary(0x20, 0xff, 3, b"abc")), unknown(19));
        assert_eq!(Beginning::of(&binary(0x21, 0x00, 0, b"")), unknown(16));
        assert_eq!(Beginning::of(&binary(0x21, 0x31, 216, &[0; 216])), unknown(232));
        assert_eq!(Beginning::of(&binary(0x21, 0x12, 12, &V4)), unknown(28));
    }

    #[test]
    fn a_binary_header_that_is_not_quite_one_is_refused() {
        // Version 1 or 3, an unknown command, an unknown family or transport, too short.
        for (command, family) in [(0x11, 0x11), (0x31, 0x11), (0x22, 0x11), (0x21, 0x41)] {
            assert_eq!(Beginning::of(&binary(command, family, 12, &V4)), Invalid);
        }
        assert_eq!(Beginning::of(&binary(0x21, 0x13, 12, &V4)), Invalid);
        assert_eq!(Beginning::of(&binary(0x21, 0x11, 11, &V4)), Invalid);
        assert_eq!(Beginning::of(&binary(0x21, 0x21, 35, &[0; 36])), Invalid);
        assert_eq!(Beginning::of(b"\r\n\r\n\0\r\nQUIT\r"), Invalid);
    }

    #[test]
    fn fields_are_skipped_up_to_the_longest_header() {
        let rest = [&V4[..], &[0xea; MAX_HEADER - FIXED - 12]].concat();
        let longest = binary(0x21, 0x11, rest.len(), &rest);
        assert_eq!(Beginning::of(&longest), header("192.0.2.7:4321", MAX_HEADER));
        // What is announced is enough to refuse it.
        assert_eq!(Beginning::of(&binary(0x21, 0x11, rest.len() + 1, b"")), Invalid);
        assert_eq!(Beginning::of(&binary(0x20, 0x00, 0xffff, b"")), Invalid);
    }

    /// What is found when the bytes come one by one: as soon as it is known, and how soon.
    fn byte_by_byte(bytes: &[u8]) -> (Beginning, usize) {
        let known = (0..=bytes.len()).find_map(|length| {
            let beginning = Beginning::of(&bytes[..length]);
            (beginning != Incomplete).then_some((beginning, length))
        });
        known.unwrap_or((Incomplete, bytes.len()))
    }

    /// Bytes that resemble a header: one, with some changed.
    fn nearly() -> impl Strategy<Value = Vec<u8>> {
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
        fn however_the_bytes_are_split_they_mean_the_same(
            bytes in prop_oneof![nearly(), prop::collection::vec(any::<u8>(), 0..600)],
        ) {
            let (found, length) = byte_by_byte(&bytes);
            prop_assert_eq!(found, Beginning::of(&bytes));
            if let Header { length: told, .. } = found {
                prop_assert_eq!(told, length);
                prop_assert!(told <= MAX_HEADER);
            }
            // Nobody waits for more than the longest header.
            prop_assert!(found != Incomplete || bytes.len() < MAX_HEADER);
        }

        #[test]
        fn what_another_implementation_writes_is_understood(
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
            prop_assert_eq!(Beginning::of(&bytes), Header { client: Some(canonical), length });
        }

        #[test]
        fn what_is_taken_is_what_another_implementation_takes(bytes in nearly()) {
            if let Header { client: Some(client), length } = Beginning::of(&bytes) {
                let (header, taken) = ProxyHeader::parse(&bytes, ParseConfig::default()).unwrap();
                let source = header.proxied_address().unwrap().source;
                prop_assert_eq!(source.ip().to_canonical(), client.ip());
                prop_assert_eq!((source.port(), taken), (client.port(), length));
            }
        }
    }
}
