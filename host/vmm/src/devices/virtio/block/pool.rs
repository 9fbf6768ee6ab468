//! The engine of hosts without io_uring: threads that wait for one operation each. Those that move data are apart from
//! the one that syncs and deallocates, so that a slow disk's flush holds up no read.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    disk::DiskFile,
    job::{Job, Operation, Progress},
    perform,
};
use crate::{devices::virtio::spawn_confined, exit::ExitSignal, memory::GuestRam};

/// Threads that read and write.
const DATA_THREADS: usize = 4;

/// The threads of one disk. They end when this is dropped.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    data: Lane,
    slow: Lane,
    landed: Mutex<Vec<(Job, Progress)>>,
    /// Raised when a job has landed.
    done: EventFd,
}

/// Queue of jobs for the threads of one kind.
struct Lane {
    /// `None` tells the threads to end.
    jobs: Mutex<Option<VecDeque<Job>>>,
    wake: Condvar,
}

impl Pool {
    /// Starts the threads.
    pub(super) fn start(
        disk: &Arc<DiskFile>,
        memory: &Arc<GuestRam>,
        done: EventFd,
        exit: &ExitSignal,
    ) -> io::Result<Self> {
        let lane = || Lane { jobs: Mutex::new(Some(VecDeque::new())), wake: Condvar::new() };
        let shared = Arc::new(Shared { data: lane(), slow: lane(), landed: Mutex::default(), done });
        // From here on dropping the pool ends those threads that did start.
        let mut pool = Self { shared, threads: Vec::new() };
        for index in 0..=DATA_THREADS {
            let (disk, memory, shared) = (Arc::clone(disk), Arc::clone(memory), Arc::clone(&pool.shared));
            let name = if index < DATA_THREADS { "block-data" } else { "block-sync" };
            pool.threads.push(spawn_confined(name, exit, move || {
                shared.serve(if index < DATA_THREADS { &shared.data } else { &shared.slow }, &disk, &memory);
                Ok(())
            })?);
        }
        Ok(pool)
    }

    /// Starts a job.
    pub(super) fn start_job(&self, job: Job) {
        let lane = match job.operation() {
            None => return self.shared.land(job, Progress::Next),
            Some(Operation::Read { .. } | Operation::Write { .. }) => &self.shared.data,
            Some(Operation::Sync | Operation::Allocate { .. }) => &self.shared.slow,
        };
        if let Some(jobs) = &mut *lane.jobs() {
            jobs.push_back(job);
        }
        lane.wake.notify_one();
    }

    /// Takes a job that is done, or has no room.
    pub(super) fn landed(&self) -> Option<(Job, Progress)> {
        self.shared.landed.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

impl Shared {
    fn serve(&self, lane: &Lane, disk: &DiskFile, memory: &GuestRam) {
        while let Some(mut job) = lane.next() {
            let progress = perform::run(disk, &mut job, memory);
            self.land(job, progress);
        }
    }

    fn land(&self, job: Job, progress: Progress) {
        self.landed.lock().unwrap_or_else(PoisonError::into_inner).push((job, progress));
        let _ = self.done.write(1);
    }
}

impl Lane {
    fn next(&self) -> Option<Job> {
        let empty = |jobs: &mut Option<VecDeque<Job>>| jobs.as_ref().is_some_and(VecDeque::is_empty);
        let mut jobs = self.wake.wait_while(self.jobs(), empty).unwrap_or_else(PoisonError::into_inner);
        jobs.as_mut()?.pop_front()
    }

    fn jobs(&self) -> MutexGuard<'_, Option<VecDeque<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for lane in [&self.shared.data, &self.shared.slow] {
            *lane.jobs() = None;
            lane.wake.notify_all();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
