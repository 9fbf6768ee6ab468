//! The driver's side of the three queues, as far as tests need one.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering, fence},
    },
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{
    Queue, QueueT,
    desc::{RawDescriptor, split::Descriptor},
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    devices::virtio::{
        Activation, ActiveQueue, Interrupt,
        vsock::packet::{HEADER_LEN, Header},
    },
    exit::ExitSignal,
    memory::GuestRam,
};

const SIZE: u16 = 256;
const RING_STRIDE: u64 = 0x10000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x4000;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_STRIDE: u64 = 0x4000;
const TX_BUFFERS: u64 = 0x100_0000;
const TX_STRIDE: u64 = 0x2_0000;
const TX_TABLES: u64 = 0x80_0000;
const MEMORY: usize = 64 << 20;

/// Maximum number of packets in the transmit queue; each has a buffer and an indirect table of its own.
const TX_SLOTS: u16 = 64;

/// The layout of a packet in descriptors.
#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    /// Header and payload in one.
    One,
    /// This many pieces of about the same size, cut through the header as well.
    Pieces(usize),
}

#[derive(Debug)]
struct Counter(AtomicUsize, EventFd);

impl Default for Counter {
    fn default() -> Self {
        Self(AtomicUsize::new(0), EventFd::new(EFD_NONBLOCK).unwrap())
    }
}

impl Interrupt for Counter {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        self.1.write(1).unwrap();
    }

    fn event(&self) -> Option<EventFd> {
        None
    }
}

/// The driver's side of a queue.
struct Ring {
    base: u64,
    kick: EventFd,
    avail: u16,
    used: u16,
    interrupts: Arc<Counter>,
}

pub(super) struct Driver {
    pub(super) memory: Arc<GuestRam>,
    rings: [Ring; 3],
    event_idx: bool,
    rx_len: u32,
    tx_free: Vec<u16>,
    /// Like Linux's driver, sleeps until an interrupt for which it [listens](Self::listen); otherwise it polls.
    sleeps: bool,
}

pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;

