//! procfs and sysfs that a container mounts itself get the container's own files, too.
//!
//! The runtime has the kernel hold `mount(2)`, `umount2(2)` and `fsopen(2)` in a container that may use them
//! (seccomp_unotify(2)), and crun sends the descriptor where that is reported to [`SOCKET`], once for each container and
//! each `exec`. Each has a thread here, so that no container waits for another. What is no new procfs or sysfs goes on
//! in the kernel at once.
//!
//! init keeps the descriptors, so that a warden that is started anew goes on with them, and answers what the last one
//! took: the numbers of calls count up, and the last one is kept in a file.
//!
//! Nothing here protects anything. The container can change what its calls point to while they are judged, and then gets
//! the kernel's own files, which it may read.

mod fd_store;
mod mount;
mod mountinfo;
mod path;
mod sys;
mod syscall;
mod worker;

use std::{
    fs::File,
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

use bulkhead_guest_common::{bounded, notify, process::Status};
use rustix::{
    event::{PollFd, PollFlags},
    fs::{Mode, OFlags},
};
use serde::Deserialize;

use self::{
    fd_store::Name,
    sys::{Answer, Notification, ProcessMemory},
    syscall::{Order, Verdict, judge},
};
pub(crate) use self::{mount::main as helper, sys::share_heaps};

/// Where crun brings the descriptors; init listens there, so that it can while no warden runs.
pub const SOCKET: &str = "/run/sysbox-runc/warden/mounts";

/// The environment variable in which init names the descriptors that it kept: `NAME=FD,…`
pub const KEPT_LISTENERS: &str = "BULKHEAD_KEPT_LISTENERS";

/// What the names begin with.
pub const KEPT_PREFIX: &str = "mounts";

/// Containers and `exec` sessions at once; over that many, new ones see the kernel's own files.
const MOST: usize = 2048;

/// Enough for a thread that reads a table of mounts and makes a process.
const STACK: usize = 256 * 1024;

/// Longest table of mounts that is looked at, in bytes.
const MAX_TABLE: u64 = 4 << 20;

/// Takes descriptors on behalf of all containers.
pub(crate) struct Traps {
    state: PathBuf,
    running: AtomicUsize,
}

/// What crun says with a descriptor (`containerProcessState` of the OCI runtime specification).
#[derive(Debug, Deserialize)]
struct Message {
    /// The container's number, which the runtime put there.
    metadata: String,
}

impl Traps {
    /// Goes on with what an earlier warden had and takes new ones on `socket`.
    ///
    /// # Errors
    /// Without threads.
    pub(crate) fn start(socket: UnixListener, state: &Path) -> io::Result<()> {
        let traps = Arc::new(Self { state: state.to_owned(), running: AtomicUsize::new(0) });
        for (name, listener) in fd_store::inherited() {
            fd_store::answer_last(listener.as_fd(), &name, state);
            traps.spawn(Some(name), move |traps| traps.watch(&name, listener));
        }
        thread::Builder::new().name("traps".into()).spawn(move || {
            for stream in socket.incoming() {
                match stream {
                    Ok(stream) => traps.spawn(None, move |traps| traps.take(&stream)),
                    // Out of descriptors, most likely.
                    Err(_) => thread::sleep(Duration::from_millis(100)),
                }
            }
        })?;
        Ok(())
    }

    /// Runs something in a thread of its own.
    fn spawn(self: &Arc<Self>, name: Option<Name>, run: impl FnOnce(&Self) + Send + 'static) {
        let traps = Arc::clone(self);
        let run = move || {
            if traps.running.fetch_add(1, Ordering::Relaxed) == MOST {
                eprintln!("bulkhead-procfs: more than {MOST} containers that may mount");
            }
            run(&traps);
            traps.running.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new().name("trap".into()).stack_size(STACK).spawn(run) {
            eprintln!("bulkhead-procfs: can't serve a container's mounts: {error}");
            // Calls that nobody answers would wait for ever; without the descriptor they fail.
            if let Some(name) = name {
                release(&name);
            }
        }
    }

    /// Waits for a container's descriptor and serves it.
    fn take(&self, stream: &UnixStream) {
        let parse = |message: &[u8]| serde_json::from_slice::<Message>(message).ok();
        let Ok((message, Some(listener))) = sys::receive_descriptor(stream, |text| parse(text).is_some()) else {
            return;
        };
        // Without a number its calls are answered all the same.
        let slot = parse(&message).and_then(|message| message.metadata.parse().ok()).unwrap_or_default();
        let name = Name::new(slot);
        if let Err(error) = notify::store(&name.to_string(), listener.as_fd()) {
            eprintln!("bulkhead-procfs: init can't keep a descriptor: {error}");
        }
        self.watch(&name, listener);
    }

    /// Serves a descriptor until nothing uses it any more.
    fn watch(&self, name: &Name, listener: OwnedFd) {
        let serves = self.running.load(Ordering::Relaxed) <= MOST;
        serve(listener.as_fd(), name, &self.state, serves);
        // First, so that there is a descriptor for the message to init even when it was the last one.
        drop(listener);
        fd_store::forget(name, &self.state);
        release(name);
    }
}

/// Has init close its copy of a descriptor.
fn release(name: &Name) {
    if let Err(error) = notify::remove(&name.to_string()) {
        eprintln!("bulkhead-procfs: can't have init close a descriptor: {error}");
    }
}

/// Answers the calls of one filter until nothing uses it any more.
fn serve(listener: BorrowedFd<'_>, name: &Name, state: &Path, serves: bool) {
    let record = fd_store::Record::open(name, state);
    let mut is_first = true;
    while waits(listener) {
        let notification = match sys::receive(listener) {
            Ok(notification) => notification,
            // Its caller was killed meanwhile, or all of them.
            Err(error) if [Some(libc::ENOENT), Some(libc::EINTR)].contains(&error.raw_os_error()) => continue,
            Err(error) => {
                eprintln!("bulkhead-procfs: can't receive a container's calls: {error}");
                return;
            }
        };
        record.write(notification.id);
        if is_first {
            fd_store::answer_before(listener, notification.id);
            is_first = false;
        }
        // A fault here must not leave the caller waiting.
        let judge = AssertUnwindSafe(|| decide(listener, &notification, name.slot(), state));
        let answer = if serves { catch_unwind(judge).unwrap_or(Answer::Continue) } else { Answer::Continue };
        // One that is gone needs none.
        let _ = sys::answer(listener, notification.id, answer);
    }
}

/// Waits for a call; `false` when there will be none any more.
fn waits(listener: BorrowedFd<'_>) -> bool {
    loop {
        let mut polled = [PollFd::from_borrowed_fd(listener, PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => {}
            ended => return ended.is_ok() && polled[0].revents().contains(PollFlags::IN),
        }
    }
}

/// What a call is to be answered.
fn decide(listener: BorrowedFd<'_>, notification: &Notification, slot: u64, state: &Path) -> Answer {
    let thread = format!("/proc/{}", notification.thread);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(thread) = rustix::fs::open(thread, flags, Mode::empty()) else { return Answer::Continue };
    let open = |name: &str| {
        let file = rustix::fs::openat(&thread, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        file.map(File::from).map_err(io::Error::from)
    };
    let Ok(memory) = open("mem") else { return Answer::Continue };
    let verdict = judge(&notification.call, &ProcessMemory(memory));
    // From here on the directory is that of the thread that waits, and of no later one with its number.
    if !sys::still_waits(listener, notification.id) {
        return Answer::Continue;
    }
    let text = |name: &str| bounded::read(open(name)?, MAX_TABLE);
    let may_mount =
        || text("status").ok().and_then(|text| Status::read(&text)).is_some_and(|status| status.is_administrator());
    let concerns = match &verdict {
        Verdict::Continue => false,
        // A container that has mounted neither has nothing to unmount together with them.
        Verdict::Do(Order::Unmount { .. }) => text("mountinfo").is_ok_and(|text| mountinfo::has_ours(&text)),
        Verdict::Do(Order::Bind { source, .. }) => mount::may_be_whole(&thread, source),
        Verdict::Refuse(_) | Verdict::Do(Order::Mount { .. }) => true,
    };
    match verdict {
        Verdict::Refuse(errno) if concerns && may_mount() => Answer::Failed(errno),
        Verdict::Do(order) if concerns && may_mount() => worker::carry_out(&order, &thread, slot, state),
        // Also what the kernel is going to refuse.
        _ => Answer::Continue,
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
