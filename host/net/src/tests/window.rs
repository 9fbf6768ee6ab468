//! A guest that closes its window over data in flight, as Linux does when a socket is short of memory.

use std::{
    collections::VecDeque,
    io::Write,
    net::TcpListener,
    time::{Duration, Instant},
};

use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{
        IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, TcpTimestampRepr,
    },
};

use crate::{
    frame::{ETHERNET_HEADER, Frame},
    fuzzing::World,
};

/// Of the guest's window, in bits.
const SCALE: u8 = 7;
/// Given when there is room: 64,000 bytes.
const WIDE: u16 = 500;
/// Bytes that the guest keeps of the first segment without room.
const KEPT: usize = 10_000;
/// The guest's end.
const PORT: u16 = 1000;

/// One end of a connection, segment by segment.
struct Guest {
    world: World,
    /// Frames that have arrived and are not read yet.
    frames: VecDeque<Vec<u8>>,
    port: u16,
    /// The next of its own bytes.
    own: TcpSeqNumber,
    /// The next of the other end's.
    next: TcpSeqNumber,
    received: Vec<u8>,
}

impl Guest {
    /// Connects to a port of the host's loopback.
    fn connect(port: u16, segmentation: bool) -> Self {
        let (own, next) = (TcpSeqNumber(7), TcpSeqNumber(0));
        let mut guest =
            Self { world: World::new(segmentation), frames: VecDeque::new(), port, own, next, received: Vec::new() };
        guest.send(TcpControl::Syn, WIDE);
        guest.own += 1;
        let answer = guest.until("an answer", |segment| segment.control == TcpControl::Syn);
        guest.next = answer + 1;
        guest.send(TcpControl::None, WIDE);
        guest
    }

    fn send(&mut self, control: TcpControl, window: u16) {
        let syn = control == TcpControl::Syn;
        let addresses = World::addresses();
        let tcp = TcpRepr {
            src_port: PORT,
            dst_port: self.port,
            control,
            seq_number: self.own,
            ack_number: (!syn).then_some(self.next),
            window_len: if syn { u16::MAX } else { window },
            window_scale: syn.then_some(SCALE),
            max_seg_size: syn.then_some(1460),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None::<TcpTimestampRepr>,
            payload: &[],
        };
        let (source, target) = (addresses.guest, addresses.host);
        let ip = Ipv4Repr {
            src_addr: source,
            dst_addr: target,
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let mut frame = Frame::ip(ip.buffer_len() + tcp.buffer_len());
        let checksums = ChecksumCapabilities::default();
        let mut packet = Ipv4Packet::new_unchecked(&mut frame.bytes[ETHERNET_HEADER..]);
        ip.emit(&mut packet, &checksums);
        let (source, target) = (IpAddress::from(source), IpAddress::from(target));
        tcp.emit(&mut TcpPacket::new_unchecked(packet.payload_mut()), &source, &target, &checksums);
        frame.seal();
        self.world.receive(&frame.bytes);
    }

    /// Passes segments to `look` until it returns true; returns the sequence number of that one.
    fn until(&mut self, what: &str, look: impl FnMut(&TcpRepr<'_>) -> bool) -> TcpSeqNumber {
        self.watch(Duration::from_secs(5), look).unwrap_or_else(|| panic!("not within 5 s: {what}"))
    }

    /// The same within a time limit; `None` if `look` never returned true.
    fn watch(&mut self, limit: Duration, mut look: impl FnMut(&TcpRepr<'_>) -> bool) -> Option<TcpSeqNumber> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            self.frames.extend(self.world.turn(usize::MAX));
            while let Some(frame) = self.frames.pop_front() {
                let packet = Ipv4Packet::new_checked(&frame[ETHERNET_HEADER..]).unwrap();
                let segment = TcpPacket::new_checked(packet.payload()).unwrap();
                let (source, target) = (packet.src_addr().into(), packet.dst_addr().into());
                let segment = TcpRepr::parse(&segment, &source, &target, &ChecksumCapabilities::ignored()).unwrap();
                if look(&segment) {
                    return Some(segment.seq_number);
                }
            }
        }
        None
    }

    /// Takes and acknowledges what comes in order, until it has `count` bytes.
    fn take(&mut self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.received.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} bytes", self.received.len());
            let mut news = Vec::new();
            let next = self.next;
            self.until("the next segment", |segment| {
                news = segment.payload.to_vec();
                segment.seq_number == next && !segment.payload.is_empty()
            });
            self.next += news.len();
            self.received.extend(news);
            self.send(TcpControl::None, WIDE);
        }
    }
}

#[test]
fn what_a_guest_drops_when_it_takes_its_window_back_is_sent_again() {
    const ALL: usize = 1_000_000;
    for segmentation in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let data: Vec<u8> = (0..ALL).map(|index: usize| (index ^ index >> 8 ^ index >> 16) as u8).collect();
        let port = listener.local_addr().unwrap().port();
        let sent = data.clone();
        let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(&sent));
        let mut guest = Guest::connect(port, segmentation);
        guest.take(100_000);
        // Sent as far as the window reaches, and all of it dropped but for the first bytes.
        // Data that does not go through smoltcp leaves a small rest unsent while some is in flight (RFC 9293,
        // 3.8.6.2.1).
        let reach = (usize::from(WIDE) << SCALE) / if segmentation { 2 } else { 1 };
        let (edge, mut first) = (guest.next + reach, Vec::new());
        let next = guest.next;
        // A host that is short of memory keeps less than a window; then what there is gets dropped.
        guest.watch(Duration::from_secs(1), |segment| {
            if segment.seq_number == next {
                first = segment.payload[..segment.payload.len().min(KEPT)].to_vec();
            }
            segment.seq_number + segment.payload.len() >= edge
        });
        // The window as it was reaches no further, so there is nothing new to send.
        let rest = WIDE - (first.len() >> SCALE) as u16 - 1;
        guest.next += first.len();
        guest.received.extend(first);
        guest.send(TcpControl::None, 0);
        std::thread::sleep(Duration::from_millis(20));
        guest.frames.extend(guest.world.turn(usize::MAX));
        guest.send(TcpControl::None, rest);
        guest.take(ALL);
        assert!(guest.received == data);
        server.join().unwrap().unwrap();
    }
}
