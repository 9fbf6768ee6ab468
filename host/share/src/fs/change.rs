//! Requests that change, rename or remove something.

use std::ffi::CStr;

use rustix::{
    fs::{AtFlags, OFlags, RenameFlags, Timespec, Timestamps, ftruncate, futimens, renameat_with, unlinkat},
    io::Errno,
};

use super::{
    Answer, Server, attributes, done,
    nodes::Origin,
    owners::{MODE_BITS, without_privileges},
    record::Wanted,
    resolve::{self, Descriptor, Directory, Target},
};
use crate::fuse::{
    reply::Body,
    request::{Changes, Time},
};

impl Server {
    pub(crate) fn set_attributes(&self, number: u64, changes: &Changes) -> Answer {
        let target = self.writable_target(number, changes.handle)?;
        if let Some(size) = changes.size {
            truncate(self, &target, size)?;
        }
        if changes.mode.is_some() || changes.uid.is_some() || changes.gid.is_some() || changes.kill_privileges {
            self.set_owner_and_mode(&target, changes)?;
        }
        // The last, because each of the others changes times.
        if changes.accessed.is_some() || changes.modified.is_some() {
            set_times(&target, changes)?;
        }
        Ok(Body::attribute(&self.attributes(&self.target(number, changes.handle)?)?).into())
    }

    fn set_owner_and_mode(&self, target: &Target, changes: &Changes) -> Result<(), Errno> {
        let shown = self.ids.shown(&target.stat, self.record(target).as_ref());
        if !matches!(attributes::kind(&target.stat), libc::S_IFREG | libc::S_IFDIR) {
            return self.set_plain(target, changes);
        }
        let mut mode = changes.mode.map(|mode| mode & MODE_BITS);
        if changes.kill_privileges {
            let now = mode.unwrap_or(shown.mode & MODE_BITS);
            mode = Some(without_privileges(now)).filter(|killed| *killed != now).or(mode);
        }
        let wanted = Wanted { uid: changes.uid, gid: changes.gid, mode, special: None };
        let nothing = changes.uid.is_none_or(|uid| uid == shown.uid)
            && changes.gid.is_none_or(|gid| gid == shown.gid)
            && mode.is_none_or(|mode| mode == shown.mode & MODE_BITS);
        if nothing && mode.is_none() {
            return Ok(());
        }
        let file = resolve::open_for_changes(target)?;
        self.set_record(&file, &wanted)
    }

    /// A link, pipe, socket or device of the host: it has no record.
    fn set_plain(&self, target: &Target, changes: &Changes) -> Result<(), Errno> {
        let owner = self.ids.plain_owner(&target.stat);
        let same = changes.uid.is_none_or(|uid| uid == owner.0) && changes.gid.is_none_or(|gid| gid == owner.1);
        let mode = u32::from(target.stat.stx_mode) & MODE_BITS;
        // Nothing depends on the owner of a link. Programs that unpack archives set it and fail if they cannot.
        let is_link = attributes::kind(&target.stat) == libc::S_IFLNK;
        if (same || is_link) && changes.mode.is_none_or(|new| new & MODE_BITS == mode) {
            Ok(())
        } else {
            Err(Errno::PERM)
        }
    }

    pub(crate) fn unlink(&self, parent: u64, name: &CStr) -> Answer {
        self.remove(parent, name, AtFlags::empty())
    }

    pub(crate) fn remove_directory(&self, parent: u64, name: &CStr) -> Answer {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> Answer {
        let directory = self.writable(parent)?;
        self.check_not_taken(&directory, name, Errno::BUSY)?;
        self.change_names(&[&directory], || unlinkat(&*directory.fd, name, flags))?;
        Ok(done())
    }

    pub(crate) fn rename(&self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> Answer {
        let flags = RenameFlags::from_bits_retain(flags);
        // A whiteout is a device, for overlays: the engine has none on a share.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (self.writable(from.0)?, self.writable(to.0)?);
        self.check_not_taken(&old, from.1, Errno::BUSY)?;
        self.check_not_taken(&new, to.1, Errno::BUSY)?;
        if old.share != new.share {
            return Err(Errno::XDEV);
        }
        let moved = [(&old, from.1), (&new, to.1)];
        self.move_names(&[&old, &new], &moved, || renameat_with(&*old.fd, from.1, &*new.fd, to.1, flags))?;
        self.renamed(&new, from, to);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.renamed(&old, to, from);
        }
        Ok(done())
    }

    /// Gives the node that is now in `directory` its new name.
    pub(super) fn renamed(&self, directory: &Directory, from: (u64, &CStr), to: (u64, &CStr)) {
        if let Ok(stat) = resolve::stat_name(&*directory.fd, to.1) {
            let origin = Origin::Host(attributes::key(directory.share, &stat));
            self.nodes().rename(origin, from, to);
        }
    }
}

fn truncate(server: &Server, target: &Target, size: u64) -> Result<(), Errno> {
    if attributes::kind(&target.stat) != libc::S_IFREG {
        return Err(Errno::INVAL);
    }
    match server.open_target(target, OFlags::WRONLY)? {
        // The handle may be one for reading, as that of a deleted file which is truncated by its node.
        Descriptor::Open(file) if !file.writes => Err(Errno::INVAL),
        file => ftruncate(file, size),
    }
}

fn set_times(target: &Target, changes: &Changes) -> Result<(), Errno> {
    let timespec = |time: Option<Time>| match time {
        None => Ok(Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT }),
        Some(Time::Now) => Ok(Timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW }),
        // Larger ones would be the two above.
        Some(Time::At(_, 1_000_000_000..)) => Err(Errno::INVAL),
        Some(Time::At(seconds, nanoseconds)) => Ok(Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() }),
    };
    let times = Timestamps { last_access: timespec(changes.accessed)?, last_modification: timespec(changes.modified)? };
    match resolve::open_for_changes(target) {
        Ok(file) => futimens(file, &times),
        // Links, and pipes and sockets of the host, keep the host's times: no descriptor of them has been judged by
        // Landlock (see `sandbox`).
        Err(Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error),
    }
}
