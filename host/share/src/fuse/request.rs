//! Parses requests. Everything in them is the guest's: each field is read with a bound.

use std::ffi::CStr;

/// Length of `struct fuse_in_header` in bytes.
pub(crate) const HEADER: usize = 40;
/// Length of `struct fuse_write_in` in bytes; the data follows it.
pub(crate) const WRITE: usize = 40;
/// Longest part of a request that is copied out of guest memory, in bytes: everything but the data of a write. The
/// longest is a SETXATTR with a value of 64 KiB.
pub(crate) const MAX_COPY: usize = 128 * 1024;

/// Opcode of a write, the only request that is not copied as a whole.
pub(crate) const OP_WRITE: u32 = 16;

/// `struct fuse_in_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) len: u32,
    pub(crate) opcode: u32,
    /// Id of the request, which the reply repeats.
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) caller: Caller,
    /// Length of the extensions at the end, in units of eight bytes.
    extensions: u16,
}

/// The calling thread and its ids. With id-mapped mounts the kernel sends ids only in requests that create something;
/// others have -1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The thread that made the request.
    pub(crate) thread: u32,
}

/// Attributes to change: `struct fuse_setattr_in` without what is not asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) handle: Option<u64>,
    pub(crate) size: Option<u64>,
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) accessed: Option<Time>,
    pub(crate) modified: Option<Time>,
    /// Clears the bits for changed identity on execution.
    pub(crate) kill_privileges: bool,
}

/// A point in time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Time {
    Now,
    /// Seconds since 1970, nanoseconds.
    At(i64, u32),
}

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation<'a> {
    Init {
        major: u32,
        minor: u32,
        readahead: u32,
        flags: u64,
    },
    Lookup(&'a CStr),
    Forget(u64),
    /// Pairs of node and count, 16 bytes each.
    BatchForget(&'a [u8]),
    GetAttributes {
        handle: Option<u64>,
    },
    SetAttributes(Changes),
    ReadLink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
    },
    MakeNode {
        name: &'a CStr,
        mode: u32,
        device: u32,
    },
    MakeDirectory {
        name: &'a CStr,
        mode: u32,
    },
    Unlink(&'a CStr),
    RemoveDirectory(&'a CStr),
    Rename {
        name: &'a CStr,
        to: u64,
        new: &'a CStr,
        flags: u32,
    },
    Link {
        node: u64,
        name: &'a CStr,
    },
    Open {
        flags: u32,
        kill_privileges: bool,
    },
    Create {
        name: &'a CStr,
        flags: u32,
        mode: u32,
        kill_privileges: bool,
    },
    TemporaryFile {
        flags: u32,
        mode: u32,
    },
    Read {
        handle: u64,
        offset: u64,
        size: u32,
    },
    Write(Write),
    Release {
        handle: u64,
    },
    /// A program closes one of its descriptors: its locks on the file end.
    Flush {
        handle: u64,
        owner: u64,
    },
    GetLock(Lock),
    SetLock {
        lock: Lock,
        /// Waits until the lock can be had.
        wait: bool,
    },
    Sync {
        handle: u64,
        data_only: bool,
    },
    OpenDirectory,
    ReadDirectory {
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    },
    ReleaseDirectory {
        handle: u64,
    },
    SyncDirectory {
        handle: u64,
        data_only: bool,
    },
    Statistics,
    SetXattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
    },
    GetXattr {
        name: &'a CStr,
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr(&'a CStr),
    Allocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Seek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    CopyRange(CopyRange),
    /// Reports from now on when the host's programs cause these events of a node (inotify(7)); none ends that.
    Watch {
        mask: u32,
        /// Of two requests for a node the one with the higher number counts.
        sequence: u64,
    },
    /// Ends the connection.
    Destroy,
    /// A signal has come for the program that made this request. Has no reply.
    Interrupt(u64),
    /// Not supported.
    Unknown,
}

/// A write, whose data is not part of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) handle: u64,
    pub(crate) offset: u64,
    pub(crate) size: u32,
    /// Flags of the open file.
    pub(crate) flags: u32,
    pub(crate) kill_privileges: bool,
}

/// `struct fuse_copy_file_range_in`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyRange {
    pub(crate) handle: u64,
    pub(crate) offset: u64,
    pub(crate) to_node: u64,
    pub(crate) to_handle: u64,
    pub(crate) to_offset: u64,
    pub(crate) length: u64,
    pub(crate) flags: u64,
}

/// A lock: `struct fuse_lk_in`. Nothing of it is checked yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lock {
    pub(crate) handle: u64,
    /// Stands for the owner: a table of descriptors, or an open file.
    pub(crate) owner: u64,
    /// The first and the last byte.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub(crate) kind: u32,
    pub(crate) pid: u32,
    /// `FUSE_LK_FLOCK` for a lock of flock(2).
    pub(crate) flags: u32,
}

