//! The syntax `HOST:PORT`, shared by the command line and the configuration.

/// Splits `HOST`, `HOST:PORT`, `[HOST]` or `[HOST]:PORT` into host and port. Text with several colons
/// and no brackets is an IPv6 address without a port. `None` if no host can have this form.
pub(crate) fn split_host_port(text: &str) -> Option<(&str, Option<&str>)> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        if rest.is_empty() { (host, None) } else { (host, Some(rest.strip_prefix(':')?)) }
    } else {
        match text.split_once(':') {
            Some((host, port)) if !port.contains(':') => (host, Some(port)),
            _ => (text, None),
        }
    };
    let is_host = !host.is_empty() && !host.contains(['[', ']', '/', ' ']);
    is_host.then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_names_and_addresses_with_and_without_a_port() {
        for (text, host, port) in [
            ("example.org", "example.org", None),
            ("example.org:80", "example.org", Some("80")),
            ("example.org:", "example.org", Some("")),
            ("2001:db8::1", "2001:db8::1", None),
            ("[2001:db8::1]", "2001:db8::1", None),
            ("[2001:db8::1]:80", "2001:db8::1", Some("80")),
        ] {
            assert_eq!(split_host_port(text), Some((host, port)), "{text}");
        }
    }

    #[test]
    fn refuses_texts_without_a_host() {
        for text in ["", ":80", "[", "[]:80", "[::1", "[::1]80", "http://x:80", "a b:80"] {
            assert_eq!(split_host_port(text), None, "{text}");
        }
    }
}
