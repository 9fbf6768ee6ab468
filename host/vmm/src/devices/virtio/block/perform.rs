//! The operations of a job, performed by the thread that calls.

use std::{io, os::fd::AsRawFd};

use super::{
    disk::DiskFile,
    job::{Job, Operation, Progress},
};
use crate::memory::GuestRam;

/// Performs the job's operations, one after the other, until it is done or the host has no room.
pub(super) fn run(disk: &DiskFile, job: &mut Job, memory: &GuestRam) -> Progress {
    while let Some(operation) = job.operation() {
        let result = perform(disk, operation, &job.iovecs(memory));
        if job.result(result) == Progress::NoRoom {
            return Progress::NoRoom;
        }
    }
    Progress::Next
}

/// Performs a transfer with the memory of [`Job::iovecs`], unless it would have to wait (`RWF_NOWAIT`, preadv2(2)): then
/// the error is `EAGAIN`. File systems that cannot tell have errors of other kinds, and so have other operations.
pub(super) fn perform_now(disk: &DiskFile, operation: Operation, iov: &[libc::iovec]) -> io::Result<u64> {
    let (fd, count, flags) = (disk.file().as_raw_fd(), iov.len() as libc::c_int, libc::RWF_NOWAIT);
    // SAFETY: as in `perform`.
    let result = unsafe {
        match operation {
            Operation::Read { offset } => libc::preadv2(fd, iov.as_ptr(), count, offset.cast_signed(), flags),
            Operation::Write { offset } => libc::pwritev2(fd, iov.as_ptr(), count, offset.cast_signed(), flags),
            Operation::Sync | Operation::Allocate { .. } => return Err(io::ErrorKind::Unsupported.into()),
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Performs an operation with the memory of [`Job::iovecs`].
pub(super) fn perform(disk: &DiskFile, operation: Operation, iov: &[libc::iovec]) -> io::Result<u64> {
    let (fd, count) = (disk.file().as_raw_fd(), iov.len() as libc::c_int);
    // SAFETY: every iovec is a live mapping of guest memory, which any thread may change at any time: it is never the
    // target of a Rust reference, only of these calls. Zeroes of this program are only read. The other calls take
    // integers.
    let result = unsafe {
        match operation {
            Operation::Read { offset } => libc::preadv(fd, iov.as_ptr(), count, offset.cast_signed()),
            Operation::Write { offset } => libc::pwritev(fd, iov.as_ptr(), count, offset.cast_signed()),
            // Sizes and the like need no commit: the file's length never changes.
            Operation::Sync => libc::fdatasync(fd) as isize,
            Operation::Allocate { mode, offset, len } => {
                libc::fallocate(fd, mode, offset.cast_signed(), len.cast_signed()) as isize
            }
        }
    };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}
