//! The shape of the tree: a directory for each container, named by its number, with one file for each node.
//!
//! Inode numbers are made of the container's number and the node's place in [`NODES`], so that nothing has to be
//! remembered.

use bulkhead_guest_common::registry::MAX_SLOT;

use crate::files::{NODES, Node};

/// The inode number of the top directory (`FUSE_ROOT_ID`).
pub(crate) const ROOT: u64 = 1;

/// What stat(2) shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Type and permissions.
    pub(crate) mode: u32,
    /// User and group, in the VM's ids.
    pub(crate) owner: u32,
    /// In bytes.
    pub(crate) size: u64,
}

/// What files say to be long, as those of sysfs do: a program that has the kernel copy takes 0 for the end.
const SIZE: u64 = 4096;

/// What an inode number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inode {
    /// The top directory.
    Root,
    /// A container's directory.
    Container(u64),
    /// A container's file.
    Node(u64, &'static Node),
}

impl Inode {
    /// What a number means; `None` when nothing has it.
    pub(crate) fn of(number: u64) -> Option<Self> {
        let (slot, place) = (number >> 8, (number & 0xff) as usize);
        match (slot, place) {
            (0, 1) => Some(Self::Root),
            (0, _) => None,
            (_, 0) => Some(Self::Container(slot)),
            _ => NODES.get(place - 1).map(|node| Self::Node(slot, node)),
        }
    }

    /// Its number.
    pub(crate) fn number(self) -> u64 {
        match self {
            Self::Root => ROOT,
            Self::Container(slot) => slot << 8,
            Self::Node(slot, node) => {
                let place = NODES.iter().position(|one| one.path == node.path).unwrap_or_default();
                slot << 8 | (place as u64 + 1)
            }
        }
    }

    /// Whether its attributes stay as they are. Opening a file to write it makes the kernel believe that it is empty.
    pub(crate) fn is_lasting(self) -> bool {
        match self {
            Self::Root => false,
            Self::Container(_) => true,
            Self::Node(_, node) => node.mode & 0o222 == 0,
        }
    }

    /// Its attributes; `owner` is the id of the container's root.
    pub(crate) fn attributes(self, owner: u32) -> Attributes {
        match self {
            // Only those who know a number come in, and only crun has a path to here.
            Self::Root => Attributes { mode: libc::S_IFDIR | 0o711, owner: 0, size: 0 },
            Self::Container(_) => Attributes { mode: libc::S_IFDIR | 0o555, owner, size: 0 },
            Self::Node(_, node) => Attributes { mode: libc::S_IFREG | node.mode, owner, size: SIZE },
        }
    }
}

/// A container's number from its directory's name; only the spelling that the runtime uses.
pub(crate) fn slot(name: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(name).ok()?;
    let slot: u64 = text.parse().ok()?;
    ((1..=MAX_SLOT).contains(&slot) && slot.to_string() == text).then_some(slot)
}

/// A node from its file's name.
pub(crate) fn node(name: &[u8]) -> Option<&'static Node> {
    NODES.iter().find(|node| node.file_name().as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_node_has_a_number_of_its_own_and_is_found_by_its_name() {
        for node in NODES {
            let inode = Inode::Node(7, node);
            assert_eq!(Inode::of(inode.number()), Some(inode));
            assert_eq!(super::node(node.file_name().as_bytes()), Some(node));
        }
        assert!(NODES.len() < 0xff);
    }

    #[test]
    fn only_the_plain_spelling_of_a_number_is_a_directory() {
        assert_eq!(slot(b"17"), Some(17));
        for other in ["", "0", "017", "+17", "17 ", "-1", "18446744073709551615", "health"] {
            assert_eq!(slot(other.as_bytes()), None, "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn a_number_means_what_it_was_made_of(number: u64) {
            if let Some(inode) = Inode::of(number) {
                prop_assert_eq!(inode.number(), number);
            }
        }
    }
}
