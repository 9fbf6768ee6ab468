//! Entry points of the fuzz targets into this crate. Only in tests and with the feature `fuzzing`.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has to fail")]

use std::{
    ffi::CStr,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use virtio_queue::QueueT;
use vm_memory::VolatileSlice;

use bulkhead_queue::{SplitQueue, fuzzing};

use crate::{
    api::Share,
    buffers::{Buffers, Segments},
    fs::{Served, Server, State},
    fuse::{ROOT, WATCH, reply, request},
};

/// Names that requests choose from: those of files that are there, others, and some that are none.
const NAMES: [&CStr; 12] = [
    c"file",
    c"directory",
    c"link",
    c"inner",
    c"new",
    c"",
    c".",
    c"..",
    c"a/b",
    c"/etc/passwd",
    c"\xff\xfe",
    c"user.x",
];

/// A request of a guest.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The operation.
    pub opcode: u8,
    /// Index of a node that the guest was given.
    pub node: u8,
    /// Index of a handle that the guest was given; the first field of the body if there is one.
    pub handle: Option<u8>,
    /// Fields of the body.
    pub fields: &'a [u32],
    /// Indices of names at the end of the body.
    pub names: &'a [u8],
    /// Bytes behind them.
    pub rest: &'a [u8],
    /// Size of the buffer for the reply.
    pub room: u16,
}

/// A server of a directory of its own, and what the guest has got from it.
pub struct World {
    server: Server,
    directory: PathBuf,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// Makes a directory with a few files, and a read-only share in it.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("bulkhead-share-{}-{number}", std::process::id()));
        fs::create_dir_all(directory.join("directory/inner")).unwrap();
        fs::write(directory.join("file"), b"contents").unwrap();
        std::os::unix::fs::symlink("/etc", directory.join("link")).unwrap();
        let share = |path: PathBuf, read_only| Share { path, read_only };
        let shares = [share(directory.clone(), false), share(directory.join("directory/inner"), true)];
        let (server, failed) = Server::new(&shares, &[], 4096, 1, &State::own().unwrap(), true);
        assert!(failed.is_empty());
        let mut world = Self { server, directory, nodes: vec![ROOT], handles: vec![0] };
        world.enter();
        world
    }

    /// Looks the share up.
    fn enter(&mut self) {
        let path = self.directory.clone();
        for name in path.components().skip(1) {
            let name = name.as_os_str().as_encoded_bytes();
            let body = [name, b"\0"].concat();
            let reply = self.send(&message(1, *self.nodes.last().unwrap(), &body), 256);
            self.nodes.push(u64::from_ne_bytes(reply[16..24].try_into().unwrap()));
        }
        self.nodes.reverse();
    }

    /// Sends a request, and keeps the node and the handle that its reply may hold.
    pub fn step(&mut self, step: &Step<'_>) {
        let pick = |from: &[u64], index: u8| from[usize::from(index) % from.len()];
        let mut body = step.handle.map(|index| pick(&self.handles, index).to_ne_bytes().to_vec()).unwrap_or_default();
        body.extend(step.fields.iter().flat_map(|field| field.to_ne_bytes()));
        for name in step.names {
            body.extend(NAMES[usize::from(*name) % NAMES.len()].to_bytes_with_nul());
        }
        body.extend(step.rest);
        // Bulkhead's own is far above the others, of which this is none.
        let opcode = if step.opcode == 55 { WATCH } else { step.opcode.into() };
        let reply = self.send(&message(opcode, pick(&self.nodes, step.node), &body), step.room.into());
        let word = |at: usize| reply.get(at..at + 8).map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap()));
        let ok = reply.get(4..8) == Some(&[0; 4]);
        match step.opcode {
            // Entries, and behind them a handle; handles alone.
            1 | 6 | 8 | 9 | 13 | 35 | 51 if ok => {
                self.nodes.extend(word(16));
                self.handles.extend(word(16 + 128));
            }
            14 | 27 if ok => self.handles.extend(word(16)),
            _ => {}
        }
    }

    /// Sends any bytes; returns the reply.
    pub fn send(&mut self, bytes: &[u8], room: usize) -> Vec<u8> {
        let (mut bytes, mut reply) = (bytes.to_vec(), vec![0; room]);
        let (first, second) = reply.split_at_mut(room / 2);
        let buffers = Buffers {
            readable: Segments::of(vec![VolatileSlice::from(&mut bytes[..])]),
            writable: Segments::of(vec![VolatileSlice::from(first), VolatileSlice::from(second)]),
        };
        let written = self.serve(&buffers);
        assert!(written <= room);
        reply.truncate(written);
        if let Some(len) = reply.get(..4).filter(|_| reply.len() >= reply::HEADER && reply.len() < room) {
            assert_eq!(u32::from_ne_bytes(len.try_into().unwrap()) as usize, reply.len());
        }
        reply
    }

    /// Serves a request, which never waits: that takes threads.
    fn serve(&self, buffers: &Buffers<'_>) -> usize {
        match self.server.serve(0, buffers) {
            Served::Done(written) => written,
            Served::Waits(_) => panic!("a request waits"),
        }
    }

    /// Serves a queue in any guest memory that begins with `bytes`, laid out as [`fuzzing`] says.
    pub fn queue(&mut self, bytes: &[u8], event_idx: bool) {
        let memory = fuzzing::memory(bytes);
        let mut queue = fuzzing::queue();
        queue.set_event_idx(event_idx);
        let mut queue = SplitQueue::new(queue);
        for _ in 0..2 * fuzzing::SIZE {
            let Some(chain) = queue.pop(&memory) else { break };
            let head = chain.head_index();
            let written = Buffers::new(chain, &memory).map_or(0, |buffers| self.serve(&buffers));
            queue.complete(&memory, head, written as u32);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Builds a request.
fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(((request::HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend(7_u64.to_ne_bytes());
    bytes.extend(node.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// Parses any bytes as a request.
pub fn parse(bytes: &[u8]) {
    if let Some(header) = request::header(bytes) {
        let _ = request::operation(&header, bytes);
    }
}
