//! Files and directories that the guest has open.
//!
//! A successor of this process knows them as lost: it opens them again when they are used.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{fd::OwnedFd, fs::OFlags, io::Errno};

use super::state::{HANDLES, Slots, State};

/// Bits of a handle's number that count up; the upper ones are random for each process.
const COUNTER_BITS: u32 = 40;

/// An open file.
pub(crate) struct File {
    pub(crate) fd: OwnedFd,
    pub(crate) share: usize,
    /// Opened for writing.
    pub(crate) writes: bool,
}

/// An open directory.
pub(crate) struct Listing {
    pub(crate) fd: OwnedFd,
    /// Position of the descriptor, `None` if it is not known.
    pub(crate) position: Mutex<Option<u64>>,
}

/// Something open.
#[derive(Clone)]
pub(crate) enum Handle {
    File(Arc<File>),
    Listing(Arc<Listing>),
    /// A file that an earlier process had open with these flags.
    LostFile(OFlags),
    /// A directory that an earlier process had open.
    LostListing,
    /// A file through which there were locks, which ended with an earlier process.
    LostLocks,
}

struct Open {
    node: u64,
    handle: Handle,
    /// Its slot in the memory for successors.
    kept: Option<u32>,
}

struct Table {
    handles: HashMap<u64, Open>,
    /// Open files by node.
    nodes: HashMap<u64, Vec<u64>>,
    kept: Slots,
}

/// Mark of a directory in a kept handle, above the flags of open(2).
const LISTING: u64 = 1 << 32;

/// Word of a kept handle that is not zero while there are locks.
const LOCKED: usize = 3;

/// The table of handles, by their numbers.
pub(crate) struct Handles {
    table: Mutex<Table>,
    state: Arc<State>,
    /// Least number of a new handle.
    first: u64,
    max: usize,
}

impl Handles {
    /// Creates a table for at most `max` handles, with those that an earlier process left. `epoch` is a random number.
    pub(crate) fn new(epoch: u32, max: usize, state: &Arc<State>) -> Self {
        let (kept, in_use) = Slots::find(state, HANDLES);
        let mut table = Table { handles: HashMap::new(), nodes: HashMap::new(), kept };
        for slot in in_use {
            let [number, node, flags] = [0, 1, 2].map(|at| table.kept.get(slot, at));
            let lost = match flags & LISTING {
                _ if table.kept.get(slot, LOCKED) != 0 => Handle::LostLocks,
                0 => Handle::LostFile(OFlags::from_bits_retain(flags as u32)),
                _ => Handle::LostListing,
            };
            table.handles.insert(number, Open { node, handle: lost, kept: Some(slot) });
        }
        Self { table: table.into(), state: Arc::clone(state), first: u64::from(epoch).max(1) << COUNTER_BITS, max }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if there are as many handles as there may be.
    pub(crate) fn check_room(&self) -> Result<(), Errno> {
        if self.table().handles.len() >= self.max { Err(Errno::NFILE) } else { Ok(()) }
    }

    fn add(&self, node: u64, handle: Handle, flags: u64) -> Result<u64, Errno> {
        self.check_room()?;
        let number = self.state.next_handle(self.first);
        let mut table = self.table();
        if matches!(handle, Handle::File(_)) {
            table.nodes.entry(node).or_default().push(number);
        }
        let kept = table.kept.add(&[number, node, flags, 0]);
        table.handles.insert(number, Open { node, handle, kept });
        Ok(number)
    }

    /// Adds a file that was opened with these flags.
    pub(crate) fn add_file(&self, node: u64, file: File, flags: OFlags) -> Result<u64, Errno> {
        // Its contents are cut once, and not again by a successor.
        self.add(node, Handle::File(file.into()), (flags - OFlags::TRUNC).bits().into())
    }

    pub(crate) fn add_listing(&self, node: u64, fd: OwnedFd) -> Result<u64, Errno> {
        self.add(node, Handle::Listing(Listing { fd, position: Mutex::new(Some(0)) }.into()), LISTING)
    }

    /// The open file or directory of a handle of this node.
    pub(crate) fn get(&self, handle: u64, node: u64) -> Result<Handle, Errno> {
        match self.table().handles.get(&handle) {
            Some(open) if open.node == node => Ok(open.handle.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// Gives a handle that was lost what it is again; returns what it has, of which another thread may be the cause.
    pub(crate) fn found(&self, handle: u64, again: Handle) -> Result<Handle, Errno> {
        let mut table = self.table();
        let Table { handles, nodes, .. } = &mut *table;
        // Closed meanwhile.
        let open = handles.get_mut(&handle).ok_or(Errno::BADF)?;
        if matches!(open.handle, Handle::LostFile(_) | Handle::LostListing) {
            if matches!(again, Handle::File(_)) {
                nodes.entry(open.node).or_default().push(handle);
            }
            open.handle = again;
        }
        Ok(open.handle.clone())
    }

    /// An open file of this node.
    pub(crate) fn any(&self, node: u64) -> Option<Arc<File>> {
        let table = self.table();
        match &table.handles.get(table.nodes.get(&node)?.last()?)?.handle {
            Handle::File(file) => Some(Arc::clone(file)),
            _ => None,
        }
    }

    /// Keeps for successors that there are locks through a handle, or none any more.
    pub(crate) fn mark_locked(&self, handle: u64, locked: bool) {
        let table = self.table();
        if let Some(kept) = table.handles.get(&handle).and_then(|open| open.kept) {
            table.kept.set(kept, LOCKED, locked.into());
        }
    }

    /// Closes a handle; returns its node.
    pub(crate) fn remove(&self, handle: u64) -> Option<u64> {
        let mut table = self.table();
        let removed = table.handles.remove(&handle);
        if let Some(kept) = removed.as_ref().and_then(|open| open.kept) {
            table.kept.remove(kept);
        }
        if let Some(Open { node, handle: Handle::File(_), .. }) = &removed
            && let Some(open) = table.nodes.get_mut(node)
        {
            open.retain(|number| *number != handle);
            if open.is_empty() {
                table.nodes.remove(node);
            }
        }
        // Closing may take a while on some file systems, so the lock is given up first.
        drop(table);
        removed.map(|open| open.node)
    }

    /// Closes all handles.
    pub(crate) fn clear(&self) {
        let mut table = self.table();
        table.kept.clear();
        table.nodes.clear();
        let handles = std::mem::take(&mut table.handles);
        drop(table);
        drop(handles);
    }
}
