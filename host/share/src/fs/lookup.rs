//! Requests that only look: names, attributes, targets of links, figures.

use std::{ffi::CStr, os::fd::AsFd};

use rustix::{
    fs::{Statx, fstatvfs, readlinkat},
    io::Errno,
};

use super::{
    Answer, Place, Reply, Server,
    attributes::{self, Stamp},
    nodes::{Node, Origin},
    owners::Record,
    record::settled,
    resolve::{self, Directory, TargetPlace},
    tree::Tree,
};
use crate::fuse::reply::{Attributes, Body, Statistics};

/// A record to remember, if its time of change is long enough ago.
fn remembered(stamp: Stamp, record: Option<Record>) -> Option<(Stamp, Option<Record>)> {
    settled(stamp).then_some((stamp, record))
}

/// The node of an entry of the tree.
pub(super) fn node_of_entry(tree: &Tree, entry: usize) -> Result<Node, Errno> {
    let Some(share) = tree.share(entry) else {
        return Ok(Node { origin: Origin::Way(entry), entry: None, record: None });
    };
    let stat = resolve::stat(&*tree.shares[share].directory)?;
    let origin = Origin::Host(attributes::key(share, &stat));
    Ok(Node { origin, entry: Some(entry), record: None })
}

impl Server {
    pub(crate) fn lookup(&self, parent: u64, name: &CStr) -> Answer {
        let (node, attributes) = self.find(parent, name)?;
        Ok(Body::entry(node, &attributes).into())
    }

    /// The node of a name, which the guest has once more from now on.
    pub(crate) fn find(&self, parent: u64, name: &CStr) -> Result<(u64, Attributes), Errno> {
        resolve::check(name)?;
        match self.place(parent)? {
            Place::Way(entry) => {
                let child = self.tree.child(entry, name).ok_or(Errno::NOENT)?;
                self.find_entry(parent, child)
            }
            Place::Host(directory) => {
                if let Some(child) = self.share_at(&directory, name) {
                    return self.find_entry(parent, child);
                }
                if self.hidden.is_place(&directory, name) {
                    return Err(Errno::NOENT);
                }
                let stat = resolve::stat_name(&*directory.fd, name)?;
                self.add(&directory, name, &stat)
            }
        }
    }

    /// The entry of the share whose root has this name in a directory of another share.
    pub(crate) fn share_at(&self, directory: &Directory, name: &CStr) -> Option<usize> {
        let child = self.tree.child(directory.entry?, name)?;
        self.tree.share(child).map(|_| child)
    }

    /// Adds the file with this name and state to the table.
    pub(crate) fn add(&self, directory: &Directory, name: &CStr, stat: &Statx) -> Result<(u64, Attributes), Errno> {
        self.add_with(directory, name, stat, |origin| self.record_of_name(&directory.fd, name, stat, origin))
    }

    /// The same, with a record that is found out if the guest may have the file.
    pub(crate) fn add_with(
        &self,
        directory: &Directory,
        name: &CStr,
        stat: &Statx,
        record: impl FnOnce(Origin) -> Option<Record>,
    ) -> Result<(u64, Attributes), Errno> {
        let key = attributes::key(directory.share, stat);
        if self.hidden.contains(key) {
            return Err(Errno::NOENT);
        }
        if let Some(entry) = self.tree.read_only_root(directory.share, key) {
            return self.find_entry(directory.number, entry);
        }
        let device = self.devices.number(stat, || resolve::place_of(&*directory.fd, name))?;
        let origin = Origin::Host(key);
        let record = record(origin);
        let entry = directory.entry.and_then(|entry| self.tree.child(entry, name));
        let entry = entry.filter(|_| key.kind == libc::S_IFDIR);
        let node = Node { origin, entry, record: remembered(attributes::stamp(stat), record) };
        let mut nodes = self.nodes();
        let number = nodes.add(directory.number, Some(name), node)?;
        nodes.give_size(number, stat.stx_size);
        drop(nodes);
        let inode = attributes::number(device, stat.stx_ino);
        let attributes = attributes::attributes(inode, stat, record.as_ref(), self.ids);
        Ok((number, attributes.with_locks(self.locks.on())))
    }

