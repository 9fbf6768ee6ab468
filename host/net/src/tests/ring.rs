//! The queues as a driver sees them.

use proptest::{collection::vec, prelude::*};
use virtio_queue::{
    QueueT,
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    frame::{Frame, VIRTIO_HEADER},
    offload::{Head, head_len},
    ring::{Ring, RxSink},
    sink::FrameSink,
};
use bulkhead_queue::SplitQueue;
use bulkhead_vmm::memory;

const WRITABLE: u16 = 2;
const DATA: u64 = 0x10_0000;

fn ring(queue: virtio_queue::Queue) -> Ring {
    let mut ring = Ring::new().unwrap();
    ring.queue = SplitQueue::new(queue);
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
    assert!(ring.push_frame(&memory, &frame, true));
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
    assert!(!ring.push_frame(&memory, &frame, true));
    assert_eq!(mock.used().idx().load(), 3);
    assert!(ring.push_frame(&memory, &Frame { header: [0; VIRTIO_HEADER], bytes: vec![1; 80] }, true));
    assert_eq!(mock.used().idx().load(), 4);
}

#[test]
fn without_mergeable_buffers_only_a_frame_that_does_not_fit_is_lost() {
    let memory = memory::create(64).unwrap();
    let mock = MockSplitQueue::new(&memory, 16);
    let buffers: Vec<_> =
        (0..2).map(|index| RawDescriptor::from(Descriptor::new(DATA + index * 0x1000, 100, WRITABLE, 0))).collect();
    mock.build_multiple_desc_chains(&buffers).unwrap();
    let mut ring = ring(mock.create_queue().unwrap());
    for len in [200, 50] {
        assert!(ring.push_frame(&memory, &Frame { header: [0; VIRTIO_HEADER], bytes: vec![1; len] }, false));
    }
    let lens: Vec<_> = (0..2).map(|index| mock.used().ring().ref_at(index).unwrap().load().len()).collect();
    assert_eq!(lens, [0, 62]);
}

#[test]
fn the_guests_frames_come_without_header_and_broken_ones_not_at_all() {
    let memory = memory::create(64).unwrap();
    memory.write_slice(b"hhhhhhhhhhhhframe", GuestAddress(DATA)).unwrap();
    let mock = MockSplitQueue::new(&memory, 16);
    let frames = [(DATA, 17), (DATA, 5), (u64::MAX - 8, 20), (DATA, 16)];
    let descriptors: Vec<_> =
        frames.iter().map(|(at, len)| RawDescriptor::from(Descriptor::new(*at, *len, 0, 0))).collect();
    mock.build_multiple_desc_chains(&descriptors).unwrap();
    let mut ring = ring(mock.create_queue().unwrap());
    let mut taken = Vec::new();
    assert!(!ring.pop_frames(&memory, 9, |frame| {
        let mut bytes = vec![0; frame.len()];
        frame.copy(0, &mut bytes);
        taken.push(bytes);
    }));
    assert_eq!(taken, [b"frame".to_vec(), b"fram".to_vec()]);
    assert_eq!(mock.used().idx().load(), 4);
    assert_eq!(ring.queue.queue().next_used(), 4);
}

proptest! {
    #[test]
    fn no_queue_makes_the_device_panic_or_touch_what_is_not_guest_memory(
        bytes in bulkhead_queue::testing::queue(), frames in vec(0_usize..70_000, 1..4), event_idx: bool, mergeable: bool
    ) {
        crate::fuzzing::rings(&bytes, &frames, event_idx, mergeable);
    }
}

