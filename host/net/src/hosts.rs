//! The names in the host's hosts(5), which its resolver knows before it asks a server.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::host_file::HostFile;

/// Largest part of the file that is read, in bytes: lists of unwanted names have some megabytes.
const MAX_FILE: u64 = 4 << 20;
/// Names that are kept.
const MAX_NAMES: usize = 1 << 17;
/// Addresses of each kind that a name has at most, so that an answer fits into 512 bytes (RFC 1035, 4.2.1).
const MAX_ADDRESSES: usize = 8;
/// Longest name in bytes, with the dot at its end (RFC 1035, 2.3.4).
const MAX_NAME: usize = 254;

/// The contents of the file since its last change. Names are in lower case with a dot at the end.
pub(super) struct Hosts {
    file: HostFile,
    entries: Entries,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Entries {
    addresses: HashMap<String, Vec<IpAddr>>,
    names: HashMap<IpAddr, String>,
}

impl Default for Hosts {
    fn default() -> Self {
        Self::at("/etc/hosts")
    }
}

impl Hosts {
    fn at(path: impl Into<std::path::PathBuf>) -> Self {
        Self { file: HostFile::new(path, MAX_FILE), entries: Entries::default() }
    }

    /// Reads the file if it has changed.
    pub(super) fn refresh(&mut self) {
        if let Some(text) = self.file.changed() {
            self.entries = parse(&text);
        }
    }

    /// Returns the addresses of a name in the order of the file; `None` for a name that is not in it.
    pub(super) fn addresses(&self, name: &str) -> Option<&[IpAddr]> {
        self.entries.addresses.get(name).map(Vec::as_slice)
    }

    /// Returns the first name of an address.
    pub(super) fn name(&self, address: IpAddr) -> Option<&str> {
        self.entries.names.get(&address).map(String::as_str)
    }
}

/// Returns the address that a name for reverse lookups stands for (RFC 1035, 3.5; RFC 3596, 2.5).
pub(super) fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(labels) = name.strip_suffix(".in-addr.arpa.") {
        let mut bytes = [0; 4];
        let mut labels = labels.split('.');
        for byte in bytes.iter_mut().rev() {
            // A leading zero or sign makes another name.
            *byte = labels.next()?.parse().ok()?;
        }
        let address = Ipv4Addr::from(bytes);
        let [a, b, c, d] = bytes;
        let canonical = format!("{d}.{c}.{b}.{a}.in-addr.arpa.") == name;
        return (labels.next().is_none() && canonical).then_some(address.into());
    }
    let labels = name.strip_suffix(".ip6.arpa.")?;
    let mut digits = [0_u8; 32];
    let mut labels = labels.split('.');
    for digit in digits.iter_mut().rev() {
        let label = labels.next().filter(|label| label.len() == 1)?;
        *digit = u8::from_str_radix(label, 16).ok()?;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    labels.next().is_none().then_some(Ipv6Addr::from(bytes).into())
}

fn parse(text: &str) -> Entries {
    let mut entries = Entries::default();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        // An address with a scope (`fe80::1%eth0`) means nothing without its interface.
        let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        for name in words.filter_map(name).filter(|name| !is_loopback(name)) {
            if entries.addresses.len() >= MAX_NAMES && !entries.addresses.contains_key(&name) {
                return entries;
            }
            if entries.names.len() < MAX_NAMES {
                entries.names.entry(address).or_insert_with(|| name.clone());
            }
            let known = entries.addresses.entry(name).or_default();
            let alike = known.iter().filter(|one| one.is_ipv4() == address.is_ipv4()).count();
            if alike < MAX_ADDRESSES && !known.contains(&address) {
                known.push(address);
            }
        }
    }
    entries
}

/// Returns a name as a query has it; `None` for one that no query can have.
fn name(word: &str) -> Option<String> {
    let labels = word.strip_suffix('.').unwrap_or(word);
    let fits = labels.is_ascii() && labels.split('.').all(|label| (1..=63).contains(&label.len()));
    let name = format!("{}.", labels.to_ascii_lowercase());
    (fits && name.len() <= MAX_NAME).then_some(name)
}

/// True if a name means the machine that asks (RFC 6761, 6.3), whatever the host has for it.
fn is_loopback(name: &str) -> bool {
    let labels: Vec<_> = name.trim_end_matches('.').split('.').collect();
    labels.last() == Some(&"localhost") || matches!(labels[0], "localhost" | "ip6-localhost" | "ip6-loopback")
}

