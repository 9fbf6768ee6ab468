//! What the main loop waits for; every source is a thread that blocks in one system call.

use std::{sync::mpsc::Sender, thread};

use bulkhead_protocol::{Description, HostMessage, PortMapping};
use nix::sys::signal::{SigSet, Signal};

use crate::error::Error;

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// A child ended.
    Child,
    /// Somebody asked PID 1 to end (SIGTERM, SIGINT from ctrl-alt-del, SIGPWR).
    Signal(Signal),
    /// The backend said something.
    Host(HostMessage),
    /// The agent connection is gone, and why.
    HostDisconnected(String),
    /// The data disk is mounted or can't be.
    DiskPrepared(Result<(), Error>),
    /// The process with this id says that it serves.
    Ready(i32),
    /// The process with this id says that it still does.
    Watchdog(i32),
    /// Answer of `_ping` through the gate.
    Pinged(Result<(), String>),
    /// dockerd's proxy asks for a published port; [`crate::ports::Ports::answer`] answers.
    Publish {
        /// Names the mapping, never used again.
        id: u64,
        /// What it asks for.
        port: PortMapping,
    },
    /// The mapping with this id is over.
    Unpublish(u64),
    /// The guest was described, as the host had asked.
    Described(Description),
}

/// Stack of the helper threads in bytes; they do little.
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

/// The signals that init takes; they are blocked in every thread and unblocked in services.
fn handled_signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR].into_iter().collect()
}

/// Blocks init's signals; must run before the first thread starts.
pub(crate) fn block_signals() -> Result<(), Error> {
    handled_signals().thread_block().map_err(Error::system("block signals"))?;
    // Ctrl-alt-del becomes SIGINT instead of a reset without sync.
    nix::sys::reboot::set_cad_enabled(false).map_err(Error::system("take ctrl-alt-del"))
}

/// Turns signals into events.
pub(crate) fn watch_signals(events: Sender<Event>) -> Result<(), Error> {
    spawn("signals", move || {
        while let Ok(signal) = handled_signals().wait() {
            let event = if signal == Signal::SIGCHLD { Event::Child } else { Event::Signal(signal) };
            if events.send(event).is_err() {
                return;
            }
        }
    })
}
