//! Requests that make something new.
//!
//! The file is the user's own on the host. If its owner, group or mode in the guest are others, it gets a record right
//! after it was made; where the host cannot keep one, it is the user's in the guest, too.

use std::ffi::CStr;

use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, linkat, mkdirat, mknodat, symlinkat, unlinkat},
    io::Errno,
};

use super::{
    Answer, Server, attributes,
    data::{guest_flags, open_flags, writes},
    handles::File,
    nodes::{Node, Origin},
    owners::{self, MODE_BITS, Record},
    record::Wanted,
    resolve::{self, Directory, TargetPlace},
};
use crate::fuse::{
    reply::{Attributes, Body},
    request::Caller,
};

/// Permissions that this process needs for a file, or a directory, to give it a record.
const OWN_FILE: u32 = 0o600;
const OWN_DIRECTORY: u32 = 0o700;

fn mode_of(bits: u32) -> Mode {
    Mode::from_raw_mode(bits)
}

impl Server {
    /// The directory for a new name.
    fn parent(&self, number: u64, name: &CStr) -> Result<Directory, Errno> {
        let directory = self.writable(number)?;
        self.check_not_taken(&directory, name, Errno::EXIST)?;
        Ok(directory)
    }

    /// Owner and mode of a new file in a directory.
    fn wanted(&self, directory: &Directory, mode: u32, caller: Caller, is_directory: bool) -> Result<Wanted, Errno> {
        let stat = resolve::stat(&*directory.fd)?;
        let record = self.record_of_directory(&directory.fd, &stat, Origin::Host(directory.key));
        let parent = self.ids.shown(&stat, record.as_ref());
        let own = self.ids.shown_own();
        let known = |id: u32, own| if id == u32::MAX { own } else { id };
        let mut wanted = Wanted {
            uid: Some(known(caller.uid, own.0)),
            gid: Some(known(caller.gid, own.1)),
            mode: Some(mode & MODE_BITS),
            special: None,
        };
        // A set-group-id directory gives its group, and to directories the bit as well (inode(7)).
        if parent.mode & libc::S_ISGID != 0 {
            wanted.gid = Some(parent.gid);
            if is_directory {
                wanted.mode = Some(mode & MODE_BITS | libc::S_ISGID);
            }
        }
        Ok(wanted)
    }

