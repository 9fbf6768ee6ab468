//! A driver of the device: queues in guest memory, of which it uses one, with a page of data for each slot.

use std::{
    fs::File,
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_blk as blk;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    devices::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice, block::Block},
    exit::ExitSignal,
    memory::{self, GuestRam},
    room::RoomSignal,
};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x5000;
/// The rings of a queue that is not used, from those of the one that is.
const UNUSED: u64 = 0x7000;
const HEADERS: u64 = 0x1_0000;
const STATUS: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;
/// Descriptors of a slot: header, data, status.
const CHAIN: u16 = 3;

/// Length of a slot's data.
pub(super) const PAGE: u64 = 4096;

struct Line(EventFd);

impl Interrupt for Line {
    fn trigger(&self) {
        let _ = self.0.write(1);
    }

    fn event(&self) -> Option<EventFd> {
        None
    }
}

pub(super) struct Driver {
    pub(super) device: Block,
    pub(super) memory: Arc<GuestRam>,
    pub(super) room: RoomSignal,
    kick: EventFd,
    line: Arc<Line>,
    /// The index of the queue that is used.
    index: usize,
    available: u16,
    used: u16,
}

impl Driver {
    /// Starts a device over `file`, with threads instead of a ring on request.
    pub(super) fn new(file: &File, threads: bool) -> Self {
        Self::with_queues(file, threads, 1, 0)
    }

    /// The same with so many queues, and requests in one of them.
    pub(super) fn with_queues(file: &File, threads: bool, count: usize, index: usize) -> Self {
        let room = RoomSignal::new().unwrap();
        let mut device = Block::new(file.try_clone().unwrap(), false, "data", count, room.clone()).unwrap();
        if threads {
            device.lanes.iter_mut().for_each(|lane| lane.ring = None);
        }
        let line = Arc::new(Line(EventFd::new(EFD_NONBLOCK).unwrap()));
        let (memory, kick) = (Arc::new(memory::create(64).unwrap()), EventFd::new(EFD_NONBLOCK).unwrap());
        let mut driver = Self { device, memory, room, kick, line, index, available: 0, used: 0 };
        driver.activate();
        driver
    }

    pub(super) fn activate(&mut self) {
        (self.available, self.used) = (0, 0);
        let interrupt = Arc::clone(&self.line) as Arc<dyn Interrupt>;
        let queues = (0..self.device.queue_max_sizes().len()).map(|index| self.queue(index)).collect();
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.device.features() | 1 << 32,
            queues,
            config_interrupt: interrupt,
            exit: ExitSignal::new().unwrap(),
        };
        self.device.activate(activation).unwrap();
    }

    /// Sets a queue up with empty rings. The last one is left out unless it is used.
    fn queue(&self, index: usize) -> Option<ActiveQueue> {
        let is_used = index == self.index;
        if !is_used && index > 0 && index + 1 == self.device.queue_max_sizes().len() {
            return None;
        }
        let (from, kick) = if is_used { (0, self.kick.try_clone()) } else { (UNUSED, EventFd::new(EFD_NONBLOCK)) };
        for address in [AVAILABLE, USED] {
            self.memory.write_slice(&[0; 4], GuestAddress(from + address)).unwrap();
        }
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(256);
        queue.set_desc_table_address(Some((from + DESCRIPTORS) as u32), Some(0));
        queue.set_avail_ring_address(Some((from + AVAILABLE) as u32), Some(0));
        queue.set_used_ring_address(Some((from + USED) as u32), Some(0));
        queue.set_ready(true);
        let interrupt = Arc::clone(&self.line) as Arc<dyn Interrupt>;
        Some(ActiveQueue { queue, kick: kick.unwrap(), interrupt })
    }

    /// Makes a request of one page, or of none for a flush, available in a slot, at most 84.
    pub(super) fn start(&mut self, slot: u16, kind: u32, sector: u64) {
        let header = HEADERS + u64::from(slot) * 16;
        self.memory.write_slice(&super::header(kind, sector), GuestAddress(header)).unwrap();
        self.memory.write_obj(0xee_u8, GuestAddress(STATUS + u64::from(slot))).unwrap();
        let status = STATUS + u64::from(slot);
        let flags = if kind == blk::VIRTIO_BLK_T_IN { 2 } else { 0 };
        let chain = if kind == blk::VIRTIO_BLK_T_FLUSH {
            vec![(header, 16, 0), (status, 1, 2)]
        } else {
            vec![(header, 16, 0), (Self::data(slot), PAGE as u32, flags), (status, 1, 2)]
        };
        let head = slot * CHAIN;
        let last = chain.len() as u16 - 1;
        for (index, (address, len, flags)) in (0..).zip(chain) {
            let place = DESCRIPTORS + u64::from(head + index) * 16;
            let next = u16::from(index < last);
            self.memory.write_obj(address, GuestAddress(place)).unwrap();
            self.memory.write_obj(len, GuestAddress(place + 8)).unwrap();
            self.memory.write_obj::<u16>(flags | next, GuestAddress(place + 12)).unwrap();
            self.memory.write_obj(head + index + 1, GuestAddress(place + 14)).unwrap();
        }
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % 256);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.store(self.available, GuestAddress(AVAILABLE + 2), std::sync::atomic::Ordering::Release).unwrap();
    }

    pub(super) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Address of a slot's data.
    pub(super) fn data(slot: u16) -> u64 {
        DATA + u64::from(slot) * PAGE
    }

    /// The slot and status of the next request that is done; `None` if there is none in time.
    pub(super) fn next(&mut self, within: Duration) -> Option<(u16, u8)> {
        let deadline = Instant::now() + within;
        loop {
            let used: u16 = self.memory.load(GuestAddress(USED + 2), std::sync::atomic::Ordering::Acquire).unwrap();
            if used != self.used {
                let entry = USED + 4 + 8 * u64::from(self.used % 256);
                self.used = self.used.wrapping_add(1);
                let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
                let slot = head as u16 / CHAIN;
                return Some((slot, self.memory.read_obj(GuestAddress(STATUS + u64::from(slot))).unwrap()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            // SAFETY: the descriptor belongs to the line, which outlives the call.
            let line = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.line.0.as_raw_fd()) };
            poll(&mut [PollFd::new(line, PollFlags::POLLIN)], PollTimeout::try_from(left).unwrap()).unwrap();
            let _ = self.line.0.read();
        }
    }
}
