//! Requests of a queue that wait for a lock, while those behind them are served.
//!
//! The vmm lets a successor of this process begin where the used ring ends, as if requests were completed in order. So
//! those that are not are kept in the memory for successors, with all that their replies need: the successor skips as
//! many chains as there are, and lets these wait again. A process may be killed between the completion of a request and
//! the end of its slot, so the slot has the place in the used ring first.

use std::sync::{Arc, MutexGuard, PoisonError};

use rustix::io::Errno;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{Bytes, GuestAddress};

use bulkhead_queue::{GuestRam, SplitQueue};

use crate::{
    fs::{Server, Slots, WAITS, Wait},
    fuse::{reply, request::Lock},
};

/// Words of a slot, see [`WAITS`].
const QUEUE: usize = 0;
const HEAD: usize = 1;
const COMPLETED: usize = 2;

/// A request that waits.
struct Waiting {
    head: u16,
    reply: GuestAddress,
    slot: u32,
    wait: Arc<Wait>,
}

/// The requests of a queue that wait.
#[derive(Default)]
pub(crate) struct Parked {
    list: Vec<Waiting>,
    /// Those of an earlier process have been taken over.
    resumed: bool,
}

impl Parked {
    /// Adds a request. One whose reply has no room is not answered.
    pub(crate) fn add(&mut self, queue: usize, chain: DescriptorChain<&GuestRam>, server: &Server, wait: Arc<Wait>) {
        let head = chain.head_index();
        let room = chain.writable().next().filter(|part| part.len() as usize >= reply::HEADER);
        let reply = room.map_or(GuestAddress(u64::MAX), |part| part.addr());
        let Lock { handle, owner, start, end, kind, pid, flags } = wait.lock;
        let kind = u64::from(kind) | u64::from(flags) << 32;
        let request = [wait.unique, wait.node, handle, owner, start, end, kind, pid.into()];
        let mut words = vec![queue as u64 + 1, head.into(), 0, reply.0];
        words.extend(request);
        let slot = slots(server).add(&words);
        if slot.is_none() {
            // There are more slots than threads.
            server.locks.pool.cancel(&wait, Errno::NOLCK);
        }
        self.list.push(Waiting { head, reply, slot: slot.unwrap_or(u32::MAX), wait });
    }

    /// Takes over the requests that waited in an earlier process; the queue begins behind them.
    pub(crate) fn resume(&mut self, queue: usize, ring: &mut SplitQueue, memory: &GuestRam, server: &Server) {
        if std::mem::replace(&mut self.resumed, true) {
            return;
        }
        let found = slots_of(queue, server);
        let used = u64::from(ring.queue().next_used()) + 1;
        let (done, waiting): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, words)| words[COMPLETED] == used);
        for (slot, _) in done {
            remove(server, slot);
        }
        ring.rewind(ring.position().wrapping_add(waiting.len() as u16));
        for (slot, words) in waiting {
            // Its end may have been at hand. The next place in the used ring is another one's.
            slots(server).set(slot, COMPLETED, 0);
            let (head, reply) = (words[HEAD] as u16, GuestAddress(words[3]));
            let (kind, flags, pid) = (words[10] as u32, (words[10] >> 32) as u32, words[11] as u32);
            let lock = Lock { handle: words[6], owner: words[7], start: words[8], end: words[9], kind, pid, flags };
            match server.wait_again((queue, words[4]), words[5], &lock) {
                Ok(wait) => self.list.push(Waiting { head, reply, slot, wait }),
                Err(bytes) => complete(ring, memory, server, (head, reply, slot), &bytes),
            }
        }
    }

    /// Completes the requests that wait no longer.
    pub(crate) fn finish(&mut self, ring: &mut SplitQueue, memory: &GuestRam, server: &Server) {
        for Waiting { head, reply, slot, wait } in self.list.extract_if(.., |waiting| waiting.wait.outcome().is_some())
        {
            let bytes = server.finish_wait(&wait);
            complete(ring, memory, server, (head, reply, slot), &bytes);
        }
    }

    /// Drops them without an answer: the driver has reset the queue.
    pub(crate) fn forget(&mut self, queue: usize, server: &Server) {
        for Waiting { wait, .. } in self.list.drain(..) {
            server.locks.pool.cancel(&wait, Errno::INTR);
            let _ = server.finish_wait(&wait);
        }
        for (slot, _) in slots_of(queue, server) {
            remove(server, slot);
        }
    }
}

fn slots(server: &Server) -> MutexGuard<'_, Slots> {
    server.waits.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The slots of a queue, with their words.
fn slots_of(queue: usize, server: &Server) -> Vec<(u32, [u64; 12])> {
    let slots = slots(server);
    let own = (0..WAITS.count() as u32).filter(|slot| slots.get(*slot, QUEUE) == queue as u64 + 1);
    own.map(|slot| (slot, std::array::from_fn(|word| slots.get(slot, word)))).collect()
}

fn complete(
    ring: &mut SplitQueue,
    memory: &GuestRam,
    server: &Server,
    (head, reply, slot): (u16, GuestAddress, u32),
    bytes: &[u8],
) {
    // A place outside of memory is the guest's own loss.
    let written = memory.write_slice(bytes, reply).map_or(0, |()| bytes.len());
    let next = u64::from(ring.queue().next_used().wrapping_add(1)) + 1;
    slots(server).set(slot, COMPLETED, next);
    ring.complete(memory, head, written as u32);
    remove(server, slot);
}

fn remove(server: &Server, slot: u32) {
    if slot != u32::MAX {
        slots(server).remove(slot);
    }
}
