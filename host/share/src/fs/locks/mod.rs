//! Locks that exclude programs of the host as well, if the user wants that: the host's kernel keeps them.
//!
//! A lock of flock(2) belongs to an open file, in the guest and on the host, so it is one of the handle's own
//! descriptor. One of fcntl(2) belongs to a process or to an open file of the guest, which FUSE tells apart by a number
//! only. Each such owner gets a description of its own for a file: locks of descriptions (`F_OFD_SETLK`) exclude each
//! other and those of processes. A process loses its locks on a file when it closes any of its descriptors (`FLUSH`),
//! and an open file when it is released.
//!
//! A handle through which there are locks is marked in the memory for successors: their locks end with this process, so
//! it is of no use in the next one (`EIO`).

mod ranges;
mod wait;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};

use super::{
    Answer, Reply, Server, done,
    handles::File,
    resolve::{self, Descriptor},
};
use crate::{
    error::ShareError,
    fuse::{reply::Body, request::Lock},
    sys::{self, HostLock},
};
use ranges::{LAST, Ranges};
use wait::{Held, Pool};
pub(crate) use wait::{MAX_WAITING, Wait};

/// Owners of locks that there can be, each with a descriptor.
pub(crate) const MAX_OWNERS: usize = 1024;
/// Ranges of one owner, and of all: the host's kernel keeps each in a list that it walks.
const MAX_OWN_RANGES: usize = 1024;
const MAX_RANGES: usize = 16_384;

/// `FUSE_LK_FLOCK`.
const FLOCK: u32 = 1;

/// An owner of locks on a node.
struct Owner {
    id: u64,
    /// The guest's process that made the last lock.
    pid: u32,
    /// The description that has the locks.
    file: Arc<OwnedFd>,
    /// Handles through which they were made.
    handles: Vec<u64>,
    ranges: Ranges,
    /// Requests that wait.
    waiting: usize,
}

#[derive(Default)]
struct Table {
    /// Owners by node.
    nodes: HashMap<u64, Vec<Owner>>,
    owners: usize,
    ranges: usize,
    /// Handles with a lock of flock(2), and their files.
    whole: HashMap<u64, Arc<File>>,
}

impl Table {
    fn owner(&mut self, node: u64, id: u64) -> Option<&mut Owner> {
        self.nodes.get_mut(&node)?.iter_mut().find(|owner| owner.id == id)
    }

    /// Forgets the owners of a node that `keep` refuses.
    fn retain(&mut self, node: u64, keep: impl Fn(&Owner) -> bool) -> Vec<Owner> {
        let Some(owners) = self.nodes.get_mut(&node) else { return Vec::new() };
        let removed: Vec<_> = owners.extract_if(.., |owner| !keep(owner)).collect();
        if owners.is_empty() {
            self.nodes.remove(&node);
        }
        self.owners -= removed.len();
        self.ranges -= removed.iter().map(|owner| owner.ranges.len()).sum::<usize>();
        removed
    }

    fn set_ranges(&mut self, node: u64, id: u64, new: Ranges) {
        let Some(owner) = self.owner(node, id) else { return };
        let (old, len) = (owner.ranges.len(), new.len());
        owner.ranges = new;
        self.ranges = self.ranges - old + len;
    }

    /// True if there are locks that end with the descriptors of this process.
    fn is_locked(&self, node: u64, handle: u64) -> bool {
        let through = |owner: &Owner| !owner.ranges.is_empty() && owner.handles.contains(&handle);
        self.whole.contains_key(&handle) || self.nodes.get(&node).is_some_and(|owners| owners.iter().any(through))
    }
}

/// All locks.
pub(crate) struct Locks {
    on: bool,
    table: Mutex<Table>,
    pub(crate) pool: Arc<Pool>,
}

impl Drop for Locks {
    fn drop(&mut self) {
        self.pool.end();
    }
}

/// A lock as it is asked for, checked.
struct Wanted {
    host: HostLock,
    range: (u64, u64),
    /// `None` unlocks.
    exclusive: Option<bool>,
    whole: bool,
}

