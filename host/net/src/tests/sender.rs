//! Data from a host's socket to a guest that loses segments, has small windows and answers late.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
};

use proptest::{collection::vec, prelude::*};
use smoltcp::time::{Duration, Instant};

use crate::{
    addresses::example,
    frame::{ETHERNET_HEADER, Frame},
    fuzzing::Frames,
    key::Key,
    offload::{self, SEGMENT},
    tcp::sender::{Sender, Sent},
};

fn key(v6: bool) -> Key {
    let addresses = example();
    if v6 {
        return Key { guest: (addresses.guest6, 9).into(), peer: (addresses.host6, 80).into() };
    }
    Key { guest: (addresses.guest, 9).into(), peer: (addresses.host, 80).into() }
}

/// A host's connection; the second is its far end.
fn connection() -> [TcpStream; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let host = listener.accept().unwrap().0;
    host.set_nonblocking(true).unwrap();
    [host, far]
}

const ACK: u8 = 16;
const SYN: u8 = 2;

/// A TCP header with these options.
fn segment(sequence: u32, ack: u32, flags: u8, window: u16, options: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 9, 0, 80];
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(ack.to_be_bytes());
    bytes.extend([(5 + options.len() as u8 / 4) << 4, flags]);
    bytes.extend(window.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(options);
    bytes
}

fn number(segment: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(segment[at..at + 4].try_into().unwrap())
}

/// A sender after the handshake, for a guest whose window has this scale.
fn connected(host: &TcpStream, v6: bool, begin: u32, scale: u8) -> Sender {
    let mut sender = Sender::new(key(v6), host, 65_535).unwrap();
    sender.on_ack(&mut segment(6, 0, SYN, 60_000, &[3, 3, scale, 0]), Instant::ZERO);
    sender.rewrite_seq(&mut segment(begin.wrapping_sub(1), 7, SYN | ACK, 65_535, &[3, 3, 4, 0]));
    sender
}

/// The receiver of the data: a guest that keeps no segment that comes out of order.
struct Guest<'a> {
    begin: u32,
    v6: bool,
    reference: &'a [u8],
    received: usize,
    /// The furthest that its windows have reached.
    edge: usize,
}

