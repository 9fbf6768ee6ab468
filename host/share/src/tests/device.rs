//! The whole device behind a vhost-user frontend, with the threads of its queues.

use std::{
    os::unix::net::UnixStream,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::{QUEUES, REQUEST_QUEUES, event_loop, vhost::Device, worker::Worker};
use bulkhead_queue::GuestRam;

/// Size of the driver's queues, in descriptors.
const SIZE: u16 = 16;
/// Bytes of guest memory that each queue's structures and buffers have.
const STRIDE: u64 = 0x10_000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUEST: u64 = 0x3000;
const REPLY: u64 = 0x8000;
/// Bytes that each of several requests of a queue has for itself, and for its reply.
const PLACE: u64 = 0x200;

/// The driver, with memory that it shares with the device.
pub(super) struct Driver {
    frontend: Frontend,
    memory: GuestRam,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    /// Features of this kind of device that it negotiates.
    features: u64,
}

/// Starts a device of these files, which answers a frontend until it is gone.
pub(super) fn device(server: Arc<Server>) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let workers = (0..QUEUES).map(|n| Worker::spawn(n, Arc::clone(&server), || Ok(())));
    let device = Device::new(workers.collect::<Result<_, _>>().unwrap()).unwrap();
    let (control, backend) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let ended = event_loop::run(&control.into(), theirs, device);
        drop(backend);
        ended.unwrap();
    });
    ours
}

