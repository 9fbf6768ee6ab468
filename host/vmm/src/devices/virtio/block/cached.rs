//! Transfers that the queue's thread performs by itself, because they only copy to or from the host's page cache. To hand
//! one to an engine costs several times as much as the copy.
//!
//! A call that would wait goes to the engine instead, if the file system can tell (`RWF_NOWAIT`, preadv2(2)). Some cannot
//! for writes, ext4 among them: a write that had to wait, because the host limits dirty pages or its journal commits, sends
//! the writes of the next second to the engine.

use std::{
    io,
    time::{Duration, Instant},
};

use nix::sys::resource::{UsageWho, getrusage};

use super::{
    disk::DiskFile,
    job::{Job, Operation, Progress},
    perform,
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
            let iov = job.iovecs(memory);
            let call = match operation {
                Operation::Read { .. } => now(disk, operation, &iov, &mut self.reads),
                Operation::Write { .. } => self.write(disk, operation, &iov),
                Operation::Sync | Operation::Allocate { .. } => Call::Waits,
            };
            let Call::Ended(result) = call else { return None };
            if job.result(result) == Progress::NoRoom {
                return Some(Progress::NoRoom);
            }
        }
        Some(Progress::Next)
    }

    fn write(&mut self, disk: &DiskFile, operation: Operation, iov: &[libc::iovec]) -> Call {
        let call = now(disk, operation, iov, &mut self.writes);
        let begun = Instant::now();
        if self.writes || self.paused.is_some_and(|until| begun < until) {
            return call;
        }
        let waited = waits();
        let result = perform::perform(disk, operation, iov);
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

/// Performs a transfer if it does not have to wait; clears `supported` if the file system cannot tell.
fn now(disk: &DiskFile, operation: Operation, iov: &[libc::iovec], supported: &mut bool) -> Call {
    if !*supported {
        return Call::Waits;
    }
    match perform::perform_now(disk, operation, iov) {
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
