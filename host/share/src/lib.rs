//! Host files for the guest: `bulkhead share-server`, the vhost-user backend of the VM's virtio-fs device (virtio 1.3,
//! 5.11).
//!
//! The guest sees the host's tree of directories, in which only the way to the shares exists: a share of `/home/me`
//! appears as `/home/me`. Files are opened with the rights of the user who runs the VM, and the guest's kernel checks
//! its processes' permissions by the attributes that it gets from here.
//!
//! # Parts
//!
//! | Layer         | Files                                                                                        |
//! |---------------|----------------------------------------------------------------------------------------------|
//! | Process       | `api` (commands of the backend), `event_loop`, `error`                                       |
//! | Virtio device | `vhost` (setup by the vmm), `worker` (a thread for each queue), `buffers` (one request)      |
//! | Protocol      | `fuse/request` (parses), `fuse/reply` (builds)                                               |
//! | Shares        | `fs/tree` (their paths), `fs/nodes` (what the guest knows), `fs/resolve`, `fs/cache`         |
//! | Crashes       | `fs/state` (what outlives a process), `fs/recovery` (nodes), `fs/replay` (requests)          |
//! | Requests      | `fs/lookup`, `fs/list`, `fs/create`, `fs/change`, `fs/data`, `fs/xattr`; `fs/handles`        |
//! | Locks         | `fs/locks` (owners, threads that wait), `parked` (requests that wait)                        |
//! | Attributes    | `fs/attributes` (inode numbers, times), `fs/owners` and `fs/record` (owners of the guest),   |
//! |               | `fs/working_directory` (names for calls that take a path)                                    |
//! | Events        | `fs/watch` (of which nodes, and what requests cause), `events` (inotify, notification queue) |
//!
//! # Staying inside
//!
//! Nothing that the guest names is resolved by the host as a path. See `fs/resolve` for the way from a node to its
//! file, which never follows a link. Beyond it, the process is confined to the shares by Landlock, and by a filter
//! without the system calls that Landlock does not cover. Bulkhead's own files are not there, in whatever share they
//! are: `fs/hidden`.
//!
//! # Coherence
//!
//! Programs of the host and of the guest may change the same files. The guest keeps names and attributes for one second
//! and drops cached data when a file's time or size has changed, and each time that it opens a file. A kernel that asks
//! for it gets an event of each change at once (`events`). A program that opens a file whose size is not the one that the
//! guest was given looks its name up again first (`ESTALE`, which the kernel hides), so that it reads all of it. Its
//! writes are never held back. Locks hold between the guest's programs, and against the host's if the user wants that
//! (`fs/locks`).
//!
//! # Limits
//!
//! Two million nodes, and as many open files as the hard limit of descriptors allows. Owners of locks, ranges and waiting
//! requests have limits in `fs/locks`.
//!
//! # Crashes
//!
//! A process that the backend starts again goes on with the same connection. It finds the nodes and open files of its
//! predecessor in memory that the backend keeps, looks them up again when they are used, and is given the requests that
//! were not answered once more. A file that had no name any more is lost: `ESTALE`. Locks on the host end with a process:
//! what was open while there were some is lost, too (`EIO`).

pub mod api;
mod buffers;
mod error;
mod event_loop;
mod events;
mod fs;
mod fuse;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod parked;
mod sys;
#[cfg(test)]
mod tests;
mod vhost;
mod worker;

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    process::ExitCode,
    sync::Arc,
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::SockType,
    stat::{Mode, umask},
};

use bulkhead_ipc::{inherited, report::chain, sandbox};

use api::Command;
use error::{ShareError, cannot};
use fs::{Server, State};
use vhost::Device;
use worker::Worker;

/// Tag of the device, by which the guest mounts it.
pub const TAG: &str = "bulkhead";

/// Number of request queues.
pub const REQUEST_QUEUES: usize = 4;

/// Number of all queues: the first is for requests that must not wait, the second for notifications if the driver uses
/// them (virtio 1.3, 5.11.2).
pub const QUEUES: usize = 2 + REQUEST_QUEUES;

/// Descriptors that the process may have open, at most.
const MAX_DESCRIPTORS: u64 = 1 << 20;

/// Serves the virtio-fs device until the vmm is gone; the main function of `bulkhead share-server`.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: share: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), ShareError> {
    let control = inherited::socket(SockType::SeqPacket).ok_or(ShareError::Descriptor)?;
    let state = match api::receive(&control)? {
        Some((Command::State, Some(memory))) => State::map(memory.into()).map_err(cannot("map the state"))?,
        _ => return Err(ShareError::NoSetup),
    };
    let (shares, hidden, locks, stream) = match api::receive(&control)? {
        Some((Command::Setup { shares, hidden, locks }, Some(stream))) => {
            (shares, hidden, locks, UnixStream::from(stream))
        }
        _ => return Err(ShareError::NoSetup),
    };
    // Each open file of the guest is a descriptor.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|error| cannot("get limits")(error.into()))?;
    let descriptors = hard.min(MAX_DESCRIPTORS);
    let descriptors = setrlimit(Resource::RLIMIT_NOFILE, descriptors, hard).map_or(soft, |()| descriptors);
    // The guest's kernel applies its processes' masks.
    umask(Mode::empty());
    let epoch = epoch().map_err(cannot("get random numbers"))?;
    let (server, failed) = Server::new(&shares, &hidden, descriptors as usize, epoch, &state, locks);
    for share in failed {
        let _ = writeln!(io::stderr(), "warning: share: {}", chain(&share));
    }
    // Before the first request: everything that comes from the guest is handled by a process that has the shares and
    // nothing else.
    sandbox::confine_share(&server.shared(), locks)?;
    let server = Arc::new(server);
    let confine_thread = move || Ok(sandbox::confine_share_thread(locks)?);
    let worker = |queue| Worker::spawn(queue, Arc::clone(&server), confine_thread);
    let workers = (0..QUEUES).map(worker);
    let workers = workers.collect::<io::Result<_>>().map_err(cannot("start threads"))?;
    server.start_lock_threads(|| Ok(sandbox::confine_share_thread(true)?)).map_err(cannot("start threads"))?;
    confine_thread()?;
    let device = Device::new(workers).map_err(cannot("allocate the queues"))?;
    event_loop::run(&control, stream, device)
}

/// A number that differs from those of earlier processes.
fn epoch() -> io::Result<u32> {
    let mut bytes = [0; 4];
    // SAFETY: the pointer and length are those of `bytes`.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if filled == bytes.len() as isize {
        // As many bits as are left above the counters.
        Ok(u32::from_ne_bytes(bytes) >> 8)
    } else {
        Err(io::Error::last_os_error())
    }
}
