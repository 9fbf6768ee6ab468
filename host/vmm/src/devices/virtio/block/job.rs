//! The execution of a request as a sequence of operations on the disk's file, without performing any. An engine asks
//! for the next operation, performs it in its own way, and hands the result back.

use std::io;

use bulkhead_ipc::report::chain;
use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{
    MAX_RANGE_SECTORS, MAX_RANGES, SECTOR,
    disk::{DiskFile, SERIAL},
    request::{Piece, RANGE, Range, Request, UNMAP, take, total},
};
use crate::memory::GuestRam;

const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Zeroes for file systems that can neither zero nor deallocate a range.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// An error in executing a request. The guest sees only the status.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    /// The type or a flag is unknown, or the disk is read-only.
    #[error("unsupported request")]
    Unsupported,
    /// The request violates the specification, or lies outside of the disk.
    #[error("malformed request")]
    Malformed,
    /// The host's file failed.
    #[error("host I/O failed")]
    Io(#[from] io::Error),
}

/// An operation on the disk's file. Offsets and lengths are in bytes, and lie on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Reads into the memory of [`Job::iovecs`].
    Read {
        /// Place in the file.
        offset: u64,
    },
    /// Writes from the memory of [`Job::iovecs`].
    Write {
        /// Place in the file.
        offset: u64,
    },
    /// Commits completed writes to stable storage.
    Sync,
    /// fallocate(2).
    Allocate {
        /// `FALLOC_FL_*`.
        mode: libc::c_int,
        /// Place in the file.
        offset: u64,
        /// Never 0.
        len: u64,
    },
}

/// The state of a job after a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// There is another operation, or the job is done.
    Next,
    /// The host's file system has no room. The same operation may succeed later.
    NoRoom,
}

#[derive(Debug)]
enum Step {
    /// `done` bytes of the data are transferred.
    Read {
        done: u64,
    },
    Write {
        done: u64,
    },
    Sync,
    /// The last of the ranges is under way, `done` bytes of it.
    Ranges {
        left: Vec<Range>,
        way: Way,
        done: u64,
    },
    Done {
        status: u8,
        written: u32,
    },
}

/// The way to treat a range, from the best to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Punch,
    Zero,
    Write,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Job {
    /// The chain's head, by which it is returned.
    pub(super) head: u16,
    /// The host had no room for it once.
    pub(super) waited: bool,
    request: Request,
    /// Each write is committed before it completes: the driver did not negotiate flushes (5.2.6.2).
    write_through: bool,
    step: Step,
}

impl Job {
    /// Checks the request. One that fails is done at once.
    pub(super) fn new(head: u16, request: Request, disk: &DiskFile, memory: &GuestRam, write_through: bool) -> Self {
        let mut job = Self { head, waited: false, request, write_through, step: Step::Sync };
        match job.first(disk, memory) {
            Ok(step) => job.step = step,
            Err(error) => job.fail(&error),
        }
        job
    }

