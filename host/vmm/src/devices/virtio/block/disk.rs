//! The raw file behind the device.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::AsRawFd,
};

use super::{
    SECTOR,
    job::{Job, Operation, Progress},
};
use crate::memory::GuestRam;

/// Length of the serial number in bytes (`VIRTIO_BLK_ID_BYTES`; virtio 1.3, 5.2.6).
pub(super) const SERIAL: usize = 20;

/// A disk: a file of whole sectors.
pub struct DiskFile {
    file: File,
    sectors: u64,
    readonly: bool,
    serial: [u8; SERIAL],
}

impl DiskFile {
    /// Creates a disk over `file`. The size is the offset of its end, which is right for block devices, too.
    pub fn new(mut file: File, readonly: bool, serial: &str) -> io::Result<Self> {
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let mut padded = [0; SERIAL];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self { file, sectors, readonly, serial: padded })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// True if the guest may only read.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    pub(super) fn serial(&self) -> &[u8; SERIAL] {
        &self.serial
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// True if `bytes` are whole sectors, and those from `sector` on lie on the disk.
    pub(super) fn contains(&self, sector: u64, bytes: u64) -> bool {
        bytes.is_multiple_of(SECTOR) && sector.checked_add(bytes / SECTOR).is_some_and(|end| end <= self.sectors)
    }

    /// Performs the job's operations, one after the other, until it is done or the host has no room.
    pub(super) fn run(&self, job: &mut Job, memory: &GuestRam) -> Progress {
        while let Some(operation) = job.operation() {
            let result = self.perform(operation, &job.iovecs(memory));
            if job.result(result) == Progress::NoRoom {
                return Progress::NoRoom;
            }
        }
        Progress::Next
    }

    /// Performs an operation with the memory of [`Job::iovecs`].
    fn perform(&self, operation: Operation, iov: &[libc::iovec]) -> io::Result<u64> {
        let (fd, count) = (self.file.as_raw_fd(), iov.len() as libc::c_int);
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
}
