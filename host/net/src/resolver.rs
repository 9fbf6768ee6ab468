//! The name servers that the host uses at this moment.

use std::{
    fs::File,
    io::Read,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::addresses::DNS_PORT;

/// What the C library asks without a configuration.
pub(super) const FALLBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DNS_PORT);
/// Most bytes of the file that are read.
const LONGEST: u64 = 64 * 1024;
/// As many as the C library asks (resolv.conf(5)).
const MOST: usize = 3;

/// resolv.conf as it was when it last changed.
pub(super) struct Resolver {
    path: PathBuf,
    /// Device, inode, and seconds and nanoseconds of the last change.
    seen: Option<(u64, u64, i64, i64)>,
    servers: Vec<SocketAddr>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self { path: PathBuf::from("/etc/resolv.conf"), seen: None, servers: Vec::new() }
    }
}

impl Resolver {
    /// The servers in their order, at least one; the file is looked at each time, and read when it is another one.
    pub(super) fn servers(&mut self) -> &[SocketAddr] {
        if let Ok(metadata) = std::fs::metadata(&self.path) {
            let now = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
            if self.seen != Some(now)
                && let Ok(text) = read(&self.path)
            {
                self.seen = Some(now);
                self.servers = parse(&text);
            }
        }
        if self.servers.is_empty() {
            self.servers.push(FALLBACK);
        }
        &self.servers
    }

    /// Always these servers.
    #[cfg(test)]
    pub(super) fn fixed(servers: Vec<SocketAddr>) -> Self {
        Self { path: PathBuf::new(), seen: None, servers }
    }
}

/// The host's name servers now, with those behind a resolver of its own that only it can reach.
pub fn nameservers() -> Vec<SocketAddr> {
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    files.iter().filter_map(|file| read(Path::new(file)).ok()).flat_map(|text| parse(&text)).collect()
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = Vec::new();
    File::open(path)?.take(LONGEST).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The servers of a resolv.conf(5); addresses of one link only (`fe80::1%eth0`) are left out.
fn parse(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, DNS_PORT))
        })
        .take(MOST)
        .collect()
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing {
    use super::{MOST, parse};

    /// Reads a resolv.conf.
    pub fn resolv_conf(text: &str) {
        assert!(parse(text).len() <= MOST);
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
    fn a_file_that_is_replaced_or_rewritten_holds_from_the_next_question_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let mut resolver = Resolver { path: path.clone(), ..Resolver::default() };
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
            prop_assert!(parse(&text).len() <= MOST);
        }
    }
}
