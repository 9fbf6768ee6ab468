//! The queues as a driver sees them.

use proptest::{collection::vec, prelude::*};
use virtio_queue::{
    QueueT,
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    frame::{Frame, VIRTIO_HEADER},
    ring::Ring,
};
use crate::vmm::memory;

const WRITABLE: u16 = 2;
const DATA: u64 = 0x10_0000;

fn ring(queue: virtio_queue::Queue) -> Ring {
    let mut ring = Ring::new().unwrap();
    ring.queue = queue;
    ring.call = Some(EventFd::new(EFD_NONBLOCK).unwrap());
    ring
}

#[test]
fn a_frame_goes_into_as_many_buffers_as_it_needs_which_appear_at_once() {
    let memory = memory::create(64).unwrap();
    let mock = MockSplitQueue::new(&memory, 16);
    let buffers: Vec<_> =
        (0..4).map(|index| RawDescriptor::from(Descriptor::new(DATA + index * 0x1000, 100, WRITABLE, 0))).collect();
    mock.build_multiple_desc_chains(&buffers).unwrap();
    let mut ring = ring(mock.create_queue().unwrap());
    let bytes: Vec<u8> = (0..250).collect();
    let frame = Frame { header: [9; VIRTIO_HEADER], bytes: bytes.clone() };
    assert!(ring.give(&memory, &frame, true));
    assert_eq!(mock.used().idx().load(), 3);
    let mut received = Vec::new();
    for index in 0..3 {
        let element = mock.used().ring().ref_at(index).unwrap().load();
        let mut data = vec![0; element.len() as usize];
        memory.read_slice(&mut data, GuestAddress(DATA + u64::from(element.id()) * 0x1000)).unwrap();
        received.extend(data);
    }
    assert_eq!(received[..VIRTIO_HEADER], [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 3, 0]);
    assert_eq!(received[VIRTIO_HEADER..], bytes);
    ring.signal(&memory);
    assert_eq!(ring.call.as_ref().unwrap().read().unwrap(), 1);

    // One buffer is left: too little, so the frame waits and the buffer stays.
    assert!(!ring.give(&memory, &frame, true));
    assert_eq!(mock.used().idx().load(), 3);
    assert!(ring.give(&memory, &Frame { header: [0; VIRTIO_HEADER], bytes: vec![1; 80] }, true));
    assert_eq!(mock.used().idx().load(), 4);
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_lost_and_the_next_one_is_not() {
    let memory = memory::create(64).unwrap();
    let mock = MockSplitQueue::new(&memory, 16);
    let buffers: Vec<_> =
        (0..2).map(|index| RawDescriptor::from(Descriptor::new(DATA + index * 0x1000, 100, WRITABLE, 0))).collect();
    mock.build_multiple_desc_chains(&buffers).unwrap();
    let mut ring = ring(mock.create_queue().unwrap());
    for len in [200, 50] {
        assert!(ring.give(&memory, &Frame { header: [0; VIRTIO_HEADER], bytes: vec![1; len] }, false));
    }
    let lens: Vec<_> = (0..2).map(|index| mock.used().ring().ref_at(index).unwrap().load().len()).collect();
    assert_eq!(lens, [0, 62]);
}

#[test]
fn the_guests_frames_are_taken_without_their_header_and_broken_ones_are_passed_over() {
    let memory = memory::create(64).unwrap();
    memory.write_slice(b"hhhhhhhhhhhhframe", GuestAddress(DATA)).unwrap();
    let mock = MockSplitQueue::new(&memory, 16);
    let frames = [(DATA, 17), (DATA, 5), (u64::MAX - 8, 20), (DATA, 16)];
    let descriptors: Vec<_> =
        frames.iter().map(|(at, len)| RawDescriptor::from(Descriptor::new(*at, *len, 0, 0))).collect();
    mock.build_multiple_desc_chains(&descriptors).unwrap();
    let mut ring = ring(mock.create_queue().unwrap());
    let mut taken = Vec::new();
    assert!(!ring.take(&memory, 9, |frame| taken.push(frame.to_vec())));
    assert_eq!(taken, [b"frame".to_vec(), b"fram".to_vec()]);
    assert_eq!(mock.used().idx().load(), 4);
    assert_eq!(ring.queue.next_used(), 4);
}

proptest! {
    #[test]
    fn no_queue_makes_the_device_panic_or_touch_what_is_not_guest_memory(
        bytes in memory::testing::queue(), frames in vec(0_usize..70_000, 1..4), event_idx: bool, mergeable: bool
    ) {
        super::fuzzing::rings(&bytes, &frames, event_idx, mergeable);
    }
}
