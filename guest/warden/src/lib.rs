//! The warden serves the files of `/proc` and `/sys` that each container has of its own.
//!
//! They are a FUSE tree with a directory for each container, which the runtime enters into the [`registry`] and whose
//! files it mounts over the kernel's. init mounts the tree and keeps the connection: a warden that ends is started anew
//! on the same one, asks the kernel for what was left unanswered, and no container notices but by a short wait. One that
//! hangs is killed by init ([`watchdog`]).

mod cgroup;
mod fuse;
mod load;
mod nodes;
pub mod registry;
mod rules;
mod tree;
mod values;
mod views;
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

pub use fuse::mount;
pub use nodes::{NODES, Node};
use registry::Registry;
use watchdog::{Notifier, Work};

/// Requests that are answered at once.
const WORKERS: usize = 4;

/// How often tasks are counted and the dead are swept out.
const ROUND: Duration = Duration::from_secs(5);

const HELP: &str = "\
bulkhead-warden serves the files of /proc and /sys that each container has of its own

Usage: bulkhead-warden --device=FD [--state=DIR]

init starts it with an open /dev/fuse, which is mounted already.";

/// What the command line says.
struct Arguments {
    device: i32,
    state: PathBuf,
}

fn arguments(args: impl Iterator<Item = String>) -> Option<Arguments> {
    let (mut device, mut state) = (None, PathBuf::from(registry::STATE));
    for arg in args {
        match arg.split_once('=')? {
            ("--device", number) => device = number.parse().ok().filter(|number| *number > 2),
            ("--state", path) => state = path.into(),
            _ => return None,
        }
    }
    Some(Arguments { device: device?, state })
}

/// The whole program.
pub fn main() -> ExitCode {
    let Some(arguments) = arguments(std::env::args().skip(1)) else {
        eprintln!("{HELP}");
        return ExitCode::from(2);
    };
    // SAFETY: nothing in this program has opened or closed anything yet, so the number is what init put there, or is
    // not open, and then the first use says so.
    let device = unsafe { OwnedFd::from_raw_fd(arguments.device) };
    match run(device, &arguments.state) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-warden: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves until the connection is gone.
fn run(device: OwnedFd, state: &Path) -> io::Result<()> {
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
                eprintln!("bulkhead-warden: can't read requests: {error}");
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
    let notifier = Notifier::from_environment();
    notifier.tell("READY=1");
    loop {
        if !works.iter().any(|work| work.is_stuck()) {
            notifier.tell("WATCHDOG=1");
        }
        thread::sleep(watchdog::BEAT);
    }
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

    fn parse(words: &[&str]) -> Option<(i32, PathBuf)> {
        arguments(words.iter().map(ToString::to_string)).map(|one| (one.device, one.state))
    }

    #[test]
    fn a_connection_is_needed_and_nothing_unknown_is_taken() {
        assert_eq!(parse(&["--device=5"]), Some((5, registry::STATE.into())));
        assert_eq!(parse(&["--device=5", "--state=/x"]), Some((5, "/x".into())));
        for wrong in [&["--state=/x"][..], &["--device=x"], &["--device=2"], &["--device=5", "--other=1"], &["x"]] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
