//! The paths of the shares as a tree. Its inner entries are directories in which only the way to a share exists, unless
//! they lie inside of another share.

use std::{
    ffi::{CStr, CString},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Component, Path},
};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};

use super::{hidden::Hidden, nodes::Key};
use crate::api;

/// Index of the root, the host's `/`.
pub(crate) const ROOT: usize = 0;

/// A shared directory.
pub(crate) struct Share {
    /// The directory itself, open as a place only (`O_PATH`).
    pub(crate) directory: std::sync::Arc<OwnedFd>,
    pub(crate) read_only: bool,
    /// Device and inode number of the directory.
    pub(crate) identity: (u64, u64),
}

#[derive(Default)]
struct Entry {
    /// Its path without a slash at the start.
    path: Vec<u8>,
    children: Vec<(CString, usize)>,
    share: Option<usize>,
}

/// All shares and the tree of their paths.
pub(crate) struct Tree {
    entries: Vec<Entry>,
    pub(crate) shares: Vec<Share>,
}

/// A share that cannot be served, and the reason.
#[derive(Debug, thiserror::Error)]
#[error("cannot share {path}")]
pub(crate) struct Unusable {
    path: String,
    #[source]
    source: io::Error,
}

impl Tree {
    /// Opens the directories. Shares that cannot be opened are left out and returned.
    pub(crate) fn open(shares: &[api::Share], hidden: &Hidden) -> (Self, Vec<Unusable>) {
        let mut tree = Self { entries: vec![Entry::default()], shares: Vec::new() };
        let failed = shares.iter().filter_map(|share| {
            let source = tree.add(share, hidden).err()?;
            Some(Unusable { path: share.path.display().to_string(), source })
        });
        let failed = failed.collect();
        tree.merge();
        (tree, failed)
    }

    /// Makes one share of those that are the same directory under several paths, so that the guest has one node for
    /// each of its files. Not where a path has another share below it, which the other path may lack.
    fn merge(&mut self) {
        for at in 0..self.entries.len() {
            let Entry { children, share: Some(own), .. } = &self.entries[at] else { continue };
            let (own, share) = (*own, &self.shares[*own]);
            let same = |other: &&Entry| {
                other.children.is_empty()
                    && other.share.is_some_and(|other| {
                        let other = &self.shares[other];
                        (other.identity, other.read_only) == (share.identity, share.read_only)
                    })
            };
            if children.is_empty() {
                let first = self.entries.iter().filter(same).filter_map(|entry| entry.share).min();
                self.entries[at].share = Some(first.unwrap_or(own));
            }
        }
    }

    fn add(&mut self, share: &api::Share, hidden: &Hidden) -> io::Result<()> {
        let names = names(&share.path).ok_or(io::ErrorKind::InvalidInput)?;
        // Links in the user's own path are followed, here only.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(rustix::fs::CWD, &share.path, flags, Mode::empty())?;
        let stat = statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        if hidden.is_inside(&directory) {
            return Err(io::Error::other("it has files of Bulkhead itself, which no container may use"));
        }
        let mut at = ROOT;
        for name in names {
            at = self.child(at, &name).unwrap_or_else(|| {
                let above = &self.entries[at].path;
                let slash: &[u8] = if above.is_empty() { b"" } else { b"/" };
                let path = [above, slash, name.as_bytes()].concat();
                self.entries.push(Entry { path, ..Entry::default() });
                let new = self.entries.len() - 1;
                self.entries[at].children.push((name, new));
                new
            });
        }
        // Of two shares of the same path the first counts.
        if self.entries[at].share.is_none() {
            self.entries[at].share = Some(self.shares.len());
            let identity = (super::attributes::device(&stat), stat.stx_ino);
            self.shares.push(Share { directory: directory.into(), read_only: share.read_only, identity });
        }
        Ok(())
    }

    /// The entry below another one.
    pub(crate) fn child(&self, entry: usize, name: &CStr) -> Option<usize> {
        self.entries[entry].children.iter().find(|(known, _)| known.as_c_str() == name).map(|(_, child)| *child)
    }

