//! HTTP proxies: their URLs, the destinations reached without them, and the form in which the guest gets both.
//!
//! A URL may have a password. It goes to the guest and to `settings get`, never into a message or a log: `Display` and
//! `Debug` leave it out.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Names and networks that the guest reaches without a proxy: itself and its names for the host.
const OWN: [&str; 5] = ["localhost", "127.0.0.0/8", "::1", "host.docker.internal", "gateway.docker.internal"];
/// Longest accepted text, in bytes.
const MAX_URL: usize = 2048;

/// The URL of a proxy. Only [`ProxyUrl::for_guest`] returns its user name and password.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    scheme: &'static str,
    user: Option<String>,
    host: String,
    port: Option<u16>,
}

/// A text that is not the URL of a proxy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a proxy URL")]
pub struct InvalidProxy;

/// Schemes that Go's HTTP client, which the engine uses, supports for a proxy.
const SCHEMES: [&str; 4] = ["http", "https", "socks5", "socks5h"];

/// Accepts the characters of a user name and password (RFC 3986, 3.2.1); others have to be written as %XX.
fn is_user(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.iter().enumerate().all(|(at, byte)| match byte {
        b'%' => bytes.get(at + 1..at + 3).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)),
        _ => byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:".contains(byte),
    })
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

impl FromStr for ProxyUrl {
    type Err = InvalidProxy;

    fn from_str(text: &str) -> Result<Self, InvalidProxy> {
        if text.len() > MAX_URL {
            return Err(InvalidProxy);
        }
        // Without a scheme it is http, as Go takes it from the environment.
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let scheme = SCHEMES.into_iter().find(|known| scheme.eq_ignore_ascii_case(known)).ok_or(InvalidProxy)?;
        // A path, query or fragment means nothing to a proxy; left in here, its characters fail as part of the host.
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        // The last @ is the separator, as one in a password has to be written as %40.
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => (Some(user.to_owned()), place),
            None => (None, authority),
        };
        let (host, port) = match place.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']').ok_or(InvalidProxy)?;
                // Written again in one spelling. A zone (`%eth0`) is refused: the guest does not have the host's
                // interfaces.
                let address: Ipv6Addr = address.parse().map_err(|_| InvalidProxy)?;
                let port = if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(InvalidProxy)?) };
                (format!("[{address}]"), port)
            }
            None => match place.split_once(':') {
                Some((host, port)) => (host.to_owned(), Some(port)),
                None => (place.to_owned(), None),
            },
        };
        // Digits only: `parse` would accept a sign, too.
        let port = match port {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().ok().filter(|port| *port != 0).ok_or(InvalidProxy)?)
            }
            Some(_) => return Err(InvalidProxy),
            None => None,
        };
        if !user.as_deref().is_none_or(is_user) || !(host.starts_with('[') || is_name(&host)) {
            return Err(InvalidProxy);
        }
        Ok(Self { scheme, user, host, port })
    }
}

impl ProxyUrl {
    /// Returns whether the proxy listens on this machine's loopback.
    pub fn is_on_loopback(&self) -> bool {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        // A dot at the end makes a name absolute and does not change where it leads.
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        match host.parse::<IpAddr>().map(|address| address.to_canonical()) {
            // Linux connects to the unspecified address as to the loopback.
            Ok(address) => address.is_loopback() || address.is_unspecified(),
            Err(_) => host == "localhost" || host.ends_with(".localhost"),
        }
    }

    /// The URL for the guest, with user name and password. A proxy on this machine's loopback is at `host` there.
    pub fn for_guest(&self, host: Option<&str>) -> String {
        let host = host.filter(|_| self.is_on_loopback()).unwrap_or(&self.host);
        self.write(self.user.as_deref(), host)
    }

    fn write(&self, user: Option<&str>, host: &str) -> String {
        let user = user.map(|user| format!("{user}@")).unwrap_or_default();
        let port = self.port.map(|port| format!(":{port}")).unwrap_or_default();
        format!("{}://{user}{host}{port}", self.scheme)
    }
}

