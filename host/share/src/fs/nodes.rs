//! The table of nodes: each file or directory that the guest knows, by the number that the guest has for it.
//!
//! A node has no descriptor. It knows by which names it was found, and `resolve` finds it again by them. What a
//! successor of this process needs for that is kept in [`super::state`], from which [`super::recovery`] fills the
//! table.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    hash::{Hash, Hasher},
    mem,
};

use rustix::io::Errno;

use super::{
    attributes::Stamp,
    owners::Record,
    state::{NameKind, Names, Slots},
};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    /// Index of the share.
    pub(crate) share: usize,
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Time of birth; zeros where the file system has none. File systems give the inode number of a deleted file to a
    /// new one.
    pub(crate) born: (i64, u32),
    /// File type (`S_IFMT`). The clocks of file systems have ticks of milliseconds, in which a file can be deleted and
    /// another one be born.
    pub(crate) kind: u32,
}

impl Hash for Key {
    /// As one word, since the hasher takes each by itself, several times in each request. Files of a device that exist at
    /// a time have inode numbers of their own, which no guest chooses.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let device = self.device.rotate_left(32) ^ (self.share as u64).rotate_left(48);
        state.write_u64(self.inode ^ device ^ u64::from(self.born.1).rotate_left(20));
    }
}

/// A node without its names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    pub(crate) origin: Origin,
    /// Entry of the tree of shares, if this directory is on the way to a share.
    pub(crate) entry: Option<usize>,
    /// The file's record as of a time of change.
    pub(crate) record: Option<(Stamp, Option<Record>)>,
}

impl Node {
    pub(crate) fn is_directory(&self) -> bool {
        match self.origin {
            Origin::Way(_) => true,
            Origin::Host(key) => key.kind == libc::S_IFDIR,
        }
    }
}

/// A name of a node in a directory.
pub(super) struct Name {
    pub(super) directory: u64,
    pub(super) text: CString,
    /// Its slot in the memory for successors.
    pub(super) kept: Option<u32>,
}

impl Name {
    fn is(&self, directory: u64, text: &CStr) -> bool {
        self.directory == directory && self.text.as_c_str() == text
    }
}

pub(super) struct Slot {
    pub(super) node: Node,
    /// Directories and names in them, the newest first. None for the root of a share.
    pub(super) names: Vec<Name>,
    /// Paths of the tree of shares at which this directory is.
    pub(super) paths: Vec<(Vec<u8>, Option<u32>)>,
    /// Number of times that the guest was given this node and has not returned it.
    pub(super) lookups: u64,
    /// Number of names of other nodes that are in this directory.
    pub(super) children: u64,
    /// Time of change and size when the file was opened last; `None` if it had just been changed.
    opened: Option<(Stamp, u64)>,
    /// Size that the guest was given last; `None` if it may have changed it since.
    given: Option<u64>,
    /// Threads of the guest that were sent to look the name up again before they open the file.
    excused: Vec<u32>,
    /// Its slot in the memory for successors.
    pub(super) kept: Option<u32>,
}

impl Slot {
    pub(super) fn new(node: Node, lookups: u64, kept: Option<u32>) -> Self {
        Self {
            node,
            names: Vec::new(),
            paths: Vec::new(),
            lookups,
            children: 0,
            opened: None,
            given: None,
            excused: Vec::new(),
            kept,
        }
    }
}

/// Mark of a directory outside of all shares, instead of the type in a kept node.
pub(super) const WAY: u64 = 1 << 32;

/// The word of a kept node that says for which events it is watched: below, the events, and above, the request's number.
const WATCH: usize = 7;

