//! Threads that wait for locks, one for each request that waits.
//!
//! A system call that waits for a lock ends by the lock, or by a signal. A signal that comes just before the call would
//! be lost, so each thread waits with a descriptor of its own: who interrupts it first puts a file there that cannot be
//! locked, and sends the signal then. A call that has not begun fails, and one that has is interrupted.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
        mpsc,
    },
    thread,
};

use rustix::io::Errno;

use crate::{
    error::ShareError,
    fs::handles::File,
    fuse::request::Lock,
    sys::{self, HostLock},
};

/// Requests that can wait at a time; each has a thread.
pub(crate) const MAX_WAITING: usize = 64;

/// Bytes of a thread's stack.
const STACK: usize = 64 << 10;

/// The open file whose lock is waited for.
pub(super) enum Held {
    /// An owner's description.
    Owner(Arc<OwnedFd>),
    /// A handle.
    Handle(Arc<File>),
}

impl Held {
    fn fd(&self) -> &OwnedFd {
        match self {
            Self::Owner(fd) => fd,
            Self::Handle(file) => &file.fd,
        }
    }
}

enum Phase {
    /// No thread has begun.
    Queued,
    /// The thread with this index waits; with an error, it was interrupted for that.
    Waiting(usize, Option<Errno>),
    Ended(Result<(), Errno>),
}

/// A request that waits.
pub(crate) struct Wait {
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) lock: Lock,
    queue: usize,
    pub(super) held: Held,
    wanted: HostLock,
    phase: Mutex<Phase>,
}

impl Wait {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The outcome, if there is one.
    pub(crate) fn outcome(&self) -> Option<Result<(), Errno>> {
        match *self.phase() {
            Phase::Ended(outcome) => Some(outcome),
            _ => None,
        }
    }
}

/// Wakes the thread of a queue.
pub(crate) type Wake = Box<dyn Fn() + Send + Sync>;

/// A thread's own descriptor, and its number.
struct Slot {
    fd: OwnedFd,
    thread: AtomicI32,
}

#[derive(Default)]
struct Waits {
    /// All that were not collected yet.
    all: Vec<Arc<Wait>>,
    /// Those that wait for a thread.
    queued: Vec<Arc<Wait>>,
    /// Ids of interrupted requests that were not found: they may be in a queue yet.
    interrupted: VecDeque<u64>,
    threads: usize,
    ended: bool,
}

