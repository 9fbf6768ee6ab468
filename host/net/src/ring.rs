//! The device side of the receive and transmit queues (virtio 1.3, 2.7, 5.1.6).
//!
//! The driver is hostile until proven otherwise: it may give any index, length and address. Indices are checked by
//! `virtio_queue`, addresses by `vm_memory`, and buffers outside of guest memory count as the driver's own loss.
//! Nothing is read twice that was checked once, except the data itself.

use std::io;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::{
    frame::{Frame, VIRTIO_HEADER},
    guest_frame::GuestFrame,
    offload::Head,
    sink::FrameSink,
};
use bulkhead_queue::{GuestRam, SplitQueue, segments};

/// Frames taken from the guest before the host's sockets have their turn.
pub(super) const BURST: usize = 128;
/// Largest queue size, in descriptors.
pub(super) const MAX_QUEUE_SIZE: u16 = 1024;

/// Buffers that one system call can fill (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;
/// Smallest room for data that is worth a frame while more data waits.
const MIN_DATA: usize = 1024;

/// One of the two queues.
pub(crate) struct Ring {
    pub(crate) queue: SplitQueue,
    pub(super) kick: Option<EventFd>,
    pub(crate) call: Option<EventFd>,
    pub(super) enabled: bool,
    /// Next available index when there were too few buffers.
    short_at: u16,
    /// Chains taken for the current frame: head index, and the end of its buffers in `buffers`.
    chains: Vec<(u16, usize)>,
    /// Buffers of these chains.
    buffers: Vec<(GuestAddress, u32)>,
}

/// Moves as much of `rest` into a buffer as it has room for; returns the number of bytes.
fn fill(memory: &GuestRam, (address, len): (GuestAddress, u32), rest: &mut [&[u8]; 2]) -> u32 {
    let mut written = 0;
    for part in rest {
        let fits = part.len().min((len - written) as usize);
        let Some(to) = address.checked_add(written.into()).filter(|_| fits > 0) else { continue };
        // Data for an address outside of memory is lost.
        if memory.write_slice(&part[..fits], to).is_ok() {
            written += fits as u32;
        }
        *part = &part[fits..];
    }
    written
}

/// virtio's header with its last field, `num_buffers` (virtio 1.3, 5.1.6.4).
fn with_buffers(mut header: [u8; VIRTIO_HEADER], buffers: usize) -> [u8; VIRTIO_HEADER] {
    header[10..12].copy_from_slice(&(buffers as u16).to_le_bytes());
    header
}

/// The receive queue as a sink for data that comes straight from the host's sockets.
pub(super) struct RxSink<'a> {
    pub(super) ring: &'a mut Ring,
    pub(super) memory: &'a GuestRam,
    pub(super) mergeable: bool,
}

impl FrameSink for RxSink<'_> {
    fn take(
        &mut self,
        head: usize,
        most: usize,
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>> {
        self.ring.push_read(self.memory, self.mergeable, (head, most), read, seal)
    }
}