/// Without user name and password.
impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.write(self.user.as_ref().map(|_| "***"), &self.host))
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A text that was meant as a proxy's URL, without user name and password.
pub(super) fn conceal(text: &str) -> String {
    match text.parse::<ProxyUrl>() {
        Ok(url) => url.to_string(),
        // Nobody knows which part is the password, so none is shown.
        Err(InvalidProxy) if text.contains('@') => "***".into(),
        Err(InvalidProxy) => text.into(),
    }
}

/// Accepts one name, address, network or pattern to reach without the proxy. 253 bytes is the longest DNS name.
pub(super) fn is_exclusion(text: &str) -> bool {
    (1..=253).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',')
}

/// The proxy in the environment of a command: `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxyEnvironment {
    /// For HTTP.
    pub http: Option<String>,
    /// For HTTPS.
    pub https: Option<String>,
    /// Destinations reached without it, separated by commas.
    pub exclude: Option<String>,
}

/// Without user names and passwords.
impl fmt::Debug for ProxyEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProxyEnvironment")
            .field("http", &self.http.as_deref().map(conceal))
            .field("https", &self.https.as_deref().map(conceal))
            .field("exclude", &self.exclude)
            .finish()
    }
}

impl ProxyEnvironment {
    /// Reads it through `variable` as Go's programs do: upper case first, and an empty variable counts as unset.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            [name.to_owned(), name.to_lowercase()]
                .iter()
                .find_map(|name| variable(name).filter(|text| !text.is_empty()))
        };
        Self { http: either("HTTP_PROXY"), https: either("HTTPS_PROXY"), exclude: either("NO_PROXY") }
    }
}

/// The engine's proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxy {
    /// For HTTP.
    pub http: Option<ProxyUrl>,
    /// For HTTPS.
    pub https: Option<ProxyUrl>,
    /// Destinations reached without it, in addition to the guest's own.
    pub exclude: Vec<String>,
}

impl Proxy {
    /// The proxy of an environment, and the variables that are not a proxy's URL.
    pub fn from_environment(environment: &ProxyEnvironment) -> (Self, Vec<&'static str>) {
        let mut wrong = Vec::new();
        let mut url = |text: &Option<String>, name| match text.as_deref().map(str::parse) {
            Some(Ok(url)) => Some(url),
            Some(Err(InvalidProxy)) => {
                wrong.push(name);
                None
            }
            None => None,
        };
        let (http, https) = (url(&environment.http, "HTTP_PROXY"), url(&environment.https, "HTTPS_PROXY"));
        // Programs differ on whether spaces separate words, too. No name or network contains one, so they do here.
        let words = environment.exclude.as_deref().unwrap_or_default().split(|c: char| c == ',' || c.is_whitespace());
        let exclude = words.filter(|word| is_exclusion(word)).map(ToOwned::to_owned).collect();
        (Self { http, https, exclude }, wrong)
    }

    /// Returns whether there is a proxy.
    pub fn is_some(&self) -> bool {
        self.http.is_some() || self.https.is_some()
    }

    /// Returns whether the guest reaches one of its URLs through its name for the host.
    pub fn is_on_loopback(&self) -> bool {
        [&self.http, &self.https].into_iter().flatten().any(ProxyUrl::is_on_loopback)
    }