#[cfg(test)]
impl Hosts {
    /// The names of this text.
    pub(super) fn fixed(text: &str) -> Self {
        Self { entries: parse(text), ..Self::at("") }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing {
    use super::{MAX_ADDRESSES, MAX_NAME, MAX_NAMES, parse, reverse};

    /// Reads a hosts file, and a name for a reverse lookup.
    pub fn hosts_file(text: &str) {
        let entries = parse(text);
        assert!(entries.addresses.len() <= MAX_NAMES && entries.names.len() <= MAX_NAMES);
        for (name, addresses) in &entries.addresses {
            assert!(name.len() <= MAX_NAME && name.ends_with('.'));
            assert!(!addresses.is_empty() && addresses.len() <= 2 * MAX_ADDRESSES);
        }
        let _ = reverse(text);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_have_the_addresses_of_all_lines_and_addresses_the_first_name() {
        let text = "# comment\n127.0.0.1 localhost ip6-localhost a.localhost\n10.0.0.1\tServer.Example server # one\n\
                    10.0.0.2 server\nfd00::1 server\n10.0.0.1 again server\nfe80::1%eth0 scoped\n10.0.0.3 dot. a..b\nnonsense x";
        let hosts = Hosts::fixed(text);
        let addresses = |name: &str| -> Vec<String> {
            hosts.addresses(name).unwrap_or_default().iter().map(ToString::to_string).collect()
        };
        assert_eq!(addresses("server."), ["10.0.0.1", "10.0.0.2", "fd00::1"]);
        assert_eq!(addresses("server.example."), ["10.0.0.1"]);
        assert_eq!(addresses("dot."), ["10.0.0.3"]);
        for name in ["localhost.", "a.localhost.", "ip6-localhost.", "scoped.", "a..b.", "x."] {
            assert_eq!(hosts.addresses(name), None, "{name}");
        }
        assert_eq!(hosts.name("10.0.0.1".parse().unwrap()), Some("server.example."));
        assert_eq!(hosts.name("fd00::1".parse().unwrap()), Some("server."));
        assert_eq!(hosts.name("127.0.0.1".parse().unwrap()), None);
    }

    #[test]
    fn a_changed_file_holds_from_the_next_query_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        let mut hosts = Hosts::at(&path);
        hosts.refresh();
        std::fs::write(&path, "10.0.0.1 one\n").unwrap();
        hosts.refresh();
        assert!(hosts.addresses("one.").is_some());
        let new = folder.path().join("new");
        std::fs::write(&new, "10.0.0.1 two\n").unwrap();
        std::fs::rename(new, &path).unwrap();
        hosts.refresh();
        assert!(hosts.addresses("one.").is_none() && hosts.addresses("two.").is_some());
    }

    #[test]
    fn a_reverse_name_is_an_address_only_in_its_one_form() {
        assert_eq!(reverse("1.0.168.192.in-addr.arpa."), Some("192.168.0.1".parse().unwrap()));
        let six = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.";
        assert_eq!(reverse(six), Some("fd00::1".parse().unwrap()));
        for name in
            ["1.0.0.in-addr.arpa.", "1.2.3.4.5.in-addr.arpa.", "01.0.168.192.in-addr.arpa.", "1.ip6.arpa.", "x."]
        {
            assert_eq!(reverse(name), None, "{name}");
        }
    }

    #[test]
    fn a_name_with_many_addresses_has_the_first_ones_of_each_kind() {
        let lines: Vec<_> = (0..100).map(|number| format!("10.0.0.{number} many\nfd00::{number} many")).collect();
        assert_eq!(Hosts::fixed(&lines.join("\n")).addresses("many.").unwrap().len(), 2 * MAX_ADDRESSES);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "([0-9a-f:.%#]{0,12}[ \t\n]|[a-zA-Z.\u{80}-\u{ff}-]{0,12}[ \t\n]){0,40}") {
            fuzzing::hosts_file(&text);
        }

        #[test]
        fn every_address_has_its_reverse_name(four: u32, six: u128) {
            let (four, six) = (Ipv4Addr::from(four), Ipv6Addr::from(six));
            let [a, b, c, d] = four.octets();
            prop_assert_eq!(reverse(&format!("{d}.{c}.{b}.{a}.in-addr.arpa.")), Some(IpAddr::V4(four)));
            let digits: String = format!("{:032x}", u128::from(six)).chars().rev().flat_map(|digit| [digit, '.']).collect();
            prop_assert_eq!(reverse(&format!("{digits}ip6.arpa.")), Some(IpAddr::V6(six)));
        }
    }
}
