//! The device side of the two queues (virtio 1.3, 5.1.6).

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use std::io::Read;

use super::frame::{Frame, MOST, VIRTIO_HEADER};
use crate::vmm::memory::GuestRam;

/// Largest number of descriptors of a queue.
pub(super) const MOST_DESCRIPTORS: u16 = 1024;

/// One queue.
pub(crate) struct Ring {
    pub(crate) queue: Queue,
    pub(super) kick: Option<EventFd>,
    pub(crate) call: Option<EventFd>,
    pub(super) enabled: bool,
    event_idx: bool,
    /// `used.idx` when the driver was last signalled.
    signalled: u16,
    /// Chains under way: the head, and where its descriptors end among the places.
    chains: Vec<(u16, usize)>,
    /// Buffers of the chains under way.
    places: Vec<(GuestAddress, u32)>,
}

/// Moves as much of `rest` as there is room for into a buffer; how much that was.
fn fill(memory: &GuestRam, (address, len): (GuestAddress, u32), rest: &mut [&[u8]; 2]) -> u32 {
    let mut written = 0;
    for part in rest {
        let fits = part.len().min((len - written) as usize);
        let Some(to) = address.checked_add(written.into()).filter(|_| fits > 0) else { continue };
        // A place outside of memory is the driver's loss.
        if memory.write_slice(&part[..fits], to).is_ok() {
            written += fits as u32;
        }
        *part = &part[fits..];
    }
    written
}

impl Ring {
    pub(super) fn new() -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            queue: Queue::new(MOST_DESCRIPTORS)?,
            kick: None,
            call: None,
            enabled: false,
            event_idx: false,
            signalled: 0,
            chains: Vec::new(),
            places: Vec::new(),
        })
    }

    pub(super) fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
        self.queue.set_event_idx(on);
    }

    /// Where the queue stands when it is taken over.
    pub(super) fn set_used(&mut self, used: u16) {
        self.queue.set_next_used(used);
        self.signalled = used;
    }

    /// Whether frames may move.
    pub(crate) fn runs(&self) -> bool {
        self.enabled && self.queue.ready() && self.kick.is_some()
    }

    /// Takes at most `most` frames of the guest; true when there may be more. What virtio's header says of checksums and
    /// segments concerns only wires, and is left out.
    pub(super) fn take(&mut self, memory: &GuestRam, most: usize, mut each: impl FnMut(&[u8])) -> bool {
        self.take_whole(memory, most, |frame| each(&frame[VIRTIO_HEADER..]))
    }

    /// The same, with virtio's header before each frame.
    pub(super) fn take_whole(&mut self, memory: &GuestRam, most: usize, mut each: impl FnMut(&[u8])) -> bool {
        let mut buffer = Vec::new();
        for _ in 0..most {
            let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
                self.signal(memory);
                return self.queue.enable_notification(memory).unwrap_or(false);
            };
            let head = chain.head_index();
            if let Some(frame) = read(chain, memory, &mut buffer) {
                each(frame);
            }
            let _ = self.queue.add_used(memory, head, 0);
        }
        self.signal(memory);
        true
    }

    /// Gives the guest a frame, in as many buffers as it needs; false when it has not offered enough of them.
    ///
    /// All buffers of a frame appear in the used ring at once (5.1.6.4.1).
    pub(super) fn give(&mut self, memory: &GuestRam, frame: &Frame, mergeable: bool) -> bool {
        let start = self.queue.next_avail();
        let mut missing = (VIRTIO_HEADER + frame.bytes.len()) as u64;
        self.chains.clear();
        self.places.clear();
        while missing > 0 && (mergeable || self.chains.is_empty()) && self.chains.len() < MOST_DESCRIPTORS.into() {
            let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
                self.queue.set_next_avail(start);
                return false;
            };
            let (head, first) = (chain.head_index(), self.places.len());
            self.places.extend(chain.writable().map(|descriptor| (descriptor.addr(), descriptor.len())));
            let room = self.places[first..].iter().map(|(_, len)| u64::from(*len)).sum();
            missing = missing.saturating_sub(room);
            self.chains.push((head, self.places.len()));
        }
        let mut header = frame.header;
        header[10..12].copy_from_slice(&(self.chains.len() as u16).to_le_bytes());
        // A frame that does not fit into the driver's buffers is lost, the buffers are not.
        let mut rest = if missing == 0 { [&header[..], &frame.bytes[..]] } else { [&[][..], &[][..]] };
        let mut at = 0;
        for index in 0..self.chains.len() {
            let (head, end) = self.chains[index];
            let written = self.places[at..end].iter().map(|place| fill(memory, *place, &mut rest)).sum();
            at = end;
            if index + 1 == self.chains.len() {
                let _ = self.queue.add_used(memory, head, written);
            } else {
                self.prepare_used(memory, head, written);
            }
        }
        true
    }

    /// Writes an element that becomes visible with the next `add_used`.
    fn prepare_used(&mut self, memory: &GuestRam, head: u16, written: u32) {
        let next = self.queue.next_used();
        let at = 4 + 8 * u64::from(next % self.queue.size());
        if let Some(address) = self.queue.used_ring().checked_add(at) {
            let element = u64::from(head) | u64::from(written) << 32;
            let _ = memory.write_obj(element.to_le(), GuestAddress(address));
        }
        self.queue.set_next_used(next.wrapping_add(1));
    }

    /// Asks to be kicked when the guest offers buffers; true when it has done so meanwhile.
    pub(super) fn await_buffers(&mut self, memory: &GuestRam) -> bool {
        self.queue.enable_notification(memory).unwrap_or(false)
    }

    /// Tells the driver of what was used since the last time, if it wants to know (2.7.7.2).
    pub(super) fn signal(&mut self, memory: &GuestRam) {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return;
        }
        // What was used must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let offset = if self.event_idx { 4 + 2 * u64::from(self.queue.size()) } else { 0 };
        let word = self
            .queue
            .avail_ring()
            .checked_add(offset)
            .and_then(|address| memory.load::<u16>(GuestAddress(address), Ordering::Relaxed).ok())
            .map(u16::from_le);
        let wanted = match word {
            Some(event) if self.event_idx => new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old),
            Some(flags) => flags & 1 == 0,
            None => true,
        };
        if wanted && let Some(call) = &self.call {
            let _ = call.write(1);
        }
    }
}

/// A frame of the guest, with virtio's header.
fn read<'b>(chain: DescriptorChain<&GuestRam>, memory: &GuestRam, buffer: &'b mut Vec<u8>) -> Option<&'b [u8]> {
    let mut reader = chain.reader(memory).ok()?;
    let len = reader.available_bytes();
    if !(VIRTIO_HEADER..=VIRTIO_HEADER + MOST).contains(&len) {
        return None;
    }
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    reader.read_exact(&mut buffer[..len]).ok()?;
    buffer.get(..len)
}