impl Wanted {
    fn new(lock: &Lock) -> Result<Self, Errno> {
        let kind = i32::try_from(lock.kind).map_err(|_| Errno::INVAL)?;
        let (exclusive, operation) = match kind {
            libc::F_RDLCK => (Some(false), libc::LOCK_SH),
            libc::F_WRLCK => (Some(true), libc::LOCK_EX),
            libc::F_UNLCK => (None, libc::LOCK_UN),
            _ => return Err(Errno::INVAL),
        };
        let (start, end) = (lock.start, lock.end);
        if lock.flags & !FLOCK != 0 || start > end || end > LAST {
            return Err(Errno::INVAL);
        }
        let whole = lock.flags & FLOCK != 0;
        let host = if whole { HostLock::Whole(operation) } else { HostLock::Range(kind, start, end) };
        Ok(Self { host, range: (start, end), exclusive, whole })
    }
}

impl Locks {
    pub(crate) fn new(on: bool) -> Self {
        Self { on, table: Mutex::default(), pool: Pool::new() }
    }

    /// True if the host keeps the locks.
    pub(crate) fn on(&self) -> bool {
        self.on
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up all locks.
    pub(crate) fn clear(&self) {
        self.pool.cancel_all();
        let all = std::mem::take(&mut *self.table());
        for owner in all.nodes.values().flatten() {
            unlock(&owner.file);
        }
        for file in all.whole.values() {
            let _ = sys::try_lock(&file.fd, &HostLock::Whole(libc::LOCK_UN));
        }
    }
}

/// Gives up all ranges. The description may be open for a while yet.
fn unlock(file: &OwnedFd) {
    let _ = sys::try_lock(file, &HostLock::Range(libc::F_UNLCK, 0, LAST));
}

impl Server {
    /// Starts the threads that wait for locks, which first confine themselves.
    pub(crate) fn start_lock_threads(&self, confine: fn() -> Result<(), ShareError>) -> io::Result<()> {
        // A share's root is a mere reference, which cannot be locked. Without a share, files are missing as well.
        match self.tree.shares.first() {
            Some(share) if self.locks.on => self.locks.pool.start(share.directory.try_clone()?, confine),
            _ => Ok(()),
        }
    }

    /// The lock that excludes one.
    pub(super) fn get_lock(&self, number: u64, lock: &Lock) -> Answer {
        if !self.locks.on {
            return Err(Errno::NOSYS);
        }
        let wanted = Wanted::new(lock)?;
        let (HostLock::Range(kind, start, end), Some(exclusive)) = (wanted.host, wanted.exclusive) else {
            return Err(Errno::INVAL);
        };
        let file = self.file(lock.handle, number)?;
        let mut table = self.locks.table();
        // No range is ever locked by a handle's own description, so that of a stranger finds all.
        let own = table.owner(number, lock.owner).map(|owner| Arc::clone(&owner.file));
        let found = match own {
            Some(own) => sys::find_lock(&*own, kind, start, end)?,
            None => sys::find_lock(&file.fd, kind, start, end)?,
        };
        let Some((start, end, kind, _)) = found else {
            return Ok(Body::lock((0, 0), libc::F_UNLCK.cast_unsigned(), 0).into());
        };
        // Processes of the host have no numbers in the guest: 0.
        let others = table.nodes.get(&number).into_iter().flatten().filter(|owner| owner.id != lock.owner);
        let holder = others.into_iter().find(|owner| owner.ranges.conflicts((start, end), exclusive));
        let pid = holder.map_or(0, |owner| owner.pid);
        Ok(Body::lock((start, end), kind.cast_unsigned(), pid).into())
    }

    /// Takes, changes or gives up a lock; with `wait`, may begin to wait for it.
    pub(super) fn set_lock(&self, request: (usize, u64), number: u64, lock: &Lock, wait: bool) -> Answer {
        if !self.locks.on {
            return Err(Errno::NOSYS);
        }
        let wanted = Wanted::new(lock)?;
        let file = self.file(lock.handle, number)?;
        if wanted.whole {
            self.lock_whole(request, number, lock, &wanted, file, wait)
        } else {
            self.lock_range(request, number, lock, &wanted, &file, wait)
        }
    }