    fn first(&mut self, disk: &DiskFile, memory: &GuestRam) -> Result<Step, RequestError> {
        let check = |request: &Request, bytes| {
            disk.contains(request.sector, bytes).then_some(()).ok_or(RequestError::Malformed)
        };
        match self.request.kind {
            // Reads fill the writable part, whose length is the request's.
            blk::VIRTIO_BLK_T_IN => {
                let bytes = total(&self.request.writable);
                check(&self.request, bytes)?;
                // The length goes into the used ring, with the status.
                u32::try_from(bytes + 1).map_err(|_| RequestError::Malformed)?;
                Ok(if bytes == 0 { done(0) } else { Step::Read { done: 0 } })
            }
            blk::VIRTIO_BLK_T_GET_ID => self.serial(disk, memory),
            // Nothing can have been written to a read-only disk, so it has nothing to commit. The driver may flush it
            // all the same, since the device offers it.
            blk::VIRTIO_BLK_T_FLUSH if disk.readonly() => Ok(done(0)),
            // All types below change the disk, or concern changes. The driver knows from VIRTIO_BLK_F_RO not to use
            // them.
            _ if disk.readonly() => Err(RequestError::Unsupported),
            blk::VIRTIO_BLK_T_OUT => {
                let bytes = total(&self.request.readable);
                check(&self.request, bytes)?;
                Ok(if bytes == 0 { done(0) } else { Step::Write { done: 0 } })
            }
            // Covers all writes that were completed before, as the guest relies on for its journal (5.2.6.2). Those
            // under way beside it need not be covered, so nothing waits for anything.
            blk::VIRTIO_BLK_T_FLUSH => Ok(Step::Sync),
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                let mut left = self.ranges(disk, memory)?;
                // Taken from the end, in the driver's order.
                left.reverse();
                left.retain(|range| range.sectors > 0);
                Ok(self.next_range(left))
            }
            _ => Err(RequestError::Unsupported),
        }
    }

    /// Copies the serial number. A shorter buffer receives the start of it.
    fn serial(&self, disk: &DiskFile, memory: &GuestRam) -> Result<Step, RequestError> {
        let mut at = 0;
        for piece in &self.request.writable {
            let part = &disk.serial()[at..SERIAL.min(at + piece.len)];
            memory.write_slice(part, piece.address).map_err(|_| RequestError::Malformed)?;
            at += part.len();
        }
        Ok(done(at as u32))
    }

    /// Returns all ranges of a DISCARD or WRITE_ZEROES. All are checked before the first of them is changed.
    fn ranges(&self, disk: &DiskFile, memory: &GuestRam) -> Result<Vec<Range>, RequestError> {
        let mut rest = self.request.readable.clone();
        let bytes = total(&rest);
        if bytes == 0 || !bytes.is_multiple_of(RANGE as u64) || bytes / RANGE as u64 > u64::from(MAX_RANGES) {
            return Err(RequestError::Malformed);
        }
        // A discard with the flag is unsupported, and so is a flag that is unknown (5.2.6.2).
        let known = if self.request.kind == blk::VIRTIO_BLK_T_DISCARD { 0 } else { UNMAP };
        (0..bytes / RANGE as u64)
            .map(|_| {
                let raw = take(&mut rest, RANGE, memory).ok_or(RequestError::Malformed)?;
                let range = Range::decode(&raw).ok_or(RequestError::Malformed)?;
                if range.flags & !known != 0 {
                    return Err(RequestError::Unsupported);
                }
                let inside = range.sectors <= MAX_RANGE_SECTORS
                    && disk.contains(range.sector, u64::from(range.sectors) * SECTOR);
                inside.then_some(range).ok_or(RequestError::Malformed)
            })
            .collect()
    }

    fn next_range(&self, left: Vec<Range>) -> Step {
        // A hole reads as zeroes, so it does for both requests; WRITE_ZEROES allows one only with the flag (5.2.6.2).
        let hole = |range: &Range| self.request.kind == blk::VIRTIO_BLK_T_DISCARD || range.flags & UNMAP != 0;
        match left.last() {
            None if self.write_through => Step::Sync,
            None => done(0),
            Some(range) => {
                let way = if hole(range) { Way::Punch } else { Way::Zero };
                Step::Ranges { left, way, done: 0 }
            }
        }
    }

    /// The next operation; `None` when the job is done.
    pub(super) fn operation(&self) -> Option<Operation> {
        let start = self.request.sector.saturating_mul(SECTOR);
        match &self.step {
            Step::Read { done } => Some(Operation::Read { offset: start + done }),
            Step::Write { done } => Some(Operation::Write { offset: start + done }),
            Step::Sync => Some(Operation::Sync),
            Step::Ranges { left, way, done } => {
                let range = left.last()?;
                let (offset, len) = (range.sector * SECTOR, u64::from(range.sectors) * SECTOR);
                Some(match way {
                    Way::Punch => Operation::Allocate { mode: PUNCH, offset, len },
                    Way::Zero => Operation::Allocate { mode: ZERO, offset, len },
                    Way::Write => Operation::Write { offset: offset + done },
                })
            }
            Step::Done { .. } => None,
        }
    }

    /// The memory of a transfer, at most as many parts as one call takes. It is guest memory, which is mapped for as
    /// long as `memory` lives, or zeroes that nobody writes to.
    pub(super) fn iovecs(&self, memory: &GuestRam) -> Vec<libc::iovec> {
        match &self.step {
            Step::Read { done } => gather(&self.request.writable, *done, memory),
            Step::Write { done } => gather(&self.request.readable, *done, memory),
            Step::Ranges { left, way: Way::Write, done } => {
                let bytes = left.last().map_or(0, |range| u64::from(range.sectors) * SECTOR).saturating_sub(*done);
                let len = bytes.min(ZEROES.len() as u64) as usize;
                vec![libc::iovec { iov_base: ZEROES.as_ptr().cast_mut().cast(), iov_len: len }]
            }
            _ => Vec::new(),
        }
    }

    /// Takes the result of the operation: for a transfer the number of bytes.
    pub(super) fn result(&mut self, result: io::Result<u64>) -> Progress {
        let step = std::mem::replace(&mut self.step, Step::Sync);
        let error = match (result, step) {
            // The file is shorter than at the start: another program truncated it.
            (Ok(0), Step::Read { .. } | Step::Write { .. } | Step::Ranges { way: Way::Write, .. }) => {
                io::ErrorKind::UnexpectedEof.into()
            }
            (Ok(bytes), Step::Read { done }) => {
                self.step = self.transferred(done + bytes, total(&self.request.writable), |done| Step::Read { done });
                return Progress::Next;
            }
            (Ok(bytes), Step::Write { done }) => {
                self.step = self.transferred(done + bytes, total(&self.request.readable), |done| Step::Write { done });
                return Progress::Next;
            }
            (Ok(_), Step::Sync) => {
                self.step = done(0);
                return Progress::Next;
            }
            (Ok(bytes), Step::Ranges { mut left, way, done }) => {
                let len = left.last().map_or(0, |range| u64::from(range.sectors) * SECTOR);
                // Only a transfer may be short.
                let done = if way == Way::Write { done + bytes } else { len };
                self.step = if done < len {
                    Step::Ranges { left, way, done }
                } else {
                    left.pop();
                    self.next_range(left)
                };
                return Progress::Next;
            }
            (Ok(_), Step::Done { .. }) => io::ErrorKind::Other.into(),
            (Err(error), step) => match self.retry(&error, step) {
                Some(progress) => return progress,
                None => error,
            },
        };
        self.fail(&RequestError::Io(error));
        Progress::Next
    }

    /// Decides whether an error is the end of the request, and `step` of it goes on in some way.
    fn retry(&mut self, error: &io::Error, step: Step) -> Option<Progress> {
        match (error.raw_os_error()?, step) {
            (libc::EINTR, step) => {
                self.step = step;
                Some(Progress::Next)
            }
            // A failed fdatasync has lost what it should have written, so a second one would tell a lie.
            (libc::ENOSPC | libc::EDQUOT, step @ (Step::Write { .. } | Step::Ranges { .. })) => {
                self.step = step;
                Some(Progress::NoRoom)
            }
            // Without support for holes a DISCARD, which is a hint, has no effect. Some file systems, tmpfs among them,
            // cannot zero a range either.
            (libc::EOPNOTSUPP, Step::Ranges { mut left, way, .. }) => {
                self.step = match way {
                    Way::Punch if self.request.kind == blk::VIRTIO_BLK_T_DISCARD => {
                        left.pop();
                        self.next_range(left)
                    }
                    Way::Punch => Step::Ranges { left, way: Way::Zero, done: 0 },
                    Way::Zero => Step::Ranges { left, way: Way::Write, done: 0 },
                    Way::Write => return None,
                };
                Some(Progress::Next)
            }
            _ => None,
        }
    }

    fn transferred(&self, bytes: u64, all: u64, more: fn(u64) -> Step) -> Step {
        let read = self.request.kind == blk::VIRTIO_BLK_T_IN;
        // Continues behind a short transfer, which a signal or a full file system can cause.
        if bytes < all {
            more(bytes)
        } else if self.write_through && !read {
            Step::Sync
        } else {
            done(if read { bytes as u32 } else { 0 })
        }
    }

    fn fail(&mut self, error: &RequestError) {
        let status = if matches!(error, RequestError::Unsupported) {
            STATUS_UNSUPPORTED
        } else {
            // The guest sees only an I/O error. The cause is in the vmm's log.
            let Request { kind, sector, .. } = self.request;
            tracing::warn!(kind, sector, error = %chain(error), "disk request failed");
            STATUS_ERROR
        };
        self.step = Step::Done { status, written: 0 };
    }

    /// Writes the status and returns the number of bytes written to guest memory, including it.
    pub(super) fn finish(self, memory: &GuestRam) -> u32 {
        let (status, written) = match self.step {
            Step::Done { status, written } => (status, written),
            _ => (STATUS_ERROR, 0),
        };
        memory.write_obj(status, self.request.status).map_or(0, |()| written + 1)
    }
}

fn done(written: u32) -> Step {
    Step::Done { status: STATUS_OK, written }
}

/// Returns the parts of `pieces` behind the first `skip` bytes.
fn gather(pieces: &[Piece], mut skip: u64, memory: &GuestRam) -> Vec<libc::iovec> {
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let passed = skip.min(piece.len as u64);
        skip -= passed;
        let (address, len) = (GuestAddress(piece.address.0 + passed), piece.len - passed as usize);
        // A guest's segment may cross regions of memory, so there can be more pieces than a call takes.
        if len == 0 || parts.len() == libc::UIO_MAXIOV as usize {
            continue;
        }
        // Inside of one region, by construction.
        let Ok(slice) = memory.get_slice(address, len) else { break };
        parts.push(part(&slice));
    }
    parts
}

fn part(slice: &VolatileSlice<'_>) -> libc::iovec {
    let guard = slice.ptr_guard_mut();
    libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }
}
