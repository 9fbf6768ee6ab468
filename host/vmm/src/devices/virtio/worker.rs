//! The threads of devices.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A running thread. It is stopped and joined when this is dropped.
pub(crate) struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// The end of a worker's waits when it has to stop.
pub(crate) struct StopSignal(EventFd);

impl Worker {
    /// Starts `body` on a thread of this name, at most 15 bytes (the kernel cuts the rest).
    pub(crate) fn spawn(name: &str, body: impl FnOnce(StopSignal) + Send + 'static) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let watched = StopSignal(stop.try_clone()?);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || body(watched))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Joining is what makes a reset complete: afterwards nothing of the device touches guest memory.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl StopSignal {
    /// Waits until one of `events` is readable and returns its index; `None` when the thread has to end.
    pub(crate) fn wait(&self, events: &[&EventFd]) -> Option<usize> {
        let mut fds: Vec<_> = std::iter::once(&self.0).chain(events.iter().copied()).map(readable).collect();
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
        // The stop event is never reset, and looked at first: kicks cannot delay it.
        let (stop, events) = fds.split_first()?;
        if stop.any() != Some(false) {
            return None;
        }
        events.iter().position(|event| event.any() != Some(false))
    }
}

/// Prepares to wait until an event is readable.
fn readable(event: &EventFd) -> PollFd<'_> {
    // SAFETY: the descriptor belongs to `event`, which is borrowed as long as the result.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    PollFd::new(fd, PollFlags::POLLIN)
}
