//! How any thread of the vmm ends the machine.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::api::ExitReason;

/// Raised once; the first reason wins.
#[derive(Clone)]
pub struct ExitSignal(Arc<Inner>);

struct Inner {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl ExitSignal {
    /// A signal that is not raised.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner { reason: Mutex::new(None), event: EventFd::new(EFD_NONBLOCK)? })))
    }

    /// Ends the machine for this reason, unless it is ending already.
    pub fn raise(&self, reason: ExitReason) {
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        let _ = self.0.event.write(1);
    }

    /// Readable once the signal is raised.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    /// The reason, if raised.
    pub fn take(&self) -> Option<ExitReason> {
        self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
