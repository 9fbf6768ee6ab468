//! One connection, step by step.

use std::time::Instant;

use super::model::{Guest, Host, MemoryStream};
use crate::devices::virtio::vsock::{
    connection::{Connection, Key, LINGER_TIMEOUT, Phase, REQUEST_TIMEOUT, Readiness, Reply},
    credit::BUF_ALLOC,
    packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
};

const KEY: Key = Key { host_port: 70, guest_port: 7 };
const PAGE: usize = 4096;

/// A connection, its guest and its host.
struct Pair {
    connection: Connection<MemoryStream>,
    guest: Guest,
    stream: MemoryStream,
    now: Instant,
}

impl Pair {
    /// Opened by the guest and accepted.
    fn established(buf_alloc: u32, space: usize) -> Self {
        let (stream, now) = (MemoryStream::with_space(space), Instant::now());
        let mut guest = Guest::new(buf_alloc);
        let request = guest.header(Op::Request, 0, 0);
        let connection = Connection::from_guest(KEY, stream.clone(), false, &request);
        let mut pair = Self { connection, guest, stream, now };
        assert_eq!(pair.poll(), Some(Reply { op: Op::Response, flags: 0, len: 0 }));
        pair
    }

    /// Opened by the host, request not sent.
    fn requested(announce: bool) -> Self {
        let (stream, now) = (MemoryStream::with_space(usize::MAX), Instant::now());
        let connection = Connection::from_host(KEY, stream.clone(), announce, now);
        Self { connection, guest: Guest::new(256 << 10), stream, now }
    }

    fn poll(&mut self) -> Option<Reply> {
        self.guest.poll(&mut self.connection, PAGE, self.now)
    }

    fn ops(&mut self) -> Vec<Op> {
        std::iter::from_fn(|| self.poll().map(|reply| reply.op)).collect()
    }

    fn control(&mut self, op: Op, flags: u32) {
        self.guest.control(&mut self.connection, op, flags, self.now);
    }

    fn guest_sends(&mut self, data: &[u8]) {
        self.guest.send(&mut self.connection, data, 3, self.now);
    }

    fn host(&self) -> std::cell::RefMut<'_, Host> {
        self.stream.0.borrow_mut()
    }

    fn host_sends(&mut self, data: &[u8]) {
        self.host().outgoing.extend(data);
        self.ready(Readiness { readable: true, ..Readiness::default() });
    }

    fn host_ends(&mut self) {
        self.host().eof = true;
        self.ready(Readiness { readable: true, ..Readiness::default() });
    }

    /// The host program closes its socket altogether.
    fn host_leaves(&mut self) {
        self.host().eof = true;
        self.host().deaf = true;
        self.ready(Readiness { readable: true, writable: true, hung_up: true });
    }

    fn host_reads(&mut self, space: usize) {
        self.host().space = space;
        self.ready(Readiness { writable: true, ..Readiness::default() });
    }

    fn ready(&mut self, readiness: Readiness) {
        self.connection.ready(readiness, self.now);
    }

    fn guest_reads_all(&mut self) -> Vec<u8> {
        while self.poll().is_some() {}
        self.guest.read(&mut self.connection, usize::MAX, self.now);
        std::mem::take(&mut self.guest.received)
    }
}

#[test]
fn half_close_by_the_host_still_lets_the_guest_send() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.host_sends(b"stdin");
    pair.host_ends();
    assert_eq!(pair.ops(), [Op::Rw, Op::Shutdown]);
    assert_eq!(pair.guest.shutdown, SHUTDOWN_SEND, "the host still receives");
    pair.guest_sends(b"stdout");
    assert_eq!(pair.host().incoming, b"stdout");
    assert!(!pair.host().saw_eof);
    pair.control(Op::Shutdown, SHUTDOWN_BOTH);
    assert_eq!(pair.ops(), [Op::Rst]);
    assert_eq!(pair.connection.phase(), Phase::Gone);
    assert!(pair.host().saw_eof);
}

#[test]
fn half_close_by_the_guest_still_lets_the_host_send() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.guest_sends(b"last words");
    pair.control(Op::Shutdown, SHUTDOWN_SEND);
    assert!(pair.host().saw_eof && !pair.host().refused && !pair.host().finished);
    pair.host_sends(b"answer");
    assert_eq!(pair.guest_reads_all(), b"answer");
    pair.host_ends();
    assert_eq!(pair.ops(), [Op::Shutdown]);
    assert_eq!(pair.guest.shutdown, SHUTDOWN_BOTH);
}

