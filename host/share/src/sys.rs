//! System calls without a safe wrapper.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
};

use rustix::io::{Errno, ReadWriteFlags};
use vm_memory::{VolatileSlice, volatile_memory::PtrGuardMut};

/// The result of a call, or its error.
fn call(result: isize) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| {
        let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Errno::from_raw_os_error(error)
    })
}

/// Offsets of files are signed.
fn signed(offset: u64) -> Result<i64, Errno> {
    i64::try_from(offset).map_err(|_| Errno::INVAL)
}

/// Buffers of guest memory for the kernel, which may change them while the guest does; so they are never references.
fn vectors(parts: &[VolatileSlice<'_>]) -> (Vec<PtrGuardMut>, Vec<libc::iovec>) {
    let guards: Vec<_> = parts.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vector = |guard: &PtrGuardMut| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
    let vectors = guards.iter().map(vector).collect();
    (guards, vectors)
}

/// Reads into guest memory until it is full or the file ends; returns the number of bytes.
pub(crate) fn read_at(file: impl AsFd, parts: &[VolatileSlice<'_>], offset: u64) -> Result<usize, Errno> {
    let (_guards, vectors) = vectors(parts);
    let (fd, offset) = (file.as_fd().as_raw_fd(), signed(offset)?);
    // SAFETY: the buffers are guest memory that stays mapped, and the guards with it, until the call has returned. The
    // number of buffers is at most that of a chain, which is bounded below `UIO_MAXIOV`.
    call(unsafe { libc::preadv(fd, vectors.as_ptr(), vectors.len() as libc::c_int, offset) })
}

/// Writes guest memory to a file, at its end with `RWF_APPEND`; returns the number of bytes.
pub(crate) fn write_at(
    file: impl AsFd,
    parts: &[VolatileSlice<'_>],
    offset: u64,
    flags: ReadWriteFlags,
) -> Result<usize, Errno> {
    let (_guards, vectors) = vectors(parts);
    let (fd, offset, count) = (file.as_fd().as_raw_fd(), signed(offset)?, vectors.len() as libc::c_int);
    let flags = flags.bits().cast_signed();
    // SAFETY: as for `read_at`; the kernel only reads the buffers.
    call(unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags) })
}

/// getxattrat(2), which Linux has since 6.13.
pub(crate) const SYS_GETXATTRAT: libc::c_long = 464;

/// Reads an extended attribute of a name in a directory, without following a link; returns its length.
pub(crate) fn xattr_of_name(
    directory: impl AsFd,
    name: &CStr,
    attribute: &CStr,
    value: &mut [u8],
) -> Result<usize, Errno> {
    /// `struct xattr_args`.
    #[repr(C)]
    struct Arguments {
        value: u64,
        size: u32,
        flags: u32,
    }
    let arguments = Arguments { value: value.as_mut_ptr() as u64, size: value.len() as u32, flags: 0 };
    let (fd, follow) = (directory.as_fd().as_raw_fd(), libc::AT_SYMLINK_NOFOLLOW);
    let size = size_of::<Arguments>();
    // SAFETY: strings that end with a zero, the structure's own size, and in it that of the buffer.
    let result = unsafe {
        libc::syscall(SYS_GETXATTRAT, fd, name.as_ptr(), follow, attribute.as_ptr(), &raw const arguments, size)
    };
    call(result as isize)
}

/// A lock on a file of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostLock {
    /// flock(2): `LOCK_SH`, `LOCK_EX` or `LOCK_UN`.
    Whole(i32),
    /// A range of bytes, of the open file description (fcntl(2), `F_OFD_SETLK`): the kind, the first and the last byte.
    /// Bytes are at most `i64::MAX`.
    Range(i32, u64, u64),
}

/// `struct flock`. Its pid is zero, which locks of descriptions require.
fn range(kind: i32, start: u64, end: u64) -> libc::flock {
    // SAFETY: integers only, which may be zero.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    range.l_start = start.cast_signed();
    // Zero reaches to the end, wherever that is.
    range.l_len = if end >= i64::MAX as u64 { 0 } else { (end - start + 1).cast_signed() };
    range
}

/// Takes, changes or gives up a lock, if that can be done at once.
///
/// # Errors
/// `EAGAIN` if another lock excludes it.
pub(crate) fn try_lock(file: impl AsFd, lock: &HostLock) -> Result<(), Errno> {
    match set_lock(&file, lock, libc::LOCK_NB, libc::F_OFD_SETLK) {
        Err(Errno::ACCESS) => Err(Errno::AGAIN),
        result => result,
    }
}

/// Waits until a lock can be taken, or for a signal.
pub(crate) fn wait_for_lock(file: impl AsFd, lock: &HostLock) -> Result<(), Errno> {
    set_lock(&file, lock, 0, libc::F_OFD_SETLKW)
}

fn set_lock(file: &impl AsFd, lock: &HostLock, flags: i32, command: i32) -> Result<(), Errno> {
    let fd = file.as_fd().as_raw_fd();
    let result = match *lock {
        // SAFETY: integers only.
        HostLock::Whole(operation) => unsafe { libc::flock(fd, operation | flags) },
        HostLock::Range(kind, start, end) => {
            let range = range(kind, start, end);
            // SAFETY: the structure lives until the call has returned.
            unsafe { libc::fcntl(fd, command, &raw const range) }
        }
    };
    call(result as isize).map(drop)
}

/// A lock that excludes one of this kind and range: its first and last byte, its kind, and the process, which is zero or
/// less if it is not known.
pub(crate) fn find_lock(
    file: impl AsFd,
    kind: i32,
    start: u64,
    end: u64,
) -> Result<Option<(u64, u64, i32, i32)>, Errno> {
    let mut range = range(kind, start, end);
    // SAFETY: the structure lives until the call has returned, which fills it.
    call(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut range) } as isize)?;
    let kind = i32::from(range.l_type);
    if kind == libc::F_UNLCK {
        return Ok(None);
    }
    let start = u64::try_from(range.l_start).map_err(|_| Errno::IO)?;
    let len = u64::try_from(range.l_len).map_err(|_| Errno::IO)?;
    let end = if len == 0 { i64::MAX as u64 } else { (start + (len - 1)).min(i64::MAX as u64) };
    Ok(Some((start, end, kind, range.l_pid)))
}

/// Lets a descriptor that is open refer to another file, at once.
pub(crate) fn put(file: impl AsFd, at: RawFd) -> Result<(), Errno> {
    // SAFETY: the callers own the descriptor `at`, and use it for nothing but locks.
    call(unsafe { libc::dup3(file.as_fd().as_raw_fd(), at, libc::O_CLOEXEC) } as isize).map(drop)
}

/// Signal that ends a system call of a thread.
const INTERRUPTION: libc::c_int = libc::SIGUSR1;

extern "C" fn interrupted(_signal: libc::c_int) {}

/// Lets [`interrupt`] end system calls, and do nothing else.
pub(crate) fn let_signals_interrupt() -> io::Result<()> {
    // SAFETY: integers and a null pointer, which may be zero.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = interrupted as *const () as libc::sighandler_t;
    // SAFETY: the handler does nothing. Without `SA_RESTART` the call that it interrupts fails.
    match unsafe { libc::sigaction(INTERRUPTION, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The number of the calling thread.
pub(crate) fn thread() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// Interrupts the system call of a thread of this process.
pub(crate) fn interrupt(thread: i32) {
    // SAFETY: integers only. A thread that is gone makes the call fail.
    unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, INTERRUPTION) };
}
