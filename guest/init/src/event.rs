//! The events of the supervisor's loop; every source is a thread that blocks in one system call.

use std::{sync::mpsc::Sender, thread};

use bulkhead_protocol::{Description, HostMessage, PortMapping};
use nix::sys::signal::{SigSet, Signal};

use crate::error::Error;

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// At least one child ended; SIGCHLD is sent once for several.
    Child,
    /// A signal that asks PID 1 to shut down (SIGTERM, SIGINT from ctrl-alt-del, SIGPWR).
    Signal(Signal),
    /// A message from the backend.
    Host(HostMessage),
    /// The agent connection ended, for this reason.
    HostDisconnected(String),
    /// The data disk is mounted, or cannot be.
    DiskPrepared(Result<(), Error>),
    /// `READY=1` from the process with this id.
    Ready(i32),
    /// `WATCHDOG=1` from the process with this id.
    Watchdog(i32),
    /// The result of `GET /_ping` through the gate.
    Pinged(Result<(), String>),
    /// A request for a published port; [`crate::ports::Ports::answer`] answers it.
    Publish {
        /// Identifies the mapping; never reused while the guest runs.
        id: u64,
        port: PortMapping,
    },
    /// The mapping with this id has ended.
    Unpublish(u64),
    /// A container has connected to the host's socket of this number.
    ConnectSocket(u32),
    /// The diagnostics that the backend asked for.
    Described(Description),
}

/// Stack of a helper thread in bytes; the largest buffer on one is a few KiB.
pub(crate) const STACK_SIZE: usize = 128 * 1024;

/// Starts a helper thread.
pub(crate) fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_SIZE)
        .spawn(work)
        .map(drop)
        .map_err(Error::system("start a thread"))
}

/// Returns the signals that init handles; they are blocked in every thread and unblocked in services.
fn handled_signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR].into_iter().collect()
}

/// Blocks init's signals; must be called before the first thread starts.
pub(crate) fn block_signals() -> Result<(), Error> {
    handled_signals().thread_block().map_err(Error::system("block signals"))?;
    // The kernel then sends SIGINT to PID 1 for ctrl-alt-del, instead of resetting the machine without a sync.
    nix::sys::reboot::set_cad_enabled(false).map_err(Error::system("take ctrl-alt-del"))
}

/// Turns signals into events.
pub(crate) fn watch_signals(events: Sender<Event>) -> Result<(), Error> {
    spawn("signals", move || {
        // SIGCHLD carries no status: several ends can be merged into one signal, so the supervisor reaps until none is
        // left.
        while let Ok(signal) = handled_signals().wait() {
            let event = if signal == Signal::SIGCHLD { Event::Child } else { Event::Signal(signal) };
            if events.send(event).is_err() {
                return;
            }
        }
    })
}