/// Fields that have not been read yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.bytes().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_ne_bytes)
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.0 = self.0.get(bytes..)?;
        Some(())
    }

    /// A string with its final zero.
    fn name(&mut self) -> Option<&'a CStr> {
        let name = CStr::from_bytes_until_nul(self.0).ok()?;
        self.0 = &self.0[name.to_bytes_with_nul().len()..];
        Some(name)
    }
}

/// Parses the header.
pub(crate) fn header(bytes: &[u8]) -> Option<Header> {
    let mut fields = Fields(bytes);
    let (len, opcode, unique, node) = (fields.u32()?, fields.u32()?, fields.u64()?, fields.u64()?);
    let caller = Caller { uid: fields.u32()?, gid: fields.u32()?, thread: fields.u32()? };
    let extensions = fields.u16()?;
    fields.skip(2)?;
    Some(Header { len, opcode, unique, node, caller, extensions })
}

/// Parses the operation of the request with this header, which `bytes` starts with; `None` if a part is missing.
pub(crate) fn operation<'a>(header: &Header, bytes: &'a [u8]) -> Option<Operation<'a>> {
    // The data of a write is not here, so `len` may be larger than what was copied.
    let len = if header.opcode == OP_WRITE { HEADER + WRITE } else { header.len as usize };
    // No extension is negotiated. A kernel that sends one all the same loses it, and nothing else.
    let extensions = usize::from(header.extensions) * 8;
    let end = if header.opcode == OP_WRITE { len } else { len.checked_sub(extensions)? };
    let mut body = Fields(bytes.get(HEADER..end)?);
    names(header.opcode, &mut body)
}

/// Operations on names and attributes.
fn names<'a>(opcode: u32, body: &mut Fields<'a>) -> Option<Operation<'a>> {
    Some(match opcode {
        1 => Operation::Lookup(body.name()?),
        2 => Operation::Forget(body.u64()?),
        3 => {
            let (flags, _, handle) = (body.u32()?, body.u32()?, body.u64()?);
            Operation::GetAttributes { handle: (flags & GETATTR_FH != 0).then_some(handle) }
        }
        4 => Operation::SetAttributes(changes(body)?),
        5 => Operation::ReadLink,
        6 => Operation::Symlink { name: body.name()?, target: body.name()? },
        8 => {
            let (mode, device) = (body.u32()?, body.u32()?);
            body.skip(8)?;
            Operation::MakeNode { mode, device, name: body.name()? }
        }
        9 => {
            let mode = body.u32()?;
            body.skip(4)?;
            Operation::MakeDirectory { mode, name: body.name()? }
        }
        10 => Operation::Unlink(body.name()?),
        11 => Operation::RemoveDirectory(body.name()?),
        12 => Operation::Rename { to: body.u64()?, flags: 0, name: body.name()?, new: body.name()? },
        13 => Operation::Link { node: body.u64()?, name: body.name()? },
        35 => {
            let (flags, mode, _, open) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
            Operation::Create { flags, mode, kill_privileges: open & OPEN_KILL != 0, name: body.name()? }
        }
        42 => {
            let count = body.u32()? as usize;
            body.skip(4)?;
            Operation::BatchForget(body.0.get(..count.checked_mul(16)?)?)
        }
        45 => {
            let (to, flags) = (body.u64()?, body.u32()?);
            body.skip(4)?;
            Operation::Rename { to, flags, name: body.name()?, new: body.name()? }
        }
        51 => Operation::TemporaryFile { flags: body.u32()?, mode: body.u32()? },
        _ => return data(opcode, body),
    })
}

