//! The table of nodes: each file or directory that the guest knows, by the number that the guest has for it.
//!
//! A node has no descriptor. It knows by which names it was found, and `resolve` finds it again by them.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
};

use rustix::io::Errno;

use super::{attributes::Stamp, owners::Record};
use crate::fuse;

/// Largest number of nodes. The guest keeps one for each file in its caches and returns it when it needs the memory.
const MAX_NODES: usize = 2_000_000;
/// Names that are remembered for one file, which has several if it has hard links.
const MAX_NAMES: usize = 8;
/// Threads of the guest that are remembered for one file because they look its name up again.
const MAX_EXCUSED: usize = 8;
/// Levels of directories below a share that are searched.
const MAX_DEPTH: usize = 2048;
/// Bits of a node's number that count up. The upper ones are random for each process, so that a number of an earlier
/// process is unknown instead of another file's.
const COUNTER_BITS: u32 = 40;

/// The identity of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// An entry of the tree of shares that is outside of all shares.
    Way(usize),
    /// A file of the host. The same file in two shares is two nodes: one share may be read-only.
    Host(Key),
}

/// The identity of a file on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Index of the share.
    pub(crate) share: usize,
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Time of birth; zeros where the file system has none. File systems give the inode number of a deleted file to a
    /// new one.
    pub(crate) born: (i64, u32),
}

/// A node without its names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    pub(crate) origin: Origin,
    /// File type on the host (`S_IFMT`).
    pub(crate) kind: u32,
    /// Entry of the tree of shares, if this directory is on the way to a share.
    pub(crate) entry: Option<usize>,
    /// The file's record as of a time of change.
    pub(crate) record: Option<(Stamp, Option<Record>)>,
}

struct Slot {
    node: Node,
    /// Directories and names in them, the newest first. None for the root of a share.
    names: Vec<(u64, CString)>,
    /// Number of times that the guest was given this node and has not returned it.
    lookups: u64,
    /// Number of names of other nodes that are in this directory.
    children: u64,
    /// Time of change and size when the file was opened last; `None` if it had just been changed.
    opened: Option<(Stamp, u64)>,
    /// Size that the guest was given last; `None` if it may have changed it since.
    given: Option<u64>,
    /// Threads of the guest that were sent to look the name up again before they open the file.
    excused: Vec<u32>,
}

impl Slot {
    fn new(node: Node, lookups: u64) -> Self {
        Self { node, names: Vec::new(), lookups, children: 0, opened: None, given: None, excused: Vec::new() }
    }
}

/// Start of the way to a directory.
pub(crate) enum Start<T> {
    /// The root of a share.
    Share(usize),
    /// A directory that is open already.
    Open(T),
}

/// The table.
pub(crate) struct Nodes {
    slots: HashMap<u64, Slot>,
    numbers: HashMap<Origin, u64>,
    /// Number of the next node.
    next: u64,
    max: usize,
}

impl Nodes {
    /// Creates a table with the root only. `epoch` is a random number.
    pub(crate) fn new(epoch: u32, root: Node) -> Self {
        // Never zero, so that no number is the root's.
        let epoch = u64::from(epoch).max(1) << COUNTER_BITS;
        let slot = Slot::new(root, 1);
        Self {
            slots: HashMap::from([(fuse::ROOT, slot)]),
            numbers: HashMap::from([(root.origin, fuse::ROOT)]),
            next: epoch,
            max: MAX_NODES,
        }
    }

    /// Removes all nodes but the root. Their numbers are never used again.
    pub(crate) fn clear(&mut self) {
        self.slots.retain(|number, slot| {
            slot.children = 0;
            *number == fuse::ROOT
        });
        self.numbers.retain(|_, number| *number == fuse::ROOT);
    }

    /// The node of a number; one that is not known belongs to an earlier process or was returned.
    pub(crate) fn get(&self, number: u64) -> Result<Node, Errno> {
        self.slots.get(&number).map(|slot| slot.node).ok_or(Errno::STALE)
    }

