//! The end of the machine, which any thread of the vmm can bring about.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::api::ExitReason;

/// A signal with the reason for the machine's end. The first reason wins.
#[derive(Clone)]
pub struct ExitSignal(Arc<Inner>);

struct Inner {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl ExitSignal {
    /// Creates a signal that is not raised.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner { reason: Mutex::new(None), event: EventFd::new(EFD_NONBLOCK)? })))
    }

    /// Ends the machine for this reason, unless it is ending already.
    pub fn raise(&self, reason: ExitReason) {
        // The other vCPUs still run for a moment and may fail because of the end; that is not the reason.
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        // Only after the reason is set: the main thread takes it as soon as it sees the event.
        let _ = self.0.event.write(1);
    }

    /// The event that becomes readable when the signal is raised.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    /// Takes the reason, if the signal is raised.
    pub fn take(&self) -> Option<ExitReason> {
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