/// Offers `count` buffers of 1000 bytes, and takes a frame with `head` bytes of headers and `most` of data, of which
/// `there` exist.
fn give_read(count: u64, mergeable: bool, most: usize, there: usize) -> (Option<usize>, Vec<u32>, Vec<u8>, u16) {
    let memory = memory::create(64).unwrap();
    let mock = MockSplitQueue::new(&memory, 16);
    let buffers: Vec<_> = (0..count)
        .map(|index| RawDescriptor::from(Descriptor::new(DATA + index * 0x1000, 1000, WRITABLE, 0)))
        .collect();
    mock.build_multiple_desc_chains(&buffers).unwrap();
    let mut ring = ring(mock.create_queue().unwrap());
    let key = crate::key::Key { guest: ([1, 1, 1, 1], 1).into(), peer: ([2, 2, 2, 2], 2).into() };
    let mut source = (0..there).map(|index| (index ^ index >> 8) as u8).collect::<std::collections::VecDeque<_>>();
    let result = RxSink { ring: &mut ring, memory: &memory, mergeable }.take(
        head_len(&key),
        most,
        &mut |parts| {
            let before = source.len();
            for part in parts {
                let data: Vec<u8> = source.drain(..part.len().min(source.len())).collect();
                part.write_slice(&data, 0).unwrap();
            }
            Ok(before - source.len())
        },
        &mut |len| Head::new(key, (3, 4), 5, false, len, 1460),
    );
    let (mut lens, mut bytes) = (Vec::new(), Vec::new());
    for index in 0..mock.used().idx().load() {
        let element = mock.used().ring().ref_at(index.into()).unwrap().load();
        let mut data = vec![0; element.len() as usize];
        memory.read_slice(&mut data, GuestAddress(DATA + u64::from(element.id()) * 0x1000)).unwrap();
        lens.push(element.len());
        bytes.extend(data);
    }
    (result.map(Result::unwrap), lens, bytes, ring.queue.position())
}

#[test]
fn data_is_read_behind_its_headers_and_unused_buffers_stay_available() {
    for (there, lens) in [(2500, vec![1000, 1000, 566]), (934, vec![1000]), (935, vec![1000, 1]), (1, vec![67])] {
        let (result, used, bytes, next) = give_read(4, true, 3000, there);
        assert_eq!((result, &used, usize::from(next)), (Some(there), &lens, lens.len()));
        assert_eq!(bytes[10..12], [lens.len() as u8, 0]);
        assert_eq!(u16::from_be_bytes([bytes[28], bytes[29]]), 40 + there as u16);
        assert!(bytes[66..].iter().enumerate().all(|(index, byte)| *byte == (index ^ index >> 8) as u8));
    }
    let (result, used, _, next) = give_read(4, true, 3000, 0);
    assert_eq!((result, used.len(), next), (Some(0), 0, 0), "no data, no frame");
}

#[test]
fn data_makes_smaller_frames_of_few_buffers_and_waits_for_a_useful_size() {
    let (result, used, _, _) = give_read(2, true, 60_000, 60_000);
    assert_eq!((result, used), (Some(1934), vec![1000, 1000]));
    let (result, used, _, next) = give_read(1, true, 60_000, 60_000);
    assert_eq!((result, used.len(), next), (None, 0, 0));
    let (result, used, _, _) = give_read(3, false, 900, 60_000);
    assert_eq!((result, used), (Some(900), vec![966]));
}

#[test]
fn waiting_for_buffers_ends_only_with_more_than_were_too_few() {
    let memory = memory::create(64).unwrap();
    let mock = MockSplitQueue::new(&memory, 16);
    let buffer = |index: u64| RawDescriptor::from(Descriptor::new(DATA + index * 0x1000, 100, WRITABLE, 0));
    mock.build_multiple_desc_chains(&[buffer(0), buffer(1)]).unwrap();
    let mut ring = ring(mock.create_queue().unwrap());
    let frame = Frame { header: [0; VIRTIO_HEADER], bytes: vec![1; 280] };
    assert!(!ring.push_frame(&memory, &frame, true));
    assert!(!ring.enable_kick(&memory));
    mock.desc_table().store(2, buffer(2)).unwrap();
    mock.avail().ring().ref_at(2).unwrap().store(2);
    mock.avail().idx().store(3);
    assert!(ring.enable_kick(&memory));
    assert!(ring.push_frame(&memory, &frame, true));
    // An impossible index does not keep the device looking.
    mock.avail().idx().store(1000);
    assert!(!ring.push_frame(&memory, &frame, true));
    assert!(!ring.enable_kick(&memory));
}
