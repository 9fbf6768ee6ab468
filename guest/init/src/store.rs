//! Descriptors that the gate and the warden have kept here while they are started anew (`FDSTORE` of sd_notify(3)).

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_procfs::traps::KEPT_PREFIX;

/// Descriptors that are kept for each of the two; one for each container that has one.
const MOST: usize = 2048;

/// Whose a descriptor is, by the beginning of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A container's socket.
    Gate,
    /// Where a container's mounts are reported.
    Warden,
}

impl Owner {
    fn of(name: &str) -> Self {
        if name.starts_with(KEPT_PREFIX) { Self::Warden } else { Self::Gate }
    }
}

/// The sockets by name. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Store(Arc<Mutex<BTreeMap<String, OwnedFd>>>);

/// What a datagram of the protocol asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked<'a> {
    keep: bool,
    release: bool,
    name: Option<&'a str>,
}

impl<'a> Asked<'a> {
    fn read(datagram: &'a [u8]) -> Self {
        let mut asked = Self::default();
        for line in datagram.split(|byte| *byte == b'\n') {
            match line {
                b"FDSTORE=1" => asked.keep = true,
                b"FDSTOREREMOVE=1" => asked.release = true,
                line => {
                    let name = line.strip_prefix(b"FDNAME=").and_then(|name| std::str::from_utf8(name).ok());
                    // Other characters stand between the names when they are handed down.
                    let plain = |name: &&str| {
                        (1..=255).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
                    };
                    asked.name = name.filter(plain).or(asked.name);
                }
            }
        }
        asked
    }
}

impl Store {
    fn sockets(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what a datagram asks for; descriptors that it does not ask to keep are closed.
    pub(crate) fn handle(&self, datagram: &[u8], descriptors: Vec<OwnedFd>) {
        let Asked { keep, release, name: Some(name) } = Asked::read(datagram) else { return };
        let mut sockets = self.sockets();
        if release {
            sockets.remove(name);
        } else if keep
            && let Some(socket) = descriptors.into_iter().next()
            && (sockets.keys().filter(|other| Owner::of(other) == Owner::of(name)).count() < MOST
                || sockets.contains_key(name))
        {
            sockets.insert(name.to_owned(), socket);
        }
    }

    /// Copies for a new gate or warden.
    pub(crate) fn copies(&self, owner: Owner) -> std::io::Result<Vec<(String, OwnedFd)>> {
        let sockets = self.sockets();
        let theirs = sockets.iter().filter(|(name, _)| Owner::of(name) == owner);
        theirs.map(|(name, socket)| Ok((name.clone(), socket.try_clone()?))).collect()
    }

    /// Lets go of all.
    pub(crate) fn release(&self, owner: Owner) {
        self.sockets().retain(|name, _| Owner::of(name) != owner);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn socket() -> Vec<OwnedFd> {
        vec![std::os::unix::net::UnixDatagram::unbound().unwrap().into()]
    }

    fn names(store: &Store) -> String {
        store.copies(Owner::Gate).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(",")
    }

    #[test]
    fn sockets_are_kept_by_name_replaced_and_released() {
        let store = Store::default();
        store.handle(b"FDSTORE=1\nFDNAME=b", socket());
        store.handle(b"FDNAME=a\nFDSTORE=1", socket());
        store.handle(b"FDSTORE=1\nFDNAME=a", socket());
        assert_eq!(names(&store), "a,b");
        store.handle(b"FDSTOREREMOVE=1\nFDNAME=b", Vec::new());
        assert_eq!(names(&store), "a");
    }

    #[test]
    fn each_gets_back_what_is_its_own() {
        let store = Store::default();
        store.handle(b"FDSTORE=1\nFDNAME=a1", socket());
        store.handle(b"FDSTORE=1\nFDNAME=mounts1x2", socket());
        assert_eq!(names(&store), "a1");
        let of_warden = || store.copies(Owner::Warden).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(of_warden(), ["mounts1x2"]);
        store.release(Owner::Warden);
        assert_eq!((names(&store).as_str(), of_warden().len()), ("a1", 0));
    }

    #[test]
    fn what_is_not_asked_for_in_full_is_not_kept() {
        let store = Store::default();
        for datagram in [&b"FDSTORE=1"[..], b"FDNAME=a", b"FDSTORE=1\nFDNAME=a,b=1", b"FDSTORE=1\nFDNAME=", b"READY=1"]
        {
            store.handle(datagram, socket());
        }
        store.handle(b"FDSTORE=1\nFDNAME=a", Vec::new());
        assert_eq!(names(&store), "");
    }

    proptest! {
        #[test]
        fn no_datagram_makes_it_panic(datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
            Store::default().handle(&datagram, socket());
        }
    }
}