    /// Gives a new file its record, and returns its state and that; the file stays where the host cannot keep one.
    fn record_new(&self, file: impl AsFd, wanted: &Wanted) -> Result<(Statx, Option<Record>), Errno> {
        match self.set_first_record(&file, wanted) {
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSPC | Errno::DQUOT) if wanted.special.is_none() => {
                let stat = resolve::stat(&file)?;
                let current = u32::from(stat.stx_mode) & MODE_BITS;
                let is_directory = attributes::kind(&stat) == libc::S_IFDIR;
                let host = owners::host_mode(wanted.mode.unwrap_or(current), current, is_directory);
                rustix::fs::fchmod(&file, mode_of(host))?;
                Ok((resolve::stat(&file)?, None))
            }
            result => result,
        }
    }

    /// Takes the identity of a new file from the node that may have it still.
    fn supersede(&self, directory: &Directory, stat: &Statx) {
        self.nodes().supersede(Origin::Host(attributes::key(directory.share, stat)));
    }

    /// The node of a new file, whose state and record are known.
    fn add_new(
        &self,
        directory: &Directory,
        name: &CStr,
        (stat, record): (Statx, Option<Record>),
    ) -> Result<(u64, Attributes), Errno> {
        self.supersede(directory, &stat);
        self.add_with(directory, name, &stat, |_| record)
    }

    /// The node of a new file that has only its name.
    fn add_new_name(&self, directory: &Directory, name: &CStr) -> Result<(u64, Attributes), Errno> {
        let stat = resolve::stat_name(&*directory.fd, name)?;
        self.supersede(directory, &stat);
        self.add(directory, name, &stat)
    }

    /// The node of a name that somebody else gave.
    fn entry(&self, directory: &Directory, name: &CStr) -> Result<(u64, Attributes), Errno> {
        let stat = resolve::stat_name(&*directory.fd, name)?;
        self.add(directory, name, &stat)
    }

    pub(crate) fn create(
        &self,
        parent: u64,
        name: &CStr,
        flags: u32,
        mode: u32,
        caller: Caller,
        kill_privileges: bool,
    ) -> Answer {
        let directory = self.parent(parent, name)?;
        self.handles.check_room()?;
        let wanted = self.wanted(&directory, mode, caller, false)?;
        let passed = open_flags(flags);
        // One descriptor, whatever the mode: it stays open for writing when the file is read-only.
        let new = (passed - OFlags::TRUNC) | OFlags::CREATE | OFlags::EXCL;
        let own = owners::host_mode(mode, 0, false) | OWN_FILE;
        match self.new_file(&directory, name, new, own) {
            Ok(fd) => {
                let new = self.record_new(&fd, &wanted)?;
                let (node, attributes) = self.add_new(&directory, name, new)?;
                self.created(&directory, node, &attributes, fd, flags)
            }
            // Somebody was faster; unless the program insists on a new file, it opens that one.
            Err(Errno::EXIST) if flags & libc::O_EXCL.cast_unsigned() == 0 => {
                let (node, attributes) = self.entry(&directory, name)?;
                let opened = self.reopen(node, passed, kill_privileges);
                match opened {
                    Ok(fd) => self.created(&directory, node, &attributes, fd, flags),
                    Err(error) => {
                        self.nodes().forget(node, 1);
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    fn new_file(&self, directory: &Directory, name: &CStr, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
        self.change_names(&[directory], || resolve::open_name(&*directory.fd, name, flags, mode_of(mode)))
    }

    fn reopen(&self, node: u64, flags: OFlags, kill_privileges: bool) -> Result<OwnedFd, Errno> {
        let target = self.writable_target(node, None)?;
        self.nodes().size_changes(node);
        match self.open_target(&target, flags)? {
            resolve::Descriptor::New(fd) if attributes::kind(&target.stat) == libc::S_IFREG => {
                if kill_privileges && flags.contains(OFlags::TRUNC) {
                    self.kill_privileges(&fd)?;
                }
                Ok(fd)
            }
            _ => Err(Errno::STALE),
        }
    }

    fn created(&self, directory: &Directory, node: u64, attributes: &Attributes, fd: OwnedFd, asked: u32) -> Answer {
        let flags = open_flags(asked);
        let file = File { fd, share: directory.share, writes: writes(flags) };
        match self.handles.add_file(node, file, flags) {
            Ok(handle) => Ok(Body::entry(node, attributes).open(handle, guest_flags(asked)).into()),
            Err(error) => {
                self.nodes().forget(node, 1);
                Err(error)
            }
        }
    }

    pub(crate) fn make_directory(&self, parent: u64, name: &CStr, mode: u32, caller: Caller) -> Answer {
        let directory = self.parent(parent, name)?;
        let wanted = self.wanted(&directory, mode, caller, true)?;
        let own = owners::host_mode(mode, 0, true) | OWN_DIRECTORY;
        self.change_names(&[&directory], || mkdirat(&*directory.fd, name, mode_of(own)))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let new = resolve::open_name(&*directory.fd, name, flags, Mode::empty())?;
        let new = self.record_new(&new, &wanted)?;
        let (node, attributes) = self.add_new(&directory, name, new)?;
        Ok(Body::entry(node, &attributes).into())
    }

    pub(crate) fn make_node(&self, parent: u64, name: &CStr, mode: u32, device: u32, caller: Caller) -> Answer {
        let directory = self.parent(parent, name)?;
        let mut wanted = self.wanted(&directory, mode, caller, false)?;
        let kind = mode & libc::S_IFMT;
        match kind {
            libc::S_IFREG => {}
            libc::S_IFCHR | libc::S_IFBLK => wanted.special = Some((kind, device)),
            // No program of the host reaches the other end of these, which is in the guest's kernel. A real one could
            // not have a record, and its mode could not be changed: many servers do that with their sockets.
            libc::S_IFIFO | libc::S_IFSOCK => wanted.special = Some((kind, 0)),
            _ => return Err(Errno::INVAL),
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let own = owners::host_mode(mode, 0, false) | OWN_FILE;
        let file = self.new_file(&directory, name, flags, own)?;
        let new = match self.record_new(&file, &wanted) {
            Ok(new) => new,
            Err(error) => {
                let _ = unlinkat(&*directory.fd, name, AtFlags::empty());
                // A pipe or socket is a real one, and the user's own, where the host cannot keep records.
                return match kind {
                    libc::S_IFIFO | libc::S_IFSOCK => self.make_real_node(&directory, name, mode),
                    _ => Err(error),
                };
            }
        };
        let (node, attributes) = self.add_new(&directory, name, new)?;
        Ok(Body::entry(node, &attributes).into())
    }

    fn make_real_node(&self, directory: &Directory, name: &CStr, mode: u32) -> Answer {
        let kind = FileType::from_raw_mode(mode);
        let permissions = mode_of(mode & 0o777);
        self.change_names(&[directory], || mknodat(&*directory.fd, name, kind, permissions, 0))?;
        let (node, attributes) = self.add_new_name(directory, name)?;
        Ok(Body::entry(node, &attributes).into())
    }

    pub(crate) fn symlink(&self, parent: u64, name: &CStr, target: &CStr) -> Answer {
        let directory = self.parent(parent, name)?;
        // Only the guest follows it, in its own tree.
        self.change_names(&[&directory], || symlinkat(target, &*directory.fd, name))?;
        let (node, attributes) = self.add_new_name(&directory, name)?;
        Ok(Body::entry(node, &attributes).into())
    }

    /// An open file without a name, in a directory to which it may be linked later.
    pub(crate) fn temporary_file(&self, parent: u64, flags: u32, mode: u32, caller: Caller) -> Answer {
        let directory = self.writable(parent)?;
        self.handles.check_room()?;
        let wanted = self.wanted(&directory, mode, caller, false)?;
        let passed = open_flags(flags) - OFlags::TRUNC;
        if !writes(passed) {
            return Err(Errno::INVAL);
        }
        let own = owners::host_mode(mode, 0, false) | OWN_FILE;
        let keep = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let fd = self.new_file(&directory, c".", passed | keep | OFlags::TMPFILE, own)?;
        let (stat, record) = self.record_new(&fd, &wanted)?;
        let origin = Origin::Host(attributes::key(directory.share, &stat));
        let node = Node { origin, entry: None, record: None };
        let device = self.devices.number(&stat, || resolve::place_of(&*directory.fd, c"."))?;
        let inode = attributes::number(device, stat.stx_ino);
        let attributes = attributes::attributes(inode, &stat, record.as_ref(), self.ids).with_locks(self.locks.on());
        self.supersede(&directory, &stat);
        let number = self.nodes().add(parent, None, node)?;
        self.created(&directory, number, &attributes, fd, flags & !libc::O_TRUNC.cast_unsigned())
    }

    pub(crate) fn link(&self, of: u64, parent: u64, name: &CStr) -> Answer {
        let directory = self.parent(parent, name)?;
        let target = self.writable_target(of, None)?;
        // Two shares are two places to the host, of which the user gives each its own rules.
        if target.share != directory.share {
            return Err(Errno::XDEV);
        }
        self.change_names(&[&directory], || match &target.place {
            TargetPlace::Directory(_) => Err(Errno::PERM),
            // The last component is never followed.
            TargetPlace::Name(from, old) => linkat(&**from, old.as_c_str(), &*directory.fd, name, AtFlags::empty()),
            // A file without a name gets one through the descriptor: linkat(2), `O_TMPFILE` of open(2).
            TargetPlace::Open(file) => {
                let path = format!("/proc/self/fd/{}", file.fd.as_raw_fd());
                linkat(CWD, path, &*directory.fd, name, AtFlags::SYMLINK_FOLLOW)
            }
        })?;
        let stat = resolve::stat_name(&*directory.fd, name)?;
        if attributes::key(target.share, &stat) != attributes::key(target.share, &target.stat) {
            // The name was given to another file meanwhile.
            let _ = unlinkat(&*directory.fd, name, AtFlags::empty());
            return Err(Errno::STALE);
        }
        let (node, attributes) = self.add(&directory, name, &stat)?;
        Ok(Body::entry(node, &attributes).into())
    }
}
