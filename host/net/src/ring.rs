//! The device side of the two queues (virtio 1.3, 5.1.6).

use std::{
    io::{self, Read},
    sync::atomic::{Ordering, fence},
};

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::{
    frame::{Frame, MOST, VIRTIO_HEADER},
    offload::Head,
    sender::Receiver,
};
use bulkhead_queue::GuestRam;

/// Largest number of descriptors of a queue.
pub(super) const MOST_DESCRIPTORS: u16 = 1024;

/// Places that one call of the kernel fills at most (`UIO_MAXIOV`).
const MOST_PLACES: usize = 1024;
/// Data that is worth a frame when the driver has not offered room for more.
const LEAST: usize = 1024;

/// One queue.
pub(crate) struct Ring {
    pub(crate) queue: Queue,
    pub(super) kick: Option<EventFd>,
    pub(crate) call: Option<EventFd>,
    pub(super) enabled: bool,
    event_idx: bool,
    /// `used.idx` when the driver was last signalled.
    signalled: u16,
    /// `avail.idx` when there were too few buffers.
    seen: u16,
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

/// virtio's header of a frame in so many buffers.
fn with_buffers(mut header: [u8; VIRTIO_HEADER], buffers: usize) -> [u8; VIRTIO_HEADER] {
    header[10..12].copy_from_slice(&(buffers as u16).to_le_bytes());
    header
}

/// The receive queue, for data that comes straight from the host's sockets.
pub(super) struct Offered<'a> {
    pub(super) ring: &'a mut Ring,
    pub(super) memory: &'a GuestRam,
    pub(super) mergeable: bool,
}

