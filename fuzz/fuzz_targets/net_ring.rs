//! The device side of the network queues over any guest memory.
#![no_main]

use arbitrary::Arbitrary;
use bulkhead_net::fuzzing::rings;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    event_idx: bool,
    mergeable: bool,
    frames: [u16; 4],
    memory: &'a [u8],
}

fuzz_target!(|input: Input| {
    rings(input.memory, &input.frames.map(usize::from), input.event_idx, input.mergeable);
});
