//! The shape of the tree: a directory for each container, named by its number, with one file for each node.
//!
//! An inode number consists of the container's number and the index of the node in [`NODES`], plus one. Both mean the
//! same to every process that ever serves the tree, so there is no table of inodes to keep.

use bulkhead_guest_common::registry::MAX_SLOT;

use crate::files::{NODES, Node};

/// The inode number of the top directory (`FUSE_ROOT_ID`).
pub(crate) const ROOT: u64 = 1;

/// Attributes as stat(2) returns them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// File type and permissions.
    pub(crate) mode: u32,
    /// User and group id, in the VM.
    pub(crate) owner: u32,
    /// In bytes.
    pub(crate) size: u64,
}

/// Size that files report, in bytes, as those of sysfs do. With 0, as in procfs, programs that copy
/// in the kernel take a file for empty.
const SIZE: u64 = 4096;

/// An inode, as its number describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inode {
    Root,
    Container(u64),
    Node(u64, &'static Node),
}

impl Inode {
    /// Decodes a number; `None` if no inode has it.
    pub(crate) fn of(number: u64) -> Option<Self> {
        let (slot, place) = (number >> 8, (number & 0xff) as usize);
        match (slot, place) {
            (0, 1) => Some(Self::Root),
            (0, _) => None,
            (_, 0) => Some(Self::Container(slot)),
            _ => NODES.get(place - 1).map(|node| Self::Node(slot, node)),
        }
    }

    /// Returns the inode number.
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

    /// Returns whether its attributes can be cached. Not for files that can be written: opening one with O_TRUNC sets
    /// the size that the kernel has cached to zero.
    pub(crate) fn is_lasting(self) -> bool {
        match self {
            Self::Root => false,
            Self::Container(_) => true,
            Self::Node(_, node) => node.mode & 0o222 == 0,
        }
    }

    /// Returns its attributes; `owner` is the VM's id of the container's root.
    pub(crate) fn attributes(self, owner: u32) -> Attributes {
        match self {
            // Not listed for users other than root. Containers have no path to it at all, only mounts of single files.
            Self::Root => Attributes { mode: libc::S_IFDIR | 0o711, owner: 0, size: 0 },
            Self::Container(_) => Attributes { mode: libc::S_IFDIR | 0o555, owner, size: 0 },
            Self::Node(_, node) => Attributes { mode: libc::S_IFREG | node.mode, owner, size: SIZE },
        }
    }
}

/// Parses a container's number from the name of its directory, in the one spelling that the runtime uses.
pub(crate) fn slot(name: &[u8]) -> Option<u64> {
    // `01` or `+1` as well would give one inode several names in the kernel's cache, of which only one is invalidated.
    let text = std::str::from_utf8(name).ok()?;
    let slot: u64 = text.parse().ok()?;
    ((1..=MAX_SLOT).contains(&slot) && slot.to_string() == text).then_some(slot)
}

/// Finds a node by the name of its file.
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
