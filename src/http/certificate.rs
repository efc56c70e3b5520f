//! Fields of an X.509 certificate (RFC 5280) that webpki does not expose: names for messages, and
//! the extensions that matter for a certificate that is trusted as such.
//!
//! webpki has parsed the certificate before. Fields that do not parse here are treated as absent.

use std::net::IpAddr;

const SEQUENCE: u8 = 0x30;
const BMP_STRING: u8 = 0x1e;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;

/// Kinds of a name in the extension `subjectAltName`.
const DNS_NAME: u8 = 0x82;
const IP_ADDRESS: u8 = 0x87;

const ORGANIZATION: &[u8] = &[0x55, 4, 10];
const COMMON_NAME: &[u8] = &[0x55, 4, 3];
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 29, 17];
const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 29, 37];
/// `id-kp-serverAuth` (RFC 5280, 4.2.1.12).
const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];

/// The fields of a certificate, as DER.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Certificate<'a> {
    issuer: &'a [u8],
    subject: &'a [u8],
    extensions: &'a [u8],
}

impl<'a> Certificate<'a> {
    /// Splits a certificate into its fields.
    pub(crate) fn parse(der: &'a [u8]) -> Option<Self> {
        let (SEQUENCE, certificate, _) = element(der)? else { return None };
        let (SEQUENCE, to_be_signed, _) = element(certificate)? else { return None };
        let mut fields = Elements(to_be_signed).filter(|(tag, _)| *tag != VERSION);
        // The serial number and the signature's algorithm come first.
        let (_, issuer) = fields.nth(2)?;
        // Then the validity.
        let (_, subject) = fields.nth(1)?;
        let extensions = fields.find(|(tag, _)| *tag == EXTENSIONS);
        let extensions = extensions.and_then(|(_, wrapped)| element(wrapped));
        let extensions = extensions.map_or(&[][..], |(_, extensions, _)| extensions);
        Some(Self { issuer, subject, extensions })
    }

    /// Returns the issuer's common name, or else its organization.
    pub(crate) fn issuer(&self) -> Option<String> {
        attribute(self.issuer, COMMON_NAME).or_else(|| attribute(self.issuer, ORGANIZATION))
    }

    /// Returns the common name of the subject.
    pub(crate) fn common_name(&self) -> Option<String> {
        attribute(self.subject, COMMON_NAME)
    }

    /// Whether the certificate lists the names of its server (RFC 6125), so that its common name
    /// is not one.
    pub(crate) fn has_alt_names(&self) -> bool {
        self.extension(SUBJECT_ALT_NAME).is_some()
    }

    /// Returns the names and addresses of the server that the certificate lists.
    pub(crate) fn alt_names(&self) -> Vec<String> {
        let list = self.extension(SUBJECT_ALT_NAME).and_then(element);
        let names = list.map_or(&[][..], |(_, names, _)| names);
        let text = |(tag, name): (u8, &[u8])| match tag {
            DNS_NAME => Some(String::from_utf8_lossy(name).into_owned()),
            IP_ADDRESS => {
                let v4 = <[u8; 4]>::try_from(name).map(IpAddr::from);
                v4.or_else(|_| <[u8; 16]>::try_from(name).map(IpAddr::from))
                    .ok()
                    .map(|ip| ip.to_string())
            }
            _ => None,
        };
        Elements(names).filter_map(text).collect()
    }

    /// Whether the certificate may be that of a server: without an extended key usage it may.
    pub(crate) fn is_for_servers(&self) -> bool {
        self.extension(EXTENDED_KEY_USAGE).is_none_or(|value| {
            let purposes = element(value).map_or(&[][..], |(_, purposes, _)| purposes);
            Elements(purposes).any(|(_, purpose)| purpose == SERVER_AUTH)
        })
    }

    /// Returns the value of an extension: its last part, after an optional `critical`.
    fn extension(&self, id: &[u8]) -> Option<&'a [u8]> {
        let parts = Elements(self.extensions).map(|(_, extension)| Elements(extension));
        let mut of_id = parts.filter(|parts| parts.clone().next().is_some_and(|(_, it)| it == id));
        of_id.next()?.last().map(|(_, value)| value)
    }
}

/// Returns the last attribute of this type in a name, which is the most specific one.
fn attribute(name: &[u8], id: &[u8]) -> Option<String> {
    let sets = Elements(name).flat_map(|(_, set)| Elements(set));
    let values = sets.filter_map(|(_, pair)| {
        let mut pair = Elements(pair);
        let (_, found) = pair.next()?;
        if found == id { pair.next() } else { None }
    });
    values.last().map(|(tag, value)| match tag {
        BMP_STRING => {
            let units = value
                .chunks_exact(2)
                .map(|pair| pair.iter().fold(0, |unit, byte| (unit << 8) | u16::from(*byte)));
            char::decode_utf16(units).map(|decoded| decoded.unwrap_or('\u{fffd}')).collect()
        }
        _ => String::from_utf8_lossy(value).into_owned(),
    })
}

