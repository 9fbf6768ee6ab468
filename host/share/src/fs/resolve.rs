//! Finds the host's file of a node.
//!
//! Nothing of the guest is ever looked up by a path from the host's root. A directory is opened from the root of its
//! share, or from one above it that is open, by names without links (openat2(2): `RESOLVE_BENEATH`,
//! `RESOLVE_NO_SYMLINKS`, `RESOLVE_NO_MAGICLINKS`). A file is a name in a directory. Device, inode number, time of birth
//! and type are compared with those of the node: another file at its place is `ESTALE`, and the guest looks its name up
//! again.

use std::{
    ffi::{CStr, CString},
    sync::Arc,
};

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, ftruncate, openat2, statx},
    io::Errno,
};

use super::{
    Server,
    attributes::{self, STAT},
    handles::File,
    nodes::{Key, Node, Origin, Start},
};

/// Resolution of the guest's names.
pub(crate) const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Longest path for one system call, less than `PATH_MAX`.
const MAX_PATH: usize = 4000;
/// Directories above one that are compared with the root of its share.
const MAX_CLIMB: usize = 256;

/// A directory of the host.
pub(crate) struct Directory {
    pub(crate) number: u64,
    /// Open as a place only.
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) share: usize,
    pub(crate) key: Key,
    /// Entry of the tree of shares, if it is on the way to one.
    pub(crate) entry: Option<usize>,
}

/// A directory that the guest names.
pub(crate) enum Place {
    /// A directory on the way to a share, by its entry of the tree.
    Way(usize),
    Host(Directory),
}

/// A file of the host that a request is about.
pub(crate) struct Target {
    pub(crate) number: u64,
    pub(crate) share: usize,
    pub(crate) stat: Statx,
    pub(crate) place: TargetPlace,
}

/// The ways to reach a file.
pub(crate) enum TargetPlace {
    /// By a name in a directory.
    Name(Arc<OwnedFd>, CString),
    /// It is a directory, open as a place only.
    Directory(Arc<OwnedFd>),
    /// The guest has it open.
    Open(Arc<File>),
}

/// A descriptor to which reads, writes and changes apply.
pub(crate) enum Descriptor {
    New(OwnedFd),
    Open(Arc<File>),
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::New(fd) => fd.as_fd(),
            Self::Open(file) => file.fd.as_fd(),
        }
    }
}

/// Checks a name that the guest gave for something in a directory.
pub(crate) fn check(name: &CStr) -> Result<(), Errno> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        bytes if bytes.len() > 255 => Err(Errno::NAMETOOLONG),
        _ => Ok(()),
    }
}

/// The state of a name in a directory.
pub(crate) fn stat_name(directory: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    // A file system that is mounted on use is not mounted by a look.
    statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, STAT)
}

/// The state of an open file.
pub(crate) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, STAT)
}

/// Opens a name in a directory. Never waits: for the other end of a pipe it would take forever.
pub(crate) fn open_name(directory: impl AsFd, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    openat2(directory, name, flags, mode, BENEATH)
}

fn open_place(directory: impl AsFd, path: &CStr, kind: OFlags) -> Result<OwnedFd, Errno> {
    openat2(directory, path, kind | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), BENEATH)
}

/// Opens a file as a place, to ask for its file system.
pub(crate) fn place_of(directory: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    open_place(directory, name, OFlags::empty())
}

/// Walks along names, in steps that a system call takes.
fn walk(start: &Arc<OwnedFd>, names: &[CString]) -> Result<Arc<OwnedFd>, Errno> {
    let mut at = Arc::clone(start);
    let mut rest = names;
    while !rest.is_empty() {
        let mut path = Vec::new();
        let mut taken = 0;
        for name in rest {
            if taken > 0 && path.len() + name.as_bytes().len() > MAX_PATH {
                break;
            }
            if taken > 0 {
                path.push(b'/');
            }
            path.extend(name.as_bytes());
            taken += 1;
        }
        let path = CString::new(path).map_err(|_| Errno::INVAL)?;
        at = Arc::new(open_place(&*at, &path, OFlags::DIRECTORY)?);
        rest = &rest[taken..];
    }
    Ok(at)
}

impl Server {
    /// The directory of a node.
    pub(crate) fn place(&self, number: u64) -> Result<Place, Errno> {
        let node = self.nodes().get(number)?;
        match node.origin {
            Origin::Way(entry) => Ok(Place::Way(entry)),
            Origin::Host(_) if !node.is_directory() => Err(Errno::NOTDIR),
            Origin::Host(key) => Ok(Place::Host(Directory {
                number,
                fd: self.open_directory(number, key)?,
                share: key.share,
                key,
                entry: node.entry,
            })),
        }
    }

    /// The directory of a node in which something is to be changed.
    pub(crate) fn writable(&self, number: u64) -> Result<Directory, Errno> {
        match self.place(number)? {
            Place::Host(directory) if !self.tree.shares[directory.share].read_only => Ok(directory),
            _ => Err(Errno::ROFS),
        }
    }

