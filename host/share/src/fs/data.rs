//! Open files: their data goes straight between the host's file and guest memory.

use std::sync::Arc;

use rustix::{
    fs::{FallocateFlags, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek},
    io::{Errno, ReadWriteFlags},
};

use super::{
    Answer, Reply, Server, attributes, done,
    handles::{File, Handle},
    owners::without_privileges,
    record::{self, Wanted},
    resolve::{Descriptor, Target},
};
use crate::{
    buffers::Segments,
    fuse::{
        reply::{self, Body, MAX_WRITE},
        request::{self, Caller, CopyRange, Write},
    },
    sys,
};

/// Longest copy by one request in bytes, so that the queue moves on. Programs ask for the rest.
const MAX_COPY: u64 = 128 << 20;

/// Flags of open(2) that are passed on. Without `O_DIRECT`, whose alignment the guest cannot know: its own cache is
/// bypassed all the same. Without `O_APPEND`, which goes with each write.
pub(crate) fn open_flags(flags: u32) -> OFlags {
    let flags = OFlags::from_bits_retain(flags);
    let passed = OFlags::RWMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    flags & passed
}

/// Flags for the guest's kernel about a file that a program opens with these: one that asks for `O_DIRECT` has its
/// requests sent as they are, several at a time. Without [`reply::DIRECT_IO`] its writes would wait for each other.
pub(crate) fn guest_flags(flags: u32) -> u32 {
    let direct = flags & libc::O_DIRECT.cast_unsigned() != 0;
    if direct { reply::DIRECT_IO | reply::PARALLEL_WRITES } else { 0 }
}

/// Flags for one write. The end of the file is the host's to know: another program may have appended. A write past the
/// guest's cache is not followed by the FSYNC that `RWF_DSYNC` asks for, so it has to be one itself.
pub(crate) fn write_flags(flags: u32) -> ReadWriteFlags {
    // rustix has one name for both `O_SYNC` and `O_DSYNC`, which is a part of it.
    let pairs = [
        (libc::O_APPEND, ReadWriteFlags::APPEND),
        (libc::O_DSYNC, ReadWriteFlags::DSYNC),
        (libc::O_SYNC, ReadWriteFlags::SYNC),
    ];
    let asked = |flag: i32| flags.cast_signed() & flag == flag;
    pairs.into_iter().filter(|(flag, _)| asked(*flag)).map(|(_, flag)| flag).collect()
}

/// True if a file that is opened with these flags can be changed.
pub(crate) fn changes(flags: OFlags) -> bool {
    flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC)
}

/// True if a file is opened for writing.
pub(crate) fn writes(flags: OFlags) -> bool {
    flags & OFlags::RWMODE != OFlags::RDONLY
}

impl Server {
    /// The open file of a handle of a node. One that an earlier process opened is opened again, if it still has a name.
    pub(crate) fn file(&self, handle: u64, number: u64) -> Result<Arc<File>, Errno> {
        let flags = match self.handles.get(handle, number)? {
            Handle::File(file) => return Ok(file),
            Handle::LostFile(flags) => open_flags(flags.bits()),
            // A program that goes on would believe that it has its locks.
            Handle::LostLocks => return Err(Errno::IO),
            Handle::Listing(_) | Handle::LostListing => return Err(Errno::BADF),
        };
        let target = if changes(flags) { self.writable_target(number, None) } else { self.target(number, None) }?;
        if attributes::kind(&target.stat) != libc::S_IFREG {
            return Err(Errno::STALE);
        }
        let Descriptor::New(fd) = self.open_target(&target, flags)? else { return Err(Errno::STALE) };
        let file = File { fd, share: target.share, writes: writes(flags) };
        match self.handles.found(handle, Handle::File(file.into()))? {
            Handle::File(file) => Ok(file),
            _ => Err(Errno::BADF),
        }
    }

    pub(crate) fn open_file(&self, number: u64, asked: u32, kill_privileges: bool, caller: Caller) -> Answer {
        let flags = open_flags(asked);
        self.handles.check_room()?;
        let target = if changes(flags) { self.writable_target(number, None) } else { self.target(number, None) }?;
        if attributes::kind(&target.stat) != libc::S_IFREG || !self.is_plain(&target) {
            return Err(Errno::OPNOTSUPP);
        }
        // The guest keeps attributes for a while, and would read no further than to the end that the file had. It looks
        // the name up and opens the file again (open(2) of Linux does so once).
        if flags.contains(OFlags::TRUNC) {
            self.nodes().size_changes(number);
        } else if self.nodes().has_old_size(number, caller.thread, target.stat.stx_size) {
            return Err(Errno::STALE);
        }
        let fd = match self.open_target(&target, flags)? {
            Descriptor::New(fd) => fd,
            // Deleted, but open: a second descriptor with its own flags cannot be had without a name.
            Descriptor::Open(_) => return Err(Errno::STALE),
        };
        if kill_privileges && flags.contains(OFlags::TRUNC) {
            self.kill_privileges(&fd)?;
        }
        let file = File { fd, share: target.share, writes: writes(flags) };
        let handle = self.handles.add_file(number, file, flags)?;
        // Cached data stays if nothing has changed the file since it was opened before.
        let stamp = attributes::stamp(&target.stat);
        let state = record::settled(stamp).then_some((stamp, target.stat.stx_size));
        let keep = if self.nodes().reopen(number, state) { reply::KEEP_CACHE } else { 0 };
        Ok(Body::default().open(handle, keep | guest_flags(asked)).into())
    }