/// The DER elements of a sequence or a set: tag and contents of each.
#[derive(Clone)]
struct Elements<'a>(&'a [u8]);

impl<'a> Iterator for Elements<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (tag, contents, rest) = element(self.0)?;
        self.0 = rest;
        Some((tag, contents))
    }
}

/// Splits off the first DER element: its tag, its contents, and the rest.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, length], rest) = der.split_first_chunk()?;
    let (length, rest) = match length {
        0..=0x7f => (usize::from(length), rest),
        // TLS transports no certificate whose length takes more than three bytes.
        0x81..=0x83 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(length & 0x7f))?;
            (bytes.iter().fold(0, |length, byte| (length << 8) | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(length)?;
    Some((tag, contents, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A DER element with up to 255 bytes of contents.
    fn der(tag: u8, contents: &[u8]) -> Vec<u8> {
        let length = u8::try_from(contents.len()).unwrap();
        let length = if length < 0x80 { vec![length] } else { vec![0x81, length] };
        [&[tag], &length[..], contents].concat()
    }

    fn name(attributes: &[(&[u8], u8, &[u8])]) -> Vec<u8> {
        let sets = attributes.iter().map(|(id, tag, value)| {
            der(0x31, &der(SEQUENCE, &[der(6, id), der(*tag, value)].concat()))
        });
        der(SEQUENCE, &sets.collect::<Vec<_>>().concat())
    }

    fn certificate(issuer: &[u8], extensions: &[u8]) -> Vec<u8> {
        let fields = [
            der(VERSION, &der(2, &[2])),
            der(2, &[1]),
            der(SEQUENCE, &[]),
            issuer.to_vec(),
            der(SEQUENCE, &[]),
            name(&[(COMMON_NAME, 0x0c, b"example.org")]),
            der(SEQUENCE, &[]),
            der(EXTENSIONS, &der(SEQUENCE, extensions)),
        ];
        der(SEQUENCE, &der(SEQUENCE, &fields.concat()))
    }

    #[test]
    fn names_the_issuer_in_any_string_type() {
        for (tag, value) in
            [(0x0c, &b"R\xc3\xb6\xc3\xb6t"[..]), (BMP_STRING, b"\0R\0\xf6\0\xf6\0t")]
        {
            let issuer = name(&[(ORGANIZATION, 0x0c, b"Org"), (COMMON_NAME, tag, value)]);
            let der = certificate(&issuer, &[]);
            let fields = Certificate::parse(&der).unwrap();
            assert_eq!(fields.issuer().unwrap(), "Rööt");
            assert_eq!(fields.common_name().unwrap(), "example.org");
            assert!(fields.is_for_servers() && !fields.has_alt_names());
        }
        let der = certificate(&name(&[(ORGANIZATION, 0x0c, b"Org")]), &[]);
        assert_eq!(Certificate::parse(&der).unwrap().issuer().unwrap(), "Org");
    }

    #[test]
    fn lists_names_and_purposes() {
        let names = [der(DNS_NAME, b"a.org"), der(IP_ADDRESS, &[192, 0, 2, 1]), der(0x81, b"mail")];
        let names = der(4, &der(SEQUENCE, &names.concat()));
        let critical = der(1, &[0xff]);
        let client = der(4, &der(SEQUENCE, &der(6, &[0x2b, 6, 1, 5, 5, 7, 3, 2])));
        let extensions = [
            der(SEQUENCE, &[der(6, SUBJECT_ALT_NAME), names].concat()),
            der(SEQUENCE, &[der(6, EXTENDED_KEY_USAGE), critical, client].concat()),
        ];
        let der = certificate(&name(&[]), &extensions.concat());
        let fields = Certificate::parse(&der).unwrap();
        assert_eq!(fields.alt_names(), ["a.org", "192.0.2.1"]);
        assert!(fields.has_alt_names() && !fields.is_for_servers());
        assert_eq!(fields.issuer(), None);
    }

    proptest! {
        #[test]
        fn never_panics_on_any_bytes(mut bytes: Vec<u8>, at: prop::sample::Index, byte: u8) {
            let mut der = certificate(&name(&[(COMMON_NAME, BMP_STRING, b"abc")]), &[]);
            *at.get_mut(&mut der) = byte;
            bytes.truncate(64);
            for bytes in [der, bytes] {
                if let Some(fields) = Certificate::parse(&bytes) {
                    let _ = (fields.issuer(), fields.common_name(), fields.alt_names());
                    let _ = (fields.has_alt_names(), fields.is_for_servers());
                }
            }
        }
    }
}
