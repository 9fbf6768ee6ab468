//! What the fuzz targets reach of this room. Only in tests and with the feature `fuzzing`.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up shall say so")]

use std::{net::SocketAddr, os::fd::OwnedFd, sync::Arc, time::Duration};

use bulkhead_protocol::Transport;
use virtio_queue::QueueT;
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::{
    addresses::Addresses,
    control::Setup,
    events::Token,
    frame::{Frame, VIRTIO_HEADER},
    ring::Ring,
    stack::Stack,
    tcp::Offload,
};
use crate::virtio::fuzzing;

pub use super::{dns::fuzzing::*, resolver::fuzzing::*};

/// The whole network behind the wire, with the host's real sockets.
pub struct World {
    stack: Stack,
    epoll: Arc<Epoll>,
}

impl World {
    /// A network as its defaults make it.
    pub fn new(segmentation: bool) -> Self {
        let epoll = Arc::new(Epoll::new().unwrap());
        let mut stack = Stack::new(Arc::clone(&epoll), Self::addresses());
        stack.offload = Offload { checksum: segmentation, segmentation };
        Self { stack, epoll }
    }

    /// Its addresses.
    pub fn addresses() -> Addresses {
        Addresses::new(&Setup::default()).unwrap()
    }

    /// A frame of the guest.
    pub fn receive(&mut self, frame: &[u8]) {
        self.stack.receive(frame);
    }

    /// Publishes a socket.
    pub fn publish(&mut self, id: u64, udp: bool, socket: OwnedFd, target: SocketAddr) {
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        self.stack.publish(id, transport, socket, target);
    }

    /// Ends a published port.
    pub fn forget(&mut self, id: u64) {
        self.stack.forget(id);
    }

    /// Lets the host's sockets and timers have their turn; the guest takes at most `most` frames.
    pub fn turn(&mut self, most: usize) -> Vec<Vec<u8>> {
        let mut events = [EpollEvent::default(); 16];
        let ready = self.epoll.wait(0, &mut events).unwrap();
        for event in &events[..ready] {
            self.stack.host_ready(Token::unpack(event.data()));
        }
        self.stack.run_timers();
        assert!(self.stack.timeout() >= -1);
        let frames = self.stack.out.len().min(most);
        let taken = self.stack.out.drain(..frames).map(|frame| frame.bytes).collect();
        self.stack.resume();
        taken
    }

    /// Waits for what the loopback needs.
    pub fn pause(&self) {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// The device side of both queues over any guest memory: `bytes` are its beginning. Each is laid out as
/// [`fuzzing`] says.
pub fn rings(bytes: &[u8], frames: &[usize], event_idx: bool, mergeable: bool) {
    let memory = fuzzing::memory(bytes);
    let mut ring = Ring::new().unwrap();
    ring.set_event_idx(event_idx);
    fuzzing::lay_out(&mut ring.queue);
    for len in frames {
        if ring.queue.is_valid(&memory) {
            ring.take(&memory, usize::from(fuzzing::SIZE), |frame| assert!(frame.len() <= super::frame::MOST));
            let frame = Frame { header: [1; VIRTIO_HEADER], bytes: vec![2; *len] };
            if !ring.give(&memory, &frame, mergeable) {
                let _ = ring.await_buffers(&memory);
            }
            ring.signal(&memory);
        }
    }
}
