//! The host's name servers, as resolv.conf(5) has them at the moment.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{addresses::DNS_PORT, host_file::HostFile};

/// The server that the C library asks without a configuration.
pub(super) const FALLBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DNS_PORT);
/// Largest part of the file that is read, in bytes.
const MAX_FILE: u64 = 64 * 1024;
/// Number of servers that the C library asks (`MAXNS` of resolv.conf(5)).
const MAX_SERVERS: usize = 3;

/// The contents of resolv.conf since its last change.
pub(super) struct Resolver {
    file: HostFile,
    servers: Vec<SocketAddr>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self { file: HostFile::new("/etc/resolv.conf", MAX_FILE), servers: Vec::new() }
    }
}

impl Resolver {
    /// The servers in their order, at least one. Each call checks the file, and reads it if it has changed.
    pub(super) fn servers(&mut self) -> &[SocketAddr] {
        if let Some(text) = self.file.changed() {
            self.servers = parse(&text);
        }
        if self.servers.is_empty() {
            self.servers.push(FALLBACK);
        }
        &self.servers
    }
}

/// The host's name servers, with those behind systemd-resolved, whose own address only the host can reach.
pub fn nameservers() -> Vec<SocketAddr> {
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    files.iter().filter_map(|file| HostFile::new(*file, MAX_FILE).read().ok()).flat_map(|text| parse(&text)).collect()
}

/// Reads the servers from a resolv.conf(5). Link-local addresses (`fe80::1%eth0`) are left out: they mean nothing
/// without their interface's index.
fn parse(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, DNS_PORT))
        })
        .take(MAX_SERVERS)
        .collect()
}

#[cfg(test)]
impl Resolver {
    /// A resolver that always has these servers.
    pub(super) fn fixed(servers: Vec<SocketAddr>) -> Self {
        Self { file: HostFile::new("", MAX_FILE), servers }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing {
    use super::{MAX_SERVERS, parse};

    /// Reads a resolv.conf.
    pub fn resolv_conf(text: &str) {
        assert!(parse(text).len() <= MAX_SERVERS);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn servers_are_those_that_the_c_library_would_ask() {
        let text = "# nameserver 9.9.9.9\nsearch example.org\nnameserver 127.0.0.53\n nameserver\t10.0.0.1 x\nnameserver fe80::1%eth0\nnameserver ::1\nnameserver\nnameserver 10.0.0.2\n";
        let servers: Vec<_> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["127.0.0.53:53", "10.0.0.1:53", "[::1]:53"]);
    }

    #[test]
    fn a_replaced_or_rewritten_file_holds_from_the_next_query_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let mut resolver = Resolver { file: HostFile::new(&path, MAX_FILE), ..Resolver::default() };
        assert_eq!(resolver.servers()[0].to_string(), "127.0.0.1:53");
        std::fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
        assert_eq!(resolver.servers()[0].to_string(), "10.0.0.1:53");
        let new = folder.path().join("new");
        std::fs::write(&new, "nameserver 10.0.0.2\n").unwrap();
        std::fs::rename(new, &path).unwrap();
        assert_eq!(resolver.servers()[0].to_string(), "10.0.0.2:53");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,300}") {
            prop_assert!(parse(&text).len() <= MAX_SERVERS);
        }
    }
}
