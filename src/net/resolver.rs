//! The name servers that the host uses at this moment.

use std::{
    fs::File,
    io::Read,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::addresses::DNS_PORT;

/// Most bytes of the file that are read.
const LONGEST: u64 = 64 * 1024;
/// As many as the C library asks (resolv.conf(5)).
const MOST: usize = 3;

/// resolv.conf as it was when it last changed.
pub(super) struct Resolver {
    path: PathBuf,
    /// Device, inode, and seconds and nanoseconds of the last change.
    seen: Option<(u64, u64, i64, i64)>,
    servers: Vec<SocketAddrV4>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self { path: PathBuf::from("/etc/resolv.conf"), seen: None, servers: Vec::new() }
    }
}

impl Resolver {
    /// The servers in their order, at least one; the file is looked at each time, and read when it is another one.
    pub(super) fn servers(&mut self) -> &[SocketAddrV4] {
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
            // What the C library does without a configuration.
            self.servers.push(SocketAddrV4::new(Ipv4Addr::LOCALHOST, DNS_PORT));
        }
        &self.servers
    }

    /// Always these servers.
    #[cfg(test)]
    pub(super) fn fixed(servers: Vec<SocketAddrV4>) -> Self {
        Self { path: PathBuf::new(), seen: None, servers }
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = Vec::new();
    File::open(path)?.take(LONGEST).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The IPv4 servers of a resolv.conf(5).
fn parse(text: &str) -> Vec<SocketAddrV4> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            Some(SocketAddrV4::new(address.parse().ok()?, DNS_PORT))
        })
        .take(MOST)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn servers_are_those_that_the_c_library_would_ask() {
        let text = "# nameserver 9.9.9.9\nsearch example.org\nnameserver 127.0.0.53\n nameserver\t10.0.0.1 x\nnameserver ::1\nnameserver\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n";
        let servers: Vec<_> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["127.0.0.53:53", "10.0.0.1:53", "10.0.0.2:53"]);
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
