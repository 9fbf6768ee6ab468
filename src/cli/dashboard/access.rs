//! The right to use the page: everything is refused but the requests of the one browser that got the address.
//!
//! - **Token**: 256 random bits in the printed address, exchanged once for the session's cookie.
//! - **Session**: another 256 bits in a cookie that scripts cannot read and that no other site's request carries.
//! - **Host** names the address that was printed, so that a name of somebody's own which resolves to 127.0.0.1 (DNS
//!   rebinding) leads nowhere. **Origin** and **Sec-Fetch-Site** are this page's, so that no other page can ask, one on
//!   another port of this machine included.
//! - **User**: the other end of the connection is a socket of this user. The loopback belongs to all users, and a cookie
//!   does not know ports: a browser would also send it to another user's server.

use std::{
    fs::File,
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr},
    sync::{Mutex, PoisonError},
};

use hyper::{
    HeaderMap, Method,
    header::{COOKIE, HOST, HeaderName, ORIGIN},
};
use sha2::{Digest, Sha256};

use crate::hex::hex;

/// Random bytes in a token.
const TOKEN_BYTES: usize = 32;

/// Fetch metadata (W3C): the relation of the page that asks to this one.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The reason that a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("this server answers only at its own address")]
    Host,
    #[error("another page must not use the dashboard")]
    Origin,
    #[error("this session has ended; run `bulkhead dashboard` and open the address that it prints")]
    Session,
    #[error("this address has been used or is wrong; run `bulkhead dashboard` and open the address that it prints")]
    Token,
}

/// The secrets of one server.
#[derive(Debug)]
pub(super) struct Access {
    port: u16,
    host: String,
    origin: String,
    cookie: String,
    /// The secret in the address, until it is used.
    token: Mutex<Option<String>>,
    session: String,
}

impl Access {
    /// Makes the secrets for a server on a port of 127.0.0.1.
    pub(super) fn new(port: u16) -> io::Result<Self> {
        let host = format!("{}:{port}", Ipv4Addr::LOCALHOST);
        Ok(Self {
            port,
            origin: format!("http://{host}"),
            // Of one name per port: cookies do not know ports, and two dashboards would overwrite each other's.
            cookie: format!("bulkhead-{port}"),
            host,
            token: Mutex::new(Some(secret()?)),
            session: secret()?,
        })
    }

    /// The address to open, with the token while it is not used.
    pub(super) fn address(&self) -> String {
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        format!("{}/open?token={}", self.origin, token.as_deref().unwrap_or_default())
    }

    /// Uses up the token, if it is this one; returns the cookie to set.
    pub(super) fn redeem(&self, token: &str) -> Result<String, Refusal> {
        let mut expected = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if !expected.as_deref().is_some_and(|expected| same(expected, token)) {
            return Err(Refusal::Token);
        }
        *expected = None;
        Ok(format!("{}={}; Path=/; HttpOnly; SameSite=Strict", self.cookie, self.session))
    }

    /// Refuses requests to another host and from another page.
    pub(super) fn permit_origin(&self, method: &Method, headers: &HeaderMap) -> Result<(), Refusal> {
        // hyper leaves a second header of the name in the map; a request with two is not one of a browser.
        let only = |name: HeaderName| {
            let mut values = headers.get_all(name).iter();
            (values.next().map(|value| value.to_str().unwrap_or("?")), values.next().is_none())
        };
        if only(HOST) != (Some(&self.host), true) {
            return Err(Refusal::Host);
        }
        match only(ORIGIN) {
            (Some(origin), true) if origin == self.origin => {}
            // A browser names the origin of every request that is not a GET or HEAD (Fetch, 3.2).
            (None, _) if matches!(*method, Method::GET | Method::HEAD) => {}
            _ => return Err(Refusal::Origin),
        }
        match only(FETCH_SITE) {
            // `none`: the user typed the address, or another program opened it.
            (None | Some("same-origin" | "none"), true) => Ok(()),
            _ => Err(Refusal::Origin),
        }
    }

    /// Refuses requests without the session's cookie.
    pub(super) fn permit_session(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut pairs = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
        if pairs.any(|(name, value)| name == self.cookie && same(value, &self.session)) {
            return Ok(());
        }
        Err(Refusal::Session)
    }

    /// Returns whether the client's socket belongs to this user.
    pub(super) fn is_own(&self, client: SocketAddr) -> io::Result<bool> {
        let own = nix::unistd::geteuid().as_raw();
        let mut found = false;
        // A socket of IPv6 can be connected to an address of IPv4, which is the end of its own.
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let text = match std::fs::read_to_string(table) {
                // A kernel without IPv6.
                Err(error) if table.ends_with('6') && error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            for user in users(&text, client, self.port) {
                if user != own {
                    return Ok(false);
                }
                found = true;
            }
        }
        Ok(found)
    }
}