#[test]
fn the_end_of_the_guests_stream_waits_until_the_buffer_has_drained() {
    let mut pair = Pair::established(256 << 10, 2);
    pair.guest_sends(b"slowly");
    pair.control(Op::Shutdown, SHUTDOWN_SEND);
    assert!(!pair.host().saw_eof);
    pair.host_reads(3);
    assert!(!pair.host().saw_eof);
    pair.host_reads(100);
    assert!(pair.host().saw_eof);
    assert_eq!(pair.host().incoming, b"slowly");
}

#[test]
fn a_close_by_the_guest_is_confirmed_only_when_the_host_has_everything() {
    let mut pair = Pair::established(256 << 10, 2);
    pair.guest_sends(b"slowly");
    pair.control(Op::Shutdown, SHUTDOWN_BOTH);
    assert!(pair.host().refused, "the host need not write any more");
    assert_eq!(pair.ops(), []);
    pair.host_reads(100);
    assert_eq!(pair.ops(), [Op::Rst]);
    assert_eq!(pair.host().incoming, b"slowly");
}

#[test]
fn a_guest_that_gives_up_waiting_does_not_cost_a_slow_reader_its_bytes() {
    let mut pair = Pair::established(256 << 10, 2);
    pair.guest_sends(b"slowly");
    pair.control(Op::Shutdown, SHUTDOWN_BOTH);
    pair.control(Op::Rst, 0);
    assert_eq!(pair.connection.phase(), Phase::Orphaned);
    assert!(!pair.connection.wants_to_send());
    pair.host_reads(100);
    assert_eq!(pair.connection.phase(), Phase::Gone);
    assert_eq!(pair.host().incoming, b"slowly");
}

#[test]
fn an_orphan_ends_when_its_reader_leaves() {
    let mut pair = Pair::established(256 << 10, 0);
    pair.guest_sends(b"lost");
    pair.control(Op::Rst, 0);
    assert_eq!(pair.connection.phase(), Phase::Orphaned);
    pair.host_leaves();
    assert_eq!(pair.connection.phase(), Phase::Gone);
}

#[test]
fn a_host_that_leaves_ends_both_directions_for_the_guest() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.host_sends(b"bye");
    pair.host_leaves();
    assert_eq!(pair.ops(), [Op::Rw, Op::Shutdown]);
    assert_eq!(pair.guest.shutdown, SHUTDOWN_BOTH);
    assert_eq!(pair.connection.phase(), Phase::Closing);
    pair.control(Op::Rst, 0);
    assert_eq!(pair.connection.phase(), Phase::Gone);
}

#[test]
fn a_hang_up_after_the_hosts_half_close_ends_the_other_half_too() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.host_ends();
    assert_eq!(pair.ops(), [Op::Shutdown]);
    pair.host_leaves();
    assert_eq!(pair.ops(), [Op::Shutdown]);
    assert_eq!(pair.guest.shutdown, SHUTDOWN_BOTH);
}

#[test]
fn bytes_of_a_host_that_reads_no_more_still_arrive() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.host().deaf = true;
    pair.guest_sends(b"nobody reads this");
    assert_eq!(pair.ops(), [Op::Shutdown]);
    assert_eq!(pair.guest.shutdown, SHUTDOWN_RECEIVE);
    pair.host_sends(b"but this is read");
    assert_eq!(pair.guest_reads_all(), b"but this is read");
    pair.guest_sends(b"in flight when the guest heard of it");
    assert_eq!(pair.connection.phase(), Phase::Established);
}

#[test]
fn a_close_needs_no_credit() {
    let mut pair = Pair::established(1600, usize::MAX);
    pair.host_sends(&[7; 1024]);
    assert_eq!(pair.ops(), [Op::Rw]);
    pair.host_sends(&[7; 5000]);
    assert_eq!(pair.ops(), [], "credit is used up");
    pair.control(Op::Shutdown, SHUTDOWN_BOTH);
    assert_eq!(pair.ops(), [Op::Rst]);

    let mut pair = Pair::established(1600, usize::MAX);
    pair.host_sends(&[7; 1024]);
    assert_eq!(pair.ops(), [Op::Rw]);
    pair.host_leaves();
    assert_eq!(pair.ops().first(), Some(&Op::Shutdown), "the end of the stream waits for no credit");
    assert_eq!(pair.guest.shutdown, SHUTDOWN_BOTH);
}