    /// The destinations that the guest reaches without the proxy, separated by commas; `own` has more of its names and
    /// networks.
    pub fn no_proxy(&self, own: &[String]) -> String {
        let mut words: Vec<&str> = OWN.into_iter().chain(own.iter().map(String::as_str)).collect();
        // The guest's own names come first and only once; the user's list often has `localhost`, too.
        for word in &self.exclude {
            if !words.contains(&word.as_str()) {
                words.push(word);
            }
        }
        words.join(",")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_proxy_on_the_loopback_is_the_hosts_in_the_guest() {
        for (text, guest) in [
            ("http://127.0.0.1:3128", "http://host.docker.internal:3128"),
            ("localhost:3128/", "http://host.docker.internal:3128"),
            ("HTTP://me:p%40ss@LOCALHOST.:8080", "http://me:p%40ss@host.docker.internal:8080"),
            ("socks5://[::1]:1080", "socks5://host.docker.internal:1080"),
            ("http://[::ffff:127.0.0.1]", "http://host.docker.internal"),
            ("http://127.9.9.9", "http://host.docker.internal"),
            ("http://0.0.0.0:1", "http://host.docker.internal:1"),
            ("https://proxy.example.org:3128", "https://proxy.example.org:3128"),
            ("http://10.0.0.1:3128", "http://10.0.0.1:3128"),
            ("http://localhost.example.org", "http://localhost.example.org"),
        ] {
            assert_eq!(text.parse::<ProxyUrl>().unwrap().for_guest(Some("host.docker.internal")), guest, "{text}");
        }
    }

    #[test]
    fn what_is_no_proxys_url_is_refused() {
        for text in [
            "",
            "http://",
            "ftp://proxy",
            "http://proxy:0",
            "http://proxy:65536",
            "http://proxy:+1",
            "http://proxy:",
            "http://proxy/path",
            "http://a b",
            "http://[::1",
            "http://[::1]x",
            "http://me:a b@proxy",
            "http://%zz@proxy",
            "http://proxy?x",
            "http://proxy\n",
            "direct://",
        ] {
            assert!(text.parse::<ProxyUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_environment_is_read_as_go_reads_it() {
        let read = |pairs: &[(&str, &str)]| {
            ProxyEnvironment::read(|name| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned()))
        };
        let both = read(&[("HTTP_PROXY", "upper:1"), ("http_proxy", "lower:1"), ("https_proxy", "lower:2")]);
        assert_eq!((both.http.as_deref(), both.https.as_deref()), (Some("upper:1"), Some("lower:2")));
        assert_eq!(read(&[("HTTP_PROXY", ""), ("http_proxy", "lower:1")]).http.as_deref(), Some("lower:1"));
        let (proxy, wrong) =
            Proxy::from_environment(&read(&[("HTTP_PROXY", "%%"), ("no_proxy", "a, .b  c,,10.0.0.0/8")]));
        assert_eq!((wrong, proxy.is_some()), (vec!["HTTP_PROXY"], false));
        assert_eq!(proxy.exclude, ["a", ".b", "c", "10.0.0.0/8"]);
    }

    #[test]
    fn the_guests_own_names_never_go_through_the_proxy() {
        let proxy = Proxy { exclude: vec![".corp".into(), "localhost".into()], ..Proxy::default() };
        assert_eq!(
            proxy.no_proxy(&["192.168.65.0/24".into()]),
            "localhost,127.0.0.0/8,::1,host.docker.internal,gateway.docker.internal,192.168.65.0/24,.corp"
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,60}") {
            let _ = text.parse::<ProxyUrl>();
        }

        #[test]
        fn a_secret_is_shown_to_the_guest_only(secret in "s[a-z0-9]{6,20}", name in "[a-z]{1,5}", port in 1_u16..) {
            let url: ProxyUrl = format!("http://{name}:{secret}@proxy.example:{port}").parse().unwrap();
            prop_assert!(url.for_guest(None).contains(&secret));
            let shown = format!("{url} {url:?}");
            prop_assert!(!shown.contains(&secret));
            let environment = ProxyEnvironment { http: Some(url.for_guest(None)), ..ProxyEnvironment::default() };
            let shown = format!("{environment:?}");
            prop_assert!(!shown.contains(&secret));
        }

        #[test]
        fn what_is_written_for_the_guest_reads_back(text in "(http|socks5)://([a-z]{1,4}:[a-z%0-9]{0,6}@)?([a-z.]{1,9}|\\[::[0-9a-f]{1,4}\\])(:[0-9]{1,6})?/?") {
            if let Ok(url) = text.parse::<ProxyUrl>() {
                let again: ProxyUrl = url.for_guest(None).parse().unwrap();
                prop_assert_eq!(again.for_guest(None), url.for_guest(None));
            }
        }
    }
}
