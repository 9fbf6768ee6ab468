//! The threads of devices.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::mpsc,
    thread::JoinHandle,
    time::Duration,
};

use bulkhead_ipc::sandbox;

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{exit::ExitSignal, threads};

/// A running thread. It is stopped and joined when this is dropped.
pub(crate) struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// The end of a worker's waits when it has to stop.
pub(crate) struct StopSignal(EventFd);

impl Worker {
    /// Starts `body` on a thread of this name, see [`spawn_confined`].
    pub(crate) fn spawn(
        name: &str,
        exit: &ExitSignal,
        body: impl FnOnce(StopSignal) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let watched = StopSignal(stop.try_clone()?);
        let thread = spawn_confined(name, exit, move || body(watched))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

/// Starts `body` on a thread of this name, confined to what a device does with descriptors that are open. An error that
/// it returns ends the machine.
pub(crate) fn spawn_confined(
    name: &str,
    exit: &ExitSignal,
    body: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (report, confined) = mpsc::sync_channel(1);
    let (own_name, mut body) = (name.to_owned(), Some(body));
    let thread = threads::spawn(name, exit.clone(), move || {
        let result = sandbox::confine_vmm_thread();
        let ready = result.is_ok();
        let _ = report.send(result);
        match body.take() {
            Some(body) if ready => body().map_err(|error| threads::failed(&own_name, &error)),
            _ => Ok(()),
        }
    })?;
    // The caller waits, so that a device whose thread is not confined has not started.
    confined.recv().map_err(io::Error::other)?.map_err(io::Error::other)?;
    Ok(thread)
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
    /// Waits until one of `events` is readable or the time is over; false when the thread has to end.
    pub(crate) fn wait(&self, events: &[&EventFd], timeout: Option<Duration>) -> io::Result<bool> {
        let mut fds: Vec<_> = std::iter::once(&self.0).chain(events.iter().copied()).map(readable).collect();
        loop {
            match poll(&mut fds, timeout.map_or(PollTimeout::NONE, |time| time.try_into().unwrap_or(PollTimeout::MAX)))
            {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // The stop event is never reset: kicks cannot delay it.
        Ok(fds.first().is_some_and(|stop| stop.any() == Some(false)))
    }

    /// Waits for an event only, to finish what is under way.
    pub(crate) fn wait_for(event: &EventFd) -> io::Result<()> {
        match poll(&mut [readable(event)], PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Prepares to wait until an event is readable.
fn readable(event: &EventFd) -> PollFd<'_> {
    // SAFETY: the descriptor belongs to `event`, which is borrowed as long as the result.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    PollFd::new(fd, PollFlags::POLLIN)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, thread};

    use super::*;

    #[test]
    fn a_thread_of_a_device_can_wait_but_opens_nothing_and_starts_no_other() {
        let (report, seen) = mpsc::channel();
        let exit = ExitSignal::new().unwrap();
        let worker = Worker::spawn("test", &exit, move |stop| {
            let opened = File::open("/dev/null").map_err(|error| error.raw_os_error());
            let started = thread::Builder::new().spawn(|| ()).is_ok();
            let _ = report.send((opened.err(), started));
            stop.wait(&[], None).map(|_| ())
        });
        assert_eq!(seen.recv().unwrap(), (Some(Some(libc::EPERM)), false));
        drop(worker.unwrap());
    }
}