    /// Names and indices of the entries below one.
    pub(crate) fn children(&self, entry: usize) -> &[(CString, usize)] {
        &self.entries[entry].children
    }

    /// The entry of a read-only share with this directory as its root, for one that is found in a share that is not.
    ///
    /// The host can move it, or what is above it, to another path in a share around it.
    pub(crate) fn read_only_root(&self, found_in: usize, key: Key) -> Option<usize> {
        let guarded = |share: usize| {
            let share = &self.shares[share];
            share.read_only && share.identity == (key.device, key.inode)
        };
        // In most trees no share is read-only.
        if self.shares[found_in].read_only || !self.shares.iter().any(|share| share.read_only) {
            return None;
        }
        self.entries.iter().position(|entry| entry.share.is_some_and(guarded))
    }

    /// The path of an entry, without a slash at its start.
    pub(crate) fn path(&self, entry: usize) -> &[u8] {
        &self.entries[entry].path
    }

    /// The entry with a path.
    pub(crate) fn find(&self, path: &[u8]) -> Option<usize> {
        self.entries.iter().position(|entry| entry.path == path)
    }

    /// The share whose root an entry is.
    pub(crate) fn share(&self, entry: usize) -> Option<usize> {
        self.entries[entry].share
    }
}

/// The names in an absolute path without `.` and `..`.
fn names(path: &Path) -> Option<Vec<CString>> {
    let mut components = path.components();
    if components.next()? != Component::RootDir {
        return None;
    }
    components
        .map(|component| match component {
            Component::Normal(name) => CString::new(name.as_bytes()).ok(),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(path: &Path) -> api::Share {
        api::Share { path: path.to_owned(), read_only: false }
    }

    #[test]
    fn only_the_way_to_a_share_exists() {
        let directory = tempfile::tempdir().unwrap();
        let (tree, failed) = Tree::open(&[share(directory.path())], &Hidden::default());
        assert!(failed.is_empty());
        let names = names(directory.path()).unwrap();
        let mut at = ROOT;
        for name in &names {
            assert_eq!((tree.share(at), tree.children(at).len()), (None, 1));
            assert_eq!(tree.child(at, c"other"), None);
            at = tree.child(at, name).unwrap();
        }
        assert_eq!((tree.share(at), tree.children(at).len()), (Some(0), 0));
    }

    #[test]
    fn a_share_may_be_the_root_and_contain_others() {
        let directory = tempfile::tempdir().unwrap();
        let (tree, _) = Tree::open(&[share(directory.path()), share(Path::new("/"))], &Hidden::default());
        assert_eq!((tree.share(ROOT), tree.shares.len()), (Some(1), 2));
    }

    #[test]
    fn a_directory_with_two_paths_is_one_share_unless_another_lies_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        std::fs::create_dir_all(real.join("inner")).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let find = |tree: &Tree, path: &Path| {
            names(path).unwrap().iter().fold(ROOT, |entry, name| tree.child(entry, name).unwrap())
        };
        let shares = |tree: &Tree| [&real, &link].map(|path| tree.share(find(tree, path)).unwrap());
        let (tree, _) = Tree::open(&[share(&link), share(&real)], &Hidden::default());
        assert_eq!(shares(&tree), [0, 0]);
        let (tree, _) = Tree::open(&[share(&link), share(&real), share(&real.join("inner"))], &Hidden::default());
        assert_eq!(shares(&tree), [1, 0]);
        let (tree, _) =
            Tree::open(&[share(&link), api::Share { path: real.clone(), read_only: true }], &Hidden::default());
        assert_eq!(shares(&tree), [1, 0]);
    }

    #[test]
    fn a_share_that_is_missing_or_not_a_directory_or_relative_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), b"").unwrap();
        let paths = [directory.path().join("none"), directory.path().join("file"), "relative".into(), "/a/../b".into()];
        let (tree, failed) = Tree::open(&paths.map(|path| share(&path)), &Hidden::default());
        assert_eq!((tree.shares.len(), failed.len()), (0, 4));
        assert!(tree.children(ROOT).is_empty());
    }
}
