//! Descriptors that the gate and the procfs service store here across their restarts (`FDSTORE=1` of sd_notify(3)).
//!
//! Containers depend on them: they connect to these sockets, and their system calls wait for an answer to come through
//! these descriptors. As long as init has a copy, nothing of that breaks when a service ends: the next process gets all
//! of its own back, by name.
//!
//! dockerd and its helpers reach the socket of the datagrams as well, and can be led to write to it. So a name is
//! changed by the service that owns it and by nothing else: the kernel tells the sender's process id, and init knows
//! the process ids that it started.

use std::{
    collections::BTreeMap,
    io,
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

/// The processes of one owner whose datagrams count: the last one started and the one before it, whose last datagrams
/// may still be in the socket's queue when its successor starts.
type Processes = [Option<i32>; 2];

#[derive(Debug, Default)]
struct Content {
    descriptors: BTreeMap<String, OwnedFd>,
    gate: Processes,
    procfs: Processes,
}

impl Content {
    fn processes(&mut self, owner: Owner) -> &mut Processes {
        match owner {
            Owner::Gate => &mut self.gate,
            Owner::Procfs => &mut self.procfs,
        }
    }
}

/// The descriptors by name. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct FdStore(Arc<Mutex<Content>>);

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
    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process of `owner` with `start`, which returns its id; from then on its datagrams count.
    pub(crate) fn start<E>(&self, owner: Owner, start: impl FnOnce() -> Result<i32, E>) -> Result<i32, E> {
        // Locked until the id is noted: the process may send its first datagram before `start` returns.
        let mut content = self.lock();
        let pid = start()?;
        let processes = content.processes(owner);
        *processes = [Some(pid), processes[0]];
        Ok(pid)
    }

    /// Carries out the request of a datagram of the process `sender`. Descriptors that are not stored are closed.
    pub(crate) fn handle(&self, sender: i32, datagram: &[u8], descriptors: Vec<OwnedFd>) {
        let Request { keep, release, name: Some(name) } = Request::read(datagram) else { return };
        let mut content = self.lock();
        if !content.processes(Owner::of(name)).contains(&Some(sender)) {
            return;
        }
        let stored = &mut content.descriptors;
        if release {
            stored.remove(name);
        } else if keep
            && let Some(descriptor) = descriptors.into_iter().next()
            // A name that is stored already does not count: it is replaced.
            && (stored.keys().filter(|other| Owner::of(other) == Owner::of(name)).count() < MAX_PER_OWNER
                || stored.contains_key(name))
        {
            stored.insert(name.to_owned(), descriptor);
        }
    }

    /// Returns copies of all descriptors of `owner`, for its new process.
    pub(crate) fn copies(&self, owner: Owner) -> io::Result<Vec<(String, OwnedFd)>> {
        let content = self.lock();
        let theirs = content.descriptors.iter().filter(|(name, _)| Owner::of(name) == owner);
        theirs.map(|(name, descriptor)| Ok((name.clone(), descriptor.try_clone()?))).collect()
    }

    /// Closes all descriptors of `owner`.
    pub(crate) fn release(&self, owner: Owner) {
        self.lock().descriptors.retain(|name, _| Owner::of(name) != owner);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn socket() -> Vec<OwnedFd> {
        vec![std::os::unix::net::UnixDatagram::unbound().unwrap().into()]
    }

    const GATE: i32 = 7;
    const PROCFS: i32 = 8;

    /// A store whose two services run.
    fn store() -> FdStore {
        let store = FdStore::default();
        for (owner, pid) in [(Owner::Gate, GATE), (Owner::Procfs, PROCFS)] {
            store.start(owner, || Ok::<_, io::Error>(pid)).unwrap();
        }
        store
    }

    fn names(store: &FdStore) -> String {
        store.copies(Owner::Gate).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(",")
    }

    fn names_of_procfs(store: &FdStore) -> Vec<String> {
        store.copies(Owner::Procfs).unwrap().into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn sockets_are_kept_by_name_replaced_and_released() {
        let store = store();
        store.handle(GATE, b"FDSTORE=1\nFDNAME=b", socket());
        store.handle(GATE, b"FDNAME=a\nFDSTORE=1", socket());
        store.handle(GATE, b"FDSTORE=1\nFDNAME=a", socket());
        assert_eq!(names(&store), "a,b");
        store.handle(GATE, b"FDSTOREREMOVE=1\nFDNAME=b", Vec::new());
        assert_eq!(names(&store), "a");
    }

    #[test]
    fn each_gets_back_what_is_its_own() {
        let store = store();
        store.handle(GATE, b"FDSTORE=1\nFDNAME=a1", socket());
        store.handle(PROCFS, b"FDSTORE=1\nFDNAME=mounts1x2", socket());
        assert_eq!(names(&store), "a1");
        assert_eq!(names_of_procfs(&store), ["mounts1x2"]);
        store.release(Owner::Procfs);
        assert_eq!((names(&store).as_str(), names_of_procfs(&store).len()), ("a1", 0));
    }

    #[test]
    fn no_process_but_the_owners_stores_replaces_or_releases_a_name() {
        let store = store();
        store.handle(GATE, b"FDSTORE=1\nFDNAME=a", socket());
        store.handle(PROCFS, b"FDSTORE=1\nFDNAME=mounts1x2", socket());
        let inode = |store: &FdStore| {
            use std::os::unix::fs::MetadataExt;
            let copy = store.copies(Owner::Gate).unwrap().remove(0).1;
            std::fs::File::from(copy).metadata().unwrap().ino()
        };
        let before = inode(&store);
        // dockerd, another process of the VM, and each service with the other's names.
        for (sender, name) in [(99, "a"), (99, "mounts1x2"), (PROCFS, "a"), (GATE, "mounts1x2"), (99, "c")] {
            store.handle(sender, format!("FDSTORE=1\nFDNAME={name}").as_bytes(), socket());
            store.handle(sender, format!("FDSTOREREMOVE=1\nFDNAME={name}").as_bytes(), Vec::new());
        }
        assert_eq!((names(&store).as_str(), inode(&store)), ("a", before));
        assert_eq!(names_of_procfs(&store), ["mounts1x2"]);
    }

    #[test]
    fn the_last_datagrams_of_a_process_that_ended_still_count_and_those_of_older_ones_do_not() {
        let store = store();
        store.start(Owner::Gate, || Ok::<_, io::Error>(20)).unwrap();
        store.handle(GATE, b"FDSTORE=1\nFDNAME=a", socket());
        store.start(Owner::Gate, || Ok::<_, io::Error>(21)).unwrap();
        store.handle(GATE, b"FDSTORE=1\nFDNAME=b", socket());
        store.handle(21, b"FDSTORE=1\nFDNAME=c", socket());
        assert_eq!(names(&store), "a,c");
        // A start that failed changes nothing.
        assert!(store.start(Owner::Gate, || Err(io::Error::other("x"))).is_err());
        store.handle(20, b"FDSTORE=1\nFDNAME=d", socket());
        assert_eq!(names(&store), "a,c,d");
    }

    #[test]
    fn what_is_not_asked_for_in_full_is_not_kept() {
        let store = store();
        for datagram in [&b"FDSTORE=1"[..], b"FDNAME=a", b"FDSTORE=1\nFDNAME=a,b=1", b"FDSTORE=1\nFDNAME=", b"READY=1"]
        {
            store.handle(GATE, datagram, socket());
        }
        store.handle(GATE, b"FDSTORE=1\nFDNAME=a", Vec::new());
        assert_eq!(names(&store), "");
    }

    proptest! {
        #[test]
        fn no_datagram_makes_it_panic(datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
            store().handle(GATE, &datagram, socket());
        }

        #[test]
        fn no_datagram_of_another_process_changes_anything(
            sender in 9..i32::MAX,
            datagram in "(FDSTORE=1|FDSTOREREMOVE=1|FDNAME=|a|mounts1x2|\n){0,12}",
        ) {
            let store = store();
            store.handle(GATE, b"FDSTORE=1\nFDNAME=a", socket());
            store.handle(sender, datagram.as_bytes(), socket());
            prop_assert_eq!(names(&store), "a");
            prop_assert!(names_of_procfs(&store).is_empty());
        }
    }
}
