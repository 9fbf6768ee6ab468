//! A device's thread and how it is stopped.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    thread::{self, JoinHandle},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A running thread that ends when it is stopped or dropped.
pub(crate) struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// What a thread waits for.
pub(crate) struct Stop(EventFd);

impl Worker {
    /// Starts `body` on a thread of this name (at most 15 bytes).
    pub(crate) fn spawn(name: &str, body: impl FnOnce(Stop) + Send + 'static) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let watched = Stop(stop.try_clone()?);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || body(watched))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Stop {
    /// Waits until one of `events` is readable; its index, or `None` when the thread shall end.
    pub(crate) fn wait(&self, events: &[&EventFd]) -> Option<usize> {
        let mut fds: Vec<_> =
            std::iter::once(self.0.as_raw_fd()).chain(events.iter().map(|e| e.as_raw_fd())).map(poll_in).collect();
        loop {
            // SAFETY: `fds` is a valid array of its length for the duration of the call.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
            if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return None;
            }
            if ready > 0 {
                break;
            }
        }
        if fds.first().is_some_and(|fd| fd.revents != 0) {
            return None;
        }
        fds.iter().skip(1).position(|fd| fd.revents != 0)
    }
}

fn poll_in(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}
