//! Guest memory behind chains.

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::GuestAddress;

use crate::{
    devices::virtio::vsock::segments::{Access, MAX_DESCRIPTORS, Malformed, copy_in, copy_out, gather, total, window},
    memory::GuestRam,
};

const SIZE: u64 = 1 << 20;

fn memory() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap()
}

fn descriptor(address: u64, len: u32, flags: u32) -> RawDescriptor {
    Descriptor::new(address, len, flags as u16, 0).into()
}

#[test]
fn readable_and_writable_descriptors_are_separated_and_empty_ones_skipped() {
    let memory = memory();
    let queue = MockSplitQueue::new(&memory, 16);
    let descriptors = [
        descriptor(0x8000, 44, 0),
        descriptor(0x9000, 0, 0),
        descriptor(0xa000, 100, 0),
        descriptor(0xb000, 7, VRING_DESC_F_WRITE),
    ];
    let chain = queue.build_desc_chain(&descriptors).unwrap();
    let mut out = Vec::new();
    assert_eq!(gather(&memory, chain.clone(), Access::Readable, &mut out), Ok(144));
    assert_eq!(out.len(), 2);
    assert_eq!(gather(&memory, chain, Access::Writable, &mut out), Ok(7));
}

#[test]
fn a_chain_that_leaves_guest_memory_is_malformed() {
    let memory = memory();
    for (address, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 44), (0, u32::MAX)] {
        let queue = MockSplitQueue::new(&memory, 16);
        let chain = queue.build_desc_chain(&[descriptor(address, len, 0)]).unwrap();
        let gathered = gather(&memory, chain, Access::Readable, &mut Vec::new());
        assert_eq!(gathered, Err(Malformed), "{address:#x}+{len}");
    }
}

#[test]
fn a_chain_that_runs_in_a_circle_ends() {
    let memory = memory();
    let queue = MockSplitQueue::new(&memory, 16);
    let circle = Descriptor::new(0x8000, 16, VRING_DESC_F_NEXT as u16, 0).into();
    queue.add_desc_chains(&[circle], 0).unwrap();
    let chain = queue.build_multiple_desc_chains(&[circle]).unwrap();
    assert!(gather(&memory, chain, Access::Readable, &mut Vec::new()).is_ok_and(|total| total <= 16 * 16));
}

#[test]
fn an_indirect_table_longer_than_the_queue_is_malformed() {
    let memory = memory();
    let table = 0x4_0000_u64;
    let count = MAX_DESCRIPTORS as u64 + 1;
    for index in 0..count {
        let entry: RawDescriptor = Descriptor::new(0x8000, 1, VRING_DESC_F_NEXT as u16, index as u16 + 1).into();
        vm_memory::Bytes::write_obj(&memory, entry, GuestAddress(table + index * 16)).unwrap();
    }
    let queue = MockSplitQueue::new(&memory, 16);
    let indirect = virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;
    let chain = queue.build_desc_chain(&[descriptor(table, count as u32 * 16, indirect)]).unwrap();
    assert_eq!(gather(&memory, chain, Access::Readable, &mut Vec::new()), Err(Malformed));
}

proptest! {
    #[test]
    fn no_queue_makes_the_device_panic(bytes in bulkhead_queue::testing::queue()) {
        crate::devices::virtio::vsock::fuzzing::chains(&bytes);
    }

    #[test]
    fn a_window_holds_exactly_the_bytes_asked_for(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 0..8),
        skip in 0_usize..100,
        limit in 0_usize..100,
    ) {
        let flat = pieces.concat();
        let mut pieces = pieces;
        let all: Vec<_> = pieces.iter_mut().map(|piece| piece.as_mut_slice().into()).collect();
        let mut out = Vec::new();
        window(all, skip, limit, &mut out);
        let expected: Vec<u8> = flat.iter().copied().skip(skip).take(limit).collect();
        let mut bytes = vec![0; expected.len()];
        prop_assert_eq!(total(&out), expected.len());
        prop_assert_eq!(copy_out(&out, &mut bytes), expected.len());
        prop_assert_eq!(&bytes, &expected);
        let fresh: Vec<u8> = expected.iter().map(|byte| !byte).collect();
        prop_assert_eq!(copy_in(&out, &fresh), fresh.len());
        copy_out(&out, &mut bytes);
        prop_assert_eq!(bytes, fresh);
    }
}