impl Guest<'_> {
    /// Takes a frame; true when it answers.
    fn take(&mut self, frame: &Frame) -> bool {
        let tcp = &frame.bytes[ETHERNET_HEADER + if self.v6 { 40 } else { 20 }..];
        let data = &tcp[20..];
        assert_eq!((number(tcp, 8), &tcp[14..16]), (7, &4095_u16.to_be_bytes()[..]));
        if data.is_empty() {
            return true;
        }
        let from = number(tcp, 4).wrapping_sub(self.begin) as usize;
        assert!(from + data.len() <= self.edge, "{from} and {} are beyond {}", data.len(), self.edge);
        assert!(data == &self.reference[from..from + data.len()], "wrong data at {from}");
        if from <= self.received {
            self.received = self.received.max(from + data.len());
        }
        true
    }

    fn answer(&mut self, sender: &mut Sender, window: u32, scale: u8, now: Instant) {
        let shown = (window >> scale).min(0xffff) as u16;
        self.edge = self.edge.max(self.received + (usize::from(shown) << scale));
        let ack = self.begin.wrapping_add(self.received as u32);
        let mut bytes = segment(7, ack, ACK, shown, &[]);
        assert!(sender.on_ack(&mut bytes, now));
        // For smoltcp nothing has changed.
        assert_eq!(number(&bytes, 8), self.begin);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_byte_arrives_in_order_whatever_is_lost_and_no_window_is_exceeded(
        sizes in vec(1_usize..150_000, 1..12),
        begin in prop_oneof![any::<u32>(), Just(u32::MAX - 70_000), Just(0x7fff_ff00)],
        scale in 0_u8..15,
        windows in vec(prop_oneof![Just(0_u32), 1_u32..3000, 10_000_u32..400_000], 1..8),
        lost in vec(any::<bool>(), 1..16),
        answered in vec(any::<bool>(), 1..8),
        rooms in vec(0_usize..6, 1..8),
        v6: bool,
    ) {
        let reference: Vec<u8> = (0..sizes.iter().sum()).map(|at: usize| (at ^ at >> 7 ^ at >> 15) as u8).collect();
        let [host, mut far] = connection();
        let mut sender = connected(&host, v6, begin, scale);
        let mut guest = Guest { begin, v6, reference: &reference, received: 0, edge: 0 };
        let data = reference.clone();
        let writer = thread::spawn(move || {
            let mut rest = &data[..];
            for size in sizes {
                far.write_all(&rest[..size]).unwrap();
                rest = &rest[size..];
            }
            far.shutdown(Shutdown::Write).unwrap();
            far
        });
        let (mut windows, mut lost) = (windows.iter().cycle(), lost.iter().cycle());
        let (mut answered, mut rooms) = (answered.iter().cycle(), rooms.iter().cycle());
        let (mut now, mut ended) = (Instant::ZERO, false);
        for turn in 0_u32.. {
            prop_assert!(turn < 100_000, "{} of {} bytes: {sender:?}", guest.received, reference.len());
            // From some turn on nothing is lost and everything has room, or a case of bad luck alone would never end.
            let kind = turn > 200;
            let mut frames = Frames { frames: Vec::new(), most: if kind { 9 } else { *rooms.next().unwrap() } };
            let mut readable = !ended;
            if sender.send(&host, (&mut readable, true), SEGMENT, now, &mut frames).unwrap() == Sent::End {
                ended = true;
            }
            now += Duration::from_millis(if turn % 4 == 0 { 700 } else { 1 });
            frames.frames.extend(sender.expire(now));
            let mut answers = false;
            for frame in &frames.frames {
                answers |= (kind || !lost.next().unwrap()) && guest.take(frame);
            }
            if turn == 0 || kind || answers && *answered.next().unwrap() {
                let window = if kind { 100_000 } else { *windows.next().unwrap() };
                guest.answer(&mut sender, window, scale, now);
            }
            sender.discard(&host, turn % 3 == 0).unwrap();
            if ended && sender.is_empty() {
                break;
            }
            thread::yield_now();
        }
        prop_assert_eq!(guest.received, reference.len());
        sender.discard(&host, true).unwrap();
        // Nothing is left, so the far end sees an end and no reset.
        drop(host);
        prop_assert_eq!(writer.join().unwrap().read(&mut [0; 9]).unwrap(), 0);
    }

    #[test]
    fn no_segment_makes_it_panic(
        segments in vec((vec(any::<u8>(), 0..70), any::<bool>(), 0_u32..200_000), 0..40), begin: u32,
    ) {
        let [host, mut far] = connection();
        let mut sender = connected(&host, false, begin, 14);
        far.write_all(&[7; 3000]).unwrap();
        let mut now = Instant::ZERO;
        for (mut bytes, sound, pause) in segments {
            if sound && bytes.len() >= 20 {
                let ack = begin.wrapping_add(u32::from(bytes[8]));
                bytes[8..12].copy_from_slice(&ack.to_be_bytes());
                bytes[12] = 5 << 4;
                bytes[13] |= ACK;
            }
            let mut frames = Frames { frames: Vec::new(), most: 3 };
            if bytes.get(13).is_some_and(|flags| flags & 1 == 1) {
                sender.rewrite_seq(&mut bytes);
            }
            sender.on_ack(&mut bytes, now);
            now += Duration::from_millis(pause.into());
            sender.expire(now);
            let _ = sender.send(&host, (&mut true, true), SEGMENT, now, &mut frames);
            let _ = sender.discard(&host, pause % 2 == 0);
        }
    }
}

#[test]
fn smoltcps_segments_follow_the_data_and_its_keep_alive_repeats_a_byte() {
    let [host, mut far] = connection();
    let mut sender = connected(&host, false, 1000, 0);
    let mut guest = Guest { begin: 1000, v6: false, reference: &[1; 300], received: 0, edge: 0 };
    guest.answer(&mut sender, 5000, 0, Instant::ZERO);
    let mut frames = Frames { frames: Vec::new(), most: 1 };
    far.write_all(&[1; 300]).unwrap();
    while frames.frames.is_empty() {
        sender.send(&host, (&mut true, true), SEGMENT, Instant::ZERO, &mut frames).unwrap();
    }
    // With data in flight: an acknowledgement of smoltcp's, and its keep-alive.
    let mut plain = segment(1000, 8, ACK, 9, &[]);
    sender.rewrite_seq(&mut plain);
    let mut keep_alive = segment(999, 8, ACK, 9, &[]);
    keep_alive.push(0);
    sender.rewrite_seq(&mut keep_alive);
    assert_eq!((number(&plain, 4), number(&keep_alive, 4)), (1300, 999));
    // The guest's acknowledgement of smoltcp's FIN, one beyond the data.
    let mut bytes = segment(8, 1301, ACK, 9, &[]);
    assert!(!sender.on_ack(&mut bytes, Instant::ZERO));
    assert_eq!(number(&bytes, 8), 1001);
    // A keep-alive of the guest is one before its next byte, and for smoltcp to answer.
    assert!(!sender.on_ack(&mut segment(7, 1300, ACK, 9, &[]), Instant::ZERO));
    assert!(sender.is_empty());
}

