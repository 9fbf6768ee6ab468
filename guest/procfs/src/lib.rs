//! Serves the files of `/proc` and `/sys` that each container has of its own, with Enhanced Container Isolation on.
//!
//! A container sees its own memory, CPUs and uptime instead of the VM's, and has its own values of sysctls that are not
//! namespaced ([`NODES`] lists all files). They inform a container about itself and protect nothing: what the kernel
//! does not allow in a user namespace, it does not allow behind them either.
//!
//! # The tree
//!
//! One FUSE file system, mounted at [`registry::TREE`], has a directory for each container. The runtime enters a
//! container into the [`registry`], a small file on a tmpfs, and has crun mount the container's files over the
//! kernel's. This service reads the registry when a request arrives. The two never talk to each other, and neither
//! waits for the other. An entry is removed when crun does not know the container any more and its creator has ended.
//!
//! A generated file is made from the container's cgroup when it is read (`generated`); a sysctl has the value that the
//! container wrote, else the VM's (`sysctls`, judged by `sysctl_rules`); hostname and domainname are forwarded to the
//! kernel's files, in a thread that enters the caller's UTS namespace (`hostname`). Reads bypass the page cache.
//! sendfile(2) would not, so it is refused and programs read instead.
//!
//! # Restarts
//!
//! The service keeps nothing in memory that its successor would miss. Inode numbers are made of the container's number,
//! which is used once per boot, and the file's index; written values are files. init makes the mount and holds its
//! descriptor, so a new process takes over the same connection and has the kernel send again the requests that were
//! read and never answered (`FUSE_NOTIFY_RESEND`). Programs in containers notice a short wait.
//!
//! Every two seconds the service reports to init that no thread hangs. After ten seconds without a report init kills
//! it, and starts the next one even if a thread of the old one cannot be ended. After six bad starts, and before the
//! guest goes down, init aborts the connection ([`mount::abort`]), so that no process waits forever.
//!
//! # Mounts of containers
//!
//! A procfs or sysfs that a container mounts itself gets the files as well: see [`seccomp_notify`].

mod cgroup;
mod files;
mod fuse;
mod generated;
mod hostname;
mod loadavg;
pub mod seccomp_notify;
mod sysctl_rules;
mod sysctls;
#[cfg(test)]
mod testing;
mod tree;
mod watchdog;

