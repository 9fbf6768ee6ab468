//! Whole conversations under every kind of timing.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::model::{Guest, MemoryStream};
use crate::devices::virtio::vsock::{
    connection::{Connection, Key, Phase, Readiness},
    credit::BUF_ALLOC,
    packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_SEND},
};

/// A small generator, so that one number from proptest decides a whole schedule.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }

    /// Mostly small, sometimes large.
    fn size(&mut self, max: usize) -> usize {
        let bits = self.roll(max.ilog2() as usize + 1);
        1 + self.roll(1 << bits).min(max - 1)
    }
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|index| (index as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ salt).collect()
}

/// Sends `up` bytes from the guest and `down` bytes from the host at once; each side closes its half when it is done.
fn converse(seed: u64, buf_alloc: u32, up: usize, down: usize, slow_host: usize, slow_guest: usize) {
    let (mut dice, mut now) = (Dice(seed | 1), Instant::now());
    let (up, down) = (pattern(up, 1), pattern(down, 2));
    let stream = MemoryStream::default();
    let mut guest = Guest::new(buf_alloc);
    let request = guest.header(Op::Request, 0, 0);
    let key = Key { host_port: 1, guest_port: 2 };
    let mut connection = Connection::from_guest(key, stream.clone(), false, &request);
    let (mut sent, mut written, mut guest_ended) = (0, 0, false);
    for _ in 0..2_000_000 {
        if connection.phase() == Phase::Gone {
            break;
        }
        now += Duration::from_micros(100);
        if connection.next_deadline().is_some_and(|deadline| deadline <= now) {
            connection.expire(now);
        }
        match dice.roll(5) {
            0 if guest.accepted && !guest_ended => {
                let len = dice.size(64 << 10).min(up.len() - sent).min(guest.may_send());
                if len > 0 {
                    let pieces = 1 + dice.roll(5);
                    guest.send(&mut connection, &up[sent..sent + len], pieces, now);
                    sent += len;
                } else if sent == up.len() {
                    guest_ended = true;
                    guest.control(&mut connection, Op::Shutdown, SHUTDOWN_SEND, now);
                }
            }
            1 => {
                let len = dice.size(32 << 10).min(down.len() - written);
                let mut host = stream.0.borrow_mut();
                if host.outgoing.len() < 200 << 10 {
                    host.outgoing.extend(&down[written..written + len]);
                    written += len;
                    host.eof = written == down.len();
                    drop(host);
                    connection.ready(Readiness { readable: true, ..Readiness::default() }, now);
                }
            }
            2 if dice.roll(slow_host) == 0 => {
                stream.0.borrow_mut().space = dice.size(64 << 10);
                connection.ready(Readiness { writable: true, ..Readiness::default() }, now);
            }
            3 => {
                let size = [1, 64, 4096 - 44, 4096, 65536][dice.roll(5)];
                for _ in 0..=dice.roll(8) {
                    if connection.wants_to_send() {
                        guest.poll(&mut connection, size, now);
                    }
                }
            }
            4 if dice.roll(slow_guest) == 0 => {
                let len = dice.size(64 << 10);
                guest.read(&mut connection, len, now);
                guest.answer(&mut connection, now);
            }
            _ => {}
        }
        assert!(connection.buffered() <= BUF_ALLOC as usize, "the buffer is bounded");
        let guest_done = guest_ended && guest.shutdown & SHUTDOWN_SEND != 0 && guest.queue.is_empty();
        if guest_done && stream.0.borrow().saw_eof {
            guest.control(&mut connection, Op::Shutdown, SHUTDOWN_BOTH, now);
        }
    }
    assert!(guest.received == down, "the guest read {} of {} bytes", guest.received.len(), down.len());
    let host = stream.0.borrow();
    assert!(host.incoming == up, "the host read {} of {} bytes", host.incoming.len(), up.len());
    assert!(host.saw_eof && host.finished && guest.reset);
    assert_eq!(connection.phase(), Phase::Gone);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn bytes_arrive_exactly_and_in_order_both_ways_and_both_halves_close(
        seed in any::<u64>(),
        buf_alloc in prop_oneof![Just(256_u32 << 10), Just(8 << 20), 128_u32..8192],
        up in 0_usize..(2 * BUF_ALLOC as usize + 5000),
        down in 0_usize..(600 << 10),
        slow_host in 1_usize..12,
        slow_guest in 1_usize..12,
    ) {
        // A small buffer takes many more steps for the same bytes.
        let down = if buf_alloc < 8192 { down / 64 } else { down };
        converse(seed, buf_alloc, up, down, slow_host, slow_guest);
    }
}

#[test]
fn more_than_twice_the_buffer_reaches_a_slow_reader_byte_for_byte() {
    converse(1, 256 << 10, 2 * BUF_ALLOC as usize + 777, 0, 20, 1);
    converse(2, 256 << 10, 0, 2 * (256 << 10) + 777, 1, 20);
}