impl Driver {
    /// Creates a driver whose receive buffers have `rx_len` bytes, at most 16 KiB.
    pub(super) fn new(event_idx: bool, rx_len: u32) -> Self {
        let ring = |index: u64| Ring {
            base: 0x1000 + index * RING_STRIDE,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            avail: 0,
            used: 0,
            interrupts: Arc::default(),
        };
        Self {
            memory: Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()),
            rings: [ring(0), ring(1), ring(2)],
            event_idx,
            rx_len,
            tx_free: (0..TX_SLOTS).collect(),
            sleeps: false,
        }
    }

    /// Creates a driver that sleeps between interrupts and has at most `slots` packets on their way.
    pub(super) fn sleeping(event_idx: bool, rx_len: u32, slots: u16) -> Self {
        Self { sleeps: true, tx_free: (0..slots.min(TX_SLOTS)).collect(), ..Self::new(event_idx, rx_len) }
    }

    /// Asks for an interrupt for the next completed chain; true if there is one already.
    pub(super) fn listen(&self, ring: usize) -> bool {
        let Ring { base, used, .. } = self.rings[ring];
        if self.event_idx {
            self.store(base + AVAIL + 4 + u64::from(SIZE) * 2, used);
        }
        fence(Ordering::SeqCst);
        self.load(base + USED + 2) != used
    }

    /// Waits for an interrupt; false if none comes within `longest`.
    pub(super) fn sleep(&self, rings: &[usize], longest: Duration) -> bool {
        let lines: Vec<_> = rings.iter().map(|ring| &self.rings[*ring].interrupts.1).collect();
        // SAFETY: the lines stay open as long as the driver, which is borrowed.
        let fd = |line: &&EventFd| unsafe { BorrowedFd::borrow_raw(line.as_raw_fd()) };
        let mut fds: Vec<_> = lines.iter().map(|line| PollFd::new(fd(line), PollFlags::POLLIN)).collect();
        let woken = poll(&mut fds, PollTimeout::try_from(longest).unwrap()).unwrap() > 0;
        for line in lines {
            let _ = line.read();
        }
        woken
    }

    /// The activation that a transport passes to the device at `DRIVER_OK`.
    pub(super) fn activation(&self) -> Activation {
        let queues = self
            .rings
            .iter()
            .map(|ring| {
                let mut queue = Queue::new(SIZE).unwrap();
                queue.set_desc_table_address(Some(ring.base as u32), Some(0));
                queue.set_avail_ring_address(Some((ring.base + AVAIL) as u32), Some(0));
                queue.set_used_ring_address(Some((ring.base + USED) as u32), Some(0));
                queue.set_ready(true);
                let interrupt: Arc<dyn Interrupt> = Arc::<Counter>::clone(&ring.interrupts);
                Some(ActiveQueue { queue, kick: ring.kick.try_clone().unwrap(), interrupt })
            })
            .collect();
        let features = u64::from(self.event_idx) << VIRTIO_RING_F_EVENT_IDX;
        let config_interrupt: Arc<dyn Interrupt> = Arc::new(Counter::default());
        Activation {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            config_interrupt,
            exit: ExitSignal::new().unwrap(),
        }
    }

    pub(super) fn interrupts(&self, ring: usize) -> usize {
        self.rings[ring].interrupts.0.load(Ordering::SeqCst)
    }

    fn load(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap()
    }

    fn store(&self, address: u64, value: u16) {
        self.memory.store(value, GuestAddress(address), Ordering::SeqCst).unwrap();
    }

    pub(super) fn describe(&self, ring: usize, index: u16, address: u64, len: u32, flags: u32) {
        let descriptor: RawDescriptor = Descriptor::new(address, len, flags as u16, index.wrapping_add(1)).into();
        let at = self.rings[ring].base + u64::from(index) * 16;
        self.memory.write_obj(descriptor, GuestAddress(at)).unwrap();
    }

    /// Makes a chain available, and kicks unless the device declines.
    pub(super) fn offer(&mut self, ring: usize, head: u16) {
        self.offer_all(ring, &[head]);
    }

    /// Makes chains available together, and kicks once unless the device declines.
    pub(super) fn offer_all(&mut self, ring: usize, heads: &[u16]) {
        let (base, old) = (self.rings[ring].base, self.rings[ring].avail);
        let mut new = old;
        for head in heads {
            self.store(base + AVAIL + 4 + u64::from(new % SIZE) * 2, *head);
            new = new.wrapping_add(1);
        }
        self.rings[ring].avail = new;
        self.store(base + AVAIL + 2, new);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.load(base + USED + 4 + u64::from(SIZE) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(base + USED) & 1 == 0
        };
        if wanted {
            self.kick(ring);
        }
    }

    pub(super) fn kick(&self, ring: usize) {
        self.rings[ring].kick.write(1).unwrap();
    }

    /// Claims that this many chains are available.
    pub(super) fn corrupt_avail(&self, ring: usize, index: u16) {
        self.store(self.rings[ring].base + AVAIL + 2, index);
        self.kick(ring);
    }

    /// Takes the next completed chain: its head and length.
    pub(super) fn returned(&mut self, ring: usize) -> Option<(u16, u32)> {
        let (base, used) = (self.rings[ring].base, self.rings[ring].used);
        if self.load(base + USED + 2) == used {
            return None;
        }
        let at = GuestAddress(base + USED + 4 + u64::from(used % SIZE) * 8);
        let [head, len]: [u32; 2] = self.memory.read_obj(at).unwrap();
        self.rings[ring].used = used.wrapping_add(1);
        if self.event_idx && !self.sleeps {
            self.store(base + AVAIL + 4 + u64::from(SIZE) * 2, used.wrapping_add(1));
        }
        Some((head as u16, len))
    }

    pub(super) fn offer_rx(&mut self, indices: std::ops::Range<u16>) {
        for index in indices {
            let address = RX_BUFFERS + u64::from(index) * RX_STRIDE;
            self.describe(RX, index, address, self.rx_len, VRING_DESC_F_WRITE);
            self.offer(RX, index);
        }
    }

    /// Takes a packet of the device, if there is one, and offers its buffer again.
    pub(super) fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, header, payload) = self.take_received()?;
        self.offer(RX, head);
        Some((header, payload))
    }

    /// Takes a packet of the device, if there is one, and its buffer.
    pub(super) fn take_received(&mut self) -> Option<(u16, Header, Vec<u8>)> {
        let (head, len) = self.returned(RX)?;
        assert!(len >= HEADER_LEN as u32 && len <= self.rx_len, "{len} bytes used");
        let mut bytes = vec![0; len as usize];
        let address = RX_BUFFERS + u64::from(head) * RX_STRIDE;
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        let header = Header::parse(bytes.first_chunk().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        Some((head, header, bytes.split_off(HEADER_LEN)))
    }

    /// Waits for the next packet of the device.
    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "the device sends nothing");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// True if a packet can be sent at once.
    pub(super) fn can_send(&mut self) -> bool {
        while let Some((head, len)) = self.returned(TX) {
            assert_eq!(len, 0, "the device wrote into a buffer it may only read");
            self.tx_free.push(head);
        }
        !self.tx_free.is_empty()
    }

    pub(super) fn send(&mut self, header: &Header, payload: &[u8], layout: Layout) {
        let bytes = [&header.to_bytes()[..], payload].concat();
        self.send_bytes(&bytes, layout);
    }

    /// Sends bytes that need not be a valid packet.
    pub(super) fn send_bytes(&mut self, bytes: &[u8], layout: Layout) {
        let start = Instant::now();
        while !self.can_send() {
            assert!(start.elapsed() < Duration::from_secs(20), "the device takes no packet");
            std::thread::sleep(Duration::from_micros(50));
        }
        let slot = self.tx_free.pop().unwrap();
        let address = TX_BUFFERS + u64::from(slot) * TX_STRIDE;
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        match layout {
            Layout::One => self.describe(TX, slot, address, bytes.len() as u32, 0),
            Layout::Pieces(pieces) => {
                let table = TX_TABLES + u64::from(slot) * 0x1000;
                let size = bytes.len().div_ceil(pieces).max(1);
                let chunks: Vec<usize> = bytes.chunks(size).map(<[u8]>::len).collect();
                for (index, len) in chunks.iter().enumerate() {
                    let flags = if index + 1 < chunks.len() { VRING_DESC_F_NEXT } else { 0 };
                    let at = address + (index * size) as u64;
                    let entry: RawDescriptor = Descriptor::new(at, *len as u32, flags as u16, index as u16 + 1).into();
                    self.memory.write_obj(entry, GuestAddress(table + index as u64 * 16)).unwrap();
                }
                self.describe(TX, slot, table, chunks.len() as u32 * 16, VRING_DESC_F_INDIRECT);
            }
        }
        self.offer(TX, slot);
    }
}