/// Operations on open files, extended attributes and the connection.
fn data<'a>(opcode: u32, body: &mut Fields<'a>) -> Option<Operation<'a>> {
    Some(match opcode {
        14 => Operation::Open { flags: body.u32()?, kill_privileges: body.u32()? & OPEN_KILL != 0 },
        15 => Operation::Read { handle: body.u64()?, offset: body.u64()?, size: body.u32()? },
        OP_WRITE => {
            let (handle, offset, size, write) = (body.u64()?, body.u64()?, body.u32()?, body.u32()?);
            body.skip(8)?;
            Operation::Write(Write {
                handle,
                offset,
                size,
                flags: body.u32()?,
                kill_privileges: write & WRITE_KILL != 0,
            })
        }
        17 => Operation::Statistics,
        18 => Operation::Release { handle: body.u64()? },
        20 => Operation::Sync { handle: body.u64()?, data_only: body.u32()? & FSYNC_DATA != 0 },
        21 => {
            let (size, flags) = (body.u32()?, body.u32()?);
            Operation::SetXattr { name: body.name()?, value: body.0.get(..size as usize)?, flags }
        }
        22 => {
            let size = body.u32()?;
            body.skip(4)?;
            Operation::GetXattr { size, name: body.name()? }
        }
        23 => Operation::ListXattr { size: body.u32()? },
        24 => Operation::RemoveXattr(body.name()?),
        25 => {
            let handle = body.u64()?;
            body.skip(8)?;
            Operation::Flush { handle, owner: body.u64()? }
        }
        26 => init(body)?,
        27 => Operation::OpenDirectory,
        28 | 44 => {
            let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
            Operation::ReadDirectory { handle, offset, size, plus: opcode == 44 }
        }
        29 => Operation::ReleaseDirectory { handle: body.u64()? },
        30 => Operation::SyncDirectory { handle: body.u64()?, data_only: body.u32()? & FSYNC_DATA != 0 },
        31 => Operation::GetLock(lock(body)?),
        32 | 33 => Operation::SetLock { lock: lock(body)?, wait: opcode == 33 },
        36 => Operation::Interrupt(body.u64()?),
        38 => Operation::Destroy,
        43 => {
            let (handle, offset, length) = (body.u64()?, body.u64()?, body.u64()?);
            Operation::Allocate { handle, offset, length, mode: body.u32()? }
        }
        46 => Operation::Seek { handle: body.u64()?, offset: body.u64()?, whence: body.u32()? },
        47 => Operation::CopyRange(CopyRange {
            handle: body.u64()?,
            offset: body.u64()?,
            to_node: body.u64()?,
            to_handle: body.u64()?,
            to_offset: body.u64()?,
            length: body.u64()?,
            flags: body.u64()?,
        }),
        super::WATCH => {
            let mask = body.u32()?;
            body.skip(4)?;
            Operation::Watch { mask, sequence: body.u64()? }
        }
        _ => Operation::Unknown,
    })
}

/// `FUSE_GETATTR_FH`.
const GETATTR_FH: u32 = 1;
/// `FUSE_OPEN_KILL_SUIDGID`.
const OPEN_KILL: u32 = 1;
/// `FUSE_WRITE_KILL_SUIDGID`.
const WRITE_KILL: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`.
const FSYNC_DATA: u32 = 1;
/// `FUSE_INIT_EXT`: the upper half of the flags is there.
const INIT_EXT: u32 = 1 << 30;

fn lock(body: &mut Fields<'_>) -> Option<Lock> {
    let (handle, owner, start, end) = (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
    Some(Lock { handle, owner, start, end, kind: body.u32()?, pid: body.u32()?, flags: body.u32()? })
}

fn init<'a>(body: &mut Fields<'a>) -> Option<Operation<'a>> {
    let (major, minor, readahead, flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
    let more = if flags & INIT_EXT == 0 { 0 } else { body.u32()? };
    Some(Operation::Init { major, minor, readahead, flags: u64::from(flags) | u64::from(more) << 32 })
}

/// `struct fuse_setattr_in` with its `FATTR_*` bits.
fn changes(body: &mut Fields<'_>) -> Option<Changes> {
    let valid = body.u32()?;
    body.skip(4)?;
    let (handle, size) = (body.u64()?, body.u64()?);
    body.skip(8)?;
    let seconds = (body.u64()?, body.u64()?, body.u64()?);
    let nanoseconds = (body.u32()?, body.u32()?, body.u32()?);
    let mode = body.u32()?;
    body.skip(4)?;
    let (uid, gid) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    let has = |bit: u32| valid & 1 << bit != 0;
    let time = |bit, now, seconds: u64, nanoseconds| match (has(bit), has(now)) {
        (true, true) => Some(Time::Now),
        (true, false) => Some(Time::At(seconds.cast_signed(), nanoseconds)),
        _ => None,
    };
    Some(Changes {
        mode: has(0).then_some(mode),
        uid: has(1).then_some(uid),
        gid: has(2).then_some(gid),
        size: has(3).then_some(size),
        accessed: time(4, 7, seconds.0, nanoseconds.0),
        modified: time(5, 8, seconds.1, nanoseconds.1),
        handle: has(6).then_some(handle),
        // The time of change, bit 10, is the host's.
        kill_privileges: has(11),
    })
}
