//! Bulkhead's own files, which may lie in a share and are not the guest's: a container that could write the settings
//! would turn its isolation off, and one that could write the disk would be the VM.
//!
//! They are known by what they are, not by a path: whatever name leads to them, they are not there. The names on the
//! way to them are taken, in the directories that have them now: the guest cannot put something else in a place where
//! Bulkhead looks for its files, by renaming a directory above them, or by replacing a link to them. Both are found
//! when the process starts, before it is confined.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{CStr, CString},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

use rustix::{
    fs::{CWD, Dir, FileType, Mode, OFlags, openat, readlinkat},
    io::Errno,
};

use super::{
    attributes,
    nodes::Key,
    resolve::{self, Directory},
};

/// Symbolic links that are followed on the way to a hidden place, as in path_resolution(7).
const MAX_LINKS: usize = 40;
/// Files of the hidden directories that are known by themselves, and levels of directories in which they are: those of
/// a profile. The start of the VM waits for all of them to be looked at, and a cache can have any number.
const MAX_FILES: usize = 1000;
const MAX_DEPTH: usize = 1;
/// Directories above the root of a share that are looked at.
const MAX_CLIMB: usize = 256;

/// A name on the way to a hidden place.
struct Taken {
    name: CString,
    /// It is the place's own.
    last: bool,
}

/// Hidden places.
#[derive(Default)]
pub(crate) struct Hidden {
    /// Directories and files, without a share.
    files: HashSet<Key>,
    /// Names that are taken, by their directories.
    taken: HashMap<Key, Vec<Taken>>,
}

fn place(directory: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

impl Hidden {
    /// Finds the places at these paths. One that does not exist cannot be made by the guest, either.
    pub(crate) fn find<'p>(paths: impl IntoIterator<Item = &'p Path>) -> Self {
        let mut hidden = Self::default();
        for path in paths {
            // A place on the way that cannot be looked at is out of the guest's reach, too.
            let _ = hidden.add(path);
        }
        hidden
    }

    fn add(&mut self, path: &Path) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = || openat(CWD, c"/", flags, Mode::empty());
        let (mut at, mut links) = (root()?, 0);
        let mut rest: VecDeque<Vec<u8>> = names(path.as_os_str().as_bytes()).collect();
        while let Some(bytes) = rest.pop_front() {
            let name = CString::new(bytes).map_err(|_| Errno::INVAL)?;
            if name.as_c_str() == c".." {
                at = place(&at, c"..")?;
                continue;
            }
            let last = rest.is_empty();
            let directory = attributes::key(0, &resolve::stat(&at)?);
            self.taken.entry(directory).or_default().push(Taken { name: name.clone(), last });
            let found = place(&at, &name)?;
            let stat = resolve::stat(&found)?;
            if attributes::kind(&stat) == libc::S_IFLNK {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                let target = readlinkat(&at, &name, Vec::new())?.into_bytes();
                if target.starts_with(b"/") {
                    at = root()?;
                }
                names(&target).collect::<Vec<_>>().into_iter().rev().for_each(|name| rest.push_front(name));
            } else if last {
                self.files.insert(attributes::key(0, &stat));
                self.add_files(&found, MAX_DEPTH);
            } else {
                at = found;
            }
        }
        Ok(())
    }

    /// Adds the files in a hidden directory, which may have names elsewhere as well.
    fn add_files(&mut self, directory: &OwnedFd, depth: usize) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(listing) = openat(directory, c".", flags, Mode::empty()).and_then(Dir::new) else { return };
        for entry in listing.flatten() {
            if matches!(entry.file_name().to_bytes(), b"." | b"..") || self.files.len() >= MAX_FILES {
                continue;
            }
            let Ok(found) = place(directory, entry.file_name()) else { continue };
            let Ok(stat) = resolve::stat(&found) else { continue };
            match FileType::from_raw_mode(stat.stx_mode.into()) {
                FileType::Directory if depth > 0 => self.add_files(&found, depth - 1),
                FileType::Directory => {}
                _ => drop(self.files.insert(attributes::key(0, &stat))),
            }
        }
    }

    /// True if a file is not the guest's.
    pub(crate) fn contains(&self, key: Key) -> bool {
        !self.files.is_empty() && self.files.contains(&Key { share: 0, ..key })
    }

    /// True if a name in a directory leads, or would lead, to a hidden place.
    pub(crate) fn takes(&self, directory: &Directory, name: &CStr) -> bool {
        self.find_taken(directory.key, name).is_some()
    }

    /// True if a name in a directory is that of a hidden place.
    pub(crate) fn is_place(&self, directory: &Directory, name: &CStr) -> bool {
        self.find_taken(directory.key, name).is_some_and(|taken| taken.last)
    }

    fn find_taken(&self, directory: Key, name: &CStr) -> Option<&Taken> {
        let taken = self.taken.get(&Key { share: 0, ..directory })?;
        // One that is the place itself counts before one that is on the way to another.
        let named = || taken.iter().filter(|taken| taken.name.as_c_str() == name);
        named().find(|taken| taken.last).or_else(|| named().next())
    }

    /// True if a directory is hidden, or lies in one that is.
    pub(crate) fn is_inside(&self, directory: &OwnedFd) -> bool {
        let Ok(mut at) = place(directory, c".") else { return true };
        let mut below = None;
        for _ in 0..MAX_CLIMB {
            let Ok(stat) = resolve::stat(&at) else { return true };
            let key = attributes::key(0, &stat);
            if self.contains(key) {
                return true;
            }
            // The root is its own parent.
            if below == Some(key) {
                return false;
            }
            below = Some(key);
            match place(&at, c"..") {
                Ok(parent) => at = parent,
                Err(_) => return true,
            }
        }
        true
    }
}

