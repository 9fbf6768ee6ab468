//! A guest's vsock packets between host clients that come, write and leave.
#![no_main]

use std::{
    os::unix::net::UnixListener,
    sync::{Arc, LazyLock},
    time::Duration,
};

use arbitrary::Arbitrary;
use bulkhead_vmm::devices::virtio::vsock::fuzzing::{CID, HEADER, World};
use libfuzzer_sys::fuzz_target;

/// A host port for which streams are offered.
const PORT: u32 = 1025;

/// A host port at which clients listen.
const LISTENED: u32 = 5000;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Any header.
    Raw {
        header: [u8; HEADER],
        payload: &'a [u8],
    },
    /// A packet of a connection that may exist.
    Packet {
        connection: u8,
        op: u8,
        flags: u8,
        buffer: u16,
        forwarded: u16,
        payload: &'a [u8],
    },
    Receive {
        room: u16,
    },
    Connect {
        port: u8,
    },
    Offer,
    Host {
        index: u8,
        bytes: &'a [u8],
        leaves: bool,
    },
    Turn {
        milliseconds: u16,
    },
}

static HYBRID: LazyLock<Arc<UnixListener>> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("bulkhead-fuzz-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    Arc::new(listener)
});

fn put(header: &mut [u8; HEADER], at: usize, bytes: &[u8]) {
    header[at..at + bytes.len()].copy_from_slice(bytes);
}

fuzz_target!(|steps: Vec<Step>| {
    let mut world = World::new(&HYBRID);
    world.offer(PORT);
    // Ends of connections that the device has announced: (host port, guest port).
    let mut known = vec![(PORT, 1000), (PORT, 1001), (9, 1002), (LISTENED, 2000), (LISTENED, 2001)];
    for step in steps.into_iter().take(64) {
        match step {
            Step::Raw { header, payload } => world.transmit(&header, &mut payload.to_vec()),
            Step::Packet { connection, op, flags, buffer, forwarded, payload } => {
                let (host_port, guest_port) = known[usize::from(connection) % known.len()];
                let mut header = [0; HEADER];
                put(&mut header, 0, &CID.to_le_bytes());
                put(&mut header, 8, &2_u64.to_le_bytes());
                put(&mut header, 16, &u32::to_le_bytes(guest_port));
                put(&mut header, 20, &u32::to_le_bytes(host_port));
                put(&mut header, 24, &(payload.len() as u32).to_le_bytes());
                put(&mut header, 28, &1_u16.to_le_bytes());
                put(&mut header, 30, &u16::from(op % 9).to_le_bytes());
                put(&mut header, 32, &u32::from(flags & 3).to_le_bytes());
                put(&mut header, 36, &u32::from(buffer).to_le_bytes());
                put(&mut header, 40, &u32::from(forwarded).to_le_bytes());
                world.transmit(&header, &mut payload.to_vec());
            }
            Step::Receive { room } => {
                if let Some(header) = world.receive(usize::from(room)) {
                    let port = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
                    let ends = (port(16), port(20));
                    if !known.contains(&ends) {
                        known.push(ends);
                    }
                }
            }
            Step::Connect { port: 0..32 } => world.listen(&HYBRID, LISTENED),
            Step::Connect { port } => world.connect(u32::from(port)),
            Step::Offer => world.offer(PORT),
            Step::Host { index, bytes, leaves } => world.host(usize::from(index), bytes, leaves),
            Step::Turn { milliseconds } => world.turn(Duration::from_millis(u64::from(milliseconds))),
        }
    }
});