#[test]
fn an_end_that_the_guest_does_not_confirm_is_enforced() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.host_leaves();
    assert_eq!(pair.ops(), [Op::Shutdown]);
    let deadline = pair.connection.next_deadline().unwrap();
    assert_eq!(deadline, pair.now + LINGER_TIMEOUT);
    pair.connection.expire(deadline);
    assert_eq!(pair.ops(), [Op::Rst]);
    assert_eq!(pair.connection.phase(), Phase::Gone);
}

#[test]
fn both_halves_closed_one_by_one_end_the_connection() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.control(Op::Shutdown, SHUTDOWN_SEND);
    pair.host_ends();
    assert_eq!(pair.ops(), [Op::Shutdown]);
    assert!(pair.host().finished);
    pair.control(Op::Shutdown, SHUTDOWN_BOTH);
    assert_eq!(pair.ops(), [Op::Rst]);
}

#[test]
fn the_host_reads_ok_and_its_port_only_when_the_guest_accepts() {
    let mut pair = Pair::requested(true);
    assert_eq!(pair.ops(), [Op::Request]);
    assert!(pair.host().incoming.is_empty());
    pair.control(Op::Response, 0);
    assert_eq!(pair.host().incoming, b"OK 70\n");
    pair.guest_sends(b"data");
    assert_eq!(pair.host().incoming, b"OK 70\ndata");
    assert_eq!(pair.connection.stamp().1, 4, "the greeting is not the guest's data");
}

#[test]
fn a_greeting_that_waits_is_not_counted_as_the_guests_data() {
    let mut pair = Pair::requested(true);
    pair.host().space = 2;
    pair.ops();
    pair.control(Op::Response, 0);
    pair.guest_sends(b"data");
    assert_eq!(pair.connection.stamp().1, 0);
    pair.host_reads(100);
    assert_eq!(pair.host().incoming, b"OK 70\ndata");
    assert_eq!(pair.connection.stamp().1, 4);
}

#[test]
fn a_stream_handed_in_reads_no_greeting() {
    let mut pair = Pair::requested(false);
    assert_eq!(pair.ops(), [Op::Request]);
    pair.control(Op::Response, 0);
    assert!(pair.host().incoming.is_empty());
}

#[test]
fn nothing_is_read_from_the_host_before_the_guest_accepts() {
    let mut pair = Pair::requested(false);
    pair.host_sends(b"early");
    assert_eq!(pair.ops(), [Op::Request]);
    assert_eq!(pair.host().outgoing.len(), 5);
    pair.control(Op::Response, 0);
    assert_eq!(pair.guest_reads_all(), b"early");
}

#[test]
fn a_refused_request_just_closes_the_stream() {
    let mut pair = Pair::requested(true);
    pair.ops();
    pair.control(Op::Rst, 0);
    assert_eq!(pair.connection.phase(), Phase::Gone);
    assert!(pair.host().finished && pair.host().incoming.is_empty());
}

#[test]
fn an_unanswered_request_ends_with_an_rst() {
    let mut pair = Pair::requested(true);
    pair.ops();
    assert_eq!(pair.connection.next_deadline(), Some(pair.now + REQUEST_TIMEOUT));
    pair.connection.expire(pair.now + REQUEST_TIMEOUT);
    assert!(pair.host().finished);
    assert_eq!(pair.ops(), [Op::Rst]);
}

#[test]
fn a_request_whose_host_left_is_withdrawn_unless_it_left_a_message() {
    let mut pair = Pair::requested(false);
    pair.host_leaves();
    assert_eq!(pair.connection.phase(), Phase::Gone, "the guest never heard of it");

    let mut pair = Pair::requested(false);
    pair.ops();
    pair.host_leaves();
    assert_eq!(pair.ops(), [Op::Rst]);

    let mut pair = Pair::requested(false);
    pair.ops();
    pair.host().outgoing.extend(b"note");
    pair.host_leaves();
    pair.control(Op::Response, 0);
    assert_eq!(pair.guest_reads_all(), b"note");
    assert_eq!(pair.guest.shutdown, SHUTDOWN_BOTH, "a hang-up is said once and must not be forgotten");
}

