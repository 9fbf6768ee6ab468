//! Emulates mount(2) of procfs and sysfs by seccomp user notification (seccomp_unotify(2)).
//!
//! A procfs or sysfs that a container mounts itself, as an inner engine or `unshare --mount-proc` does, would show the
//! kernel's files. Here it gets the container's own files on top.
//!
//! # A call's path
//!
//! The runtime rewrites the seccomp profile of a container that may mount: the kernel suspends `mount`, `umount2` and
//! `fsopen` until they are answered. crun sends the descriptor on which they arrive to [`SOCKET`], once for each
//! container and once for each `exec`. Each descriptor has a thread of its own, so that no container waits for another.
//!
//! 1. `judge` has a process decode the call out of the caller's memory (`syscall`). Anything but a new procfs or sysfs,
//!    a bind of a whole one and an unmount continues in the kernel at once.
//! 2. `worker` starts a process for the request. `mount` is that process: it opens the container's files, enters the
//!    caller's namespaces, takes its ids and capabilities, mounts, and puts the files on top.
//! 3. The call returns the worker's result. If anything is odd, fails or takes longer than two seconds, the call
//!    continues in the kernel instead.
//!
//! The service itself touches no memory and no path of a container, which could be a FUSE file system of the
//! container's own that never answers. Judges and workers do, and are left behind when they are late. `left_behind`
//! counts them. At its bound a container's `mount` and `fsopen` fail with `EAGAIN`; `umount2` continues in the kernel,
//! since it may be what ends the waiting.
//!
//! `fsopen` of the two file systems fails with `ENOSYS`: programs fall back to `mount`, whose arguments say everything
//! in one call.
//!
//! # Restarts
//!
//! init listens on the socket and keeps the descriptors, so callers wait while no service runs. A new service answers
//! the calls that its predecessor received and never answered: notification ids count up, and `fd_store` keeps the last
//! one in a file.
//!
//! # Trust
//!
//! Nothing here protects anything. A container can change its memory or its directories while a call is judged, and
//! gains by that only the kernel's own files, which it may read. What must hold is the converse: with one exception
//! (`MountedBy::Service`) the worker does nothing that the caller could not do itself.

mod fd_store;
mod judge;
mod left_behind;
mod mount;
mod mountinfo;
mod path;
mod sys;
mod syscall;
mod worker;

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use bulkhead_guest_common::notify;
use rustix::{
    event::{PollFd, PollFlags},
    fs::{Mode, OFlags},
};
use serde::Deserialize;

pub use self::fd_store::{KEPT_LISTENERS, KEPT_PREFIX};
use self::{
    fd_store::ListenerName,
    sys::{Answer, Notification},
    syscall::Decision,
};
pub(crate) use self::{judge::main as judge, left_behind::adopt_orphans, mount::main as worker, sys::share_heaps};

/// The socket to which crun sends the descriptors. init listens on it, so that containers can start while no service
/// runs.
pub const SOCKET: &str = "/run/sysbox-runc/procfs/mounts";

/// Maximum number of containers and `exec` sessions served at once; further ones see the kernel's own files.
const MAX_LISTENERS: usize = 2048;

/// Stack of a serving thread, in bytes; it parses a judgement and spawns processes.
const STACK_SIZE: usize = 256 * 1024;

/// Maximum length of a file in `/proc/TID` that is read, in bytes. The table of mounts is as long as a container makes
/// it.
const MAX_PROC_FILE: u64 = 4 << 20;

/// Receives the descriptors of all containers and serves them.
pub(crate) struct Listener {
    state: PathBuf,
    running: AtomicUsize,
}

/// crun's message with a descriptor (`containerProcessState` of the OCI runtime specification).
#[derive(Debug, Deserialize)]
struct Message {
    /// `listenerMetadata` of the profile, where the runtime puts the container's number.
    metadata: String,
}

impl Listener {
    /// Serves the descriptors that an earlier process stored, and accepts new ones on `socket`.
    ///
    /// # Errors
    /// If the accepting thread cannot be started.
    pub(crate) fn start(socket: UnixListener, state: &Path) -> io::Result<()> {
        let listener = Arc::new(Self { state: state.to_owned(), running: AtomicUsize::new(0) });
        for (name, seccomp_fd) in fd_store::inherited() {
            fd_store::answer_last(seccomp_fd.as_fd(), &name, state);
            listener.spawn(Some(name), move |listener| listener.watch(&name, seccomp_fd));
        }
        thread::Builder::new().name("listener".into()).spawn(move || {
            for stream in socket.incoming() {
                match stream {
                    Ok(stream) => listener.spawn(None, move |listener| listener.take(&stream)),
                    // Most likely out of descriptors. The connection stays in the queue; without a pause this would
                    // spin.
                    Err(_) => thread::sleep(Duration::from_millis(100)),
                }
            }
        })?;
        Ok(())
    }