    /// Finds or adds a node that was found by a name, and counts that the guest has it once more.
    pub(crate) fn add(&mut self, parent: u64, name: Option<&CStr>, node: Node) -> Result<u64, Errno> {
        if !self.slots.contains_key(&parent) {
            return Err(Errno::STALE);
        }
        let number = match self.numbers.get(&node.origin) {
            Some(number) => *number,
            None if self.slots.len() >= self.max => return Err(Errno::NOMEM),
            None => {
                let number = self.next;
                self.next += 1;
                self.numbers.insert(node.origin, number);
                self.slots.insert(number, Slot::new(node, 0));
                number
            }
        };
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.lookups = slot.lookups.saturating_add(1);
            slot.node.entry = node.entry;
            slot.node.record = node.record.or(slot.node.record);
        }
        if let Some(name) = name {
            self.add_name(number, parent, name);
        }
        Ok(number)
    }

    fn add_name(&mut self, number: u64, parent: u64, name: &CStr) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        if let Some(at) = slot.names.iter().position(|(known, of)| *known == parent && of.as_c_str() == name) {
            slot.names.swap(0, at);
            return;
        }
        // A directory has one name only.
        let most = if slot.node.kind == libc::S_IFDIR { 0 } else { MAX_NAMES - 1 };
        let dropped = slot.names.split_off(slot.names.len().min(most));
        slot.names.insert(0, (parent, name.to_owned()));
        if let Some(parent) = self.slots.get_mut(&parent) {
            parent.children += 1;
        }
        for (parent, _) in dropped {
            self.release_child(parent);
        }
    }

    /// Gives a node that was renamed its new name.
    pub(crate) fn rename(&mut self, origin: Origin, from: (u64, &CStr), to: (u64, &CStr)) {
        let Some(number) = self.numbers.get(&origin).copied() else { return };
        if !self.slots.contains_key(&to.0) {
            return;
        }
        self.add_name(number, to.0, to.1);
        self.remove_name(number, from);
    }

    /// Removes a name that does not lead to the node any more.
    pub(crate) fn remove_name(&mut self, number: u64, (parent, name): (u64, &CStr)) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        let Some(at) = slot.names.iter().position(|(known, of)| *known == parent && of.as_c_str() == name) else {
            return;
        };
        slot.names.remove(at);
        self.release_child(parent);
    }

    fn release_child(&mut self, parent: u64) {
        if let Some(slot) = self.slots.get_mut(&parent) {
            slot.children = slot.children.saturating_sub(1);
        }
        self.remove_unused(parent);
    }

    /// Takes a node back that the guest had `count` times.
    pub(crate) fn forget(&mut self, number: u64, count: u64) {
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.lookups = slot.lookups.saturating_sub(count);
            self.remove_unused(number);
        }
    }

    /// Removes a node, and the directories above it, that nothing needs any more.
    fn remove_unused(&mut self, number: u64) {
        let mut candidates = vec![number];
        while let Some(number) = candidates.pop() {
            let unused = self.slots.get(&number).is_some_and(|slot| slot.lookups == 0 && slot.children == 0);
            if !unused || number == fuse::ROOT {
                continue;
            }
            let Some(slot) = self.slots.remove(&number) else { continue };
            self.numbers.remove(&slot.node.origin);
            for (parent, _) in slot.names {
                if let Some(slot) = self.slots.get_mut(&parent) {
                    slot.children = slot.children.saturating_sub(1);
                    candidates.push(parent);
                }
            }
        }
    }

    /// The names of a file: directories and the names in them.
    pub(crate) fn names(&self, number: u64) -> Vec<(u64, CString)> {
        self.slots.get(&number).map(|slot| slot.names.clone()).unwrap_or_default()
    }

    /// Remembers the state of a file that is opened; true if it was the same when the file was opened last.
    pub(crate) fn reopen(&mut self, number: u64, state: Option<(Stamp, u64)>) -> bool {
        let Some(slot) = self.slots.get_mut(&number) else { return false };
        let same = state.is_some() && slot.opened == state;
        slot.opened = state;
        same
    }

    /// Remembers the size that the guest is given.
    pub(crate) fn give_size(&mut self, number: u64, size: u64) {
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.given = Some(size);
        }
    }

    /// Notes that the guest changes a file, whose size it knows better than this table now.
    pub(crate) fn size_changes(&mut self, number: u64) {
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.given = None;
        }
    }

    /// True if a thread of the guest that opens a file has an older size of it. Never twice in a row for a thread.
    pub(crate) fn has_old_size(&mut self, number: u64, thread: u32, size: u64) -> bool {
        let Some(slot) = self.slots.get_mut(&number) else { return false };
        if let Some(at) = slot.excused.iter().position(|excused| *excused == thread) {
            slot.excused.swap_remove(at);
            return false;
        }
        let old = slot.given.is_some_and(|given| given != size);
        if old {
            slot.excused.truncate(MAX_EXCUSED - 1);
            slot.excused.insert(0, thread);
        }
        old
    }

    /// The record that a node had, and the time of change that it had then.
    pub(crate) fn record(&self, origin: Origin) -> Option<(Stamp, Option<Record>)> {
        self.slots.get(self.numbers.get(&origin)?)?.node.record
    }

    /// Remembers a file's record as of a time of change.
    pub(crate) fn remember(&mut self, number: u64, stamp: Stamp, record: Option<Record>) {
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.node.record = Some((stamp, record));
        }
    }

    /// The way to a directory: from where, and the names from there on. `open` finds directories that are open.
    pub(crate) fn way<T>(
        &self,
        number: u64,
        open: impl Fn(u64) -> Option<T>,
    ) -> Result<(Start<T>, Vec<CString>), Errno> {
        let mut names = Vec::new();
        let mut at = number;
        let start = loop {
            if let Some(open) = open(at) {
                break Start::Open(open);
            }
            let slot = self.slots.get(&at).ok_or(Errno::STALE)?;
            match (slot.names.first(), slot.node.origin) {
                (Some((parent, name)), Origin::Host(_)) => {
                    names.push(name.clone());
                    at = *parent;
                }
                // The root of a share, or a directory that was removed: the caller compares what it finds.
                (None, Origin::Host(key)) => break Start::Share(key.share),
                (_, Origin::Way(_)) => return Err(Errno::STALE),
            }
            // Also ends a circle, which directories can form that the host moved around.
            if names.len() > MAX_DEPTH {
                return Err(Errno::NAMETOOLONG);
            }
        };
        names.reverse();
        Ok((start, names))
    }
}