impl Driver {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self::with(stream, 0)
    }

    pub(super) fn with(stream: UnixStream, features: u64) -> Self {
        let queues = QUEUES;
        let file = tempfile::tempfile().unwrap();
        file.set_len(STRIDE * queues as u64).unwrap();
        let len = (STRIDE * queues as u64) as usize;
        let memory =
            GuestRam::from_ranges_with_files([(GuestAddress(0), len, Some(FileOffset::new(file, 0)))]).unwrap();
        let event = |_| EventFd::new(EFD_NONBLOCK).unwrap();
        let (kicks, calls) = ((0..queues).map(event).collect(), (0..queues).map(event).collect());
        let mut driver =
            Self { frontend: Frontend::from_stream(stream, queues as u64), memory, kicks, calls, features };
        driver.set_up();
        driver
    }

    fn set_up(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        frontend.set_protocol_features(protocol).unwrap();
        let protocol = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(1 << 32 | protocol | self.features).unwrap();
        let regions: Vec<_> =
            self.memory.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).collect();
        frontend.set_mem_table(&regions).unwrap();
        for index in 0..self.kicks.len() {
            let at = STRIDE * index as u64;
            let host = |address| self.memory.get_host_address(GuestAddress(address)).unwrap() as u64;
            let addresses = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: host(at),
                used_ring_addr: host(at + USED),
                avail_ring_addr: host(at + AVAILABLE),
                log_addr: None,
            };
            let base: u16 = self.memory.read_obj(GuestAddress(at + USED + 2)).unwrap();
            frontend.set_vring_num(index, SIZE).unwrap();
            frontend.set_vring_addr(index, &addresses).unwrap();
            frontend.set_vring_base(index, base).unwrap();
            frontend.set_vring_call(index, &self.calls[index]).unwrap();
            frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// Makes a request available in a queue, and kicks.
    pub(super) fn send(&self, queue: usize, request: &[u8], room: u32) {
        self.send_at(queue, 0, request, room);
    }

    /// Makes a request available in one of eight places that a queue has for them, and kicks.
    pub(super) fn send_at(&self, queue: usize, place: u64, request: &[u8], room: u32) {
        let head = self.put(queue, place, request, room);
        self.publish(queue, head);
    }

    /// Writes a request into one of these places; returns the descriptor at which its chain begins.
    fn put(&self, queue: usize, place: u64, request: &[u8], room: u32) -> u16 {
        let at = STRIDE * queue as u64;
        let (from, to) = (at + REQUEST + PLACE * place, at + REPLY + PLACE * place);
        self.memory.write_slice(request, GuestAddress(from)).unwrap();
        let descriptor = |index: u64, address: u64, len: u32, flags: u32, next: u16| {
            let table = GuestAddress(at + 16 * index);
            self.memory.write_obj(address, table).unwrap();
            self.memory.write_obj(len, GuestAddress(table.0 + 8)).unwrap();
            self.memory.write_obj([flags as u16, next], GuestAddress(table.0 + 12)).unwrap();
        };
        let head = 2 * place;
        // Without room for a reply there is one descriptor.
        let next = if room > 0 { VRING_DESC_F_NEXT } else { 0 };
        descriptor(head, from, request.len() as u32, next, head as u16 + 1);
        descriptor(head + 1, to, room, VRING_DESC_F_WRITE, 0);
        head as u16
    }

    /// True if there is a reply that was not read, to a request of this place.
    pub(super) fn is_ready(&self, queue: usize, place: u64) -> bool {
        // The id, which is behind length and error.
        self.memory.read_obj::<u64>(GuestAddress(STRIDE * queue as u64 + REPLY + PLACE * place + 8)).unwrap() != 0
    }

    /// Waits for the reply to the request of a place; returns its header.
    pub(super) fn reply_at(&self, queue: usize, place: u64) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.is_ready(queue, place) {
            assert!(Instant::now() < deadline, "no answer");
            thread::sleep(Duration::from_micros(100));
        }
        let to = GuestAddress(STRIDE * queue as u64 + REPLY + PLACE * place);
        let mut reply = vec![0; 16];
        self.memory.read_slice(&mut reply, to).unwrap();
        self.memory.write_slice(&[0; 16], to).unwrap();
        reply
    }

    /// Takes all queues back.
    pub(super) fn stop(&self) {
        for queue in 0..self.kicks.len() {
            self.frontend.get_vring_base(queue).unwrap();
        }
    }

    /// Makes the chain from this descriptor on available, and kicks.
    fn publish(&self, queue: usize, head: u16) {
        self.make_available(queue, head);
        self.kicks[queue].write(1).unwrap();
    }

    fn make_available(&self, queue: usize, head: u16) {
        let at = STRIDE * queue as u64;
        let index: u16 = self.memory.read_obj(GuestAddress(at + AVAILABLE + 2)).unwrap();
        let place = GuestAddress(at + AVAILABLE + 4 + 2 * u64::from(index % SIZE));
        self.memory.write_obj(head, place).unwrap();
        self.memory.store(index.wrapping_add(1), GuestAddress(at + AVAILABLE + 2), Ordering::SeqCst).unwrap();
    }

    /// True if the device wants a kick for the next chain (virtio 1.3, 2.7.10.1).
    fn wants_kick(&self, queue: usize) -> bool {
        let flags: u16 = self.memory.load(GuestAddress(STRIDE * queue as u64 + USED), Ordering::SeqCst).unwrap();
        u32::from(flags) & VRING_USED_F_NO_NOTIFY == 0
    }

    /// Goes on with another process, as the vmm does.
    pub(super) fn reconnect(&mut self, stream: UnixStream) {
        self.frontend = Frontend::from_stream(stream, self.kicks.len() as u64);
        self.set_up();
        for event in &self.kicks {
            event.write(1).unwrap();
        }
    }

    /// Waits until all requests of a queue are answered, whether an interrupt came or not; returns the last reply.
    pub(super) fn completed(&self, queue: usize) -> Vec<u8> {
        let at = STRIDE * queue as u64;
        let index = |place| self.memory.read_obj::<u16>(GuestAddress(at + place + 2)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while index(USED) != index(AVAILABLE) {
            assert!(Instant::now() < deadline, "no answer");
            thread::sleep(Duration::from_millis(1));
        }
        self.calls[queue].write(1).unwrap();
        self.receive(queue)
    }

    /// Gives the device a buffer of this size for what it has to tell.
    pub(super) fn offer(&self, queue: usize, room: u32) {
        let at = STRIDE * queue as u64;
        self.memory.write_obj(at + REPLY, GuestAddress(at)).unwrap();
        self.memory.write_obj(room, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj([VRING_DESC_F_WRITE as u16, 0], GuestAddress(at + 12)).unwrap();
        self.publish(queue, 0);
    }

    /// Waits for the interrupt of a queue; returns the reply.
    pub(super) fn receive(&self, queue: usize) -> Vec<u8> {
        let at = STRIDE * queue as u64;
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.calls[queue].read().is_err() {
            assert!(Instant::now() < deadline, "no interrupt");
            thread::sleep(Duration::from_millis(1));
        }
        let index: u16 = self.memory.read_obj(GuestAddress(at + USED + 2)).unwrap();
        let element = at + USED + 4 + 8 * u64::from(index.wrapping_sub(1) % SIZE);
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(element)).unwrap();
        assert_eq!(head, 0);
        let mut reply = vec![0; len as usize];
        self.memory.read_slice(&mut reply, GuestAddress(at + REPLY)).unwrap();
        reply
    }

    pub(super) fn call(&self, queue: usize, opcode: u32, node: u64, body: Request) -> Vec<u8> {
        self.send(queue, &request(opcode, node, own(), &body.0), 0x4000);
        self.receive(queue)
    }
}