    /// The node of an entry of the tree that is a share's root, or outside of all shares.
    pub(crate) fn node_of_entry(&self, entry: usize) -> Result<Node, Errno> {
        node_of_entry(&self.tree, entry)
    }

    fn find_entry(&self, parent: u64, entry: usize) -> Result<(u64, Attributes), Errno> {
        let node = self.node_of_entry(entry)?;
        let mut nodes = self.nodes();
        let number = nodes.add(parent, None, node)?;
        nodes.keep_path(number, self.tree.path(entry));
        drop(nodes);
        Ok((number, self.attributes_of(number, None)?))
    }

    /// Attributes of a node.
    pub(crate) fn attributes_of(&self, number: u64, handle: Option<u64>) -> Result<Attributes, Errno> {
        match self.node(number)?.origin {
            Origin::Way(entry) => Ok(attributes::of_way(entry, self.started)),
            Origin::Host(_) => self.attributes(&self.target(number, handle)?),
        }
    }

    pub(crate) fn get_attributes(&self, number: u64, handle: Option<u64>) -> Answer {
        Ok(Body::attribute(&self.attributes_of(number, handle)?).into())
    }

    pub(crate) fn read_link(&self, number: u64) -> Answer {
        let target = self.target(number, None)?;
        match &target.place {
            TargetPlace::Name(directory, name) if attributes::kind(&target.stat) == libc::S_IFLNK => {
                let link = readlinkat(&**directory, name.as_c_str(), Vec::new())?;
                Ok(Reply::Body(Body(link.into_bytes())))
            }
            _ => Err(Errno::INVAL),
        }
    }

    pub(crate) fn statistics(&self, number: u64) -> Answer {
        let figures = match self.node(number)?.origin {
            // For a program that looks whether there is room at all.
            Origin::Way(_) => self.tree.shares.first().map(|share| fstatvfs(share.directory.as_fd())).transpose()?,
            Origin::Host(_) => {
                let target = self.target(number, None)?;
                Some(match &target.place {
                    TargetPlace::Name(directory, _) | TargetPlace::Directory(directory) => fstatvfs(&**directory),
                    TargetPlace::Open(file) => fstatvfs(&file.fd),
                }?)
            }
        };
        let none = Statistics { block_size: 4096, fragment_size: 4096, name_length: 255, ..Statistics::default() };
        let statistics = figures.map_or(none, |of| Statistics {
            blocks: of.f_blocks,
            free: of.f_bfree,
            available: of.f_bavail,
            files: of.f_files,
            free_files: of.f_ffree,
            block_size: of.f_bsize as u32,
            name_length: of.f_namemax as u32,
            fragment_size: of.f_frsize as u32,
        });
        Ok(Body::statistics(&statistics).into())
    }

    /// Fails for a name that a share or the way to one has, as if by a mount, and for one that hides something.
    pub(crate) fn check_not_taken(&self, directory: &Directory, name: &CStr, error: Errno) -> Result<(), Errno> {
        resolve::check(name)?;
        if self.hidden.takes(directory, name) {
            // `EEXIST` would contradict the lookup, which found nothing.
            return Err(if error == Errno::EXIST { Errno::ACCESS } else { error });
        }
        if directory.entry.is_some_and(|entry| self.tree.child(entry, name).is_some()) {
            return Err(error);
        }
        // Another name of a hidden file, which the guest does not find. A new name finds it in its place anyway.
        let is_hidden = |stat: Statx| self.hidden.contains(attributes::key(directory.share, &stat));
        match error {
            Errno::BUSY if resolve::stat_name(&*directory.fd, name).is_ok_and(is_hidden) => Err(error),
            _ => Ok(()),
        }
    }
}
