//! Flow control as numbers.

use proptest::prelude::*;

use crate::devices::virtio::vsock::credit::{BUF_ALLOC, MAX_PACKETS, OwnCredit, PACKET_OVERHEAD, PeerCredit};

const OVERHEAD: usize = PACKET_OVERHEAD as usize;

#[test]
fn tiny_packets_in_flight_are_bounded_by_what_the_guest_charges_for_each() {
    let mut credit = PeerCredit::new(256 << 10);
    let mut packets = 0;
    while credit.room() > 0 {
        credit.sent(1);
        packets += 1;
    }
    assert!(packets * (OVERHEAD + 1) <= 256 << 10, "{packets} packets overflow the guest");
    assert!(packets > 400, "only {packets} packets use the buffer");
    assert!(credit.must_ask(), "a guest with so much space in bytes does not tell by itself");
}

#[test]
fn a_buffer_smaller_than_the_charge_still_gets_one_packet_at_a_time() {
    let mut credit = PeerCredit::new(128);
    assert_eq!(credit.room(), 128);
    credit.sent(128);
    assert_eq!(credit.room(), 0);
    credit.update(128, 128);
    assert_eq!(credit.room(), 128);
}

#[test]
fn a_guest_without_buffer_gets_nothing() {
    assert_eq!(PeerCredit::new(0).room(), 0);
}

#[test]
fn a_partly_read_packet_still_counts_as_queued() {
    let mut credit = PeerCredit::new(8192);
    credit.sent(4000);
    credit.sent(1000);
    let before = credit.room();
    credit.update(8192, 3999);
    assert_eq!(credit.room(), before + 3999, "bytes are back, the packet is not");
    credit.update(8192, 4000);
    assert_eq!(credit.room(), before + 4000 + OVERHEAD);
}

#[test]
fn a_count_that_claims_more_than_was_sent_changes_nothing() {
    let mut credit = PeerCredit::new(4096);
    credit.sent(3000);
    let before = credit.room();
    for lie in [3001, u32::MAX, 1 << 31] {
        credit.update(4096, lie);
        assert_eq!(credit.room(), before);
    }
}

#[test]
fn a_count_older_than_the_last_one_changes_nothing() {
    let mut credit = PeerCredit::new(16384);
    credit.sent(3000);
    credit.sent(3000);
    credit.update(16384, 3000);
    let before = credit.room();
    credit.update(16384, 2000);
    assert_eq!(credit.room(), before);
}

#[test]
fn a_guest_that_shrinks_its_buffer_is_not_underflowed() {
    let mut credit = PeerCredit::new(64 << 10);
    credit.sent(60 << 10);
    credit.update(1024, 0);
    assert_eq!(credit.room(), 0);
    credit.update(u32::MAX, 0);
    assert!(credit.room() > 0);
}

#[test]
fn an_endless_buffer_does_not_mean_endless_packets() {
    let mut credit = PeerCredit::new(u32::MAX);
    for _ in 0..MAX_PACKETS {
        assert!(credit.room() > 0);
        credit.sent(1);
    }
    assert_eq!(credit.room(), 0);
}

#[test]
fn the_guest_may_fill_the_buffer_but_not_a_byte_more() {
    let mut credit = OwnCredit::default();
    credit.receive(BUF_ALLOC as usize).unwrap();
    credit.receive(1).unwrap_err();
    credit.forward(1);
    credit.receive(1).unwrap();
    credit.receive(usize::MAX).unwrap_err();
}

#[test]
fn an_update_is_due_when_the_guest_sees_less_than_half_free() {
    let mut credit = OwnCredit::default();
    credit.receive(BUF_ALLOC as usize).unwrap();
    assert!(!credit.update_due(), "there is nothing to tell");
    credit.forward(BUF_ALLOC as usize);
    assert!(credit.update_due());
    assert_eq!(credit.stamp(), (BUF_ALLOC, BUF_ALLOC));
    assert!(!credit.update_due());
    credit.receive(BUF_ALLOC as usize / 2).unwrap();
    credit.forward(BUF_ALLOC as usize / 2);
    assert!(!credit.update_due(), "half is enough");
}

proptest! {
    /// More than 2^32 bytes go by, so every count wraps.
    #[test]
    fn packets_in_flight_never_pass_the_guests_buffer_and_all_arrive(
        buf_alloc in 2048_u32..(1 << 20),
        steps in prop::collection::vec((any::<u16>(), any::<u16>()), 1..200),
    ) {
        let mut credit = PeerCredit::new(buf_alloc);
        let mut queued = std::collections::VecDeque::new();
        let mut fwd_cnt = 0_u32;
        // Move the counts close to the wrap.
        for _ in 0..5 {
            let jump = (1_u32 << 30) - 1;
            credit.update(u32::MAX, fwd_cnt);
            credit.sent(jump as usize);
            fwd_cnt = fwd_cnt.wrapping_add(jump);
        }
        credit.update(buf_alloc, fwd_cnt);
        for (want, read) in steps {
            let len = credit.room().min(usize::from(want));
            if len > 0 {
                credit.sent(len);
                queued.push_back(len);
            }
            let charged: usize = queued.iter().map(|len| len + OVERHEAD).sum();
            prop_assert!(queued.len() == 1 || charged <= buf_alloc as usize);
            if read % 3 == 0 && let Some(len) = queued.pop_front() {
                fwd_cnt = fwd_cnt.wrapping_add(len as u32);
                credit.update(buf_alloc, fwd_cnt);
            }
        }
        for len in queued {
            fwd_cnt = fwd_cnt.wrapping_add(len as u32);
        }
        credit.update(buf_alloc, fwd_cnt);
        prop_assert_eq!(credit.room(), (buf_alloc - PACKET_OVERHEAD) as usize);
    }
}
