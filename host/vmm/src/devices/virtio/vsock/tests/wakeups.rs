//! A guest that sleeps between interrupts, as Linux's driver does: a missing interrupt or kick stalls it forever.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use super::{
    driver::{Driver, Layout, RX, TX},
    echo::Echo,
    machine::Machine,
};
use bulkhead_queue::testing::Numbers;

use crate::devices::virtio::{VirtioDevice, vsock::packet::Header};

/// Longer than any step takes.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A guest that sends back what it receives.
struct Guest {
    driver: Driver,
    numbers: Numbers,
    echo: Echo,
    /// Packets that have no place in the transmit queue yet.
    out: VecDeque<(Header, Vec<u8>)>,
    /// Buffers that are not offered again yet.
    spare: Vec<u16>,
    /// Number of all buffers.
    buffers: u16,
}

impl Guest {
    fn answer(&mut self) {
        for port in self.echo.ports() {
            let most = self.numbers.below(60_000) as usize + 1;
            self.out.extend(self.echo.next_packet(port, most));
        }
    }

    /// Does the work of an interrupt; true if there is more.
    fn work(&mut self) -> bool {
        let mut most = self.numbers.below(40);
        while most > 0
            && let Some((head, header, payload)) = self.driver.take_received()
        {
            most -= 1;
            self.spare.push(head);
            self.out.extend(self.echo.on_packet(&header, payload).map(|answer| (answer, Vec::new())));
        }
        self.answer();
        // Like Linux, offers the buffers that were read again when half of them are gone.
        if self.spare.len() * 2 >= usize::from(self.buffers) {
            self.driver.offer_all(RX, &std::mem::take(&mut self.spare));
        }
        while !self.out.is_empty() && self.driver.can_send() {
            let (header, payload) = self.out.pop_front().unwrap();
            let pieces = self.numbers.below(5) as usize;
            self.driver.send(&header, &payload, if pieces == 0 { Layout::One } else { Layout::Pieces(pieces) });
        }
        if self.numbers.below(16) == 0 {
            thread::sleep(Duration::from_micros(self.numbers.below(500).into()));
        }
        most == 0 || (self.echo.is_ready() && self.out.is_empty())
    }

    /// Runs until so many streams have ended.
    fn run(&mut self, streams: usize) {
        while self.echo.closed < streams {
            if self.work() || self.echo.closed == streams {
                continue;
            }
            let rings = if self.out.is_empty() { &[RX][..] } else { &[RX, TX] };
            let ready = rings.iter().any(|ring| self.driver.listen(*ring));
            let woken = ready || self.driver.sleep(rings, TIMEOUT);
            assert!(woken, "no interrupt: {} of {streams} ended, {} packets wait", self.echo.closed, self.out.len());
        }
    }
}

/// Writes data and reads it back, `rounds` times, and returns the longest wait.
fn converse(mut stream: UnixStream, seed: u32, rounds: u32) -> Duration {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let (mut numbers, mut longest) = (Numbers(seed), Duration::ZERO);
    for round in 0..rounds {
        let len = if numbers.below(8) == 0 { numbers.below(150_000) } else { numbers.below(500) } + 1;
        let data = vec![round as u8; len as usize];
        let begun = Instant::now();
        // In pieces that fit into the socket's buffer, so that this side does not block.
        for piece in data.chunks(20_000) {
            stream.write_all(piece).unwrap();
            let mut back = vec![0; piece.len()];
            stream.read_exact(&mut back).unwrap();
            assert!(back == piece);
        }
        longest = longest.max(begun.elapsed());
        if numbers.below(3) == 0 {
            thread::sleep(Duration::from_micros(numbers.below(3000).into()));
        }
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    longest
}

fn conversations(event_idx: bool, buffers: u16, slots: u16) {
    const STREAMS: u32 = 20;
    let mut machine = Machine::off(Driver::sleeping(event_idx, 4096, slots));
    machine.driver.offer_rx(0..buffers);
    machine.device.activate(machine.driver.activation()).unwrap();
    let talks: Vec<_> = (0..STREAMS)
        .map(|seed| {
            let stream = machine.hand_in(1024);
            thread::spawn(move || converse(stream, seed, 60))
        })
        .collect();
    let Machine { driver, device, directory: _directory, handle: _handle } = machine;
    let (echo, out) = (Echo::default(), VecDeque::new());
    let mut guest = Guest { driver, numbers: Numbers(9), echo, out, spare: Vec::new(), buffers };
    guest.run(STREAMS as usize);
    let longest = talks.into_iter().map(|talk| talk.join().unwrap()).max().unwrap();
    println!("event index {event_idx}, {buffers} buffers, {slots} packets: the longest wait was {longest:.1?}");
    drop(device);
}

#[test]
fn no_conversation_stalls_whatever_driver_and_device_do_at_once() {
    for (buffers, slots) in [(1, 1), (2, 3), (16, 2), (128, 64)] {
        conversations(true, buffers, slots);
        conversations(false, buffers, slots);
    }
}