use std::{
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use bulkhead_guest_common::{
    notify::{self, Heartbeat},
    registry::{self, Registry},
};

pub use files::{NODES, Node};
pub use fuse::mount;
use seccomp_notify::Listener;
use watchdog::Work;

/// Number of threads that answer requests. One that waits, for a slow cgroup file or a hostname, leaves the others.
const WORKERS: usize = 4;

/// Interval at which tasks are counted and entries of dead containers removed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

const HELP: &str = "\
bulkhead-procfs serves the files of /proc and /sys that each container has of its own

Usage: bulkhead-procfs --device=FD [--listener=FD] [--state=DIR]

Options:
  --device=FD    an open /dev/fuse whose file system is mounted already
  --listener=FD  a listening socket to which crun sends the seccomp descriptors of containers
  --state=DIR    directory of the container registry (default: /run/sysbox-runc/procfs)

init starts it; the descriptors are inherited.";

#[derive(Debug, PartialEq, Eq)]
enum Arguments {
    Serve {
        device: i32,
        /// The socket to which crun sends seccomp descriptors.
        listener: Option<i32>,
        state: PathBuf,
    },
    /// A judge of calls for `seccomp_notify`, on a socket.
    Judge { socket: i32 },
    /// A worker for one request of `seccomp_notify`. `caller` is a directory in `/proc`.
    Work { caller: i32, slot: u64, state: PathBuf },
}

fn arguments(args: impl Iterator<Item = String>) -> Option<Arguments> {
    let (mut device, mut listener, mut judge, mut worker, mut slot) = (None, None, None, None, None);
    let mut state = PathBuf::from(registry::STATE);
    // The standard streams are never meant, and adopting one would close it.
    let descriptor = |number: &str| number.parse().ok().filter(|number: &i32| *number > 2);
    for arg in args {
        match arg.split_once('=')? {
            ("--device", number) => device = Some(descriptor(number)?),
            ("--listener", number) => listener = Some(descriptor(number)?),
            ("--judge", number) => judge = Some(descriptor(number)?),
            ("--worker", number) => worker = Some(descriptor(number)?),
            ("--slot", number) => slot = Some(number.parse().ok()?),
            ("--state", path) => state = path.into(),
            _ => return None,
        }
    }
    match (device, judge, worker) {
        (Some(device), None, None) => Some(Arguments::Serve { device, listener, state }),
        (None, Some(socket), None) => Some(Arguments::Judge { socket }),
        (None, None, Some(caller)) => Some(Arguments::Work { caller, slot: slot?, state }),
        _ => None,
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    // Silent: judges and workers fail for reasons that a container chooses, and the call then continues in the kernel.
    let silent = |ended: io::Result<()>| if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    let ended = match arguments(std::env::args().skip(1)) {
        Some(Arguments::Judge { socket }) => return silent(seccomp_notify::judge(socket)),
        Some(Arguments::Work { caller, slot, state }) => return silent(seccomp_notify::worker(caller, slot, &state)),
        Some(Arguments::Serve { device, listener, state }) => {
            // SAFETY: nothing has been opened or closed in this process yet, so the numbers are those that init passed,
            // or are not open, and then the first use fails.
            let own = |number| unsafe { OwnedFd::from_raw_fd(number) };
            run(own(device), listener.map(own), &state)
        }
        None => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-procfs: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves until the connection is gone. Returns only when the start fails.
fn run(device: OwnedFd, listener: Option<OwnedFd>, state: &Path) -> io::Result<()> {
    raise_open_files();
    seccomp_notify::share_heaps();
    seccomp_notify::adopt_orphans()?;
    let heartbeat = Heartbeat::connect()?;
    // Inherited without the flag. A worker enters containers and must not take them along.
    for descriptor in [Some(&device), listener.as_ref()].into_iter().flatten() {
        rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC)?;
    }
    // First, since callers whose calls the last process took wait in the middle of mount(2). It also adopts descriptors
    // by number, before anything else opens some.
    if let Some(listener) = listener {
        Listener::start(listener.into(), state)?;
    }
    let device = Arc::new(device);
    let registry = Registry::open(state)?;
    let epoch = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Handles count up from the nanosecond of the start. No server opens files that fast, so handles never repeat, not
    // even those of a server that was started in the same second.
    let epoch = epoch.tv_sec.unsigned_abs() * 1_000_000_000 + epoch.tv_nsec.unsigned_abs();
    let server = Arc::new(fuse::server::Server::new(registry.clone(), epoch));
    let works: Vec<Arc<Work>> = (0..WORKERS).map(|_| Arc::default()).collect();
    // Before a worker reads, or its own requests would be sent again as well. Fails on a connection without FUSE_INIT,
    // which has nothing to send again.
    let _ = rustix::io::write(device.as_fd(), &fuse::reply::resend());
    for work in &works {
        let (server, device, work) = (Arc::clone(&server), Arc::clone(&device), Arc::clone(work));
        thread::Builder::new().name("worker".into()).spawn(move || {
            let end = server.serve(&device, &work);
            if let Err(error) = &end {
                eprintln!("bulkhead-procfs: cannot read requests from /dev/fuse: {error}");
            }
            // One worker ends only when the connection is gone or broken, for all of them.
            std::process::exit(i32::from(end.is_err()));
        })?;
    }
    let sweeper = Arc::clone(&server);
    thread::Builder::new().name("sweeper".into()).spawn(move || {
        loop {
            sweep(&sweeper, &registry, &device);
            thread::sleep(SWEEP_INTERVAL);
        }
    })?;
    if let Err(error) = notify::ready() {
        eprintln!("bulkhead-procfs: cannot report readiness to init: {error}");
    }
    loop {
        // One stuck worker is enough to keep the process from reporting: a killed process answers again, a stuck one
        // never.
        if !works.iter().any(|work| work.is_stuck()) {
            heartbeat.beat();
        }
        thread::sleep(watchdog::HEARTBEAT_INTERVAL);
    }
}

/// Raises the limit of open files to its maximum: each container that may mount has a descriptor here.
fn raise_open_files() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

/// Removes dead containers from the registry, and counts the tasks of the others.
fn sweep(server: &fuse::server::Server, registry: &Registry, device: &OwnedFd) {
    for slot in registry.sweep() {
        // An error means that the kernel has no such name in its cache.
        let _ = rustix::io::write(device.as_fd(), &fuse::reply::forget(&slot.to_string()));
    }
    server.loads.sample(&registry.all());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Option<Arguments> {
        arguments(words.iter().map(ToString::to_string))
    }

    #[test]
    fn a_connection_is_needed_and_nothing_unknown_is_taken() {
        let serve = |listener, state: &str| Some(Arguments::Serve { device: 5, listener, state: state.into() });
        assert_eq!(parse(&["--device=5"]), serve(None, registry::STATE));
        assert_eq!(parse(&["--device=5", "--listener=6", "--state=/x"]), serve(Some(6), "/x"));
        let help = Arguments::Work { caller: 7, slot: 9, state: registry::STATE.into() };
        assert_eq!(parse(&["--worker=7", "--slot=9"]), Some(help));
        assert_eq!(parse(&["--judge=7"]), Some(Arguments::Judge { socket: 7 }));
        for wrong in [
            &["--state=/x"][..],
            &["--device=x"],
            &["--device=2"],
            &["--device=5", "--listener=2"],
            &["--device=5", "--worker=6", "--slot=1"],
            &["--device=5", "--judge=6"],
            &["--judge=1"],
            &["--worker=6"],
            &["--device=5", "--other=1"],
            &["x"],
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
