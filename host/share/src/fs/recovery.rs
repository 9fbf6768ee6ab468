//! Finds the nodes of an earlier process again.
//!
//! The shares are opened again, by their paths. A node belongs to a share if its names lead up to the root of one. Its
//! identity is compared whenever it is used, as that of every node, so that nothing has to be looked at here.

use std::{
    collections::{HashMap, VecDeque},
    ffi::CString,
    sync::Arc,
};

use super::{
    hidden::Hidden,
    lookup::node_of_entry,
    nodes::{self, Key, Node, Nodes, Origin},
    state::{self, NODES, NameKind, Names, Slots, State},
    tree::{self, Tree},
};
use crate::fuse;

/// A node that was kept.
struct Kept {
    slot: u32,
    lookups: u64,
    /// Without the share.
    key: Key,
    is_way: bool,
}

/// The nodes that were kept and are still reachable; the root alone for a new device.
pub(super) fn nodes(tree: &Tree, hidden: &Hidden, epoch: u32, state: &Arc<State>) -> Nodes {
    // A root that cannot be looked at is left as an empty directory. It is a share if the user shares `/`.
    let way = Node { origin: Origin::Way(tree::ROOT), entry: None, record: None };
    let root = node_of_entry(tree, tree::ROOT).unwrap_or(way);
    let (mut slots, in_use) = Slots::find(state, NODES);
    let (names, found) = Names::find(state);
    let mut kept = HashMap::new();
    for slot in in_use {
        let number = slots.get(slot, 0);
        if number == fuse::ROOT || kept.insert(number, read(&slots, slot)).is_some() {
            slots.remove(slot);
        }
    }
    let mut recovery = Recovery { tree, hidden, kept, nodes: Nodes::new(epoch, root, slots, names) };
    recovery.entries(&found);
    recovery.children(&found);
    recovery.names(found);
    for kept in recovery.kept.into_values() {
        recovery.nodes.kept.remove(kept.slot);
    }
    recovery.nodes
}

fn read(slots: &Slots, slot: u32) -> Kept {
    let word = |at| slots.get(slot, at);
    let born = (word(4).cast_signed(), word(5) as u32);
    let key = Key { share: 0, device: word(2), inode: word(3), born, kind: word(6) as u32 };
    Kept { slot, lookups: word(1), key, is_way: word(6) & nodes::WAY != 0 }
}

struct Recovery<'t> {
    tree: &'t Tree,
    hidden: &'t Hidden,
    /// Nodes that have no place yet.
    kept: HashMap<u64, Kept>,
    nodes: Nodes,
}

impl Recovery<'_> {
    fn place(&mut self, number: u64, node: Node) {
        let Some(kept) = self.kept.remove(&number) else { return };
        if self.nodes.slots.len() >= self.nodes.max {
            self.nodes.kept.remove(kept.slot);
            return;
        }
        self.nodes.numbers.entry(node.origin).or_insert(number);
        self.nodes.slots.insert(number, nodes::Slot::new(node, kept.lookups, Some(kept.slot)));
    }

    /// Places roots of shares, and directories on the way to one.
    fn entries(&mut self, names: &[state::Name]) {
        for name in names.iter().filter(|name| name.kind == NameKind::Path) {
            let Some(kept) = self.kept.get(&name.node) else { continue };
            let node = self.tree.find(&name.bytes).and_then(|entry| node_of_entry(self.tree, entry).ok());
            let Some(node) = node else { continue };
            // A way has nothing of its own, so it may have become a share. Another directory at the path of a share is
            // another node.
            let same = match node.origin {
                Origin::Host(key) => kept.is_way || Key { share: 0, ..key } == kept.key,
                Origin::Way(_) => kept.is_way,
            };
            if same {
                self.place(name.node, node);
            }
        }
    }

    /// Places what is below the roots of shares.
    fn children(&mut self, names: &[state::Name]) {
        let mut below = HashMap::<u64, Vec<&state::Name>>::new();
        for name in names.iter().filter(|name| name.kind == NameKind::Child) {
            below.entry(name.directory).or_default().push(name);
        }
        let host = |(number, slot): (&u64, &nodes::Slot)| match slot.node.origin {
            Origin::Host(key) => Some((*number, key.share, slot.node.entry)),
            Origin::Way(_) => None,
        };
        let mut directories: VecDeque<_> = self.nodes.slots.iter().filter_map(host).collect();
        while let Some((directory, share, entry)) = directories.pop_front() {
            for name in below.remove(&directory).unwrap_or_default() {
                let Some(kept) = self.kept.get(&name.node).filter(|kept| !kept.is_way) else { continue };
                let Ok(text) = CString::new(&*name.bytes) else { continue };
                if self.hidden.contains(kept.key) || self.tree.read_only_root(share, kept.key).is_some() {
                    continue;
                }
                let entry = entry.and_then(|entry| self.tree.child(entry, &text));
                // Another share has been put in this place.
                if entry.is_some_and(|entry| self.tree.share(entry).is_some()) {
                    continue;
                }
                let origin = Origin::Host(Key { share, ..kept.key });
                let is_directory = kept.key.kind == libc::S_IFDIR;
                let node = Node { origin, entry: entry.filter(|_| is_directory), record: None };
                if is_directory {
                    directories.push_back((name.node, share, entry));
                }
                self.place(name.node, node);
            }
        }
    }

    /// Gives nodes their names, and forgets the names of others.
    fn names(&mut self, names: Vec<state::Name>) {
        let nodes = &mut self.nodes;
        for name in names {
            let text = CString::new(name.bytes);
            let known = |number| nodes.slots.contains_key(&number);
            let text = text.ok().filter(|_| known(name.node));
            let kept = Some(name.slot);
            match (text, name.kind) {
                (Some(text), NameKind::Path) => {
                    if let Some(slot) = nodes.slots.get_mut(&name.node) {
                        slot.paths.push((text.into_bytes(), kept));
                    }
                }
                (Some(text), NameKind::Child) if known(name.directory) => {
                    if let Some(directory) = nodes.slots.get_mut(&name.directory) {
                        directory.children += 1;
                    }
                    if let Some(slot) = nodes.slots.get_mut(&name.node) {
                        // In the order in which they were given; the newest comes first.
                        slot.names.insert(0, nodes::Name { directory: name.directory, text, kept });
                    }
                }
                _ => nodes.kept_names.remove(name.slot),
            }
        }
    }
}
