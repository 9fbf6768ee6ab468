//! Descriptors that the gate and the procfs service store here across their restarts (`FDSTORE=1` of sd_notify(3)).
//!
//! Containers depend on them: they connect to these sockets, and their system calls wait for an answer to come through
//! these descriptors. As long as init has a copy, nothing of that breaks when a service ends: the next process gets all
//! of its own back, by name.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_procfs::seccomp_notify::KEPT_PREFIX;

/// Maximum of descriptors for each owner, about one for each container. One owner cannot use up the other's share.
const MAX_PER_OWNER: usize = 2048;

/// The owner of a descriptor, known by the prefix of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The gate: containers' sockets of the engine.
    Gate,
    /// The procfs service: seccomp listeners that report containers' mounts.
    Procfs,
}

impl Owner {
    fn of(name: &str) -> Self {
        if name.starts_with(KEPT_PREFIX) { Self::Procfs } else { Self::Gate }
    }
}

/// The descriptors by name. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct FdStore(Arc<Mutex<BTreeMap<String, OwnedFd>>>);

/// The request in a datagram.
#[derive(Debug, Default, PartialEq, Eq)]
struct Request<'a> {
    keep: bool,
    release: bool,
    name: Option<&'a str>,
}

impl<'a> Request<'a> {
    fn read(datagram: &'a [u8]) -> Self {
        let mut request = Self::default();
        for line in datagram.split(|byte| *byte == b'\n') {
            match line {
                b"FDSTORE=1" => request.keep = true,
                b"FDSTOREREMOVE=1" => request.release = true,
                line => {
                    let name = line.strip_prefix(b"FDNAME=").and_then(|name| std::str::from_utf8(name).ok());
                    // `,` and `=` separate the names when they are passed to the service again, so only characters
                    // that cannot be confused with these are allowed.
                    let plain = |name: &&str| {
                        (1..=255).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
                    };
                    request.name = name.filter(plain).or(request.name);
                }
            }
        }
        request
    }
}

impl FdStore {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out a datagram's request. Descriptors that it does not ask to store are closed.
    pub(crate) fn handle(&self, datagram: &[u8], descriptors: Vec<OwnedFd>) {
        let Request { keep, release, name: Some(name) } = Request::read(datagram) else { return };
        let mut sockets = self.lock();
        if release {
            sockets.remove(name);
        } else if keep
            && let Some(socket) = descriptors.into_iter().next()
            // A name that is stored already does not count: it is replaced.
            && (sockets.keys().filter(|other| Owner::of(other) == Owner::of(name)).count() < MAX_PER_OWNER
                || sockets.contains_key(name))
        {
            sockets.insert(name.to_owned(), socket);
        }
    }

    /// Returns copies of all descriptors of `owner`, for its new process.
    pub(crate) fn copies(&self, owner: Owner) -> std::io::Result<Vec<(String, OwnedFd)>> {
        let sockets = self.lock();
        let theirs = sockets.iter().filter(|(name, _)| Owner::of(name) == owner);
        theirs.map(|(name, socket)| Ok((name.clone(), socket.try_clone()?))).collect()
    }

    /// Closes all descriptors of `owner`.
    pub(crate) fn release(&self, owner: Owner) {
        self.lock().retain(|name, _| Owner::of(name) != owner);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn socket() -> Vec<OwnedFd> {
        vec![std::os::unix::net::UnixDatagram::unbound().unwrap().into()]
    }

    fn names(store: &FdStore) -> String {
        store.copies(Owner::Gate).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(",")
    }

    #[test]
    fn sockets_are_kept_by_name_replaced_and_released() {
        let store = FdStore::default();
        store.handle(b"FDSTORE=1\nFDNAME=b", socket());
        store.handle(b"FDNAME=a\nFDSTORE=1", socket());
        store.handle(b"FDSTORE=1\nFDNAME=a", socket());
        assert_eq!(names(&store), "a,b");
        store.handle(b"FDSTOREREMOVE=1\nFDNAME=b", Vec::new());
        assert_eq!(names(&store), "a");
    }

    #[test]
    fn each_gets_back_what_is_its_own() {
        let store = FdStore::default();
        store.handle(b"FDSTORE=1\nFDNAME=a1", socket());
        store.handle(b"FDSTORE=1\nFDNAME=mounts1x2", socket());
        assert_eq!(names(&store), "a1");
        let of_procfs = || store.copies(Owner::Procfs).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(of_procfs(), ["mounts1x2"]);
        store.release(Owner::Procfs);
        assert_eq!((names(&store).as_str(), of_procfs().len()), ("a1", 0));
    }

    #[test]
    fn what_is_not_asked_for_in_full_is_not_kept() {
        let store = FdStore::default();
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
            FdStore::default().handle(&datagram, socket());
        }
    }
}