/// The threads and what they wait for.
pub(crate) struct Pool {
    waits: Mutex<Waits>,
    more: Condvar,
    slots: Mutex<Vec<Arc<Slot>>>,
    /// A file that cannot be locked, for threads that wait for none.
    nothing: Mutex<Option<Arc<OwnedFd>>>,
    wakes: Mutex<HashMap<usize, Wake>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            waits: Mutex::default(),
            more: Condvar::new(),
            slots: Mutex::default(),
            nothing: Mutex::default(),
            wakes: Mutex::default(),
        })
    }

    /// Starts the threads, which first confine themselves. `nothing` is open as a place only (`O_PATH`).
    pub(super) fn start(self: &Arc<Self>, nothing: OwnedFd, confine: fn() -> Result<(), ShareError>) -> io::Result<()> {
        sys::let_signals_interrupt()?;
        let nothing = Arc::new(nothing);
        *locked(&self.nothing) = Some(Arc::clone(&nothing));
        for index in 0..MAX_WAITING {
            let slot = Arc::new(Slot { fd: nothing.try_clone()?, thread: AtomicI32::new(0) });
            locked(&self.slots).push(Arc::clone(&slot));
            let (pool, nothing) = (Arc::clone(self), Arc::clone(&nothing));
            let (confined, result) = mpsc::channel();
            let body = move || {
                slot.thread.store(sys::thread(), Ordering::Release);
                let ready = confine().map_err(|error| io::Error::other(bulkhead_ipc::report::chain(&error)));
                let well = ready.is_ok();
                if confined.send(ready).is_ok() && well {
                    pool.work(index, &slot, &nothing);
                }
            };
            thread::Builder::new().name(format!("lock-{index}")).stack_size(STACK).spawn(body)?;
            result.recv().map_err(io::Error::other)??;
            locked(&self.waits).threads += 1;
        }
        Ok(())
    }

    /// Sets what is called when a request of a queue has ended.
    pub(crate) fn wake_with(&self, queue: usize, wake: Wake) {
        locked(&self.wakes).insert(queue, wake);
    }

    /// Begins to wait.
    ///
    /// # Errors
    /// `ENOLCK` if as many requests wait as can, `EINTR` if this one was interrupted already.
    pub(super) fn wait(
        &self,
        (queue, unique): (usize, u64),
        (node, lock): (u64, Lock),
        held: Held,
        wanted: HostLock,
    ) -> Result<Arc<Wait>, Errno> {
        let mut waits = locked(&self.waits);
        if waits.ended || waits.all.len() >= waits.threads {
            return Err(Errno::NOLCK);
        }
        if waits.interrupted.contains(&unique) {
            waits.interrupted.retain(|other| *other != unique);
            return Err(Errno::INTR);
        }
        let phase = Phase::Queued.into();
        let wait = Arc::new(Wait { unique, node, lock, queue, held, wanted, phase });
        waits.all.push(Arc::clone(&wait));
        waits.queued.push(Arc::clone(&wait));
        self.more.notify_one();
        Ok(wait)
    }

    /// Takes a request off the list; its outcome is known, or is not wanted any more.
    pub(super) fn collect(&self, wait: &Arc<Wait>) {
        locked(&self.waits).all.retain(|other| !Arc::ptr_eq(other, wait));
    }

    /// Ends the waiting of a request with an error, unless it has the lock already.
    pub(crate) fn cancel(&self, wait: &Wait, reason: Errno) {
        let mut phase = wait.phase();
        match *phase {
            Phase::Queued => *phase = Phase::Ended(Err(reason)),
            Phase::Waiting(index, None) => {
                *phase = Phase::Waiting(index, Some(reason));
                let slot = locked(&self.slots).get(index).map(Arc::clone);
                let nothing = locked(&self.nothing).as_ref().map(Arc::clone);
                if let (Some(slot), Some(nothing)) = (slot, nothing) {
                    // Fails only for numbers that are none.
                    let _ = sys::put(&*nothing, slot.fd.as_raw_fd());
                    sys::interrupt(slot.thread.load(Ordering::Acquire));
                }
                return;
            }
            Phase::Waiting(..) | Phase::Ended(_) => return,
        }
        drop(phase);
        self.wake(wait.queue);
    }

    /// Ends the waiting of the request with this id.
    pub(crate) fn interrupt(&self, unique: u64) {
        let mut waits = locked(&self.waits);
        let Some(wait) = waits.all.iter().find(|wait| wait.unique == unique).map(Arc::clone) else {
            waits.interrupted.push_back(unique);
            if waits.interrupted.len() > MAX_WAITING {
                waits.interrupted.pop_front();
            }
            return;
        };
        drop(waits);
        self.cancel(&wait, Errno::INTR);
    }

    /// Ends the waiting of all requests.
    pub(super) fn cancel_all(&self) {
        let all = locked(&self.waits).all.clone();
        for wait in &all {
            self.cancel(wait, Errno::INTR);
        }
    }

    /// Ends the threads.
    pub(super) fn end(&self) {
        locked(&self.waits).ended = true;
        self.cancel_all();
        self.more.notify_all();
    }

    fn wake(&self, queue: usize) {
        if let Some(wake) = locked(&self.wakes).get(&queue) {
            wake();
        }
    }

    fn next(&self) -> Option<Arc<Wait>> {
        let mut waits = locked(&self.waits);
        loop {
            if waits.ended {
                return None;
            }
            if !waits.queued.is_empty() {
                return Some(waits.queued.remove(0));
            }
            waits = self.more.wait(waits).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work(&self, index: usize, slot: &Slot, nothing: &OwnedFd) {
        while let Some(wait) = self.next() {
            {
                let mut phase = wait.phase();
                if !matches!(*phase, Phase::Queued) {
                    continue;
                }
                *phase = match sys::put(wait.held.fd(), slot.fd.as_raw_fd()) {
                    Ok(()) => Phase::Waiting(index, None),
                    Err(error) => Phase::Ended(Err(error)),
                };
            }
            while wait.outcome().is_none() {
                let result = sys::wait_for_lock(&slot.fd, &wait.wanted);
                let mut phase = wait.phase();
                let reason = match *phase {
                    Phase::Waiting(_, reason) => reason,
                    _ => None,
                };
                *phase = match (result, reason) {
                    (Ok(()), _) => Phase::Ended(Ok(())),
                    (Err(_), Some(reason)) => Phase::Ended(Err(reason)),
                    // A signal for the request before.
                    (Err(Errno::INTR), None) => continue,
                    (Err(error), None) => Phase::Ended(Err(error)),
                };
                // While the request cannot be interrupted any more, and the next one not yet.
                let _ = sys::put(nothing, slot.fd.as_raw_fd());
            }
            self.wake(wait.queue);
        }
    }
}
