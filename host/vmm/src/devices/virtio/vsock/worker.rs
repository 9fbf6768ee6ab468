//! The device's thread, with one epoll for the queues' kicks, the hybrid socket, all streams and the handle's requests.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use virtio_queue::DescriptorChain;
use vmm_sys_util::{
    epoll::{ControlOperation, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    muxer::{Endpoint, Muxer},
    packet::{HEADER_LEN, Header},
    segments::{self, Access, Segment},
    stream::{HostStream, SocketStream},
};
use crate::{
    devices::virtio::{ActiveQueue, RunningQueue},
    memory::GuestRam,
};

/// Maximum number of connect requests that wait for a guest whose driver is not up.
const MAX_PENDING: usize = 1024;

/// Maximum number of packets in one direction before the other has its turn.
const BUDGET: usize = 64;

// Tokens of the events that are not a stream's; streams have tokens from `muxer::FIRST_TOKEN` on.
const CONTROL: u64 = 0;
const KICK_RX: u64 = 1;
const KICK_TX: u64 = 2;
const LISTENER: u64 = 3;

/// A request to connect a host stream to a port of the guest.
#[derive(Debug)]
pub(super) struct ConnectRequest {
    pub(super) guest_port: u32,
    pub(super) stream: OwnedFd,
}

/// State that the device, its handles and the thread share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Requests that no thread has taken yet; `None` once the device is gone.
    pending: Mutex<Option<VecDeque<ConnectRequest>>>,
    wake: EventFd,
    stop: AtomicBool,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            pending: Mutex::new(Some(VecDeque::new())),
            wake: EventFd::new(EFD_NONBLOCK)?,
            stop: AtomicBool::new(false),
        })
    }

    /// Queues a request for the thread. If too many wait or the device is gone, the stream is closed.
    pub(super) fn request(&self, request: ConnectRequest) {
        match &mut *self.pending() {
            Some(pending) if pending.len() < MAX_PENDING => pending.push_back(request),
            // Each holds a descriptor, and a guest whose driver never comes up would let them pile up.
            Some(_) => {
                tracing::warn!(port = request.guest_port, "rejecting a vsock stream: too many wait for the guest");
                // Its sender may have a copy, which keeps one that is only closed open.
                SocketStream::new(request.stream).finish();
                return;
            }
            None => return,
        }
        self.wake();
    }

    /// Closes the streams that wait, and those of later requests.
    pub(super) fn close(&self) {
        *self.pending() = None;
    }

    /// Ends the thread, or allows a new one to run.
    pub(super) fn set_stop(&self, stop: bool) {
        self.stop.store(stop, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then the event is raised anyway.
        let _ = self.wake.write(1);
    }

    fn take_pending(&self) -> VecDeque<ConnectRequest> {
        self.pending().as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn pending(&self) -> MutexGuard<'_, Option<VecDeque<ConnectRequest>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything that the thread needs.
pub(super) struct Parts {
    pub(super) memory: Arc<GuestRam>,
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
    /// Kept but never used: its one event reports a migration (5.10.6.7), which does not happen.
    pub(super) event: Option<ActiveQueue>,
    pub(super) endpoint: Endpoint,
    pub(super) shared: Arc<Shared>,
}

/// Sets up everything that can fail, before the thread runs.
pub(super) fn prepare(parts: &Parts) -> io::Result<Muxer> {
    let muxer = Muxer::new(parts.endpoint.clone(), LISTENER)?;
    for (fd, token) in [
        (parts.shared.wake.as_raw_fd(), CONTROL),
        (parts.rx.kick.as_raw_fd(), KICK_RX),
        (parts.tx.kick.as_raw_fd(), KICK_TX),
    ] {
        // Edge-triggered: each write to an eventfd is an edge, so its counter need not be read, which saves a call for
        // each.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        muxer.epoll().ctl(ControlOperation::Add, fd, event)?;
    }
    Ok(muxer)
}

/// Runs the device until it is stopped.
pub(super) fn run(parts: Parts, muxer: Muxer) -> io::Result<()> {
    let Parts { memory, rx, tx, event: _event, endpoint: _, shared } = parts;
    let mut worker = Worker {
        memory: &memory,
        shared: &shared,
        rx: rx.run(),
        tx: tx.run(),
        tx_waits: true,
        muxer,
        chain: Vec::new(),
        payload: Vec::new(),
    };
    worker.run()
}

struct Worker<'m> {
    memory: &'m GuestRam,
    shared: &'m Shared,
    rx: RunningQueue,
    tx: RunningQueue,
    /// The transmit queue may hold packets.
    tx_waits: bool,
    muxer: Muxer,
    /// Scratch lists, kept for their allocations: the memory of a chain, and the part of it for the payload.
    chain: Vec<Segment<'m>>,
    payload: Vec<Segment<'m>>,
}

impl<'m> Worker<'m> {
    fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        // Buffers and requests may have come before the thread, and their events are not repeated.
        let mut more = true;
        self.connect_pending(Instant::now());
        while !self.shared.stop.load(Ordering::Acquire) {
            // With work left the events are only collected, so that a busy connection does not delay the others.
            let timeout = if more { 0 } else { self.sleep_ms() };
            let count = match self.muxer.epoll().wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            let now = Instant::now();
            for event in &events[..count] {
                match event.data() {
                    CONTROL => self.connect_pending(now),
                    // The receive queue is looked at below in any case.
                    KICK_RX => {}
                    KICK_TX => self.tx_waits = true,
                    LISTENER => self.muxer.accept(now),
                    token => self.muxer.event(token, event.event_set(), now),
                }
            }
            self.muxer.expire(now);
            // Packets of the guest before packets for it: they bring credit, and RSTs that make others unnecessary.
            self.transmit(now);
            let output_left = self.receive(now);
            // A stalled transmit queue waits for receive buffers, whose kick continues it; a broken one waits for a
            // reset.
            more = output_left || (self.tx_waits && !self.muxer.is_stalled() && !self.tx.queue.is_broken());
        }
        Ok(())
    }

    /// Returns the timeout for `epoll_wait`, rounded up: when the thread wakes, the deadline has passed.
    fn sleep_ms(&self) -> i32 {
        match self.muxer.timeout(Instant::now()) {
            None => -1,
            Some(timeout) => i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX),
        }
    }

    fn connect_pending(&mut self, now: Instant) {
        for ConnectRequest { guest_port, stream } in self.shared.take_pending() {
            self.muxer.connect(guest_port, SocketStream::new(stream), false, now);
        }
    }

    /// Handles a bounded number of packets of the guest.
    fn transmit(&mut self, now: Instant) {
        if !self.tx_waits {
            return;
        }
        // A driver need not kick a queue that is being looked at.
        self.tx.queue.disable_notifications(self.memory);
        for _ in 0..BUDGET {
            // The packet might have to be answered with an RST for which there is no room (5.10.6.1). The chain stays
            // in the queue, so that the driver sees it as not processed.
            if self.muxer.is_stalled() {
                break;
            }
            if let Some(chain) = self.tx.queue.pop(self.memory) {
                let head = chain.head_index();
                self.take_packet(chain, now);
                self.tx.queue.complete(self.memory, head, 0);
            // Only an empty queue asks for kicks; if a chain came meanwhile, the loop takes it.
            } else if !self.tx.queue.enable_notifications(self.memory) {
                self.tx_waits = false;
                break;
            }
        }
        // One interrupt for the batch.
        self.tx.notify(self.memory);
    }

    /// Handles a packet of the guest. Its header is copied once and never read from guest memory again, so the guest
    /// cannot change it between check and use.
    fn take_packet(&mut self, chain: DescriptorChain<&'m GuestRam>, now: Instant) {
        // A malformed chain or one without a complete header names no connection: it is returned and has no other
        // effect.
        let Ok(total) = segments::gather(self.memory, chain, Access::Readable, &mut self.chain) else {
            return;
        };
        let mut bytes = [0; HEADER_LEN];
        if segments::copy_out(&self.chain, &mut bytes) < HEADER_LEN {
            return;
        }
        let header = Header::parse(&bytes);
        // The chain may be longer than the packet (5.10.6). A packet longer than its chain violates the protocol, which
        // ends its connection.
        let len = header.len as usize;
        segments::window(self.chain.iter().copied(), HEADER_LEN, len, &mut self.payload);
        let complete = len <= total - HEADER_LEN;
        self.muxer.transmit(&header, complete.then_some(&self.payload[..]), now);
    }

    /// Gives the guest a bounded number of packets; true if there may be more, and buffers for them.
    fn receive(&mut self, now: Instant) -> bool {
        if !self.muxer.has_output() {
            return false;
        }
        self.rx.queue.disable_notifications(self.memory);
        let mut budget = BUDGET;
        while budget > 0 && self.muxer.has_output() {
            // A buffer is taken before it is certain that there is a packet: the payload is read straight into it.
            let position = self.rx.queue.position();
            let Some(chain) = self.rx.queue.pop(self.memory) else {
                // Out of buffers: the kick for the next one continues. None is needed if one has come in this moment.
                if self.rx.queue.enable_notifications(self.memory) {
                    self.rx.queue.disable_notifications(self.memory);
                    continue;
                }
                break;
            };
            budget -= 1;
            let head = chain.head_index();
            if let Some(len) = self.fill(chain, now) {
                self.rx.queue.complete(self.memory, head, len);
            } else {
                // No packet after all. The buffer stays available, and connections that may have become ready are tried
                // in the next round.
                self.rx.queue.rewind(position);
                budget = 0;
                break;
            }
        }
        self.rx.notify(self.memory);
        budget == 0 && self.muxer.has_output()
    }

    /// Writes a packet into a buffer and returns the number of bytes used; `None` if there is no packet. A buffer that
    /// cannot hold a packet is returned empty.
    fn fill(&mut self, chain: DescriptorChain<&'m GuestRam>, now: Instant) -> Option<u32> {
        let gathered = segments::gather(self.memory, chain, Access::Writable, &mut self.chain);
        if gathered.is_err() || gathered.is_ok_and(|total| total < HEADER_LEN) {
            return Some(0);
        }
        // The payload goes behind the header, which is written last, when the length is known.
        segments::window(self.chain.iter().copied(), HEADER_LEN, usize::MAX, &mut self.payload);
        let Some(header) = self.muxer.next_packet(&self.payload, now) else {
            // A buffer for a header only cannot take the data for which it was chosen. It is returned, or it would
            // block the queue forever.
            return self.payload.is_empty().then_some(0);
        };
        segments::copy_in(&self.chain, &header.to_bytes());
        Some(HEADER_LEN as u32 + header.len)
    }
}
