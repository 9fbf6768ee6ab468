//! The warden serves the files of `/proc` and `/sys` that each container has of its own.
//!
//! They are a FUSE tree with a directory for each container, which the runtime enters into the [`registry`] and whose
//! files it mounts over the kernel's. init mounts the tree and keeps the connection: a warden that ends is started anew
//! on the same one, asks the kernel for what was left unanswered, and no container notices but by a short wait. One that
//! hangs is killed by init ([`watchdog`]). A procfs or sysfs that a container mounts itself gets the files as well
//! ([`seccomp_notify`]).

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
use seccomp_notify::Traps;
use watchdog::Work;

/// Requests that are answered at once.
const WORKERS: usize = 4;

/// How often tasks are counted and the dead are swept out.
const ROUND: Duration = Duration::from_secs(5);

const HELP: &str = "\
bulkhead-procfs serves the files of /proc and /sys that each container has of its own

Usage: bulkhead-procfs --device=FD [--listener=FD] [--state=DIR]

init starts it with an open /dev/fuse, which is mounted already, and a socket that listens for crun.";

/// What the command line says.
#[derive(Debug, PartialEq, Eq)]
enum Arguments {
    Serve {
        device: i32,
        /// Where crun brings what the kernel holds for the warden.
        listener: Option<i32>,
        state: PathBuf,
    },
    /// The warden's own child, for one order.
    Help { caller: i32, slot: u64, state: PathBuf },
}

fn arguments(args: impl Iterator<Item = String>) -> Option<Arguments> {
    let (mut device, mut listener, mut helper, mut slot) = (None, None, None, None);
    let mut state = PathBuf::from(registry::STATE);
    let descriptor = |number: &str| number.parse().ok().filter(|number: &i32| *number > 2);
    for arg in args {
        match arg.split_once('=')? {
            ("--device", number) => device = Some(descriptor(number)?),
            ("--listener", number) => listener = Some(descriptor(number)?),
            ("--helper", number) => helper = Some(descriptor(number)?),
            ("--slot", number) => slot = Some(number.parse().ok()?),
            ("--state", path) => state = path.into(),
            _ => return None,
        }
    }
    match (device, helper) {
        (Some(device), None) => Some(Arguments::Serve { device, listener, state }),
        (None, Some(caller)) => Some(Arguments::Help { caller, slot: slot?, state }),
        _ => None,
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    let ended = match arguments(std::env::args().skip(1)) {
        Some(Arguments::Help { caller, slot, state }) => {
            // The warden takes no answer for one, and has the kernel do it.
            return if seccomp_notify::helper(caller, slot, &state).is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Some(Arguments::Serve { device, listener, state }) => {
            // SAFETY: nothing in this program has opened or closed anything yet, so the numbers are what init put
            // there, or are not open, and then the first use says so.
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

/// Serves until the connection is gone.
fn run(device: OwnedFd, listener: Option<OwnedFd>, state: &Path) -> io::Result<()> {
    raise_open_files();
    seccomp_notify::share_heaps();
    let heartbeat = Heartbeat::connect()?;
    // None of the helpers shall have them.
    for descriptor in [Some(&device), listener.as_ref()].into_iter().flatten() {
        rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC)?;
    }
    // First: what an earlier one took waits for an answer.
    if let Some(listener) = listener {
        Traps::start(listener.into(), state)?;
    }
    let device = Arc::new(device);
    let registry = Registry::open(state)?;
    let epoch = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Openings are numbered from here; no server makes a thousand of them in a microsecond.
    let server = Arc::new(fuse::server::Server::new(registry.clone(), epoch.tv_sec.unsigned_abs() << 30));
    let works: Vec<Arc<Work>> = (0..WORKERS).map(|_| Arc::default()).collect();
    // Before anything is taken. Fails on a connection that is new, or on a kernel that has nothing to send again.
    let _ = rustix::io::write(device.as_fd(), &fuse::reply::resend());
    for work in &works {
        let (server, device, work) = (Arc::clone(&server), Arc::clone(&device), Arc::clone(work));
        thread::Builder::new().name("worker".into()).spawn(move || {
            let end = server.serve(&device, &work);
            if let Err(error) = &end {
                eprintln!("bulkhead-procfs: can't read requests: {error}");
            }
            // One that ends means all do: the connection is gone.
            std::process::exit(i32::from(end.is_err()));
        })?;
    }
    let keeper = Arc::clone(&server);
    thread::Builder::new().name("keeper".into()).spawn(move || {
        loop {
            keep(&keeper, &registry, &device);
            thread::sleep(ROUND);
        }
    })?;
    if let Err(error) = notify::ready() {
        eprintln!("bulkhead-procfs: can't report readiness: {error}");
    }
    loop {
        if !works.iter().any(|work| work.is_stuck()) {
            heartbeat.beat();
        }
        thread::sleep(watchdog::BEAT);
    }
}

/// Each container that may mount has a descriptor here.
fn raise_open_files() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

/// Counts tasks and lets go of the dead.
fn keep(server: &fuse::server::Server, registry: &Registry, device: &OwnedFd) {
    for slot in registry.sweep() {
        // The kernel may not remember it.
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
        let help = Arguments::Help { caller: 7, slot: 9, state: registry::STATE.into() };
        assert_eq!(parse(&["--helper=7", "--slot=9"]), Some(help));
        for wrong in [
            &["--state=/x"][..],
            &["--device=x"],
            &["--device=2"],
            &["--device=5", "--listener=2"],
            &["--device=5", "--helper=6", "--slot=1"],
            &["--helper=6"],
            &["--device=5", "--other=1"],
            &["x"],
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