    /// Runs something in a thread of its own. `name` is that of a stored descriptor which `run` owns.
    fn spawn(self: &Arc<Self>, name: Option<ListenerName>, run: impl FnOnce(&Self) + Send + 'static) {
        let listener = Arc::clone(self);
        let run = move || {
            if listener.running.fetch_add(1, Ordering::Relaxed) == MAX_LISTENERS {
                eprintln!(
                    "bulkhead-procfs: {MAX_LISTENERS} containers and exec sessions may mount already; a procfs or sysfs \
                     that others mount shows the kernel's own files"
                );
            }
            run(&listener);
            listener.running.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new().name("container".into()).stack_size(STACK_SIZE).spawn(run) {
            eprintln!("bulkhead-procfs: cannot serve a container's mounts: {error}");
            // `run` is dropped and its descriptor closed. With init's copy closed as well the kernel fails pending and
            // later calls with ENOSYS; with a copy left they would wait forever.
            if let Some(name) = name {
                release(&name);
            }
        }
    }

    /// Receives a container's descriptor and serves it.
    fn take(&self, stream: &UnixStream) {
        let parse = |message: &[u8]| serde_json::from_slice::<Message>(message).ok();
        let Ok((message, Some(seccomp_fd))) = sys::receive_descriptor(stream, |text| parse(text).is_some()) else {
            return;
        };
        // Metadata that is not a number becomes slot 0, which has no files: calls get the kernel's own result.
        let slot = parse(&message).and_then(|message| message.metadata.parse().ok()).unwrap_or_default();
        let name = ListenerName::new(slot);
        if let Err(error) = notify::store(&name.to_string(), seccomp_fd.as_fd()) {
            // Served all the same. Only a restart would leave this container without an answer.
            eprintln!("bulkhead-procfs: cannot store a container's descriptor with init: {error}");
        }
        self.watch(&name, seccomp_fd);
    }

    /// Serves a descriptor until its filter has no process left, then drops what is kept of it.
    fn watch(&self, name: &ListenerName, seccomp_fd: OwnedFd) {
        let serves = self.running.load(Ordering::Relaxed) <= MAX_LISTENERS;
        serve(seccomp_fd.as_fd(), name, &self.state, serves);
        // Before the message to init, which needs a descriptor: this may be the last one that was free.
        drop(seccomp_fd);
        fd_store::forget(name, &self.state);
        release(name);
    }
}

/// Removes a descriptor from init's store.
fn release(name: &ListenerName) {
    if let Err(error) = notify::remove(&name.to_string()) {
        eprintln!("bulkhead-procfs: cannot remove a container's descriptor from init: {error}");
    }
}

/// Answers the calls of one filter until it has no process left. With `serves` off, all continue in the kernel.
fn serve(seccomp_fd: BorrowedFd<'_>, name: &ListenerName, state: &Path, serves: bool) {
    let record = fd_store::LastCall::open(name, state);
    let mut is_first = true;
    while waits(seccomp_fd) {
        let notification = match sys::receive(seccomp_fd) {
            Ok(notification) => notification,
            // ENOENT: the caller was killed between poll and receive. The next poll tells if it was the last one.
            Err(error) if [Some(libc::ENOENT), Some(libc::EINTR)].contains(&error.raw_os_error()) => continue,
            Err(error) => {
                eprintln!("bulkhead-procfs: cannot receive a container's system calls: {error}");
                return;
            }
        };
        // Before anything that could crash or hang: the next process has to know which call this one took.
        record.write(notification.id);
        if is_first {
            // An earlier process may have taken a call before it could record one.
            fd_store::answer_before(seccomp_fd, notification.id);
            is_first = false;
        }
        // A panic must not leave the caller suspended, nor this container without a thread.
        let judge = AssertUnwindSafe(|| decide(seccomp_fd, &notification, name.slot(), state));
        let answer = if serves { catch_unwind(judge).unwrap_or(Answer::Continue) } else { Answer::Continue };
        // ENOENT: the caller was killed while it waited, and needs no answer.
        let _ = sys::answer(seccomp_fd, notification.id, answer);
    }
}

/// Waits for a call; `false` when there cannot be another one.
fn waits(seccomp_fd: BorrowedFd<'_>) -> bool {
    loop {
        let mut polled = [PollFd::from_borrowed_fd(seccomp_fd, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => {}
            // POLLHUP without POLLIN: the last process with this filter is gone.
            ended => return ended.is_ok() && polled[0].revents().contains(PollFlags::IN),
        }
    }
}

/// Has a call judged and performed, and returns the answer.
fn decide(seccomp_fd: BorrowedFd<'_>, notification: &Notification, slot: u64, state: &Path) -> Answer {
    let call = &notification.call;
    if !syscall::may_concern(call) {
        return Answer::Continue;
    }
    if !left_behind::may_start(slot) {
        return if syscall::is_unmount(call) { Answer::Continue } else { Answer::Failed(libc::EAGAIN) };
    }
    // A directory of procfs stays that of one thread, however often its number is used again.
    let thread = format!("/proc/{}", notification.thread);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(thread) = rustix::fs::open(thread, flags, Mode::empty()) else { return Answer::Continue };
    let decision = judge::ask(call, &thread, slot);
    // The caller may have been killed, and its number given to another process, before the directory was opened. If the
    // call is still pending now, the directory, and what was read of its memory, are the caller's.
    if !sys::still_waits(seccomp_fd, notification.id) {
        return Answer::Continue;
    }
    match decision {
        Decision::Continue => Answer::Continue,
        Decision::Refuse(errno) => Answer::Failed(errno),
        Decision::Perform(request) => worker::perform(&request, &thread, slot, state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_in_what_crun_says() {
        let text = br#"{"ociVersion":"0.2.0","fds":["seccompFd"],"pid":9,"metadata":"17","state":{"id":"x","pid":9}}"#;
        assert_eq!(serde_json::from_slice::<Message>(text).unwrap().metadata, "17");
        assert!(serde_json::from_slice::<Message>(&text[..text.len() - 1]).is_err());
    }
}