    fn lock_whole(
        &self,
        request: (usize, u64),
        number: u64,
        lock: &Lock,
        wanted: &Wanted,
        file: Arc<File>,
        wait: bool,
    ) -> Answer {
        let mut table = self.locks.table();
        self.handles.get(lock.handle, number)?;
        let result = sys::try_lock(&file.fd, &wanted.host);
        // A lock that cannot be changed is gone (flock(2)).
        let held = result.is_ok() && wanted.exclusive.is_some();
        if held {
            table.whole.insert(lock.handle, Arc::clone(&file));
        } else {
            table.whole.remove(&lock.handle);
        }
        self.handles.mark_locked(lock.handle, table.is_locked(number, lock.handle));
        drop(table);
        match result {
            Err(Errno::AGAIN) if wait => {
                let wait = self.locks.pool.wait(request, (number, *lock), Held::Handle(file), wanted.host);
                wait.map(Reply::Waits)
            }
            result => result.map(|()| done()),
        }
    }

    fn lock_range(
        &self,
        request: (usize, u64),
        number: u64,
        lock: &Lock,
        wanted: &Wanted,
        file: &File,
        wait: bool,
    ) -> Answer {
        let mut table = self.locks.table();
        // One that is released from now on finds what is made here.
        self.handles.get(lock.handle, number)?;
        if table.owner(number, lock.owner).is_none() {
            if wanted.exclusive.is_none() {
                return Ok(done());
            }
            if table.owners >= MAX_OWNERS {
                return Err(Errno::NOLCK);
            }
            let (description, handles) = (self.description(number, file)?.into(), Vec::new());
            let ranges = Ranges::default();
            let owner = Owner { id: lock.owner, pid: 0, file: description, handles, ranges, waiting: 0 };
            table.nodes.entry(number).or_default().push(owner);
            table.owners += 1;
        }
        let all = table.ranges;
        let owner = table.owner(number, lock.owner).ok_or(Errno::NOLCK)?;
        let mut new = owner.ranges.clone();
        new.set(wanted.range.0, wanted.range.1, wanted.exclusive);
        let grows = new.len() > owner.ranges.len();
        if grows && (new.len() > MAX_OWN_RANGES || all - owner.ranges.len() + new.len() > MAX_RANGES) {
            return Err(Errno::NOLCK);
        }
        owner.pid = lock.pid;
        if wanted.exclusive.is_some() && !owner.handles.contains(&lock.handle) {
            owner.handles.push(lock.handle);
        }
        let mut result = sys::try_lock(&*owner.file, &wanted.host);
        // The description is for reading, and another handle of its owner is for writing.
        if result == Err(Errno::BADF) && file.writes {
            let better = self.description(number, file)?;
            result = change_description(owner, better).and_then(|()| sys::try_lock(&*owner.file, &wanted.host));
        }
        let waiting = match result {
            Err(Errno::AGAIN) if wait => {
                let held = Held::Owner(Arc::clone(&owner.file));
                let wait = self.locks.pool.wait(request, (number, *lock), held, wanted.host)?;
                owner.waiting += 1;
                Some(wait)
            }
            _ => None,
        };
        if result.is_ok() {
            table.set_ranges(number, lock.owner, new);
        }
        self.mark(&mut table, number, lock.owner);
        match waiting {
            Some(wait) => Ok(Reply::Waits(wait)),
            None => result.map(|()| done()),
        }
    }

    /// Marks the handles of an owner for successors.
    fn mark(&self, table: &mut Table, number: u64, id: u64) {
        let handles = table.owner(number, id).map(|owner| owner.handles.clone()).unwrap_or_default();
        for handle in handles {
            self.handles.mark_locked(handle, table.is_locked(number, handle));
        }
    }

