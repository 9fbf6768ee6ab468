//! Entry points of the fuzz targets into this module. Only in tests and with the feature `fuzzing`.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has to fail")]

use std::{io, net::SocketAddr, os::fd::OwnedFd, sync::Arc, time::Duration};

use bulkhead_protocol::Transport;
use virtio_queue::QueueT;
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::{
    addresses::Addresses,
    api::Setup,
    events::{Token, ending},
    frame::{Frame, VIRTIO_HEADER},
    key::Key,
    offload::{Head, Offload},
    ring::{Ring, RxSink},
    sink::FrameSink,
    stack::Stack,
};
use bulkhead_queue::fuzzing;

pub use super::{dns::fuzzing::*, hosts::fuzzing::*, resolver::fuzzing::*};

/// The whole network behind the queues, with the host's real sockets.
pub struct World {
    stack: Stack,
    epoll: Arc<Epoll>,
}

impl World {
    /// A network with default settings.
    pub fn new(segmentation: bool) -> Self {
        let epoll = Arc::new(Epoll::new().unwrap());
        let mut stack = Stack::new(Arc::clone(&epoll), Self::addresses());
        stack.offload = Offload { checksum: segmentation, segmentation };
        Self { stack, epoll }
    }

    /// The addresses of every such network.
    pub fn addresses() -> Addresses {
        Addresses::new(&Setup::default()).unwrap()
    }

    /// Takes a frame of the guest.
    pub fn receive(&mut self, frame: &[u8]) {
        self.stack.receive_copy(frame);
    }

    /// Publishes a socket.
    pub fn publish(&mut self, id: u64, udp: bool, socket: OwnedFd, target: SocketAddr) {
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        self.stack.publish(id, transport, socket, target);
    }

    /// Closes a published port.
    pub fn forget(&mut self, id: u64) {
        self.stack.forget(id);
    }

    /// Handles the host's sockets and timers once; the guest takes at most `most` frames.
    pub fn turn(&mut self, most: usize) -> Vec<Vec<u8>> {
        let mut events = [EpollEvent::default(); 16];
        let ready = self.epoll.wait(0, &mut events).unwrap();
        for event in &events[..ready] {
            self.stack.host_ready(Token::unpack(event.data()), ending(event));
        }
        self.stack.run_timers();
        assert!(self.stack.timeout() >= -1);
        take(&mut self.stack, most).into_iter().map(|frame| frame.bytes).collect()
    }

    /// Waits until the loopback has delivered.
    pub fn pause(&self) {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Takes at most `most` frames as the guest does.
pub(super) fn take(stack: &mut Stack, most: usize) -> Vec<Frame> {
    let waiting = stack.out.len().min(most);
    let mut taken = Frames { frames: stack.out.drain(..waiting).collect(), most };
    stack.send(&mut taken);
    stack.resume();
    taken.frames
}

/// A guest that takes a limited number of frames.
pub(super) struct Frames {
    /// Frames that it has taken.
    pub(super) frames: Vec<Frame>,
    /// Number of frames that it takes.
    pub(super) most: usize,
}

impl FrameSink for Frames {
    fn take(
        &mut self,
        head: usize,
        most: usize,
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>> {
        if self.frames.len() >= self.most {
            return None;
        }
        let mut bytes = vec![0; head + most];
        let result = read(&[VolatileSlice::from(&mut bytes[head..])]);
        if let Ok(len @ 1..) = result {
            let sealed = seal(len);
            assert_eq!(sealed.bytes().len(), head);
            bytes[..head].copy_from_slice(sealed.bytes());
            bytes.truncate(head + len);
            self.frames.push(Frame { header: sealed.header, bytes });
        }
        Some(result)
    }
}

/// The device side of both queues over any guest memory that begins with `bytes`, each laid out as [`fuzzing`] says.
pub fn rings(bytes: &[u8], frames: &[usize], event_idx: bool, mergeable: bool) {
    let memory = fuzzing::memory(bytes);
    let mut ring = Ring::new().unwrap();
    ring.queue.queue_mut().set_event_idx(event_idx);
    fuzzing::lay_out(ring.queue.queue_mut());
    for len in frames {
        if ring.queue.queue().is_valid(&memory) {
            ring.pop_frames(&memory, usize::from(fuzzing::SIZE), |frame| {
                assert!(frame.len() <= super::frame::MAX_FRAME);
            });
            let frame = Frame { header: [1; VIRTIO_HEADER], bytes: vec![2; *len] };
            if !ring.push_frame(&memory, &frame, mergeable) {
                let _ = ring.enable_kick(&memory);
            }
            let mut sink = RxSink { ring: &mut ring, memory: &memory, mergeable };
            let fill = &mut |parts: &[VolatileSlice<'_>]| {
                assert!(parts.iter().map(VolatileSlice::len).sum::<usize>() <= *len);
                Ok(parts.iter().map(|part| part.len() - part.len() / 3).sum())
            };
            let seal = &mut |len| Head::new(key(), (1, 2), 3, true, len, 1000);
            if sink.take(super::offload::head_len(&key()), *len, fill, seal).is_none() {
                let _ = ring.enable_kick(&memory);
            }
            ring.signal(&memory);
        }
    }
}

fn key() -> Key {
    Key { guest: ([192, 168, 65, 3], 1).into(), peer: ([192, 168, 65, 254], 2).into() }
}