#[test]
fn three_acknowledgements_of_one_byte_bring_the_lost_segment_again_at_once() {
    let [host, mut far] = connection();
    let mut sender = connected(&host, false, 0, 7);
    let reference = vec![5; 40_000];
    let mut guest = Guest { begin: 0, v6: false, reference: &reference, received: 0, edge: 0 };
    guest.answer(&mut sender, 1 << 20, 7, Instant::ZERO);
    let data = reference.clone();
    let writer = thread::spawn(move || far.write_all(&data));
    let mut sent = Frames { frames: Vec::new(), most: usize::MAX };
    while sent.frames.iter().map(|frame| frame.bytes.len() - 54).sum::<usize>() < reference.len() {
        sender.send(&host, (&mut true, true), SEGMENT, Instant::ZERO, &mut sent).unwrap();
    }
    writer.join().unwrap().unwrap();
    let mut again = Frames { frames: Vec::new(), most: 9 };
    for _ in 0..3 {
        assert!(again.frames.is_empty());
        guest.answer(&mut sender, 1 << 20, 7, Instant::ZERO);
        sender.send(&host, (&mut false, true), SEGMENT, Instant::ZERO, &mut again).unwrap();
    }
    assert_eq!(again.frames.len(), 1);
    assert_eq!(number(&again.frames[0].bytes[34..], 4), 0);
    guest.received = reference.len();
    guest.answer(&mut sender, 1 << 20, 7, Instant::ZERO);
    assert!(sender.is_empty() && sender.timer().is_none());
}

#[test]
fn a_window_that_stays_closed_is_probed() {
    let [host, mut far] = connection();
    let mut sender = connected(&host, false, 0, 0);
    let mut guest = Guest { begin: 0, v6: false, reference: b"abc", received: 0, edge: 0 };
    guest.answer(&mut sender, 0, 0, Instant::ZERO);
    far.write_all(b"abc").unwrap();
    let mut frames = Frames { frames: Vec::new(), most: 9 };
    assert_eq!(sender.send(&host, (&mut true, true), SEGMENT, Instant::ZERO, &mut frames).unwrap(), Sent::Idle);
    let first = sender.timer().unwrap();
    let probe = sender.expire(first).unwrap();
    let tcp = &probe.bytes[ETHERNET_HEADER + 20..];
    assert_eq!((number(tcp, 4), tcp.len()), (u32::MAX, 20));
    assert!(sender.timer().unwrap() - first > Duration::from_secs(1), "the next pause is longer");
    guest.answer(&mut sender, 10, 0, first);
    assert!(frames.frames.is_empty());
    while frames.frames.is_empty() {
        sender.send(&host, (&mut true, true), SEGMENT, first, &mut frames).unwrap();
    }
    assert!(guest.take(&frames.frames[0]));
    assert_eq!(guest.received, 3);
}

#[test]
fn a_short_peek_is_the_last_unless_the_end_may_be_behind_it() {
    for ending in [false, true] {
        let [host, mut far] = connection();
        let mut sender = connected(&host, false, 0, 0);
        let mut guest = Guest { begin: 0, v6: false, reference: b"abc", received: 0, edge: 0 };
        guest.answer(&mut sender, 60_000, 0, Instant::ZERO);
        far.write_all(b"abc").unwrap();
        far.shutdown(Shutdown::Write).unwrap();
        thread::sleep(std::time::Duration::from_millis(50));
        let (mut frames, mut readable) = (Frames { frames: Vec::new(), most: 9 }, true);
        let sent = sender.send(&host, (&mut readable, ending), SEGMENT, Instant::ZERO, &mut frames).unwrap();
        assert_eq!((sent, frames.frames.len()), (if ending { Sent::End } else { Sent::Idle }, 1));
        assert!(!readable);
    }
}

/// Bytes in the socket.
fn left(host: &TcpStream) -> usize {
    crate::socket::set_peek_offset(host, 0).unwrap();
    host.peek(&mut vec![0; 100_000]).unwrap_or(0)
}