    /// A description of the same file for an owner's locks.
    ///
    /// For writing only if the handle is: the host's programs that watch the file see that it is closed.
    fn description(&self, number: u64, file: &File) -> Result<OwnedFd, Errno> {
        let accesses: &[OFlags] = if file.writes { &[OFlags::RDWR, OFlags::WRONLY] } else { &[OFlags::RDONLY] };
        let mut failed = Errno::NOLCK;
        for access in accesses {
            match self.open_again(number, file, *access) {
                Ok(fd) => return Ok(fd),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn open_again(&self, number: u64, file: &File, access: OFlags) -> Result<OwnedFd, Errno> {
        let path = format!("/proc/self/fd/{}", file.fd.as_raw_fd());
        // The link leads to the file itself, whatever names it has. Landlock has its say as with any name.
        let found = openat2(CWD, path, access | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty());
        let fd = match found {
            Err(Errno::ACCESS) => match self.open_target(&self.target(number, None)?, access)? {
                Descriptor::New(fd) => fd,
                Descriptor::Open(_) => return Err(Errno::NOLCK),
            },
            result => result?,
        };
        let identity = |file: &OwnedFd| resolve::stat(file).map(|stat| super::attributes::key(0, &stat));
        if identity(&fd)? == identity(&file.fd)? { Ok(fd) } else { Err(Errno::STALE) }
    }

    /// Ends the locks of an owner that closes a descriptor of the file.
    pub(super) fn flush(&self, number: u64, id: u64) -> Answer {
        if !self.locks.on {
            return Err(Errno::NOSYS);
        }
        let mut table = self.locks.table();
        let Some(owner) = table.owner(number, id) else { return Ok(done()) };
        unlock(&owner.file);
        let handles = owner.handles.clone();
        // A request of another thread may wait for a lock yet.
        if owner.waiting > 0 {
            table.set_ranges(number, id, Ranges::default());
        } else {
            table.retain(number, |owner| owner.id != id);
        }
        for handle in handles {
            self.handles.mark_locked(handle, table.is_locked(number, handle));
        }
        Ok(done())
    }

    /// Ends the locks of an open file that is released.
    pub(super) fn release_locks(&self, number: u64, handle: u64) {
        if !self.locks.on {
            return;
        }
        let mut table = self.locks.table();
        if let Some(file) = table.whole.remove(&handle) {
            let _ = sys::try_lock(&file.fd, &HostLock::Whole(libc::LOCK_UN));
        }
        // Those that were made through others, too, are a process's, which has closed its descriptor: FLUSH.
        for owner in table.nodes.get_mut(&number).into_iter().flatten() {
            owner.handles.retain(|other| *other != handle);
        }
        for owner in table.retain(number, |owner| !owner.handles.is_empty()) {
            unlock(&owner.file);
        }
    }

    /// The answer to a request that has waited, with what it waited for.
    pub(super) fn lock_answer(&self, wait: &Arc<Wait>) -> Answer {
        self.locks.pool.collect(wait);
        let result = wait.outcome().unwrap_or(Err(Errno::INTR));
        let Lock { handle, owner: id, .. } = wait.lock;
        let wanted = Wanted::new(&wait.lock)?;
        let mut table = self.locks.table();
        let outcome = match &wait.held {
            Held::Handle(file) => {
                let open = matches!(self.file(handle, wait.node), Ok(open) if Arc::ptr_eq(&open, file));
                if result.is_ok() && open {
                    table.whole.insert(handle, Arc::clone(file));
                }
                self.handles.mark_locked(handle, table.is_locked(wait.node, handle));
                if open { result } else { Err(Errno::BADF) }
            }
            Held::Owner(description) => {
                let owner = table.owner(wait.node, id).filter(|owner| Arc::ptr_eq(&owner.file, description));
                // Closed meanwhile: the lock ends with the description.
                let Some(owner) = owner else { return Err(Errno::BADF) };
                owner.waiting -= 1;
                if result.is_ok() {
                    let mut new = owner.ranges.clone();
                    new.set(wanted.range.0, wanted.range.1, wanted.exclusive);
                    table.set_ranges(wait.node, id, new);
                }
                self.mark(&mut table, wait.node, id);
                result
            }
        };
        outcome.map(|()| done())
    }
}

/// Gives an owner a description for reading and writing, with all its locks.
fn change_description(owner: &mut Owner, better: OwnedFd) -> Result<(), Errno> {
    // One that waits does so on the old one.
    if owner.waiting > 0 {
        return Err(Errno::BADF);
    }
    for (start, end, exclusive) in owner.ranges.iter() {
        // The old one is for reading, and has shared locks, which do not exclude each other.
        let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        sys::try_lock(&better, &HostLock::Range(kind, start, end))?;
    }
    owner.file = better.into();
    Ok(())
}