/// The users of the sockets at `client` that are connected to the server's port, from a table of `/proc/net`
/// (proc_pid_net(5)).
fn users(table: &str, client: SocketAddr, port: u16) -> Vec<u32> {
    // Addresses are in the order of the machine's bytes, ports are not.
    let end = |address: Ipv4Addr, port: u16| format!("{:08X}:{port:04X}", u32::from_ne_bytes(address.octets()));
    let SocketAddr::V4(client) = client else { return Vec::new() };
    let (client, server) = (end(*client.ip(), client.port()), end(Ipv4Addr::LOCALHOST, port));
    let socket = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, remote) = (fields.next()?, fields.next()?);
        // Between them: state, queues, timers and retransmissions.
        let user = fields.nth(4)?;
        (local.ends_with(&client) && remote.ends_with(&server)).then(|| user.parse().ok()).flatten()
    };
    table.lines().skip(1).filter_map(socket).collect()
}

fn secret() -> io::Result<String> {
    let mut bytes = [0; TOKEN_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex(&bytes))
}

/// Compares secrets without a hint, by the time that it takes, at how much of them is the same.
fn same(one: &str, other: &str) -> bool {
    Sha256::digest(one) == Sha256::digest(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    fn token(access: &Access) -> String {
        access.address().split_once("token=").unwrap().1.to_owned()
    }

    #[test]
    fn a_token_is_exchanged_once_for_a_session() {
        let access = Access::new(7).unwrap();
        let token = token(&access);
        assert_eq!(access.redeem(""), Err(Refusal::Token));
        assert_eq!(access.redeem(&token[1..]), Err(Refusal::Token));
        let cookie = access.redeem(&token).unwrap();
        assert!(cookie.ends_with("; Path=/; HttpOnly; SameSite=Strict"), "{cookie}");
        assert_eq!(access.redeem(&token), Err(Refusal::Token));
        assert_eq!(access.redeem(""), Err(Refusal::Token), "a used token is not an empty one");
        let pair = cookie.split(';').next().unwrap();
        let others = format!("a=b; {pair}; c");
        for good in [pair, &others] {
            assert_eq!(access.permit_session(&headers(&[("cookie", good)])), Ok(()));
        }
        let shorter = &pair[..pair.len() - 1];
        for bad in [token.as_str(), "bulkhead-7=", shorter, &pair.replace("bulkhead-7", "bulkhead-8")] {
            assert_eq!(access.permit_session(&headers(&[("cookie", bad)])), Err(Refusal::Session), "{bad}");
        }
        assert_eq!(access.permit_session(&headers(&[])), Err(Refusal::Session));
    }

    #[test]
    fn two_servers_have_different_secrets() {
        let [one, other] = [Access::new(7).unwrap(), Access::new(7).unwrap()];
        assert_eq!(other.redeem(&token(&one)), Err(Refusal::Token));
        assert_ne!(one.redeem(&token(&one)), other.redeem(&token(&other)));
    }

    #[test]
    fn only_this_page_at_this_address_may_ask() {
        let access = Access::new(7).unwrap();
        let judge = |method: Method, pairs: &[(&'static str, &str)]| access.permit_origin(&method, &headers(pairs));
        let (host, origin) = (("host", "127.0.0.1:7"), ("origin", "http://127.0.0.1:7"));
        assert_eq!(judge(Method::GET, &[host]), Ok(()));
        assert_eq!(judge(Method::POST, &[host, origin, ("sec-fetch-site", "same-origin")]), Ok(()));
        for name in ["localhost:7", "127.0.0.1", "127.0.0.1:8", "attacker.example:7", "[::1]:7", ""] {
            assert_eq!(judge(Method::GET, &[("host", name)]), Err(Refusal::Host), "{name}");
        }
        assert_eq!(judge(Method::GET, &[]), Err(Refusal::Host));
        assert_eq!(judge(Method::GET, &[host, host]), Err(Refusal::Host));
        for other in ["http://127.0.0.1:8", "https://127.0.0.1:7", "http://localhost:7", "null", "https://a.example"] {
            assert_eq!(judge(Method::GET, &[host, ("origin", other)]), Err(Refusal::Origin), "{other}");
        }
        assert_eq!(judge(Method::POST, &[host]), Err(Refusal::Origin));
        assert_eq!(judge(Method::PUT, &[host, origin, origin]), Err(Refusal::Origin));
        for site in ["same-site", "cross-site", "other"] {
            assert_eq!(judge(Method::GET, &[host, ("sec-fetch-site", site)]), Err(Refusal::Origin), "{site}");
        }
    }

    #[test]
    fn a_connection_has_the_user_of_its_other_end() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                     0: 0100007F:C000 0100007F:0050 01 00000000:00000000 00:00000000 00000000  1000        0 1 1\n\
                     1: 0100007F:0050 0100007F:C000 01 00000000:00000000 00:00000000 00000000     7        0 2 1\n\
                     2: 0000000000000000FFFF00000100007F:C001 0000000000000000FFFF00000100007F:0050 01 \
                     00000000:00000000 00:00000000 00000000  1001        0 3 1\n";
        let client = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        assert_eq!(users(table, client(0xc000), 0x50), [1000]);
        assert_eq!(users(table, client(0xc001), 0x50), [1001]);
        assert!(users(table, client(0xc000), 0x51).is_empty());
        assert!(users("", client(0xc000), 0x50).is_empty());
    }

    #[test]
    fn a_connection_of_this_process_is_ones_own() {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let access = Access::new(listener.local_addr().unwrap().port()).unwrap();
        assert!(access.is_own(client.local_addr().unwrap()).unwrap());
        let nobody = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        assert!(!access.is_own(nobody).unwrap());
    }
}