/// The names in a path.
fn names(path: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn key(path: &Path) -> Key {
        let fd = openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap();
        attributes::key(7, &resolve::stat(&fd).unwrap())
    }

    #[test]
    fn every_name_on_the_way_is_taken_links_and_what_they_lead_to_included() {
        let place = tempfile::tempdir().unwrap();
        let at = |path: &str| place.path().join(path);
        std::fs::create_dir_all(at("dotfiles/config/own")).unwrap();
        std::fs::write(at("dotfiles/config/own/settings"), b"").unwrap();
        symlink("dotfiles/config", at("config")).unwrap();
        let hidden = Hidden::find([at("config/own").as_path(), &at("missing/data")]);
        let taken = |directory: &str, name| hidden.find_taken(key(&at(directory)), name).map(|taken| taken.last);
        for name in [c"config", c"dotfiles", c"missing"] {
            assert_eq!(taken("", name), Some(false), "{name:?}");
        }
        assert_eq!(taken("dotfiles", c"config"), Some(false));
        assert_eq!((taken("dotfiles/config", c"own"), taken("dotfiles/config", c"other")), (Some(true), None));
        assert!(hidden.contains(key(&at("config/own/"))) && hidden.contains(key(&at("config/own/settings"))));
        assert!(!hidden.contains(key(&at("dotfiles/config"))) && !hidden.contains(key(&at("config"))));
        let open = |path: &str| openat(CWD, at(path), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        assert!(hidden.is_inside(&open("config/own")) && !hidden.is_inside(&open("config")));
    }

    #[test]
    fn files_of_profiles_are_known_and_a_deep_directory_takes_no_time() {
        let place = tempfile::tempdir().unwrap();
        let at = |path: &str| place.path().join(path);
        std::fs::create_dir_all(at("own/profile/deep")).unwrap();
        std::fs::write(at("own/profile/settings"), b"").unwrap();
        for number in 0..100 {
            std::fs::write(at(&format!("own/profile/deep/{number}")), b"").unwrap();
        }
        let hidden = Hidden::find([at("own").as_path()]);
        assert!(hidden.contains(key(&at("own/profile/settings"))));
        assert_eq!(hidden.files.len(), 2, "the directory and the file");
    }

    #[test]
    fn links_in_a_circle_end() {
        let place = tempfile::tempdir().unwrap();
        symlink("b", place.path().join("a")).unwrap();
        symlink("a", place.path().join("b")).unwrap();
        assert!(Hidden::find([place.path().join("a/x").as_path()]).files.is_empty());
    }
}
