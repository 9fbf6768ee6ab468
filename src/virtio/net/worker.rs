//! The thread that passes the backend's signals on as interrupts.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::{Interrupt, worker::Stop};

pub(super) fn run(stop: &Stop, calls: &[EventFd], interrupts: &[Arc<dyn Interrupt>]) {
    let events: Vec<_> = calls.iter().collect();
    while let Some(first) = stop.wait(&events) {
        // A later queue must not wait until an earlier one is silent.
        for (call, interrupt) in calls.iter().zip(interrupts).skip(first) {
            if call.read().is_ok() {
                interrupt.trigger();
            }
        }
    }
}