#[test]
fn packets_that_do_not_fit_the_state_are_answered_with_rst() {
    for op in [Op::Rw, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest, Op::Request] {
        let mut pair = Pair::requested(false);
        pair.ops();
        pair.control(op, 0);
        assert_eq!(pair.ops(), [Op::Rst], "{op:?} before the response");
    }
    for op in [Op::Request, Op::Response] {
        let mut pair = Pair::established(256 << 10, usize::MAX);
        pair.control(op, 0);
        assert_eq!(pair.ops(), [Op::Rst], "{op:?} twice");
    }
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.control(Op::Shutdown, SHUTDOWN_SEND);
    pair.guest_sends(b"after the end");
    assert_eq!(pair.ops(), [Op::Rst]);
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset_and_its_bytes_are_not_kept() {
    let mut pair = Pair::established(256 << 10, 0);
    let chunk = vec![1; 64 << 10];
    for _ in 0..BUF_ALLOC as usize / chunk.len() {
        pair.guest_sends(&chunk);
    }
    assert_eq!(pair.connection.buffered(), BUF_ALLOC as usize);
    pair.guest_sends(&[1]);
    assert_eq!(pair.connection.buffered(), 0);
    assert_eq!(pair.ops(), [Op::Rst]);
}

#[test]
fn a_host_that_catches_up_gives_the_guest_new_credit() {
    let mut pair = Pair::established(256 << 10, 0);
    pair.guest_sends(&vec![1; BUF_ALLOC as usize]);
    assert_eq!(pair.ops(), []);
    assert_eq!(pair.guest.may_send(), 0);
    pair.host_reads(usize::MAX);
    assert_eq!(pair.ops(), [Op::CreditUpdate]);
    assert_eq!(pair.guest.may_send(), BUF_ALLOC as usize);
}

#[test]
fn a_request_for_credit_is_answered() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.control(Op::CreditRequest, 0);
    assert_eq!(pair.ops(), [Op::CreditUpdate]);
}

#[test]
fn a_stream_without_credit_asks_again_and_again_but_not_all_the_time() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    for _ in 0..1000 {
        pair.host_sends(b"x");
        while pair.poll().is_some_and(|reply| reply.op == Op::Rw) {}
    }
    assert!(pair.guest.asked, "a guest with this much space in bytes tells nothing by itself");
    assert!(!pair.connection.wants_to_send(), "it would spin");
    assert!(!pair.host().outgoing.is_empty());
    let mut asked = 0;
    let start = pair.now;
    while pair.now < start + std::time::Duration::from_secs(2) {
        pair.now = pair.connection.next_deadline().unwrap();
        pair.connection.expire(pair.now);
        assert_eq!(pair.ops(), [Op::CreditRequest]);
        asked += 1;
    }
    assert!((8..30).contains(&asked), "{asked} requests in two seconds");
    pair.guest.read(&mut pair.connection, usize::MAX, pair.now);
    pair.guest.answer(&mut pair.connection, pair.now);
    assert!(pair.ops().contains(&Op::Rw));
    assert_eq!(pair.connection.next_deadline(), None);
}

#[test]
fn host_bytes_are_coalesced_into_full_buffers() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    for _ in 0..PAGE {
        pair.host().outgoing.extend(b"ab");
    }
    pair.ready(Readiness { readable: true, ..Readiness::default() });
    assert_eq!(pair.ops(), [Op::Rw, Op::Rw]);
}

#[test]
fn a_buffer_without_room_for_data_is_not_taken_for_the_end() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    pair.host_sends(b"data");
    assert_eq!(pair.guest.poll(&mut pair.connection, 0, pair.now), None);
    assert_eq!(pair.guest_reads_all(), b"data");
}

#[test]
fn an_idle_stream_makes_no_calls() {
    let mut pair = Pair::established(256 << 10, usize::MAX);
    assert_eq!(pair.ops(), []);
    let blocked = pair.host().blocked;
    assert!(!pair.connection.wants_to_send());
    pair.control(Op::CreditUpdate, 0);
    assert_eq!(pair.ops(), []);
    assert_eq!(pair.host().blocked, blocked, "readiness is remembered, not tried again");
}
