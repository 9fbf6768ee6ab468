//! Watches on nodes, and the events that requests are going to cause.

use std::ffi::CStr;

use rustix::{fd::AsFd, io::Errno};

use super::{
    Answer, Place, Server, attributes, done,
    nodes::Origin,
    resolve::{self, TargetPlace},
};
use crate::{
    events::{Change, Own},
    fuse::request::Operation,
};

/// Events of a file whose data, attributes or open files change.
const DATA: u32 = libc::IN_MODIFY;
const ATTRIBUTES: u32 = libc::IN_ATTRIB;
const CLOSED: u32 = libc::IN_CLOSE_WRITE;
/// Events of a file itself when its names change: its number of links, its place, its end.
const LINKS: u32 = libc::IN_ATTRIB | libc::IN_MOVE_SELF | libc::IN_DELETE_SELF;

impl Server {
    /// Watches a node for these events of inotify(7), or ceases to.
    pub(crate) fn watch(&self, number: u64, mask: u32, sequence: u64) -> Answer {
        if mask == 0 {
            self.events.unwatch(number, sequence);
        } else {
            self.begin_watch(number, mask, sequence)?;
        }
        self.nodes().keep_watch(number, mask, sequence);
        Ok(done())
    }

    /// Watches what an earlier process watched: the guest does not ask again. Files that are gone have had their last
    /// event, or will not have it.
    pub(super) fn resume_watches(&self) {
        let watches = self.nodes().kept_watches();
        for (number, mask, sequence) in watches {
            let _ = self.begin_watch(number, mask, sequence);
        }
    }

    fn begin_watch(&self, number: u64, mask: u32, sequence: u64) -> Result<(), Errno> {
        // Directories on the way to a share do not change.
        let Origin::Host(key) = self.node(number)?.origin else { return Ok(()) };
        let target = self.target(number, None)?;
        match &target.place {
            TargetPlace::Directory(directory) => self.events.watch(number, mask, sequence, directory.as_fd()),
            TargetPlace::Open(file) => self.events.watch(number, mask, sequence, file.fd.as_fd()),
            TargetPlace::Name(directory, name) => {
                let place = resolve::place_of(&**directory, name)?;
                // The name may have been given to another file since it was looked at.
                if attributes::key(key.share, &resolve::stat(&place)?) != key {
                    return Err(Errno::STALE);
                }
                self.events.watch(number, mask, sequence, place.as_fd())
            }
        }
    }

    /// Ceases to watch a node that the guest does not have any more.
    pub(crate) fn cease_if_returned(&self, number: u64) {
        if self.events.any() && self.nodes().get(number).is_err() {
            self.events.forget(number);
        }
    }

    /// Announces what a request will change, if anything is watched.
    pub(crate) fn begin_change(&self, node: u64, operation: &Operation<'_>) -> Option<Own<'_>> {
        if !self.events.any() {
            return None;
        }
        let mut change = Change::default();
        match *operation {
            Operation::Create { name, .. }
            | Operation::MakeNode { name, .. }
            | Operation::MakeDirectory { name, .. }
            | Operation::Symlink { name, .. } => self.new_name(&mut change, node, name),
            Operation::Link { node: of, name } => {
                self.new_name(&mut change, node, name);
                change.file(of, LINKS);
            }
            Operation::Unlink(name) | Operation::RemoveDirectory(name) => {
                self.lost_name(&mut change, (node, name), libc::IN_DELETE);
            }
            Operation::Rename { name, to, new, flags } => {
                self.lost_name(&mut change, (node, name), libc::IN_MOVED_FROM);
                change.name(to, new.to_bytes(), libc::IN_MOVED_TO);
                if let Some(replaced) = self.number_of((to, new)) {
                    change.file(replaced, LINKS);
                }
                if flags & libc::RENAME_EXCHANGE != 0 {
                    change.name(to, new.to_bytes(), libc::IN_MOVED_FROM);
                    change.name(node, name.to_bytes(), libc::IN_MOVED_TO);
                }
                self.file_changes(&mut change, to, ATTRIBUTES);
            }
            Operation::SetXattr { .. } | Operation::RemoveXattr(_) => {
                self.file_changes(&mut change, node, ATTRIBUTES | CLOSED);
            }
            // The mode of a file that this process may not open is changed for a moment.
            Operation::SetAttributes(_) | Operation::Open { .. } => {
                self.file_changes(&mut change, node, DATA | ATTRIBUTES | CLOSED);
            }
            Operation::Write(write) => {
                let killed = if write.kill_privileges { ATTRIBUTES } else { 0 };
                self.file_changes(&mut change, node, DATA | killed);
            }
            Operation::Allocate { .. } => self.file_changes(&mut change, node, DATA),
            Operation::CopyRange(range) => self.file_changes(&mut change, range.to_node, DATA),
            Operation::Release { .. } => self.file_changes(&mut change, node, CLOSED | libc::IN_DELETE_SELF),
            _ => return None,
        }
        Some(self.events.begin(change))
    }

    /// A node changes, for its own watchers and for those of the directories in which it has a name.
    fn file_changes(&self, change: &mut Change, node: u64, mask: u32) {
        change.file(node, mask);
        for (directory, name) in self.nodes().names(node) {
            change.file_in(directory, name.to_bytes(), mask);
        }
    }

    /// A new file gets its owner and mode after it was made.
    fn new_name(&self, change: &mut Change, directory: u64, name: &CStr) {
        change.name(directory, name.to_bytes(), libc::IN_CREATE);
        change.file_in(directory, name.to_bytes(), DATA | ATTRIBUTES | CLOSED);
        self.file_changes(change, directory, ATTRIBUTES);
    }

    fn lost_name(&self, change: &mut Change, (directory, name): (u64, &CStr), mask: u32) {
        change.name(directory, name.to_bytes(), mask);
        if let Some(node) = self.number_of((directory, name)) {
            change.file(node, LINKS);
        }
        self.file_changes(change, directory, ATTRIBUTES);
    }

    /// The node that a name leads to.
    fn number_of(&self, (directory, name): (u64, &CStr)) -> Option<u64> {
        resolve::check(name).ok()?;
        let Ok(Place::Host(directory)) = self.place(directory) else { return None };
        let stat = resolve::stat_name(&*directory.fd, name).ok()?;
        self.nodes().number(Origin::Host(attributes::key(directory.share, &stat)))
    }
}
