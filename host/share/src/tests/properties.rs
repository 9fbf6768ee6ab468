//! Requests of any bytes: each is answered or dropped.

use proptest::{collection::vec, option, prelude::*};

use crate::fuzzing::{Step, World, parse};

/// Owned form of a step.
#[derive(Clone, Debug)]
struct Owned {
    opcode: u8,
    node: u8,
    handle: Option<u8>,
    fields: Vec<u32>,
    names: Vec<u8>,
    rest: Vec<u8>,
    room: u16,
}

fn step() -> impl Strategy<Value = Owned> {
    let field = prop_oneof![4 => 0_u32..16, 2 => prop::bits::u32::ANY, 1 => Just(0o100_644_u32), 1 => Just(4096_u32)];
    let head = (0_u8..56, 0_u8..16, option::of(0_u8..16), vec(field, 0..16));
    let tail = (vec(any::<u8>(), 0..3), vec(any::<u8>(), 0..64), prop_oneof![Just(4096_u16), 0_u16..300]);
    (head, tail).prop_map(|((opcode, node, handle, fields), (names, rest, room))| Owned {
        opcode,
        node,
        handle,
        fields,
        names,
        rest,
        room,
    })
}

/// Raw bytes of a request: an opcode and a node that exist, a length that may be a lie.
fn raw() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![4 => 40_u32..200, 1 => any::<u32>()];
    (length, 0_u32..56, prop_oneof![Just(1_u64), any::<u64>()], vec(any::<u8>(), 0..200)).prop_map(
        |(length, opcode, node, body)| {
            let mut bytes = [length.to_ne_bytes(), opcode.to_ne_bytes()].concat();
            bytes.extend(7_u64.to_ne_bytes());
            bytes.extend(node.to_ne_bytes());
            bytes.extend(body);
            bytes
        },
    )
}

proptest! {
    #[test]
    fn no_bytes_panic_the_parser(request in raw(), any in vec(any::<u8>(), 0..200)) {
        parse(&request);
        parse(&any);
    }

    #[test]
    fn any_bytes_are_answered_or_dropped(request in raw(), room in 0_usize..300) {
        World::new().send(&request, room);
    }

    #[test]
    fn any_sequence_of_requests_is_answered(steps in vec(step(), 1..40)) {
        let mut world = World::new();
        for step in &steps {
            let Owned { opcode, node, handle, fields, names, rest, room } = step;
            world.step(&Step { opcode: *opcode, node: *node, handle: *handle, fields, names, rest, room: *room });
        }
    }

    #[test]
    fn any_queue_is_served(bytes in bulkhead_queue::testing::queue(), event_idx: bool) {
        World::new().queue(&bytes, event_idx);
    }
}