/// The words of a node that are kept.
fn words(number: u64, node: &Node) -> [u64; 8] {
    match node.origin {
        Origin::Way(_) => [number, 0, 0, 0, 0, 0, WAY, 0],
        Origin::Host(key) => {
            let born = (key.born.0.cast_unsigned(), key.born.1.into());
            [number, 0, key.device, key.inode, born.0, born.1, key.kind.into(), 0]
        }
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
    pub(super) slots: HashMap<u64, Slot>,
    pub(super) numbers: HashMap<Origin, u64>,
    pub(super) kept: Slots,
    pub(super) kept_names: Names,
    /// Least number of a new node.
    first: u64,
    pub(super) max: usize,
}

impl Nodes {
    /// Creates a table with the root only. `epoch` is a random number.
    pub(super) fn new(epoch: u32, root: Node, kept: Slots, kept_names: Names) -> Self {
        Self {
            slots: HashMap::from([(fuse::ROOT, Slot::new(root, 1, None))]),
            numbers: HashMap::from([(root.origin, fuse::ROOT)]),
            kept,
            kept_names,
            // Never zero, so that no number is the root's.
            first: u64::from(epoch).max(1) << COUNTER_BITS,
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
        self.kept.clear();
        self.kept_names.clear();
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
                let number = self.kept.state().next_node(self.first);
                let kept = self.kept.add(&words(number, &node));
                self.numbers.insert(node.origin, number);
                self.slots.insert(number, Slot::new(node, 0, kept));
                number
            }
        };
        let slot = self.slots.get_mut(&number).ok_or(Errno::STALE)?;
        slot.lookups = slot.lookups.saturating_add(1);
        if let Some(kept) = slot.kept {
            self.kept.set(kept, 1, slot.lookups);
        }
        slot.node.entry = node.entry;
        slot.node.record = node.record.or(slot.node.record);
        let newest = slot.names.first();
        if let Some(name) = name.filter(|name| !newest.is_some_and(|newest| newest.is(parent, name))) {
            self.add_name(number, parent, name);
        }
        Ok(number)
    }

    /// Takes identity and names from a node whose file is gone, because a new file has the same identity: its number, and
    /// a birth in the same tick. The guest may have returned the node already, which nobody has read yet.
    pub(crate) fn supersede(&mut self, origin: Origin) {
        let Some(number) = self.numbers.remove(&origin) else { return };
        let names = self.slots.get_mut(&number).map(|slot| mem::take(&mut slot.names));
        for name in names.unwrap_or_default() {
            self.release(&name);
        }
    }

    /// Keeps the path of an entry of the tree of shares for a successor, which finds the entry by it.
    pub(crate) fn keep_path(&mut self, number: u64, path: &[u8]) {
        let Some(slot) = self.slots.get_mut(&number).filter(|_| number != fuse::ROOT) else { return };
        if !slot.paths.iter().any(|(known, _)| known == path) {
            slot.paths.push((path.to_vec(), self.kept_names.add(NameKind::Path, number, 0, path)));
        }
    }

    fn add_name(&mut self, number: u64, parent: u64, name: &CStr) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        if let Some(at) = slot.names.iter().position(|known| known.is(parent, name)) {
            slot.names.swap(0, at);
            return;
        }
        // A directory has one name only.
        let most = if slot.node.is_directory() { 0 } else { MAX_NAMES - 1 };
        let dropped = slot.names.split_off(slot.names.len().min(most));
        let kept = self.kept_names.add(NameKind::Child, number, parent, name.to_bytes());
        slot.names.insert(0, Name { directory: parent, text: name.to_owned(), kept });
        if let Some(parent) = self.slots.get_mut(&parent) {
            parent.children += 1;
        }
        for name in dropped {
            self.release(&name);
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
        let Some(at) = slot.names.iter().position(|known| known.is(parent, name)) else { return };
        let removed = slot.names.remove(at);
        self.release(&removed);
    }

    /// Notes that a node has a name no longer.
    fn release(&mut self, name: &Name) {
        if let Some(kept) = name.kept {
            self.kept_names.remove(kept);
        }
        if let Some(slot) = self.slots.get_mut(&name.directory) {
            slot.children = slot.children.saturating_sub(1);
        }
        self.remove_unused(name.directory);
    }

    /// Takes a node back that the guest had `count` times.
    pub(crate) fn forget(&mut self, number: u64, count: u64) {
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.lookups = slot.lookups.saturating_sub(count);
            if let Some(kept) = slot.kept {
                self.kept.set(kept, 1, slot.lookups);
            }
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
            // Two paths that have become one share since are two nodes of it.
            if self.numbers.get(&slot.node.origin) == Some(&number) {
                self.numbers.remove(&slot.node.origin);
            }
            if let Some(kept) = slot.kept {
                self.kept.remove(kept);
            }
            for kept in slot.paths.iter().filter_map(|(_, kept)| *kept).chain(slot.names.iter().filter_map(|n| n.kept))
            {
                self.kept_names.remove(kept);
            }
            for name in slot.names {
                if let Some(slot) = self.slots.get_mut(&name.directory) {
                    slot.children = slot.children.saturating_sub(1);
                    candidates.push(name.directory);
                }
            }
        }
    }

    /// Keeps for a successor that a node is watched for these events, or for none, by the guest's request of this number.
    pub(crate) fn keep_watch(&self, number: u64, mask: u32, sequence: u64) {
        let Some(kept) = self.slots.get(&number).and_then(|slot| slot.kept) else { return };
        if self.kept.get(kept, WATCH) >> 32 < sequence {
            self.kept.set(kept, WATCH, sequence << 32 | u64::from(mask));
        }
    }

    /// The watches that an earlier process kept: nodes, events, and numbers of requests.
    pub(crate) fn kept_watches(&self) -> Vec<(u64, u32, u64)> {
        let watch = |(number, slot): (&u64, &Slot)| {
            let word = self.kept.get(slot.kept?, WATCH);
            (word as u32 != 0).then_some((*number, word as u32, word >> 32))
        };
        self.slots.iter().filter_map(watch).collect()
    }

    /// The number of a file that the guest knows.
    pub(crate) fn number(&self, origin: Origin) -> Option<u64> {
        self.numbers.get(&origin).copied()
    }

    /// The names of a file: directories and the names in them.
    pub(crate) fn names(&self, number: u64) -> Vec<(u64, CString)> {
        let names = self.slots.get(&number).map(|slot| slot.names.iter()).unwrap_or_default();
        names.map(|name| (name.directory, name.text.clone())).collect()
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
                (Some(name), Origin::Host(_)) => {
                    names.push(name.text.clone());
                    at = name.directory;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::state::{NODES, State};

    fn table() -> Nodes {
        let state = State::own().unwrap();
        let root = Node { origin: Origin::Way(0), entry: None, record: None };
        Nodes::new(7, root, Slots::find(&state, NODES).0, Names::find(&state).0)
    }

    /// A file of this type, with the number and the time of birth of all others here.
    fn file(kind: u32) -> Node {
        let key = Key { share: 0, device: 1, inode: 2, born: (3, 4), kind };
        Node { origin: Origin::Host(key), entry: None, record: None }
    }

    #[test]
    fn a_file_of_another_type_is_another_node_even_if_it_was_born_in_the_same_tick() {
        let mut nodes = table();
        let old = nodes.add(fuse::ROOT, Some(c"name"), file(libc::S_IFREG)).unwrap();
        let new = nodes.add(fuse::ROOT, Some(c"name"), file(libc::S_IFDIR)).unwrap();
        assert_ne!(old, new);
        assert!(nodes.get(new).unwrap().is_directory() && !nodes.get(old).unwrap().is_directory());
    }

    #[test]
    fn a_file_that_the_guest_makes_is_never_one_that_was_removed_in_the_same_tick() {
        for kind in [libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK] {
            let mut nodes = table();
            let old = nodes.add(fuse::ROOT, Some(c"name"), file(kind)).unwrap();
            assert_eq!(nodes.add(fuse::ROOT, Some(c"link"), file(kind)), Ok(old), "the same file is one node");
            nodes.supersede(file(kind).origin);
            let new = nodes.add(fuse::ROOT, Some(c"name"), file(kind)).unwrap();
            assert_ne!(new, old);
            assert_eq!((nodes.names(old).len(), nodes.names(new).len()), (0, 1), "the old one leads nowhere");
            // The guest returns it late.
            nodes.forget(old, 2);
            assert_eq!(nodes.get(old).err(), Some(Errno::STALE));
            assert_eq!(nodes.number(file(kind).origin), Some(new));
            nodes.forget(new, 1);
            assert_eq!((nodes.slots.len(), nodes.numbers.len()), (1, 1));
            assert_eq!(nodes.slots[&fuse::ROOT].children, 0);
        }
    }
}
