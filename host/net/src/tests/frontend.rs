//! The vmm's vhost-user frontend against this backend, over a real socket.

use std::{
    io::Read,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use vhost::vhost_user::BackendReqHandler;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::{
    epoll::Epoll,
    eventfd::{EFD_NONBLOCK, EventFd},
};

use bulkhead_vhost_user::Backend;
use bulkhead_vmm::{
    devices::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice, net},
    exit::ExitSignal,
    memory,
};

use crate::{addresses, vhost::Device};

/// A backend that answers until the frontend is gone.
fn backend() -> (UnixStream, Arc<Mutex<Backend<Device>>>, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (device, answering) = answer(theirs);
    (ours, device, answering)
}

/// Answers a frontend's requests until its stream is closed.
fn answer(theirs: UnixStream) -> (Arc<Mutex<Backend<Device>>>, JoinHandle<()>) {
    let device = Arc::new(Mutex::new(Backend::new(Device::new(Arc::new(Epoll::new().unwrap())).unwrap())));
    let mut handler = BackendReqHandler::from_stream(theirs, Arc::clone(&device));
    (device, thread::spawn(move || while handler.handle_request().is_ok() {}))
}

struct Line(EventFd);

impl Interrupt for Line {
    fn trigger(&self) {
        self.0.write(1).unwrap();
    }

    fn event(&self) -> Option<EventFd> {
        Some(self.0.try_clone().unwrap())
    }
}

fn activation(lines: &[Arc<Line>; 2]) -> Activation {
    let memory = Arc::new(memory::create(64).unwrap());
    // The first driver's used index, where every backend begins.
    memory.write_obj(7_u16, GuestAddress(0x3000 + 2)).unwrap();
    let queue = |base: u64| {
        let mut queue = Queue::new(1024).unwrap();
        queue.set_size(128);
        queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(base + 0x1000)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(base + 0x2000)).unwrap();
        queue.set_ready(true);
        queue
    };
    let queues = [0x1000, 0x8000].iter().zip(lines).map(|(base, line)| {
        let interrupt: Arc<dyn Interrupt> = Arc::<Line>::clone(line);
        Some(ActiveQueue { queue: queue(*base), kick: EventFd::new(EFD_NONBLOCK).unwrap(), interrupt })
    });
    let queues = queues.collect();
    let config_interrupt: Arc<dyn Interrupt> = Arc::<Line>::clone(&lines[0]);
    Activation { memory, features: 1 << 32 | 1 << 5, queues, config_interrupt, exit: ExitSignal::new().unwrap() }
}

fn lines() -> [Arc<Line>; 2] {
    [0, 1].map(|_| Arc::new(Line(EventFd::new(EFD_NONBLOCK).unwrap())))
}

#[test]
fn the_driver_sees_the_backends_address_and_mtu() {
    let (stream, _device, answering) = backend();
    let (net, handle) = net::connect(stream).unwrap();
    let mut config = [0xff; 16];
    net.read_config(0, &mut config);
    assert_eq!(config[10..], [&addresses::MTU.to_le_bytes()[..], &[0; 4]].concat());
    assert_eq!(config[0] & 3, 2, "a locally administered unicast address");
    assert!(net.features() & (1 << 5 | 1 << 3) == 1 << 5 | 1 << 3);
    assert_eq!(net.features() & (1 << 30), 0, "vhost-user's own bit is none of the driver's");
    drop((net, handle));
    answering.join().unwrap();
}

#[test]
fn a_backends_signal_becomes_its_queues_interrupt_and_a_successor_takes_over_until_reset() {
    let (stream, first, _answering) = backend();
    let (mut net, handle) = net::connect(stream).unwrap();
    let lines = lines();
    net.activate(activation(&lines)).unwrap();
    let signal = |device: &Mutex<Backend<Device>>, queue: usize| {
        let device = device.lock().unwrap();
        assert!(device.rings[queue].runs());
        device.rings[queue].call.as_ref().unwrap().write(1).unwrap();
    };
    signal(&first, 1);
    lines[1].0.read().unwrap();

    let (stream, second, _answering) = backend();
    handle.replace(stream);
    signal(&second, 0);
    lines[0].0.read().unwrap();
    assert_eq!(second.lock().unwrap().rings[0].queue.position(), 7);

    net.reset();
    assert!(!second.lock().unwrap().rings.iter().any(crate::ring::Ring::runs));
}

#[test]
fn what_a_dead_backend_did_not_tell_is_told_when_its_successor_takes_over() {
    let (stream, _first, _answering) = backend();
    let (mut net, handle) = net::connect(stream).unwrap();
    let lines = lines();
    net.activate(activation(&lines)).unwrap();
    // It may have died between an answer in the used ring and its signal, or between a kick and what was kicked for.
    let (stream, second, _answering) = backend();
    handle.replace(stream);
    let second = second.lock().unwrap();
    for (ring, line) in second.rings.iter().zip(&lines) {
        assert!(line.0.read().is_ok(), "no interrupt");
        assert!(ring.kicked(), "no kick");
    }
}

#[test]
fn a_backend_that_is_gone_costs_the_network_and_nothing_else() {
    let (stream, theirs) = UnixStream::pair().unwrap();
    let end = theirs.try_clone().unwrap();
    let (_device, answering) = answer(theirs);
    let (mut net, handle) = net::connect(stream).unwrap();
    let (dead, other) = UnixStream::pair().unwrap();
    drop(other);
    handle.replace(dead);
    end.shutdown(std::net::Shutdown::Both).unwrap();
    answering.join().unwrap();
    net.activate(activation(&lines())).unwrap();
    net.reset();
}

#[test]
fn a_successor_that_hangs_does_not_hold_up_the_thread_that_received_it() {
    let (stream, _device, _answering) = backend();
    let (_net, handle) = net::connect(stream).unwrap();
    let successors = handle.follow(&ExitSignal::new().unwrap()).unwrap();
    let (ours, mut silent) = UnixStream::pair().unwrap();
    let (next, _next_silent) = UnixStream::pair().unwrap();
    let begun = Instant::now();
    successors.replace(ours);
    successors.replace(next);
    // An answer may take five seconds.
    assert!(begun.elapsed() < Duration::from_secs(2));
    // The device does ask it meanwhile.
    silent.read_exact(&mut [0]).unwrap();
}

#[test]
fn what_does_not_speak_vhost_user_is_no_backend() {
    let (stream, other) = UnixStream::pair().unwrap();
    drop(other);
    assert!(net::connect(stream).is_err());
}
