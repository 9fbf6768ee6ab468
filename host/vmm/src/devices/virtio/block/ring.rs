//! The engine of hosts whose kernel offers io_uring to this user (io_uring(7)): requests overlap in the kernel.
//!
//! The ring is made before the process confines itself, and restricted to four operations on one file, the disk's. A
//! vmm that a guest has taken over can neither make another ring nor change this one, so it gets nothing from the ring
//! that it could not do by system calls.

use std::{io, os::fd::AsRawFd};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::{
    MAX_IN_FLIGHT,
    disk::DiskFile,
    job::{Job, Operation, Progress},
};
use crate::memory::GuestRam;

/// The disk's index among the registered files.
const DISK: types::Fixed = types::Fixed(0);
/// `IOSQE_FIXED_FILE`: an entry names a registered file, not a descriptor.
const FIXED_FILE: u8 = 1;

/// A ring for one disk. It outlives the threads that use it.
pub(super) struct Ring {
    ring: IoUring,
}

/// The requests of one thread in the ring.
pub(super) struct Flights<'r, 'm> {
    ring: &'r mut Ring,
    memory: &'m GuestRam,
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Jobs that left the ring.
    landed: Vec<(Job, Progress)>,
}

struct Flight {
    job: Job,
    /// Read by the kernel until the operation completes.
    iov: Vec<libc::iovec>,
}

impl Ring {
    /// Makes a ring that raises `done` when an operation completes. Fails where the kernel does not offer it.
    pub(super) fn new(disk: &DiskFile, done: &EventFd) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(MAX_IN_FLIGHT as u32)?;
        let submitter = ring.submitter();
        submitter.register_files(&[disk.file().as_raw_fd()])?;
        submitter.register_eventfd(done.as_raw_fd())?;
        let operations = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        let mut rules: Vec<_> = operations.into_iter().map(Restriction::sqe_op).collect();
        rules.push(Restriction::sqe_flags_required(FIXED_FILE));
        submitter.register_restrictions(&mut rules)?;
        submitter.register_enable_rings()?;
        Ok(Self { ring })
    }

    pub(super) fn flights<'r, 'm>(&'r mut self, memory: &'m GuestRam) -> Flights<'r, 'm> {
        let slots = (0..MAX_IN_FLIGHT).map(|_| None).collect();
        Flights { ring: self, memory, slots, free: (0..MAX_IN_FLIGHT).collect(), landed: Vec::new() }
    }
}

impl Flights<'_, '_> {
    /// Starts a job. At most [`MAX_IN_FLIGHT`] may be under way.
    pub(super) fn start(&mut self, job: Job) -> io::Result<()> {
        if job.operation().is_none() {
            self.landed.push((job, Progress::Next));
            return Ok(());
        }
        let slot = self.free.pop().ok_or(io::ErrorKind::QuotaExceeded)?;
        self.slots[slot] = Some(Flight { job, iov: Vec::new() });
        self.push(slot)
    }

    /// Puts the next operation of a job into the ring.
    fn push(&mut self, slot: usize) -> io::Result<()> {
        let Some(flight) = self.slots.get_mut(slot).and_then(Option::as_mut) else { return Ok(()) };
        let Some(operation) = flight.job.operation() else { return Ok(()) };
        flight.iov = flight.job.iovecs(self.memory);
        let entry = entry(operation, &flight.iov).user_data(slot as u64);
        // SAFETY: the list of iovecs stays in the slot until the operation completes, and the memory that it names
        // stays mapped: guest memory outlives this value, which waits for all operations when it is dropped.
        while unsafe { self.ring.ring.submission().push(&entry) }.is_err() {
            self.submit()?;
        }
        Ok(())
    }

    /// Hands what was started to the kernel.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while !self.ring.ring.submission().is_empty() {
            match self.ring.ring.submit() {
                Ok(_) => {}
                // The kernel is short of memory, or completions wait to be taken.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)) => {
                    self.collect()?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes a job that is done, or has no room.
    pub(super) fn landed(&mut self) -> io::Result<Option<(Job, Progress)>> {
        if self.landed.is_empty() {
            self.collect()?;
            // Short transfers and requests of several ranges continue.
            self.submit()?;
        }
        Ok(self.landed.pop())
    }

    fn collect(&mut self) -> io::Result<()> {
        loop {
            let Some(completion) = self.ring.ring.completion().next() else { return Ok(()) };
            let slot = completion.user_data() as usize;
            let Some(flight) = self.slots.get_mut(slot).and_then(Option::as_mut) else { continue };
            let result =
                u64::try_from(completion.result()).map_err(|_| io::Error::from_raw_os_error(-completion.result()));
            let progress = flight.job.result(result);
            if progress == Progress::Next && flight.job.operation().is_some() {
                self.push(slot)?;
            } else if let Some(flight) = self.slots[slot].take() {
                self.free.push(slot);
                self.landed.push((flight.job, progress));
            }
        }
    }

    /// The number of jobs whose memory the kernel may still use.
    fn busy(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Drop for Flights<'_, '_> {
    fn drop(&mut self) {
        // Nothing may touch guest memory afterwards. The worker waits before; this is for its errors.
        while self.busy() > 0 {
            if self.ring.ring.submit_and_wait(1).is_err() || self.collect().is_err() {
                // The memory stays mapped until the process ends, and so must the lists.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
        }
    }
}

fn entry(operation: Operation, iov: &[libc::iovec]) -> squeue::Entry {
    let (parts, count) = (iov.as_ptr(), iov.len() as u32);
    match operation {
        Operation::Read { offset } => opcode::Readv::new(DISK, parts, count).offset(offset).build(),
        Operation::Write { offset } => opcode::Writev::new(DISK, parts, count).offset(offset).build(),
        Operation::Sync => opcode::Fsync::new(DISK).flags(types::FsyncFlags::DATASYNC).build(),
        Operation::Allocate { mode, offset, len } => {
            opcode::Fallocate::new(DISK, len).offset(offset).mode(mode).build()
        }
    }
}