#[test]
fn every_queue_serves_files_and_another_process_goes_on_with_them() {
    let guest = Guest::new();
    std::fs::write(guest.path("file"), b"contents").unwrap();
    let shares = [("", false)];
    let mut driver = Driver::new(device(Arc::new(guest.serve(&shares, 5))));
    let (_, config) = driver.frontend.get_config(0, 40, VhostUserConfigFlags::WRITABLE, &[0; 40]).unwrap();
    assert_eq!((&config[..9], config[36..40].to_vec()), (&b"bulkhead\0"[..], vec![REQUEST_QUEUES as u8, 0, 0, 0]));
    assert_eq!(driver.frontend.get_queue_num().unwrap(), QUEUES as u64);

    let read = |driver: &Driver, queue: usize| {
        let mut node = fuse::ROOT;
        for name in guest.path("file").components().skip(1) {
            node = entry(&driver.call(queue, LOOKUP, node, body().name(name))[16..]).0;
        }
        let handle = u64_at(&driver.call(queue, OPEN, node, body().u32(0).u32(0)), 16);
        let whole = body().u64(handle).u64(3).u32(100).u32(0).u64(0).u64(0);
        (node, driver.call(queue, READ, node, whole)[16..].to_vec())
    };
    let mut node = 0;
    for queue in 0..QUEUES {
        let (found, data) = read(&driver, queue);
        assert_eq!(data, b"tents");
        node = found;
    }
    // Queues that are taken back are not served, and stand where they ended.
    let base = driver.frontend.get_vring_base(1).unwrap();
    driver.send(1, &request(GETATTR, fuse::ROOT, own(), &[0; 16]), 0x4000);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(STRIDE + USED + 2)).unwrap(), base as u16);

    // A successor takes the queues over in the middle of the connection: no FUSE_INIT, and nodes of the old one.
    for queue in 0..QUEUES {
        driver.frontend.get_vring_base(queue).unwrap();
    }
    driver.frontend = Frontend::from_stream(device(Arc::new(guest.serve(&shares, 6))), QUEUES as u64);
    driver.set_up();
    driver.kicks[1].write(1).unwrap();
    assert_eq!(attributes(&driver.receive(1)[32..]).mode, libc::S_IFDIR | 0o555);
    let stale = driver.call(2, GETATTR, node, body().u64(0).u64(0));
    assert_eq!(u32_at(&stale, 4).cast_signed(), -libc::ESTALE);
    assert_eq!(read(&driver, 3).1, b"tents");
}

#[test]
fn a_driver_that_forgets_many_files_neither_kicks_nor_is_interrupted_for_each() {
    const FORGOTTEN: u16 = 400;
    let guest = Guest::new();
    let driver = Driver::new(device(Arc::new(guest.serve(&[("", false)], 5))));
    let forget = request(FORGET, fuse::ROOT, own(), &body().u64(0).0);
    let head = driver.put(0, 0, &forget, 0);
    let used = || driver.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    let (mut kicks, mut interrupts) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(20);
    for number in 1..=FORGOTTEN {
        driver.make_available(0, head);
        if driver.wants_kick(0) {
            driver.kicks[0].write(1).unwrap();
            kicks += 1;
        }
        // The queue has room for as many.
        while number - used() >= SIZE {
            assert!(Instant::now() < deadline, "{number} is not completed");
            thread::sleep(Duration::from_micros(50));
        }
        interrupts += driver.calls[0].read().unwrap_or(0);
    }
    // The last ones are announced, and then the device waits for a kick.
    while used() != FORGOTTEN || !driver.wants_kick(0) {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
    let last = driver.calls[0].read().unwrap_or(0);
    assert!(last > 0 || interrupts > 0);
    assert!(kicks < FORGOTTEN / 2 && interrupts + last < u64::from(FORGOTTEN) / 2, "{kicks} {interrupts}");
}

#[test]
fn a_request_that_the_device_refuses_leaves_it_usable() {
    let guest = Guest::new();
    let driver = Driver::new(device(Arc::new(guest.serve(&[("", false)], 5))));
    driver.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    // A queue that is served, one of an impossible size, a feature that was not offered, a queue that is nowhere.
    assert!(driver.frontend.set_vring_num(1, 16).is_err());
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 0);
    assert!(driver.frontend.set_vring_num(0, 3).is_err());
    assert!(driver.frontend.set_features(1 << 63).is_err());
    let nowhere = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    assert!(driver.frontend.set_vring_addr(0, &nowhere).is_err());
    let reply = driver.call(3, GETATTR, fuse::ROOT, body().u64(0).u64(0));
    assert_eq!(u32_at(&reply, 4), 0);
}
