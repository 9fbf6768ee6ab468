//! Requests of the guest to the share process, as sequences and as any bytes in its queues.
#![no_main]

use std::cell::RefCell;

use arbitrary::Arbitrary;
use bulkhead_share::fuzzing::{Step, World, parse};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Request {
    opcode: u8,
    node: u8,
    handle: Option<u8>,
    fields: Vec<u32>,
    names: Vec<u8>,
    rest: Vec<u8>,
    room: u16,
}

#[derive(Arbitrary, Debug)]
enum Input {
    Requests(Vec<Request>),
    Queue { event_idx: bool, memory: Vec<u8> },
    Bytes(Vec<u8>),
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

fuzz_target!(|input: Input| {
    WORLD.with_borrow_mut(|world| match input {
        Input::Requests(requests) => {
            for Request { opcode, node, handle, fields, names, rest, room } in &requests {
                let step = Step { opcode: *opcode, node: *node, handle: *handle, fields, names, rest, room: *room };
                world.step(&step);
            }
        }
        Input::Queue { event_idx, memory } => world.queue(&memory, event_idx),
        Input::Bytes(bytes) => {
            parse(&bytes);
            world.send(&bytes, 1000);
        }
    });
});