impl Receiver for Offered<'_> {
    fn take(
        &mut self,
        head: usize,
        most: usize,
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>> {
        self.ring.give_read(self.memory, self.mergeable, (head, most), read, seal)
    }
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
            seen: 0,
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

    /// Whether a kick waits to be taken.
    #[cfg(test)]
    pub(crate) fn kicked(&self) -> bool {
        self.kick.as_ref().is_some_and(|kick| kick.read().is_ok())
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
                self.turn_back(start);
                return false;
            };
            let (head, first) = (chain.head_index(), self.places.len());
            self.places.extend(chain.writable().map(|descriptor| (descriptor.addr(), descriptor.len())));
            let room = self.places[first..].iter().map(|(_, len)| u64::from(*len)).sum();
            missing = missing.saturating_sub(room);
            self.chains.push((head, self.places.len()));
        }
        // A frame that does not fit into the driver's buffers is lost, the buffers are not.
        let (header, bytes) = (&with_buffers(frame.header, self.chains.len()), &frame.bytes);
        self.answer(memory, if missing == 0 { [header, bytes] } else { [&[], &[]] }, 0);
        true
    }

    /// Gives the guest a frame whose data `read` writes into the driver's buffers, after `head` bytes of headers that
    /// `seal` makes; see [`Receiver`].
    fn give_read(
        &mut self,
        memory: &GuestRam,
        mergeable: bool,
        (head, most): (usize, usize),
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>> {
        let start = self.queue.next_avail();
        let head = VIRTIO_HEADER + head;
        let room = self.collect(memory, mergeable, head + most);
        if room < head + most.min(LEAST) {
            // What is too small for anything is lost and does not stand in the way.
            let all = self.chains.len() == usize::from(MOST_DESCRIPTORS) || self.places.len() == MOST_PLACES;
            let useless = all || !self.chains.is_empty() && !mergeable;
            if useless {
                self.answer(memory, [&[], &[]], 0);
            } else {
                self.turn_back(start);
            }
            return if useless { Some(Err(io::ErrorKind::Interrupted.into())) } else { None };
        }
        let result = read(&self.slices(memory, head, most));
        let len = result.as_ref().map_or(0, |len| *len);
        if len == 0 {
            self.queue.set_next_avail(start);
            return Some(result);
        }
        // The chains that nothing was written to are the driver's again.
        let mut left = (head + len) as u64;
        let mut at = 0;
        let used = self.chains.iter().position(|(_, end)| {
            left = left.saturating_sub(self.places[at..*end].iter().map(|(_, len)| u64::from(*len)).sum());
            at = *end;
            left == 0
        });
        self.chains.truncate(used.map_or(self.chains.len(), |last| last + 1));
        self.queue.set_next_avail(start.wrapping_add(self.chains.len() as u16));
        let sealed = seal(len);
        let header = with_buffers(sealed.header, self.chains.len());
        self.answer(memory, [&header, sealed.bytes()], len as u64);
        Some(result)
    }

    /// Takes chains with room for so many bytes in guest memory, or what there is of them.
    fn collect(&mut self, memory: &GuestRam, mergeable: bool, bytes: usize) -> usize {
        self.chains.clear();
        self.places.clear();
        let mut room = 0;
        while room < bytes && (mergeable || self.chains.is_empty()) && self.places.len() < MOST_PLACES {
            let Some(chain) = self.queue.pop_descriptor_chain(memory) else { break };
            let head = chain.head_index();
            for descriptor in chain.writable().take(MOST_PLACES - self.places.len()) {
                // A place outside of memory is the driver's loss.
                if memory.get_slice(descriptor.addr(), descriptor.len() as usize).is_ok() {
                    self.places.push((descriptor.addr(), descriptor.len()));
                    room += descriptor.len() as usize;
                }
            }
            self.chains.push((head, self.places.len()));
            if self.chains.len() == usize::from(MOST_DESCRIPTORS) {
                break;
            }
        }
        room
    }

    /// The collected places without the first `skip` bytes, at most `most` bytes.
    fn slices<'m>(&self, memory: &'m GuestRam, mut skip: usize, mut most: usize) -> Vec<VolatileSlice<'m>> {
        let mut slices = Vec::with_capacity(self.places.len());
        for (address, len) in &self.places {
            let Ok(whole) = memory.get_slice(*address, *len as usize) else { continue };
            let hidden = skip.min(whole.len());
            let shown = most.min(whole.len() - hidden);
            (skip, most) = (skip - hidden, most - shown);
            if shown > 0
                && let Ok(slice) = whole.subslice(hidden, shown)
            {
                slices.push(slice);
            }
        }
        slices
    }

    /// Gives the collected chains back with `rest` written to their beginning, and `there` bytes after it that are there
    /// already.
    fn answer(&mut self, memory: &GuestRam, mut rest: [&[u8]; 2], mut there: u64) {
        let mut at = 0;
        for index in 0..self.chains.len() {
            let (head, end) = self.chains[index];
            let mut written = 0;
            for place in &self.places[at..end] {
                let len = fill(memory, *place, &mut rest);
                let data = there.min(u64::from(place.1 - len)) as u32;
                there -= u64::from(data);
                written += len + data;
            }
            at = end;
            if index + 1 == self.chains.len() {
                let _ = self.queue.add_used(memory, head, written);
            } else {
                self.prepare_used(memory, head, written);
            }
        }
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

    /// Leaves the chains from `start` on to a later frame.
    fn turn_back(&mut self, start: u16) {
        self.seen = self.queue.next_avail();
        self.queue.set_next_avail(start);
    }

    /// Asks to be kicked when the guest offers more buffers than there were too few of; true when it has done so
    /// meanwhile.
    pub(super) fn await_buffers(&mut self, memory: &GuestRam) -> bool {
        let start = self.queue.next_avail();
        self.queue.set_next_avail(self.seen);
        let more = self.queue.enable_notification(memory).unwrap_or(false);
        self.queue.set_next_avail(start);
        // From an index that cannot be true nothing can be taken.
        let offered = self.queue.avail_idx(memory, Ordering::Acquire).map_or(0, |index| index.0.wrapping_sub(start));
        more && offered <= self.queue.size()
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
