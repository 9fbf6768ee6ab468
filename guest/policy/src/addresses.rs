//! Network addresses as text: hosts, ports and URLs that cannot be read as a path, a socket or an option.
//!
//! Each form is a strict part of what Go's `net` and `net/url` accept, so that the engine cannot read another host or
//! scheme than the one judged here.

use std::net::Ipv6Addr;

/// Longest host name, in bytes (RFC 1035, 2.3.4).
const MAX_HOST: usize = 253;

/// Longest URL, in bytes; engines and registries have no use for longer ones.
const MAX_URL: usize = 2048;

/// Names that gRPC, which swarm uses, takes for the scheme of a socket if a colon follows.
const SOCKET_SCHEMES: [&str; 3] = ["unix", "unix-abstract", "vsock"];

/// Returns true for a host name or an IP address without brackets.
pub fn is_host(text: &str) -> bool {
    let is_name = text.len() <= MAX_HOST
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !SOCKET_SCHEMES.iter().any(|scheme| text.eq_ignore_ascii_case(scheme));
    is_name || text.parse::<Ipv6Addr>().is_ok()
}

/// Returns true for a port from 1 on.
fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port > 0)
}

/// Splits `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`. `None` unless both parts are valid.
fn split(text: &str) -> Option<(&str, Option<&str>)> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        // Only an IPv6 address stands in brackets.
        host.parse::<Ipv6Addr>().ok()?;
        (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    (is_host(host) && port.is_none_or(is_port)).then_some((host, port))
}

/// Returns true for a host with or without a port.
pub fn is_host_with_optional_port(text: &str) -> bool {
    // An IPv6 address without brackets is a host, too.
    is_host(text) || split(text).is_some()
}

/// The part of a URL behind host and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UrlPath {
    /// There may be none, but for a single slash.
    None,
    /// Any path, query and fragment of printable ASCII without quotes and backslashes.
    Any,
}

/// Returns true for a URL with one of these schemes, in lower case, and a host.
pub fn is_url(text: &str, schemes: &[&str], path: UrlPath) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else { return false };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, behind) = rest.split_at(end);
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"\\\"'`<>".contains(&byte);
    text.len() <= MAX_URL
        && schemes.contains(&scheme)
        && split(authority).is_some()
        && match path {
            UrlPath::None => matches!(behind, "" | "/"),
            UrlPath::Any => behind.bytes().all(is_plain),
        }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hosts_are_names_and_addresses() {
        for host in ["localhost", "logs.example.com", "10.0.0.1", "a_b", "::1", "2001:db8::1", "splunk-1"] {
            assert!(is_host(host), "{host}");
        }
        for host in ["", "/", "/run/x.sock", "-o", ".", "..", "a/b", "a b", "a\\b", "[::1]", "a:1", "unix", "UNIX"] {
            assert!(!is_host(host), "{host}");
        }
    }

    #[test]
    fn ports_are_optional_and_numbers() {
        for text in ["localhost", "localhost:24224", "[::1]:514", "[::1]", "::1", "10.0.0.1:1"] {
            assert!(is_host_with_optional_port(text), "{text}");
        }
        for text in
            ["localhost:", "localhost:0", "localhost:+1", "localhost:65536", "unix:1", "a:1:2", "[a]:1", "[::1]x"]
        {
            assert!(!is_host_with_optional_port(text), "{text}");
        }
    }

    #[test]
    fn urls_have_a_listed_scheme_and_a_host() {
        let tcp = |text| is_url(text, &["tcp", "udp"], UrlPath::None);
        for text in ["tcp://a:1", "udp://10.0.0.1:514", "tcp://[::1]:514", "tcp://a/"] {
            assert!(tcp(text), "{text}");
        }
        for text in [
            "unix:///run/x",
            "unixgram:///run/x",
            "TCP://a:1",
            "tcp:a",
            "tcp:///run/x",
            "tcp://a/run",
            "tcp://a:1?x",
            "tcp://user@a:1",
            " tcp://a",
            "tcp://",
            "tcp://a\0",
            "tcp://a\\..\\b",
        ] {
            assert!(!tcp(text), "{text}");
        }
        assert!(is_url("https://a.example/x/y?z=1#w", &["https"], UrlPath::Any));
        assert!(!is_url("https://a.example/x y", &["https"], UrlPath::Any));
        assert!(!is_url("https:///etc/shadow", &["https"], UrlPath::Any));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,80}") {
            let _ = (is_host_with_optional_port(&text), is_url(&text, &["http"], UrlPath::Any));
        }

        #[test]
        fn no_host_has_a_slash(text in "[a-z/.:\\[\\]0-9-]{0,20}") {
            prop_assert!(!(is_host_with_optional_port(&text) && text.contains('/')));
        }
    }
}