impl Ring {
    pub(super) fn new() -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            queue: SplitQueue::new(Queue::new(MAX_QUEUE_SIZE)?),
            kick: None,
            call: None,
            enabled: false,
            short_at: 0,
            chains: Vec::new(),
            buffers: Vec::new(),
        })
    }

    /// True while frames may move.
    pub(crate) fn runs(&self) -> bool {
        self.enabled && self.queue.queue().ready() && self.kick.is_some()
    }

    /// Takes at most `most` frames of the guest; true when there may be more.
    ///
    /// Frames come without virtio's header. It asks for checksums and for cutting of segments, which only a wire needs:
    /// the data ends here.
    pub(super) fn pop_frames<'m>(
        &mut self,
        memory: &'m GuestRam,
        most: usize,
        mut each: impl FnMut(GuestFrame<'m>),
    ) -> bool {
        for _ in 0..most {
            let Some(chain) = self.queue.pop(memory) else {
                self.signal(memory);
                // The driver may have added a frame between the look above and this request for a kick: then there is
                // more.
                return self.queue.enable_notifications(memory);
            };
            let head = chain.head_index();
            // A broken chain carries no frame, and is returned like any other.
            if let Some(frame) = GuestFrame::in_chain(chain, memory) {
                each(frame);
            }
            self.queue.complete(memory, head, 0);
        }
        self.signal(memory);
        true
    }

    /// Gives the guest a frame, in as many chains as it needs; false when the guest has not offered enough of them.
    ///
    /// All chains of a frame appear in the used ring at once (virtio 1.3, 5.1.6.4.1).
    pub(super) fn push_frame(&mut self, memory: &GuestRam, frame: &Frame, mergeable: bool) -> bool {
        let start = self.queue.position();
        let mut missing = (VIRTIO_HEADER + frame.bytes.len()) as u64;
        self.chains.clear();
        self.buffers.clear();
        // Without VIRTIO_NET_F_MRG_RXBUF a frame has to fit into one chain. The bound keeps a queue whose indices run
        // wild from holding this loop.
        while missing > 0 && (mergeable || self.chains.is_empty()) && self.chains.len() < MAX_QUEUE_SIZE.into() {
            let Some(chain) = self.queue.pop(memory) else {
                self.rewind(start);
                return false;
            };
            let (head, first) = (chain.head_index(), self.buffers.len());
            self.buffers.extend(chain.writable().map(|descriptor| (descriptor.addr(), descriptor.len())));
            let room = self.buffers[first..].iter().map(|(_, len)| u64::from(*len)).sum();
            missing = missing.saturating_sub(room);
            self.chains.push((head, self.buffers.len()));
        }
        // A frame that is too large for one chain, or for all of the queue, is dropped, and its chains return empty.
        let (header, bytes) = (&with_buffers(frame.header, self.chains.len()), &frame.bytes);
        self.complete(memory, if missing == 0 { [header, bytes] } else { [&[], &[]] }, 0);
        true
    }

    /// Gives the guest a frame whose data `read` writes into the driver's buffers, after `head` bytes of headers that
    /// `seal` makes; see [`FrameSink::take`].
    fn push_read(
        &mut self,
        memory: &GuestRam,
        mergeable: bool,
        (head, most): (usize, usize),
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>> {
        let start = self.queue.position();
        let head = VIRTIO_HEADER + head;
        let room = self.collect(memory, mergeable, head + most);
        if room < head + most.min(MIN_DATA) {
            // More buffers would not help if the chain has to be one, or if there are as many as can be used. Such
            // chains are returned empty, and the caller tries the next ones; else it waits for more.
            let all = self.chains.len() == usize::from(MAX_QUEUE_SIZE) || self.buffers.len() == MAX_IOVECS;
            let useless = all || !self.chains.is_empty() && !mergeable;
            if useless {
                self.complete(memory, [&[], &[]], 0);
            } else {
                self.rewind(start);
            }
            return if useless { Some(Err(io::ErrorKind::Interrupted.into())) } else { None };
        }
        let result = read(&self.slices(memory, head, most));
        let len = result.as_ref().map_or(0, |len| *len);
        if len == 0 {
            // Nothing was written, so the chains are still available to the next frame.
            self.queue.rewind(start);
            return Some(result);
        }
        // Only the chains that the data reaches are used; the others become available again.
        let mut left = (head + len) as u64;
        let mut at = 0;
        let used = self.chains.iter().position(|(_, end)| {
            left = left.saturating_sub(self.buffers[at..*end].iter().map(|(_, len)| u64::from(*len)).sum());
            at = *end;
            left == 0
        });
        self.chains.truncate(used.map_or(self.chains.len(), |last| last + 1));
        self.queue.rewind(start.wrapping_add(self.chains.len() as u16));
        let sealed = seal(len);
        let header = with_buffers(sealed.header, self.chains.len());
        self.complete(memory, [&header, sealed.bytes()], len as u64);
        Some(result)
    }

    /// Takes chains with room for `bytes` in guest memory, or all that there are; returns their room.
    fn collect(&mut self, memory: &GuestRam, mergeable: bool, bytes: usize) -> usize {
        self.chains.clear();
        self.buffers.clear();
        let mut room = 0;
        while room < bytes && (mergeable || self.chains.is_empty()) && self.buffers.len() < MAX_IOVECS {
            let Some(chain) = self.queue.pop(memory) else { break };
            let head = chain.head_index();
            for descriptor in chain.writable().take(MAX_IOVECS - self.buffers.len()) {
                // A buffer outside of memory is left out, so that the system call below cannot fail over it.
                if memory.get_slice(descriptor.addr(), descriptor.len() as usize).is_ok() {
                    self.buffers.push((descriptor.addr(), descriptor.len()));
                    room += descriptor.len() as usize;
                }
            }
            self.chains.push((head, self.buffers.len()));
            // Chains without a single writable buffer would otherwise never end the loop.
            if self.chains.len() == usize::from(MAX_QUEUE_SIZE) {
                break;
            }
        }
        room
    }

    /// The collected buffers without their first `skip` bytes, cut to `most` bytes.
    fn slices<'m>(&self, memory: &'m GuestRam, skip: usize, most: usize) -> Vec<VolatileSlice<'m>> {
        let mut slices = Vec::with_capacity(self.buffers.len());
        let whole = self.buffers.iter().filter_map(|(address, len)| memory.get_slice(*address, *len as usize).ok());
        segments::window(whole, skip, most, &mut slices);
        slices
    }

    /// Returns the collected chains to the driver, with `rest` written to their start and `present` bytes of data that
    /// follow it already.
    fn complete(&mut self, memory: &GuestRam, mut rest: [&[u8]; 2], mut present: u64) {
        let mut at = 0;
        for index in 0..self.chains.len() {
            let (head, end) = self.chains[index];
            let mut written = 0;
            for buffer in &self.buffers[at..end] {
                let len = fill(memory, *buffer, &mut rest);
                let data = present.min(u64::from(buffer.1 - len)) as u32;
                present -= u64::from(data);
                written += len + data;
            }
            at = end;
            // The last one publishes all that were staged before it.
            if index + 1 == self.chains.len() {
                self.queue.complete(memory, head, written);
            } else {
                self.queue.stage(memory, head, written);
            }
        }
    }

    /// Makes the chains from `start` on available again, and remembers that they were too few.
    fn rewind(&mut self, start: u16) {
        self.short_at = self.queue.position();
        self.queue.rewind(start);
    }

    /// Asks for a kick when the guest offers more buffers than those that were too few; true if it has offered more
    /// already.
    pub(super) fn enable_kick(&mut self, memory: &GuestRam) -> bool {
        let start = self.queue.position();
        // `enable_notifications` compares with the queue's position and, with VIRTIO_F_EVENT_IDX, asks for a kick at
        // it. From `start` on there are buffers, so at `start` it would report them forever.
        self.queue.rewind(self.short_at);
        let more = self.queue.enable_notifications(memory);
        self.queue.rewind(start);
        more
    }

    /// Signals the driver if elements were used since the last signal and it wants to be signalled (virtio 1.3,
    /// 2.7.7.2).
    pub(super) fn signal(&mut self, memory: &GuestRam) {
        if self.queue.should_interrupt(memory)
            && let Some(call) = &self.call
        {
            let _ = call.write(1);
        }
    }
}

#[cfg(test)]
impl Ring {
    /// True if a kick waits to be taken, which this does.
    pub(crate) fn kicked(&self) -> bool {
        self.kick.as_ref().is_some_and(|kick| kick.read().is_ok())
    }
}
