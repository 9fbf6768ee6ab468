//! A host stream in memory, and a guest that behaves like Linux, for tests of the state machine.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, ErrorKind},
    rc::Rc,
    time::Instant,
};

use crate::devices::virtio::vsock::{
    connection::{Connection, Reply},
    credit::PACKET_OVERHEAD,
    packet::{Header, Op},
    segments::{self, Segment},
    stream::HostStream,
};

/// Actions and observations of the host program at the other end of the stream.
#[expect(clippy::struct_excessive_bools, reason = "independent observations")]
#[derive(Debug, Default)]
pub(super) struct Host {
    /// Written by the program, not read by the device yet.
    pub(super) outgoing: VecDeque<u8>,
    /// The program shut its writing side.
    pub(super) eof: bool,
    /// Written by the device.
    pub(super) incoming: Vec<u8>,
    /// Number of bytes that the device may write before it would block.
    pub(super) space: usize,
    /// The program does not read any more.
    pub(super) deaf: bool,
    /// The device shut its writing side: the program reads the end of the stream.
    pub(super) saw_eof: bool,
    /// The device shut its reading side: the program's writes fail.
    pub(super) refused: bool,
    /// The device ended the stream.
    pub(super) finished: bool,
    /// Calls of the device that would have blocked.
    pub(super) blocked: usize,
}

/// The device's end.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryStream(pub(super) Rc<RefCell<Host>>);

impl MemoryStream {
    /// A stream whose program reads this many bytes without delay.
    pub(super) fn with_space(space: usize) -> Self {
        let stream = Self::default();
        stream.0.borrow_mut().space = space;
        stream
    }

    fn take_in(&self, pieces: &[&[u8]]) -> io::Result<usize> {
        let mut host = self.0.borrow_mut();
        if host.deaf || host.finished {
            return Err(ErrorKind::BrokenPipe.into());
        }
        assert!(!host.saw_eof, "the device writes after it ended the stream");
        let all = pieces.concat();
        let len = all.len().min(host.space);
        if len == 0 {
            host.blocked += 1;
            return Err(ErrorKind::WouldBlock.into());
        }
        host.space -= len;
        host.incoming.extend(&all[..len]);
        Ok(len)
    }
}

impl HostStream for MemoryStream {
    fn read(&mut self, into: &[Segment<'_>]) -> io::Result<usize> {
        let mut host = self.0.borrow_mut();
        assert!(segments::total(into) > 0, "an empty read looks like the end of the stream");
        if host.outgoing.is_empty() {
            if host.eof {
                return Ok(0);
            }
            host.blocked += 1;
            return Err(ErrorKind::WouldBlock.into());
        }
        let len = segments::total(into).min(host.outgoing.len());
        let bytes: Vec<u8> = host.outgoing.drain(..len).collect();
        Ok(segments::copy_in(into, &bytes))
    }

    fn write(&mut self, from: &[Segment<'_>]) -> io::Result<usize> {
        let mut bytes = vec![0; segments::total(from)];
        segments::copy_out(from, &mut bytes);
        self.take_in(&[&bytes])
    }

    fn write_bytes(&mut self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        self.take_in(&[first, second])
    }

    fn shutdown_write(&mut self) {
        self.0.borrow_mut().saw_eof = true;
    }

    fn shutdown_read(&mut self) {
        self.0.borrow_mut().refused = true;
    }

    fn finish(&mut self) {
        let mut host = self.0.borrow_mut();
        host.finished = true;
        host.saw_eof = true;
        host.refused = true;
    }

    fn is_at_end(&self) -> bool {
        let host = self.0.borrow();
        host.eof && host.outgoing.is_empty()
    }

    fn is_abandoned(&self) -> bool {
        self.is_at_end() && self.0.borrow().deaf
    }
}

/// The guest's side of one connection: its credit both ways and its application.
#[derive(Debug)]
pub(super) struct Guest {
    /// The credit that the guest announces.
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
    /// Packets that its application has not read.
    pub(super) queue: VecDeque<VecDeque<u8>>,
    /// Bytes its application read.
    pub(super) received: Vec<u8>,
    told: u32,
    sent: u32,
    device_buf_alloc: u32,
    device_fwd_cnt: u32,
    /// `SHUTDOWN` flags of the device.
    pub(super) shutdown: u32,
    /// The device accepted the connection.
    pub(super) accepted: bool,
    /// The device sent an RST.
    pub(super) reset: bool,
    /// The device asked for credit and the guest has not answered.
    pub(super) asked: bool,
}

impl Guest {
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            fwd_cnt: 0,
            queue: VecDeque::new(),
            received: Vec::new(),
            told: 0,
            sent: 0,
            device_buf_alloc: 0,
            device_fwd_cnt: 0,
            shutdown: 0,
            accepted: false,
            reset: false,
            asked: false,
        }
    }

