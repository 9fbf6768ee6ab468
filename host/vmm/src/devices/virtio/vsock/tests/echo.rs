//! A program in the guest that sends back what it receives, for a driver without threads.

use std::collections::{HashMap, VecDeque};

use super::machine::{answer, request};
use crate::devices::virtio::vsock::packet::{Header, Op, SHUTDOWN_BOTH};

#[derive(Default)]
struct Stream {
    back: VecDeque<u8>,
    /// Payload of the device that its buffer had and a program has read.
    fwd_cnt: u32,
    sent: u32,
    limit: u32,
    ending: bool,
    ended: bool,
}

/// The program. It accepts every stream, and ends one when the host has ended its half and everything has been sent
/// back.
#[derive(Default)]
pub(super) struct Echo {
    streams: HashMap<u32, Stream>,
    /// Streams that are over.
    pub(super) closed: usize,
}

impl Echo {
    /// Handles a packet of the device and returns the answer that it needs at once.
    pub(super) fn on_packet(&mut self, header: &Header, payload: Vec<u8>) -> Option<Header> {
        let port = header.src_port;
        let op = Op::from_wire(header.op).unwrap();
        let Some(stream) = self.streams.get_mut(&port) else {
            assert_eq!(op, Op::Request);
            self.streams.insert(port, Stream { limit: header.buf_alloc, ..Stream::default() });
            return Some(answer(header, Op::Response));
        };
        stream.limit = header.fwd_cnt.wrapping_add(header.buf_alloc);
        match op {
            Op::Rw => stream.back.extend(payload),
            Op::Shutdown => stream.ending = true,
            Op::Rst => {
                assert!(stream.ended, "the device reset a stream that was not over");
                self.streams.remove(&port);
                self.closed += 1;
            }
            Op::CreditRequest => {
                return Some(Header { fwd_cnt: stream.fwd_cnt, ..answer(header, Op::CreditUpdate) });
            }
            _ => {}
        }
        None
    }

    /// The host's ports of all streams.
    pub(super) fn ports(&self) -> Vec<u32> {
        self.streams.keys().copied().collect()
    }

    /// Returns the next packet of a stream: at most `most` bytes, or its end.
    pub(super) fn next_packet(&mut self, port: u32, most: usize) -> Option<(Header, Vec<u8>)> {
        let stream = self.streams.get_mut(&port)?;
        let from = Header { src_port: 1024, dst_port: port, ..request(0, 0) };
        let room = stream.limit.wrapping_sub(stream.sent) as usize;
        let len = stream.back.len().min(room).min(most);
        if len > 0 {
            let data: Vec<u8> = stream.back.drain(..len).collect();
            stream.sent = stream.sent.wrapping_add(len as u32);
            stream.fwd_cnt = stream.fwd_cnt.wrapping_add(len as u32);
            Some((Header { op: Op::Rw.to_wire(), len: len as u32, fwd_cnt: stream.fwd_cnt, ..from }, data))
        } else if stream.ending && stream.back.is_empty() && !stream.ended {
            stream.ended = true;
            let end = Header { op: Op::Shutdown.to_wire(), flags: SHUTDOWN_BOTH, fwd_cnt: stream.fwd_cnt, ..from };
            Some((end, Vec::new()))
        } else {
            None
        }
    }

    /// True if a stream has data to send and credit for it.
    pub(super) fn is_ready(&self) -> bool {
        self.streams.values().any(|stream| !stream.back.is_empty() && stream.limit != stream.sent)
    }
}