#[test]
fn a_socket_keeps_nothing_that_the_guest_has_when_nothing_is_under_way() {
    for sizes in [vec![128, 128], vec![60_000, 7168, 1]] {
        let [host, mut far] = connection();
        let reference = vec![1; sizes.iter().sum()];
        let mut sender = connected(&host, false, 0, 0);
        let mut guest = Guest { begin: 0, v6: false, reference: &reference, received: 0, edge: 0 };
        guest.answer(&mut sender, 60_000, 0, Instant::ZERO);
        let mut sum = 0;
        for size in sizes {
            far.write_all(&reference[..size]).unwrap();
            sum += size;
            while guest.received < sum {
                let mut frames = Frames { frames: Vec::new(), most: 9 };
                sender.send(&host, (&mut true, true), SEGMENT, Instant::ZERO, &mut frames).unwrap();
                assert!(frames.frames.iter().all(|frame| guest.take(frame)));
            }
            guest.answer(&mut sender, 60_000, 0, Instant::ZERO);
            sender.discard(&host, false).unwrap();
            assert_eq!(left(&host), 0, "{size}");
        }
    }
}

/// A guest whose window has closed over data in flight, which it dropped, and opens again after this many seconds.
fn reopened(seconds: u64) -> (Sender, [TcpStream; 2], Instant) {
    let [host, mut far] = connection();
    let reference = vec![1; 10_000];
    far.write_all(&reference).unwrap();
    let mut sender = connected(&host, false, 0, 0);
    let mut guest = Guest { begin: 0, v6: false, reference: &reference, received: 0, edge: 0 };
    let mut now = Instant::ZERO;
    guest.answer(&mut sender, 60_000, 0, now);
    while data_sent(&mut sender, &host, now) > 0 {}
    guest.answer(&mut sender, 0, 0, now);
    for _ in 0..seconds * 10 {
        now += Duration::from_millis(100);
        sender.expire(now);
        assert_eq!(data_sent(&mut sender, &host, now), 0);
    }
    guest.answer(&mut sender, 60_000, 0, now);
    (sender, [host, far], now)
}

/// Sends everything that can be sent now; returns the number of bytes.
fn data_sent(sender: &mut Sender, host: &TcpStream, now: Instant) -> usize {
    let mut frames = Frames { frames: Vec::new(), most: 9 };
    sender.send(host, (&mut true, true), SEGMENT, now, &mut frames).unwrap();
    frames.frames.iter().map(|frame| frame.bytes.len() - ETHERNET_HEADER - 40).sum()
}

#[test]
fn what_a_closing_window_made_the_guest_drop_is_sent_again_as_soon_as_it_opens() {
    for seconds in [0, 12] {
        let (mut sender, [host, _far], now) = reopened(seconds);
        assert_eq!(data_sent(&mut sender, &host, now), 10_000, "{seconds} s");
    }
}

#[test]
fn a_window_that_was_closed_for_long_does_not_make_the_next_loss_long() {
    let (mut sender, [host, _far], mut now) = reopened(12);
    // All of it is lost once more, and again.
    for _ in 0..5 {
        while data_sent(&mut sender, &host, now) > 0 {}
        let begun = now;
        while data_sent(&mut sender, &host, now) == 0 {
            now += Duration::from_millis(100);
            sender.expire(now);
            assert!(now < begun + Duration::from_secs(6), "{sender:?}");
        }
    }
}

#[test]
fn a_failing_socket_is_told_apart_from_an_empty_one() {
    let [host, far] = connection();
    let mut sender = connected(&host, false, 0, 0);
    let mut guest = Guest { begin: 0, v6: false, reference: &[], received: 0, edge: 0 };
    guest.answer(&mut sender, 10, 0, Instant::ZERO);
    let mut frames = Frames { frames: Vec::new(), most: 9 };
    let mut readable = true;
    assert_eq!(sender.send(&host, (&mut readable, true), SEGMENT, Instant::ZERO, &mut frames).unwrap(), Sent::Idle);
    assert!(!readable && !sender.has_work(readable));
    crate::socket::reset(far);
    let failed = loop {
        if let Err(error) = sender.send(&host, (&mut true, true), SEGMENT, Instant::ZERO, &mut frames) {
            break error;
        }
    };
    assert_eq!(failed.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn headers_are_those_of_the_stack() {
    for (v6, len) in [(false, 3000), (true, 3000), (false, 10)] {
        let head = offload::Head::new(key(v6), (1, 2), 3, false, len, 1460);
        let mut frame = Frame { header: [0; 12], bytes: [head.bytes(), &vec![0; len]].concat() };
        assert_eq!(head.bytes().len(), offload::head_len(&key(v6)));
        let (header, bytes) = (head.header, frame.bytes.clone());
        offload::offload_tcp(&mut frame, 1460, true);
        assert_eq!((frame.header, frame.bytes), (header, bytes));
    }
}