    fn open_directory(&self, number: u64, key: Key) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(fd) = self.cache().fresh(number) {
            return Ok(fd);
        }
        let found = self.walk_to(number, key);
        let known = self.cache().stale(number);
        match (found, known) {
            (Ok(fd), _) => {
                self.cache().put(number, Arc::clone(&fd));
                Ok(fd)
            }
            // Renamed on the host. A program that is in it goes on, as it does there, as long as it is in the share.
            (Err(Errno::STALE), Some(fd)) if self.is_inside(&fd, key.share) => {
                self.cache().put(number, Arc::clone(&fd));
                Ok(fd)
            }
            (Err(error), _) => Err(error),
        }
    }

    fn walk_to(&self, number: u64, key: Key) -> Result<Arc<OwnedFd>, Errno> {
        let (start, names) = self.nodes().way(number, |directory| self.cache().fresh(directory))?;
        let start = match start {
            Start::Share(share) => Arc::clone(&self.tree.shares[share].directory),
            Start::Open(fd) => fd,
        };
        let fd = walk(&start, &names).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => Errno::STALE,
            error => error,
        })?;
        if attributes::key(key.share, &stat(&*fd)?) == key { Ok(fd) } else { Err(Errno::STALE) }
    }

    /// True if a directory lies below the root of a share.
    fn is_inside(&self, directory: &Arc<OwnedFd>, share: usize) -> bool {
        let identity = |fd: &OwnedFd| stat(fd).map(|stat| (attributes::device(&stat), stat.stx_ino));
        let mut at = Arc::clone(directory);
        for _ in 0..MAX_CLIMB {
            if identity(&at) == Ok(self.tree.shares[share].identity) {
                return true;
            }
            // Up, where nothing is resolved beneath; the descriptor is only compared.
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match openat2(&*at, c"..", flags, Mode::empty(), ResolveFlags::empty()) {
                Ok(parent) => at = Arc::new(parent),
                Err(_) => return false,
            }
        }
        false
    }

    /// The file of a node, by the handle that the request names if there is one.
    pub(crate) fn target(&self, number: u64, handle: Option<u64>) -> Result<Target, Errno> {
        let node = self.nodes().get(number)?;
        let Origin::Host(key) = node.origin else { return Err(Errno::ROFS) };
        if let Some(file) = handle.and_then(|handle| self.file(handle, number).ok()) {
            return open_target(number, key, file);
        }
        if node.is_directory() {
            let fd = self.open_directory(number, key)?;
            let stat = stat(&*fd)?;
            return Ok(Target { number, share: key.share, stat, place: TargetPlace::Directory(fd) });
        }
        match (self.by_name(number, key), self.handles.any(number)) {
            (Ok(target), _) => Ok(target),
            // Deleted, yet open.
            (Err(_), Some(file)) => open_target(number, key, file),
            (Err(error), None) => Err(error),
        }
    }

    fn by_name(&self, number: u64, key: Key) -> Result<Target, Errno> {
        let names = self.nodes().names(number);
        // An error of the host, such as too many open files, does not mean that the file is gone.
        let mut failed = Errno::STALE;
        for (parent, name) in names {
            let directory = match self.place(parent) {
                Ok(Place::Host(directory)) => directory,
                Err(error) if error != Errno::NOTDIR => {
                    failed = error;
                    continue;
                }
                _ => continue,
            };
            match stat_name(&*directory.fd, &name) {
                Ok(stat) if attributes::key(key.share, &stat) == key => {
                    let place = TargetPlace::Name(directory.fd, name);
                    return Ok(Target { number, share: key.share, stat, place });
                }
                Ok(_) | Err(Errno::NOENT) => self.nodes().remove_name(number, (parent, &name)),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// The file of a node that is to be changed.
    pub(crate) fn writable_target(&self, number: u64, handle: Option<u64>) -> Result<Target, Errno> {
        let target = self.target(number, handle)?;
        if self.tree.shares[target.share].read_only { Err(Errno::ROFS) } else { Ok(target) }
    }

    /// The node of a number, with its host's file if it has one.
    pub(crate) fn node(&self, number: u64) -> Result<Node, Errno> {
        self.nodes().get(number)
    }
}

fn open_target(number: u64, key: Key, file: Arc<File>) -> Result<Target, Errno> {
    let stat = stat(&file.fd)?;
    Ok(Target { number, share: key.share, stat, place: TargetPlace::Open(file) })
}

/// Opens the file of a node, which must be a regular file or a directory.
///
/// A name may have been given to another file since it was looked at, so the descriptor is compared, too.
pub(crate) fn open(target: &Target, flags: OFlags) -> Result<Descriptor, Errno> {
    let (directory, name) = match &target.place {
        TargetPlace::Open(file) => return Ok(Descriptor::Open(Arc::clone(file))),
        TargetPlace::Directory(fd) => (fd, c"."),
        TargetPlace::Name(directory, name) => (directory, name.as_c_str()),
    };
    // Opening a device may have effects, and opening a pipe wakes its other end.
    if !matches!(attributes::kind(&target.stat), libc::S_IFREG | libc::S_IFDIR) {
        return Err(Errno::OPNOTSUPP);
    }
    // Emptied after the comparison: the open would empty whatever file has the name at that moment.
    let fd = open_name(&**directory, name, flags - OFlags::TRUNC, Mode::empty())?;
    let key = |stat: &Statx| attributes::key(target.share, stat);
    if key(&stat(&fd)?) != key(&target.stat) {
        return Err(Errno::STALE);
    }
    if flags.contains(OFlags::TRUNC) {
        match flags & OFlags::RWMODE {
            OFlags::RDONLY => ftruncate(open(target, OFlags::WRONLY)?, 0)?,
            _ => ftruncate(&fd, 0)?,
        }
    }
    Ok(Descriptor::New(fd))
}

/// Opens the file of a node to change what is kept beside its data, for reading if that is allowed.
pub(crate) fn open_for_changes(target: &Target) -> Result<Descriptor, Errno> {
    match open(target, OFlags::RDONLY) {
        Err(Errno::ACCESS) if attributes::kind(&target.stat) == libc::S_IFREG => open(target, OFlags::WRONLY),
        result => result,
    }
}
