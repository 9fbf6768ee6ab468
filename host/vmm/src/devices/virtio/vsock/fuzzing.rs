//! Entry points of the fuzz targets.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has to fail")]

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_queue::QueueT;
use vmm_sys_util::epoll::EpollEvent;

use super::{
    hybrid::{MAX_LINE, RequestParser},
    muxer::{Endpoint, Muxer},
    offers::Offers,
    packet::{HEADER_LEN, Header},
    segments::{self, Access},
    stream::SocketStream,
};
use bulkhead_queue::fuzzing;

/// The guest's context ID in [`World`].
pub const CID: u64 = 3;
/// Length of a packet's header in bytes.
pub const HEADER: usize = HEADER_LEN;
const LISTENER: u64 = 1;
const MAX_CONNECTIONS: usize = 8;

/// The connections of a device, with real sockets, without queues and without a thread.
pub struct World {
    muxer: Muxer,
    offers: Arc<Offers>,
    now: Instant,
    hosts: Vec<UnixStream>,
}

impl World {
    /// Creates a device whose hybrid socket is this non-blocking listener.
    pub fn new(listener: &Arc<UnixListener>) -> Self {
        let offers = Arc::new(Offers::new());
        let endpoint = Endpoint {
            guest_cid: CID,
            offers: Arc::clone(&offers),
            listener: Arc::clone(listener),
            clients_listen: true,
            max_connections: MAX_CONNECTIONS,
        };
        Self { muxer: Muxer::new(endpoint, LISTENER).unwrap(), offers, now: Instant::now(), hosts: Vec::new() }
    }

    /// Sends a packet of the guest.
    pub fn transmit(&mut self, header: &[u8; HEADER], payload: &mut [u8]) {
        let header = Header::parse(header);
        let complete = header.len as usize <= payload.len();
        let end = payload.len().min(header.len as usize);
        let segment = [(&mut payload[..end]).into()];
        self.muxer.transmit(&header, complete.then_some(&segment[..]), self.now);
    }

    /// Receives the guest's next packet in a buffer with this much room for payload, and returns its header.
    pub fn receive(&mut self, room: usize) -> Option<[u8; HEADER]> {
        let mut buffer = vec![0_u8; room];
        let header = self.muxer.next_packet(&[buffer.as_mut_slice().into()], self.now)?;
        assert!(header.len as usize <= room);
        Some(header.to_bytes())
    }

    /// Connects a client on the host to a port of the guest.
    pub fn connect(&mut self, port: u32) {
        if self.hosts.len() < MAX_CONNECTIONS {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            self.hosts.push(ours);
            self.muxer.connect(port, SocketStream::new(theirs.into()), false, self.now);
        }
    }

    /// Offers a stream for the guest's next connection to a port of the host.
    pub fn offer(&mut self, port: u32) {
        if self.hosts.len() < MAX_CONNECTIONS {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            self.hosts.push(ours);
            self.offers.put(port, theirs.into());
        }
    }

    /// Lets a client of the hybrid socket listen at a port of the host.
    pub fn listen(&mut self, listener: &UnixListener, port: u32) {
        if self.hosts.len() < MAX_CONNECTIONS {
            let address = listener.local_addr().unwrap();
            let mut client = UnixStream::connect_addr(&address).unwrap();
            client.write_all(format!("LISTEN {port}\n").as_bytes()).unwrap();
            client.set_nonblocking(true).unwrap();
            self.hosts.push(client);
        }
    }

    /// Lets a client on the host write, read and, if it `leaves`, close its stream.
    pub fn host(&mut self, index: usize, bytes: &[u8], leaves: bool) {
        if self.hosts.is_empty() {
            return;
        }
        let index = index % self.hosts.len();
        let _ = self.hosts[index].write(bytes);
        let _ = self.hosts[index].read(&mut [0; 4096]);
        if leaves {
            self.hosts.swap_remove(index);
        }
    }

    /// Handles the events of sockets, and timers after some more time.
    pub fn turn(&mut self, later: Duration) {
        self.now += later;
        let mut events = [EpollEvent::default(); 16];
        let count = self.muxer.epoll().wait(0, &mut events).unwrap();
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.muxer.accept(self.now),
                token => self.muxer.event(token, event.event_set(), self.now),
            }
        }
        self.muxer.expire(self.now);
        assert!(self.muxer.len() <= MAX_CONNECTIONS);
    }
}

/// Parses a host client's first line, in pieces of `piece` bytes.
pub fn hybrid_line(line: &[u8], piece: usize) {
    let mut parser = RequestParser::default();
    let mut taken = 0;
    for part in line.chunks(piece.max(1)) {
        let (len, progress) = parser.feed(part);
        taken += len;
        if progress != super::hybrid::Progress::Partial {
            break;
        }
    }
    assert!(taken <= MAX_LINE);
}

/// Gathers packets from the chains in arbitrary guest memory, which starts with `bytes` and is laid out as in
/// [`fuzzing`].
pub fn chains(bytes: &[u8]) {
    let (memory, mut queue) = (fuzzing::memory(bytes), fuzzing::queue());
    let (mut chain, mut payload) = (Vec::new(), Vec::new());
    for turn in 0..fuzzing::SIZE {
        let access = if turn % 2 == 0 { Access::Readable } else { Access::Writable };
        let Some(descriptors) = queue.pop_descriptor_chain(&memory) else { break };
        let head = descriptors.head_index();
        if let Ok(total) = segments::gather(&memory, descriptors, access, &mut chain) {
            assert_eq!(total, segments::total(&chain));
            let mut header = [0; HEADER_LEN];
            if segments::copy_out(&chain, &mut header) == HEADER_LEN {
                let len = Header::parse(&header).len as usize;
                segments::window(chain.iter().copied(), HEADER_LEN, len, &mut payload);
                assert_eq!(segments::total(&payload), len.min(total - HEADER_LEN));
            }
        }
        let _ = queue.add_used(&memory, head, 0);
    }
}
