//! Transfers that the queue's thread performs by itself, because they only copy to or from the host's page cache. To hand
//! one to an engine costs several times as much as the copy.
//!
//! Where the file system can say that a call would wait (`RWF_NOWAIT`, preadv2(2)), such a call goes to the engine
//! instead. Some cannot for writes, ext4 among them. There a write that had to wait, because the host limits dirty pages or
//! its journal commits, sends the writes of the next second to the engine.

use std::{
    io,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use nix::sys::resource::{UsageWho, getrusage};

use super::{
    disk::DiskFile,
    job::{Job, Operation, Progress},
};
use crate::memory::GuestRam;

/// Longest wait that costs less than an engine.
const MAX_WAIT: Duration = Duration::from_millis(2);
/// Time for which writes go to the engine after one that waited.
const PAUSE: Duration = Duration::from_secs(1);

/// The knowledge of the file system under one disk.
pub(super) struct Cached {
    /// Cleared when the file system refuses the flag.
    reads: bool,
    writes: bool,
    /// Until then no write is performed here that could wait.
    paused: Option<Instant>,
}

/// The outcome of a call.
enum Call {
    Ended(io::Result<u64>),
    /// It would have to wait.
    Waits,
}

impl Cached {
    pub(super) fn new() -> Self {
        Self { reads: true, writes: true, paused: None }
    }

    /// Performs the transfers of a job; `None` if an engine has to go on with it.
    pub(super) fn perform(&mut self, disk: &DiskFile, job: &mut Job, memory: &GuestRam) -> Option<Progress> {
        while let Some(operation) = job.operation() {
            let call = match operation {
                Operation::Read { offset } => self.read(disk, &job.iovecs(memory), offset),
                Operation::Write { offset } => self.write(disk, &job.iovecs(memory), offset),
                Operation::Sync | Operation::Allocate { .. } => Call::Waits,
            };
            let Call::Ended(result) = call else { return None };
            if job.result(result) == Progress::NoRoom {
                return Some(Progress::NoRoom);
            }
        }
        Some(Progress::Next)
    }

    fn read(&mut self, disk: &DiskFile, iov: &[libc::iovec], offset: u64) -> Call {
        if !self.reads {
            return Call::Waits;
        }
        let (fd, count) = (disk.file().as_raw_fd(), iov.len() as libc::c_int);
        // SAFETY: see `perform::perform`; the same memory, for the time of this call.
        let read = unsafe { libc::preadv2(fd, iov.as_ptr(), count, offset.cast_signed(), libc::RWF_NOWAIT) };
        outcome(read, &mut self.reads)
    }

    fn write(&mut self, disk: &DiskFile, iov: &[libc::iovec], offset: u64) -> Call {
        let (fd, count) = (disk.file().as_raw_fd(), iov.len() as libc::c_int);
        if self.writes {
            // SAFETY: see `perform::perform`; the same memory, for the time of this call.
            let written = unsafe { libc::pwritev2(fd, iov.as_ptr(), count, offset.cast_signed(), libc::RWF_NOWAIT) };
            let call = outcome(written, &mut self.writes);
            if self.writes {
                return call;
            }
        }
        let begun = Instant::now();
        if self.paused.is_some_and(|until| begun < until) {
            return Call::Waits;
        }
        let waited = waits();
        // SAFETY: as above.
        let written = unsafe { libc::pwritev(fd, iov.as_ptr(), count, offset.cast_signed()) };
        let result = checked(written);
        let ended = Instant::now();
        // On a busy machine a call may also take long because other threads run.
        self.paused = (ended - begun > MAX_WAIT && waits() != waited).then_some(ended + PAUSE);
        Call::Ended(result)
    }
}

/// The number of times that this thread has waited for something.
fn waits() -> libc::c_long {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

fn checked(count: isize) -> io::Result<u64> {
    u64::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// The outcome of a call with `RWF_NOWAIT`; clears `supported` if the file system does not know the flag.
fn outcome(count: isize, supported: &mut bool) -> Call {
    match checked(count) {
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) => Call::Waits,
            // Also from the filter of a container that does not know the call.
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPERM | libc::EINVAL) => {
                *supported = false;
                Call::Waits
            }
            _ => Call::Ended(Err(error)),
        },
        Ok(count) => Call::Ended(Ok(count)),
    }
}
