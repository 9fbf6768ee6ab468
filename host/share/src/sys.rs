//! System calls without a safe wrapper.

use std::{
    ffi::CStr,
    os::fd::{AsFd, AsRawFd},
};

use rustix::io::Errno;
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

/// Writes guest memory to a file, at its end with `append`; returns the number of bytes.
pub(crate) fn write_at(
    file: impl AsFd,
    parts: &[VolatileSlice<'_>],
    offset: u64,
    append: bool,
) -> Result<usize, Errno> {
    let (_guards, vectors) = vectors(parts);
    let (fd, offset, count) = (file.as_fd().as_raw_fd(), signed(offset)?, vectors.len() as libc::c_int);
    let flags = if append { libc::RWF_APPEND } else { 0 };
    // SAFETY: as for `read_at`; the kernel only reads the buffers.
    call(unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags) })
}

/// getxattrat(2), which Linux has since 6.13.
const SYS_GETXATTRAT: libc::c_long = 464;

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
