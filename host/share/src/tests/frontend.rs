//! The vmm's file system device in front of this process, with a driver of one vCPU.

use std::{
    os::unix::net::UnixStream,
    sync::Weak,
    time::{Duration, Instant},
};

use bulkhead_vmm::{
    devices::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice, fs},
    exit::ExitSignal,
    memory,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{device::device, *};
use bulkhead_queue::GuestRam;

const SIZE: u16 = 16;
/// Queues of the device, and those of them that this driver uses: one for requests, besides the first.
const QUEUES: usize = 6;
const USED_QUEUES: usize = 2;
/// Address of a queue's parts and buffers, and their offsets.
const BASE: u64 = 0x10_0000;
const STRIDE: u64 = 0x10_000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REQUEST: u64 = 0x3000;
const REPLY: u64 = 0x8000;

struct Line(EventFd);

impl Interrupt for Line {
    fn trigger(&self) {
        self.0.write(1).unwrap();
    }

    fn event(&self) -> Option<EventFd> {
        self.0.try_clone().ok()
    }
}

struct Driver {
    memory: Arc<GuestRam>,
    kicks: Vec<EventFd>,
    lines: Vec<Arc<Line>>,
}

impl Driver {
    fn new() -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let kicks = (0..QUEUES).map(|_| event()).collect();
        let lines = (0..QUEUES).map(|_| Arc::new(Line(event()))).collect();
        Self { memory: Arc::new(memory::create(64).unwrap()), kicks, lines }
    }

    /// The state at `DRIVER_OK`, with the first `enabled` queues.
    fn activation(&self, enabled: usize) -> Activation {
        let queue = |index: usize| {
            let at = BASE + STRIDE * index as u64;
            let mut queue = Queue::new(1024).unwrap();
            queue.set_size(SIZE);
            queue.try_set_desc_table_address(GuestAddress(at)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(at + AVAILABLE)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(at + USED)).unwrap();
            queue.set_ready(true);
            let interrupt: Arc<dyn Interrupt> = Arc::<Line>::clone(&self.lines[index]);
            ActiveQueue { queue, kick: self.kicks[index].try_clone().unwrap(), interrupt }
        };
        let queues = (0..QUEUES).map(|index| (index < enabled).then(|| queue(index))).collect();
        let config_interrupt: Arc<dyn Interrupt> = Arc::<Line>::clone(&self.lines[0]);
        let exit = ExitSignal::new().unwrap();
        Activation { memory: Arc::clone(&self.memory), features: 1 << 32, queues, config_interrupt, exit }
    }

    /// Makes a request for the attributes of the root available, without a kick.
    fn ask(&self, queue: usize) {
        let at = BASE + STRIDE * queue as u64;
        let request = request(GETATTR, fuse::ROOT, own(), &[0; 16]);
        self.memory.write_slice(&request, GuestAddress(at + REQUEST)).unwrap();
        let chain = [
            (at + REQUEST, request.len() as u32, VRING_DESC_F_NEXT, 1_u16),
            (at + REPLY, 0x1000, VRING_DESC_F_WRITE, 0),
        ];
        for (index, (address, len, flags, next)) in chain.into_iter().enumerate() {
            let place = at + 16 * index as u64;
            self.memory.write_obj(address, GuestAddress(place)).unwrap();
            self.memory.write_obj(len, GuestAddress(place + 8)).unwrap();
            self.memory.write_obj([flags as u16, next], GuestAddress(place + 12)).unwrap();
        }
        let index: u16 = self.memory.read_obj(GuestAddress(at + AVAILABLE + 2)).unwrap();
        self.memory.write_obj(index.wrapping_add(1), GuestAddress(at + AVAILABLE + 2)).unwrap();
    }

    /// Waits until a queue has `count` answers, and returns the error of the last one.
    fn answered(&self, queue: usize, count: u16) -> i32 {
        let at = BASE + STRIDE * queue as u64;
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.memory.read_obj::<u16>(GuestAddress(at + USED + 2)).unwrap() != count {
            assert!(Instant::now() < deadline, "no answer");
            thread::sleep(Duration::from_millis(1));
        }
        self.memory.read_obj(GuestAddress(at + REPLY + 4)).unwrap()
    }
}

/// Starts a device, and returns what is gone when all of its threads have ended.
fn served(guest: &Guest, epoch: u32) -> (UnixStream, Weak<Server>) {
    let server = Arc::new(guest.serve(&[("", false)], epoch));
    let alive = Arc::downgrade(&server);
    (device(server), alive)
}

#[test]
fn a_driver_with_one_request_queue_is_served_through_a_change_of_processes_and_a_reset() {
    let guest = Guest::new();
    let driver = Driver::new();
    let (stream, first) = served(&guest, 5);
    let (mut device, handle) = fs::connect(stream).unwrap();
    assert_eq!((device.device_type(), device.queue_max_sizes()), (26, &[1024; QUEUES][..]));
    let mut config = [0; 40];
    device.read_config(0, &mut config);
    assert_eq!((&config[..9], &config[36..]), (&b"bulkhead\0"[..], &[4, 0, 0, 0][..]));
    assert!(device.activate(driver.activation(1)).is_err(), "no queue for requests");
    device.reset();

    device.activate(driver.activation(USED_QUEUES)).unwrap();
    driver.ask(1);
    driver.kicks[1].write(1).unwrap();
    assert_eq!(driver.answered(1, 1), 0);
    driver.lines[1].0.read().unwrap();

    // The kick for a request may have gone to a process that died before it looked.
    driver.ask(1);
    handle.replace(served(&guest, 6).0);
    assert_eq!(driver.answered(1, 2), 0);
    // It stands for a process that died before, and would serve the queue as long as it looks at it.
    let deadline = Instant::now() + Duration::from_secs(20);
    while first.strong_count() > 0 {
        assert!(Instant::now() < deadline, "the first device does not end");
        thread::sleep(Duration::from_millis(1));
    }
    device.reset();
    driver.ask(1);
    driver.kicks[1].write(1).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(driver.answered(1, 2), 0, "a device that was reset touches no memory");
}