    /// A header from the guest, stamped.
    pub(super) fn header(&mut self, op: Op, len: usize, flags: u32) -> Header {
        self.told = self.fwd_cnt;
        Header {
            op: op.to_wire(),
            len: len as u32,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    pub(super) fn control(&mut self, connection: &mut Connection<MemoryStream>, op: Op, flags: u32, now: Instant) {
        let header = self.header(op, 0, flags);
        connection.receive(op, &header, &[], now);
    }

    /// Bytes that the guest may send.
    pub(super) fn may_send(&self) -> usize {
        self.device_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.device_fwd_cnt)) as usize
    }

    /// Sends data, cut into pieces as descriptors would.
    pub(super) fn send(&mut self, connection: &mut Connection<MemoryStream>, data: &[u8], pieces: usize, now: Instant) {
        let header = self.header(Op::Rw, data.len(), 0);
        self.sent = self.sent.wrapping_add(data.len() as u32);
        let mut copy = data.to_vec();
        let size = data.len().div_ceil(pieces.max(1)).max(1);
        let payload: Vec<Segment<'_>> = copy.chunks_mut(size).map(Into::into).collect();
        connection.receive(Op::Rw, &header, &payload, now);
    }

    /// Offers one receive buffer of this size; returns what the device put into it.
    pub(super) fn poll(
        &mut self,
        connection: &mut Connection<MemoryStream>,
        size: usize,
        now: Instant,
    ) -> Option<Reply> {
        let mut buffer = vec![0; size];
        let half = size / 2;
        let (first, second) = buffer.split_at_mut(half);
        let space: Vec<Segment<'_>> =
            [first, second].into_iter().filter(|piece| !piece.is_empty()).map(Into::into).collect();
        let reply = connection.next_packet(&space, now)?;
        drop(space);
        (self.device_buf_alloc, self.device_fwd_cnt) = connection.stamp();
        match reply.op {
            Op::Rw => {
                assert!(reply.len > 0 && reply.len <= size);
                buffer.truncate(reply.len);
                self.queue.push_back(buffer.into());
                let bytes: usize = self.queue.iter().map(VecDeque::len).sum();
                let charged = bytes + self.queue.len() * PACKET_OVERHEAD as usize;
                let fits = charged <= self.buf_alloc as usize || self.queue.len() == 1;
                assert!(fits && bytes <= self.buf_alloc as usize, "the guest would reset: {charged} bytes charged");
            }
            Op::Shutdown => self.shutdown |= reply.flags,
            Op::Response => self.accepted = true,
            Op::Rst => self.reset = true,
            Op::CreditRequest => self.asked = true,
            Op::CreditUpdate | Op::Request => {}
        }
        Some(reply)
    }

    /// Lets the application read. Like Linux, the guest sends an update only if its buffer looks nearly full.
    pub(super) fn read(&mut self, connection: &mut Connection<MemoryStream>, mut len: usize, now: Instant) {
        while len > 0 {
            let Some(packet) = self.queue.front_mut() else { break };
            let part = packet.len().min(len);
            self.received.extend(packet.drain(..part));
            len -= part;
            if packet.is_empty() {
                self.queue.pop_front();
            }
            self.fwd_cnt = self.fwd_cnt.wrapping_add(part as u32);
        }
        let seen_free = self.buf_alloc.saturating_sub(self.fwd_cnt.wrapping_sub(self.told));
        if seen_free < self.buf_alloc / 4 {
            self.control(connection, Op::CreditUpdate, 0, now);
        }
    }

    /// Answers a request for credit.
    pub(super) fn answer(&mut self, connection: &mut Connection<MemoryStream>, now: Instant) {
        if std::mem::take(&mut self.asked) {
            self.control(connection, Op::CreditUpdate, 0, now);
        }
    }
}