    /// True if a regular file stands for nothing else.
    fn is_plain(&self, target: &Target) -> bool {
        target.stat.stx_size > 0
            || self.ids.shown(&target.stat, self.record(target).as_ref()).mode & libc::S_IFMT == libc::S_IFREG
    }

    pub(crate) fn read(&self, number: u64, handle: u64, offset: u64, size: u32, to: &Segments<'_>) -> Answer {
        let file = self.file(handle, number)?;
        let size = size.min(MAX_WRITE) as usize;
        let parts = to.part(reply::HEADER, size);
        Ok(Reply::Data(sys::read_at(&file.fd, &parts, offset)?))
    }

    pub(crate) fn write(&self, number: u64, write: &Write, from: &Segments<'_>) -> Answer {
        let file = self.file(write.handle, number)?;
        // Was checked when the file was opened, and is what keeps a read-only share as it is.
        if !file.writes || self.tree.shares[file.share].read_only {
            return Err(Errno::BADF);
        }
        let parts = from.part(request::HEADER + request::WRITE, write.size.min(MAX_WRITE) as usize);
        if write.kill_privileges {
            self.kill_privileges(&file.fd)?;
        }
        let written = sys::write_at(&file.fd, &parts, write.offset, write_flags(write.flags))?;
        self.nodes().size_changes(number);
        Ok(Body::size(written as u32).into())
    }

    /// Clears the bits for changed identity on execution. The host clears those of its own file.
    pub(crate) fn kill_privileges(&self, file: impl rustix::fd::AsFd + Copy) -> Result<(), Errno> {
        let Some(record) = record::of_file(file) else { return Ok(()) };
        let Some(mode) = record.mode.filter(|mode| without_privileges(mode.mode) != mode.mode) else { return Ok(()) };
        let mode = Some(without_privileges(mode.mode) & super::owners::MODE_BITS);
        self.set_record(file, &Wanted { mode, ..Wanted::default() })
    }

    pub(crate) fn sync(&self, number: u64, handle: u64, data_only: bool) -> Answer {
        let file = self.file(handle, number)?;
        if data_only { fdatasync(&file.fd) } else { fsync(&file.fd) }?;
        Ok(done())
    }

    pub(crate) fn allocate(&self, number: u64, handle: u64, offset: u64, length: u64, mode: u32) -> Answer {
        let file = self.file(handle, number)?;
        if !file.writes {
            return Err(Errno::BADF);
        }
        let known = FallocateFlags::KEEP_SIZE
            | FallocateFlags::PUNCH_HOLE
            | FallocateFlags::COLLAPSE_RANGE
            | FallocateFlags::ZERO_RANGE
            | FallocateFlags::INSERT_RANGE;
        let mode = FallocateFlags::from_bits_retain(mode);
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        fallocate(&file.fd, mode, offset, length)?;
        self.nodes().size_changes(number);
        Ok(done())
    }

    pub(crate) fn seek(&self, number: u64, handle: u64, offset: u64, whence: u32) -> Answer {
        let file = self.file(handle, number)?;
        // The others are the guest's own, which knows the size.
        let from = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        Ok(Body::position(seek(&file.fd, from)?).into())
    }

    pub(crate) fn copy_range(&self, number: u64, range: &CopyRange) -> Answer {
        let from = self.file(range.handle, number)?;
        let to = self.file(range.to_handle, range.to_node)?;
        if !to.writes {
            return Err(Errno::BADF);
        }
        if range.flags != 0 {
            return Err(Errno::INVAL);
        }
        let (mut offset, mut to_offset) = (range.offset, range.to_offset);
        let length = range.length.min(MAX_COPY) as usize;
        let copied = copy_file_range(&from.fd, Some(&mut offset), &to.fd, Some(&mut to_offset), length)?;
        self.nodes().size_changes(range.to_node);
        Ok(Body::size(copied as u32).into())
    }
}
