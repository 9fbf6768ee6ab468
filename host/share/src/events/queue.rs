//! The notification queue: the guest's buffers, one for each event (virtio 1.3, 5.11.6.3).

use std::{
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, Ordering},
};

use bulkhead_queue::{GuestRam, SplitQueue};
use vmm_sys_util::eventfd::EventFd;

use super::{Event, Events};
use crate::{
    buffers::Buffers,
    fuse::{NOTIFY_HOST_EVENT, reply},
};

/// `VIRTIO_FS_F_NOTIFICATION`.
pub(crate) const FEATURE: u64 = 1 << 0;

/// Length of `struct fuse_notify_host_event_out` in bytes.
const BODY: usize = 24;

/// Size of a buffer in bytes, for the longest event: one with a name of 255 bytes.
pub(crate) const BUFFER: usize = (reply::HEADER + BODY + 255).next_multiple_of(8);

impl Event {
    /// The event as a notification: a header without the id of a request, and a code in the place of an error.
    pub(super) fn encode(&self) -> Vec<u8> {
        let code = NOTIFY_HOST_EVENT.cast_signed();
        let mut bytes = reply::header(0, -code, BODY + self.name.len()).to_vec();
        bytes.extend(self.node.to_ne_bytes());
        for word in [self.mask, self.cookie, self.name.len() as u32, 0] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(&self.name);
        bytes
    }
}

impl Events {
    /// The descriptors that become readable when there may be events for [`Self::deliver`].
    pub(crate) fn sources(&self) -> Option<(&OwnedFd, &EventFd)> {
        self.host.as_ref().map(|host| (&host.inotify, &host.ready))
    }

    /// Writes events into the driver's buffers as long as there are both and `interrupted` is not set.
    pub(crate) fn deliver(
        &self,
        queue: &mut SplitQueue,
        memory: &GuestRam,
        call: Option<&EventFd>,
        interrupted: &AtomicBool,
    ) {
        while !interrupted.load(Ordering::Acquire) {
            let position = queue.position();
            let Some(chain) = queue.pop(memory) else {
                // The host's queue is emptied all the same: it announces only what comes after that.
                self.drain(&mut self.state());
                if queue.enable_notifications(memory) {
                    continue;
                }
                return;
            };
            let Some(event) = self.next() else {
                queue.rewind(position);
                return;
            };
            let head = chain.head_index();
            let bytes = event.encode();
            // A buffer that is none, or too small, is returned empty.
            let fits = Buffers::new(chain, memory)
                .is_some_and(|buffers| buffers.writable.len() >= bytes.len() && buffers.writable.fill(&bytes));
            queue.complete(memory, head, if fits { bytes.len() as u32 } else { 0 });
            if queue.should_interrupt(memory)
                && let Some(call) = call
            {
                let _ = call.write(1);
            }
        }
    }
}
