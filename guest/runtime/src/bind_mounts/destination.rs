//! Finds or creates the mount point for a destination in a container's root.
//!
//! The root is an image's, so every link in it may be hostile. The walk follows links one by one and never leaves the
//! root; its result is an open file, not a name.
//!
//! openat2(2) with `RESOLVE_IN_ROOT` confines a lookup in the same way, but it cannot create the missing directories on
//! the way, and those have to be created behind links as well: an image's `/var/run` is often a link to `/run`.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io,
    os::fd::{AsFd, OwnedFd},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Component, Path},
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};

/// The number of links after which the walk gives up, the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The kind of file to create when the last part is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// None: the walk fails.
    Fail,
    Directory,
    /// An empty file.
    File,
}

/// Splits a path into the names to walk, `..` included.
fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

/// Opens `path` inside `root`; missing directories on the way are created unless `missing` is [`Missing::Fail`].
pub(crate) fn open(root: impl AsFd, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
    let root = root.as_fd().try_clone_to_owned()?;
    // The open directories between the root and `here`. `..` goes back on this list: a lookup of `..` in a directory
    // that was moved away meanwhile could leave the root.
    let mut above = Vec::new();
    let mut here = root.try_clone()?;
    let mut names: VecDeque<OsString> = parts(path).collect();
    let mut links = 0;
    while let Some(name) = names.pop_front() {
        if name == ".." {
            // At the root `..` is the root itself, as in a chroot.
            here = above.pop().map_or_else(|| root.try_clone(), Ok)?;
            continue;
        }
        // Only the last name is a file; all before it lead to it.
        let kind = if missing == Missing::File && !names.is_empty() { Missing::Directory } else { missing };
        let next = step(&here, &name, kind)?;
        if FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) != FileType::Symlink {
            above.push(std::mem::replace(&mut here, next));
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        // Read by the descriptor of the link itself, so that the link checked is the link followed.
        let target = rustix::fs::readlinkat(&next, c"", Vec::new())?;
        let target = OsString::from_vec(target.into_bytes());
        // An absolute target is absolute inside the container.
        if target.as_bytes().starts_with(b"/") {
            above.clear();
            here = root.try_clone()?;
        }
        // The target's names come before those that are left. A dangling last link is followed all the same, and the
        // file is created at its target, as crun does.
        for part in parts(Path::new(&target)).rev() {
            names.push_front(part);
        }
    }
    Ok(here)
}

/// Opens one name in a directory without following it, and creates it when it is missing.
fn step(directory: &OwnedFd, name: &OsStr, missing: Missing) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Err(Errno::NOENT) if missing != Missing::Fail => {}
        result => return result.map_err(Into::into),
    }
    if missing == Missing::Directory {
        rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755))?;
    } else {
        // EXCL and NOFOLLOW: a link that appears between the two calls is an error and is not written through.
        let create = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(directory, name, create, Mode::from_raw_mode(0o644))?;
    }
    rustix::fs::openat(directory, name, flags, Mode::empty()).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use proptest::prelude::*;

    use super::*;
    use crate::mount_fd;

    fn open_in(root: &Path, path: &str, missing: Missing) -> io::Result<std::path::PathBuf> {
        open(mount_fd::open_path(root)?, Path::new(path), missing).and_then(mount_fd::path_of)
    }

    #[test]
    fn missing_directories_and_files_are_made() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(open_in(root.path(), "/a/b", Missing::Directory).unwrap(), root.path().join("a/b"));
        assert_eq!(open_in(root.path(), "/a/c/f", Missing::File).unwrap(), root.path().join("a/c/f"));
        assert!(root.path().join("a/c/f").is_file());
        assert!(open_in(root.path(), "/x", Missing::Fail).is_err());
    }

    #[test]
    fn links_stay_inside_of_the_root_even_when_they_dangle() {
        let root = tempfile::tempdir().unwrap();
        symlink("/etc/made", root.path().join("absolute")).unwrap();
        symlink("../../../../etc/made2", root.path().join("relative")).unwrap();
        assert_eq!(open_in(root.path(), "/absolute", Missing::Directory).unwrap(), root.path().join("etc/made"));
        assert_eq!(open_in(root.path(), "/relative/x", Missing::Directory).unwrap(), root.path().join("etc/made2/x"));
        assert!(!Path::new("/etc/made").exists());
    }

    #[test]
    fn a_loop_of_links_ends() {
        let root = tempfile::tempdir().unwrap();
        symlink("b", root.path().join("a")).unwrap();
        symlink("a", root.path().join("b")).unwrap();
        assert!(open_in(root.path(), "/a", Missing::Directory).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn no_tree_of_links_leads_out_of_the_root(
            links in proptest::collection::vec(("[abc]", "(/|\\.\\./){0,3}([abc]|\\.\\.)(/([abc]|\\.\\.)){0,3}"), 0..6),
            path in "(/([abcd]|\\.\\.)){1,5}",
        ) {
            let outer = tempfile::tempdir().unwrap();
            let root = outer.path().join("root");
            fs::create_dir(&root).unwrap();
            for (name, target) in links {
                let _ = symlink(target, root.join(name));
            }
            if let Ok(found) = open_in(&root, &path, Missing::Directory) {
                prop_assert!(found.starts_with(&root), "{}", found.display());
            }
            prop_assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
        }
    }
}
