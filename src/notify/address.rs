//! Mail addresses and domains (RFC 5321, 4.1.2).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

const EXPECTED: &str = "expected an address, as \"ops@example.org\" or \"Ops <ops@example.org>\"";

/// Maximum length of the local part, in bytes (RFC 5321, 4.5.3.1.1).
const MAX_LOCAL_PART: usize = 64;

/// Maximum length of a domain, in bytes (RFC 5321, 4.5.3.1.2).
const MAX_DOMAIN: usize = 255;

/// Maximum length of a domain label, in bytes (RFC 1035, 2.3.4).
const MAX_LABEL: usize = 63;

/// An ASCII mail address for MAIL and RCPT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmailAddress {
    local_part: String,
    domain: String,
}

impl EmailAddress {
    /// Returns the domain or address literal.
    pub fn domain(&self) -> &str {
        &self.domain
    }
}

impl fmt::Display for EmailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.local_part, self.domain)
    }
}

impl FromStr for EmailAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (local_part, domain) = text.rsplit_once('@').ok_or(EXPECTED)?;
        // SMTPUTF8 (RFC 6531) would allow others, but few servers offer it.
        if !local_part.is_ascii() {
            return Err("expected an address whose part before the @ is ASCII");
        }
        let domain = ascii_domain(domain).filter(|_| is_local_part(local_part)).ok_or(EXPECTED)?;
        Ok(Self { local_part: local_part.to_owned(), domain })
    }
}

/// `Dot-string` or `Quoted-string` of RFC 5321.
fn is_local_part(text: &str) -> bool {
    let is_atext = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~".contains(c);
    let is_atom = |atom: &str| !atom.is_empty() && atom.chars().all(is_atext);
    let quoted = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    let is_valid = match quoted {
        Some(quoted) => is_quoted_content(quoted),
        None => text.split('.').all(is_atom),
    };
    is_valid && text.len() <= MAX_LOCAL_PART
}

/// Whether a text is printable ASCII without an unescaped quote.
fn is_quoted_content(text: &str) -> bool {
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let is_valid = match byte {
            b'\\' => bytes.next().is_some_and(|escaped| (b' '..=b'~').contains(&escaped)),
            _ => byte != b'"' && (b' '..=b'~').contains(&byte),
        };
        if !is_valid {
            return false;
        }
    }
    true
}

/// Returns a domain (RFC 5891) or address literal (RFC 5321, 4.1.3) in ASCII.
pub(crate) fn ascii_domain(text: &str) -> Option<String> {
    if let Some(literal) = text.strip_prefix('[') {
        let literal = literal.strip_suffix(']')?;
        let is_address = match literal.split_at_checked("IPv6:".len()) {
            Some((tag, address)) if tag.eq_ignore_ascii_case("IPv6:") => {
                address.parse::<Ipv6Addr>().is_ok()
            }
            _ => literal.parse::<Ipv4Addr>().is_ok(),
        };
        return is_address.then(|| text.to_owned());
    }
    // Other ASCII characters would end the host in the URL parser below.
    if !text.chars().all(|c| !c.is_ascii() || is_label_character(c) || c == '.') {
        return None;
    }
    let domain = if text.is_ascii() {
        text.to_owned()
    } else {
        let url = reqwest::Url::parse(&format!("http://{text}/")).ok()?;
        url.host_str()?.to_owned()
    };
    is_domain(&domain).then_some(domain)
}

fn is_domain(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(is_label_character)
    };
    // A last label of digits is an IPv4 address without brackets.
    let top = text.rsplit('.').next().unwrap_or_default();
    text.len() <= MAX_DOMAIN
        && text.split('.').all(is_label)
        && !top.chars().all(|c| c.is_ascii_digit())
}

/// Letters, digits and `-` (RFC 1123), and `_`, which container networks put into host names.
fn is_label_character(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<String> {
        text.parse::<EmailAddress>().ok().map(|address| address.to_string())
    }

    #[test]
    fn accepts_dot_atoms_quoted_strings_domains_and_address_literals() {
        for address in [
            "a@example.org",
            "a.b+c@sub.example.org",
            "root@localhost",
            "a@my_host.example",
            "\"a b\"@example.org",
            "\"a\\\"@b\"@example.org",
            "ops@[192.0.2.1]",
            "ops@[IPv6:2001:db8::1]",
            "ops@[ipv6:::1]",
        ] {
            assert_eq!(parsed(address).as_deref(), Some(address));
        }
        assert_eq!(parsed("a@bücher.example").unwrap(), "a@xn--bcher-kva.example");
        assert_eq!("a@[192.0.2.1]".parse::<EmailAddress>().unwrap().domain(), "[192.0.2.1]");
    }

    #[test]
    fn refuses_malformed_addresses() {
        let long_label = format!("a@{}.org", "x".repeat(64));
        let long_local_part = format!("{}@example.org", "x".repeat(65));
        for address in [
            "",
            "a",
            "a@",
            "@b",
            "a b@example.org",
            ".a@example.org",
            "a..b@example.org",
            "a@b..c",
            "a@b.",
            "a@-b.org",
            "a@b c.org",
            "a@192.0.2.1",
            "a@[192.0.2]",
            "a@[192.0.2.1",
            "a@192.0.2.1]",
            "a@[2001:db8::1]",
            "a@[IPv6:192.0.2.1]",
            "a@[IPv6:fe80::1%eth0]",
            "a@[example.org]",
            "a@[]",
            "ä@example.org",
            "a@ü.example/x",
            "a@ü.example:25",
            "\"a\"b\"@example.org",
            "\"a\\\"@example.org",
            "a>@example.org",
            "<a@example.org>",
            "a@example.org\r\nRCPT TO:<b@example.org>",
            &long_label,
            &long_local_part,
        ] {
            assert_eq!(parsed(address), None, "{address:?}");
        }
    }
}
