//! The raw file behind the device.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::AsRawFd,
};

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::VolatileSlice;

use super::{SECTOR, write_zeroes};

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

    /// True if `bytes` are whole sectors, and those from `sector` on lie on the disk.
    pub(super) fn contains(&self, sector: u64, bytes: u64) -> bool {
        bytes.is_multiple_of(SECTOR) && sector.checked_add(bytes / SECTOR).is_some_and(|end| end <= self.sectors)
    }

    /// Reads into guest memory. The range must have been checked with [`Self::contains`].
    pub(super) fn read(&self, sector: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(slices, sector * SECTOR, |iov, offset| {
            // SAFETY: every iovec is a live mapping of guest memory, which any thread may change at any time: it is
            // never the target of a Rust reference, only of this system call.
            unsafe { libc::preadv(self.file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, offset) }
        })
    }

    /// Writes from guest memory. The range must have been checked with [`Self::contains`].
    pub(super) fn write(&self, sector: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(slices, sector * SECTOR, |iov, offset| {
            // SAFETY: as in `read`; the kernel only reads from the mappings.
            unsafe { libc::pwritev(self.file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, offset) }
        })
    }

    /// Commits all completed writes to stable storage.
    pub(super) fn flush(&self) -> io::Result<()> {
        // Sizes and the like need no commit: the file's length never changes.
        self.file.sync_data()
    }

    /// Deallocates a range, which reads as zeroes afterwards.
    pub(super) fn punch_hole(&self, sector: u64, sectors: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, sector, sectors)
    }

    /// Makes a range read as zeroes and keeps it allocated.
    pub(super) fn zero(&self, sector: u64, sectors: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE, sector, sectors)
        {
            // Some file systems, tmpfs among them, cannot.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                write_zeroes(&self.file, sector * SECTOR, sectors * SECTOR)
            }
            other => other,
        }
    }

    fn allocate(&self, mode: FallocateFlags, sector: u64, sectors: u64) -> io::Result<()> {
        // fallocate(2) refuses an empty range, which a guest may ask for.
        if sectors == 0 {
            return Ok(());
        }
        let (offset, len) = ((sector * SECTOR).cast_signed(), (sectors * SECTOR).cast_signed());
        Ok(fallocate(&self.file, mode, offset, len)?)
    }
}

/// Runs a vectored system call until all of `slices` is done.
fn transfer(
    slices: &[VolatileSlice<'_>],
    start: u64,
    mut call: impl FnMut(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<()> {
    // The guards keep the mappings accessible for as long as the iovecs are used.
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut iov: Vec<_> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let mut offset = start;
    let mut first = 0;
    while iov.get(first).is_some() {
        // A guest's segment may cross regions of memory, so there can be more pieces than a call takes.
        let most = iov.len().min(first + libc::UIO_MAXIOV as usize);
        let done = call(&iov[first..most], offset.cast_signed());
        let Ok(mut done) = usize::try_from(done) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        // The file is shorter than at the start: another program truncated it.
        if done == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Continues behind a short transfer, which a signal or a full file system can cause.
        offset += done as u64;
        while let Some(piece) = iov.get_mut(first) {
            if done < piece.iov_len {
                // SAFETY: `done` is less than the piece's length, so the pointer stays inside it.
                piece.iov_base = unsafe { piece.iov_base.byte_add(done) };
                piece.iov_len -= done;
                break;
            }
            done -= piece.iov_len;
            first += 1;
        }
    }
    Ok(())
}
