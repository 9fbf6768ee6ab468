//! Keeps the guest's clock with the host's.
//!
//! The guest's clock starts with the configuration ([`crate::agent`]) and would then run at a rate of its own; while
//! the host sleeps it stands still. So a thread compares it with KVM's PTP clock, which is the host's, every
//! [`INTERVAL`], and at once when the backend says that the host's clock jumped ([`HostMessage::Time`]). [`correction`]
//! decides on the difference: a large one is a step, a small one goes to the kernel's clock discipline (NTP's PLL),
//! which also finds the right rate.
//!
//! A host whose own clock is not the TSC has no such PTP clock. Then the time in the backend's messages is the
//! reference, late by the message's way here, and only steps are made.
//!
//! [`HostMessage::Time`]: bulkhead_protocol::HostMessage::Time

mod correction;
mod sys;

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    time::{Duration, Instant},
};

use self::{
    correction::{Correction, Reading},
    sys::HostClock,
};
use crate::{error::Error, event::spawn, log};

/// Time between two comparisons. The time constant of the kernel's clock discipline is made for it
/// ([`sys::discipline`]).
const INTERVAL: Duration = Duration::from_secs(32);

/// Readings of the PTP clock that are made for one comparison until one is exact enough.
const ATTEMPTS: usize = 4;

/// The host's time at a moment of the guest.
#[derive(Clone, Copy, Debug)]
struct Told {
    unix_ns: u64,
    received: Instant,
}

/// The thread's other end.
#[derive(Clone, Debug)]
pub(crate) struct Clock(Sender<Told>);

impl Clock {
    /// Starts the thread; needs `/sys` and `/dev`.
    pub(crate) fn start() -> Result<Self, Error> {
        let (sender, told) = channel();
        spawn("clock", move || keep(&told))?;
        Ok(Self(sender))
    }

    /// Compares the clocks now. `unix_ns` is the host's time, for a guest that cannot read it.
    pub(crate) fn jumped(&self, unix_ns: u64) {
        let _ = self.0.send(Told { unix_ns, received: Instant::now() });
    }
}

fn keep(told: &Receiver<Told>) {
    let host = HostClock::open();
    if host.is_none() {
        log::info("the host has no PTP clock for its guests, so the clock follows the backend's messages");
    }
    // At once for the first time: the configuration's time is late by the message's way here.
    let mut wait = Duration::ZERO;
    loop {
        let told = match told.recv_timeout(wait) {
            Ok(told) => Some(told),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        wait = INTERVAL;
        // A host whose TSC turns out to be unstable takes the PTP clock's readings away from a running guest.
        let reading = host.as_ref().and_then(read);
        let reading = reading.or_else(|| told.and_then(|told| sys::compare(told.unix_ns, told.received)));
        if let Some(reading) = reading {
            apply(correction::decide(reading));
        }
    }
}

/// Returns the most exact of some readings.
fn read(host: &HostClock) -> Option<Reading> {
    let mut best: Option<Reading> = None;
    for _ in 0..ATTEMPTS {
        let Some(reading) = host.read() else { continue };
        if reading.is_exact() {
            return Some(reading);
        }
        // A vCPU that was taken away between two readings makes one inexact, hardly all of them.
        if best.is_none_or(|best| reading.uncertainty_ns < best.uncertainty_ns) {
            best = Some(reading);
        }
    }
    best
}

fn apply(correction: Correction) {
    let applied = match correction {
        Correction::None => return,
        Correction::Step { offset_ns } => {
            log::info(&format!(
                "the clock was {} ms off the host's and is set",
                offset_ns.saturating_neg() / 1_000_000
            ));
            sys::step(offset_ns)
        }
        Correction::Slew { offset_ns } => sys::discipline(offset_ns),
    };
    if let Err(error) = applied {
        log::info(&format!("cannot adjust the clock: {error}"));
    }
}
