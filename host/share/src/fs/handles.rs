//! Files and directories that the guest has open.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{fd::OwnedFd, io::Errno};

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

#[derive(Clone)]
enum Handle {
    File(Arc<File>),
    Listing(Arc<Listing>),
}

#[derive(Default)]
struct Table {
    handles: HashMap<u64, (u64, Handle)>,
    /// Open files by node.
    nodes: HashMap<u64, Vec<u64>>,
}

/// The table of handles, by their numbers.
pub(crate) struct Handles {
    table: Mutex<Table>,
    next: AtomicU64,
    max: usize,
}

impl Handles {
    /// Creates a table for at most `max` handles. `epoch` is a random number.
    pub(crate) fn new(epoch: u32, max: usize) -> Self {
        let next = AtomicU64::new(u64::from(epoch).max(1) << COUNTER_BITS);
        Self { table: Mutex::default(), next, max }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if there are as many handles as there may be.
    pub(crate) fn check_room(&self) -> Result<(), Errno> {
        if self.table().handles.len() >= self.max { Err(Errno::NFILE) } else { Ok(()) }
    }

    fn add(&self, node: u64, handle: Handle) -> Result<u64, Errno> {
        self.check_room()?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut table = self.table();
        if matches!(handle, Handle::File(_)) {
            table.nodes.entry(node).or_default().push(number);
        }
        table.handles.insert(number, (node, handle));
        Ok(number)
    }

    pub(crate) fn add_file(&self, node: u64, file: File) -> Result<u64, Errno> {
        self.add(node, Handle::File(file.into()))
    }

    pub(crate) fn add_listing(&self, node: u64, fd: OwnedFd) -> Result<u64, Errno> {
        self.add(node, Handle::Listing(Listing { fd, position: Mutex::new(Some(0)) }.into()))
    }

    /// The open file of a handle of this node.
    pub(crate) fn file(&self, handle: u64, node: u64) -> Result<Arc<File>, Errno> {
        match self.table().handles.get(&handle) {
            Some((of, Handle::File(file))) if *of == node => Ok(Arc::clone(file)),
            _ => Err(Errno::BADF),
        }
    }

    /// The open directory of a handle of this node.
    pub(crate) fn listing(&self, handle: u64, node: u64) -> Result<Arc<Listing>, Errno> {
        match self.table().handles.get(&handle) {
            Some((of, Handle::Listing(listing))) if *of == node => Ok(Arc::clone(listing)),
            _ => Err(Errno::BADF),
        }
    }

    /// An open file of this node.
    pub(crate) fn any(&self, node: u64) -> Option<Arc<File>> {
        let table = self.table();
        match &table.handles.get(table.nodes.get(&node)?.last()?)?.1 {
            Handle::File(file) => Some(Arc::clone(file)),
            Handle::Listing(_) => None,
        }
    }

    /// Closes a handle.
    pub(crate) fn remove(&self, handle: u64) {
        let mut table = self.table();
        let removed = table.handles.remove(&handle);
        if let Some((node, Handle::File(_))) = &removed
            && let Some(open) = table.nodes.get_mut(node)
        {
            open.retain(|number| *number != handle);
            if open.is_empty() {
                table.nodes.remove(node);
            }
        }
        // Closing may take a while on some file systems, so the lock is given up first.
        drop(table);
        drop(removed);
    }

    /// Closes all handles.
    pub(crate) fn clear(&self) {
        let table = std::mem::take(&mut *self.table());
        drop(table);
    }
}
