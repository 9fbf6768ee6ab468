//! The device's side of one split virtqueue.

use std::{
    mem,
    sync::atomic::{Ordering, fence},
    thread,
};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::GuestRam;

/// A split virtqueue (virtio 1.3, 2.7) as a worker serves it.
///
/// A worker takes chains with [`Self::pop`], gives each back with [`Self::complete`], and once in a while asks
/// [`Self::should_interrupt`] whether to signal the driver. Before it sleeps it calls [`Self::enable_notifications`],
/// and looks again if that returns true.
///
/// All indices come from the guest. A driver that breaks the ring, by an index further ahead than the ring is long or a
/// head outside of the descriptor table, is logged once; from then on the queue is empty until the device is reset, so
/// that a worker neither spins on it nor trusts what else it holds.
#[derive(Debug)]
pub struct SplitQueue {
    queue: Queue,
    /// `used.idx` when the last decision about an interrupt was made.
    signalled: u16,
    broken: bool,
}

impl SplitQueue {
    /// Serves `queue`, which the transport has set up and validated.
    pub fn new(queue: Queue) -> Self {
        Self { signalled: queue.next_used(), queue, broken: false }
    }

    /// The addresses, size and indices of the queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The same, for a transport that sets the queue up while it is not served.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Continues a queue whose used ring stands at `used`, as after a reset or when another process served it before.
    pub fn restart(&mut self, used: u16) {
        self.queue.set_next_used(used);
        self.signalled = used;
        self.broken = false;
    }

    /// True once the driver has broken the ring.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Takes the next available chain.
    pub fn pop<'m>(&mut self, memory: &'m GuestRam) -> Option<DescriptorChain<&'m GuestRam>> {
        if self.broken {
            return None;
        }
        // The iterator refuses an `avail.idx` that is more than a queue's size ahead: a chain can be available only
        // once.
        let popped = self.queue.iter(memory).map(|mut chains| chains.next());
        self.unless_broken(popped).flatten()
    }

    /// The place of the chain that [`Self::pop`] takes next, for [`Self::rewind`].
    pub fn position(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Leaves the chains from `position` on in the available ring, to be taken again later. None of them may have been
    /// completed.
    pub fn rewind(&mut self, position: u16) {
        self.queue.set_next_avail(position);
    }

    /// Returns a chain to the driver with the number of bytes written into it (2.7.8).
    ///
    /// Chains given to [`Self::stage`] before become visible together with this one.
    pub fn complete(&mut self, memory: &GuestRam, head: u16, written: u32) {
        // Stores the element first and `used.idx` after it with release ordering: the driver sees either both or none.
        let added = self.queue.add_used(memory, head, written);
        self.unless_broken(added);
    }

    /// Prepares the return of a chain that the driver sees with the next [`Self::complete`], for devices whose buffers
    /// have to appear in the used ring at once (network receive buffers: 5.1.6.4.1).
    pub fn stage(&mut self, memory: &GuestRam, head: u16, written: u32) {
        let staged = self.try_stage(memory, head, written);
        self.unless_broken(staged);
    }

    fn try_stage(&mut self, memory: &GuestRam, head: u16, written: u32) -> Result<(), Error> {
        let (next, size) = (self.queue.next_used(), self.queue.size());
        if head >= size {
            return Err(Error::InvalidDescriptorIndex);
        }
        // Behind `flags` and `idx` lie elements of two little-endian words, head and length (2.7.8).
        let offset = 4 + 8 * u64::from(next % size);
        let address = self.queue.used_ring().checked_add(offset).ok_or(Error::AddressOverflow)?;
        let element = u64::from(head) | u64::from(written) << 32;
        memory.write_obj(element.to_le(), GuestAddress(address)).map_err(Error::GuestMemory)?;
        // Only our own index moves on; `complete` publishes it.
        self.queue.set_next_used(next.wrapping_add(1));
        Ok(())
    }

    /// Asks the driver for a kick with the next chain (2.7.10); true if one is available already, which no kick will
    /// announce.
    pub fn enable_notifications(&mut self, memory: &GuestRam) -> bool {
        let enabled = self.queue.enable_notification(memory);
        let more = self.unless_broken(enabled).unwrap_or(false) && !self.broken;
        // An impossible index differs from the queue's own, too. It must not keep the caller from sleeping.
        more && {
            let valid = self.queue.iter(memory).map(drop);
            self.unless_broken(valid).is_some()
        }
    }

    /// Tells the driver that kicks are not needed for now. With `VIRTIO_F_EVENT_IDX` there is nothing to do: after one
    /// kick the driver sends no more until it is asked for the next.
    pub fn disable_notifications(&mut self, memory: &GuestRam) {
        let disabled = self.queue.disable_notification(memory);
        self.unless_broken(disabled);
    }

    /// The number of chains that were completed since the last call of [`Self::should_interrupt`].
    pub fn unsignalled(&self) -> u16 {
        self.queue.next_used().wrapping_sub(self.signalled)
    }

    /// True if the driver wants an interrupt for the chains that were completed since the last call (2.7.7.2).
    pub fn should_interrupt(&mut self, memory: &GuestRam) -> bool {
        let new = self.queue.next_used();
        let old = mem::replace(&mut self.signalled, new);
        if new == old {
            return false;
        }
        // `used.idx` must be visible before the driver's setting is read. The driver does the opposite: it changes the
        // setting and then reads `used.idx`. So one of the two sees the other, and no chain is left unannounced.
        fence(Ordering::SeqCst);
        match self.suppression(memory) {
            // `used_event` lies among the indices that have just been filled, modulo 2^16 (2.7.7.2).
            Some(used_event) if self.queue.event_idx_enabled() => {
                new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old)
            }
            Some(flags) => u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0,
            // A needless interrupt does no harm, a missing one may stop the guest.
            None => true,
        }
    }

    /// Reads the driver's setting for interrupts: with `VIRTIO_F_EVENT_IDX` `used_event`, which follows the entries of
    /// the available ring (2.7.6), otherwise the ring's `flags`.
    fn suppression(&self, memory: &GuestRam) -> Option<u16> {
        let offset = if self.queue.event_idx_enabled() { 4 + 2 * u64::from(self.queue.size()) } else { 0 };
        let address = self.queue.avail_ring().checked_add(offset)?;
        memory.load(GuestAddress(address), Ordering::Relaxed).ok().map(u16::from_le)
    }

    fn unless_broken<T>(&mut self, result: Result<T, Error>) -> Option<T> {
        result
            .inspect_err(|error| {
                if !mem::replace(&mut self.broken, true) {
                    // Workers' threads have the names of their devices.
                    let thread = thread::current();
                    let worker = thread.name().unwrap_or_default();
                    tracing::warn!(worker, %error, "the driver broke a virtqueue; ignoring it until the device is reset");
                }
            })
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        fuzzing::{self, SIZE},
        testing,
    };

    /// Addresses of the rings' parts, see [`fuzzing::lay_out`].
    const AVAIL: u64 = 0x100;
    const USED_EVENT: u64 = AVAIL + 4 + 2 * SIZE as u64;
    const USED: u64 = 0x200;
    const AVAIL_EVENT: u64 = USED + 4 + 8 * SIZE as u64;

    struct Driver(GuestRam);

    impl Driver {
        fn new() -> Self {
            Self(fuzzing::memory(&[]))
        }

        fn store(&self, address: u64, value: u16) {
            self.0.write_obj(value.to_le(), GuestAddress(address)).unwrap();
        }

        fn load(&self, address: u64) -> u16 {
            u16::from_le(self.0.read_obj(GuestAddress(address)).unwrap())
        }

        /// Makes these heads available after those that went before.
        fn offer(&self, heads: &[u16]) {
            let mut index = self.load(AVAIL + 2);
            for head in heads {
                self.store(AVAIL + 4 + 2 * u64::from(index % SIZE), *head);
                index = index.wrapping_add(1);
            }
            self.store(AVAIL + 2, index);
        }

        fn used(&self, index: u16) -> (u32, u32) {
            let address = USED + 4 + 8 * u64::from(index % SIZE);
            let [head, len]: [u32; 2] = self.0.read_obj(GuestAddress(address)).unwrap();
            (u32::from_le(head), u32::from_le(len))
        }
    }

    fn device(event_idx: bool) -> SplitQueue {
        let mut queue = fuzzing::queue();
        queue.set_event_idx(event_idx);
        SplitQueue::new(queue)
    }

    fn pop(queue: &mut SplitQueue, driver: &Driver) -> Option<u16> {
        queue.pop(&driver.0).map(|chain| chain.head_index())
    }

    #[test]
    fn chains_are_taken_in_order_and_given_back_with_their_lengths() {
        let (driver, mut queue) = (Driver::new(), device(true));
        driver.offer(&[3, 1]);
        assert_eq!(pop(&mut queue, &driver), Some(3));
        queue.complete(&driver.0, 3, 10);
        assert_eq!(pop(&mut queue, &driver), Some(1));
        queue.complete(&driver.0, 1, 20);
        assert_eq!(pop(&mut queue, &driver), None);
        assert_eq!((driver.load(USED + 2), driver.used(0), driver.used(1)), (2, (3, 10), (1, 20)));
    }

    #[test]
    fn a_chain_that_was_left_is_taken_again() {
        let (driver, mut queue) = (Driver::new(), device(true));
        driver.offer(&[3, 1]);
        let position = queue.position();
        assert_eq!((pop(&mut queue, &driver), pop(&mut queue, &driver)), (Some(3), Some(1)));
        queue.rewind(position);
        assert_eq!(pop(&mut queue, &driver), Some(3));
    }

    #[test]
    fn staged_chains_become_visible_with_the_one_that_is_completed() {
        let (driver, mut queue) = (Driver::new(), device(true));
        driver.offer(&[0, 1, 2]);
        while pop(&mut queue, &driver).is_some() {}
        queue.stage(&driver.0, 0, 100);
        queue.stage(&driver.0, 1, 200);
        assert_eq!(driver.load(USED + 2), 0);
        queue.complete(&driver.0, 2, 300);
        assert_eq!(driver.load(USED + 2), 3);
        assert_eq!([0, 1, 2].map(|index| driver.used(index)), [(0, 100), (1, 200), (2, 300)]);
    }

    #[test]
    fn an_interrupt_is_due_once_after_completions_unless_declined() {
        let (driver, mut queue) = (Driver::new(), device(false));
        driver.offer(&[0, 1, 2]);
        assert!(!queue.should_interrupt(&driver.0));
        queue.complete(&driver.0, 0, 0);
        queue.complete(&driver.0, 1, 0);
        assert!(queue.should_interrupt(&driver.0));
        assert!(!queue.should_interrupt(&driver.0));
        driver.store(AVAIL, VRING_AVAIL_F_NO_INTERRUPT as u16);
        queue.complete(&driver.0, 2, 0);
        assert!(!queue.should_interrupt(&driver.0));
    }

    #[test]
    fn a_chain_that_came_before_kicks_were_enabled_is_reported() {
        for event_idx in [false, true] {
            let (driver, mut queue) = (Driver::new(), device(event_idx));
            queue.disable_notifications(&driver.0);
            assert_eq!(driver.load(USED), u16::from(!event_idx));
            driver.offer(&[0]);
            assert!(queue.enable_notifications(&driver.0));
            assert_eq!(pop(&mut queue, &driver), Some(0));
            assert!(!queue.enable_notifications(&driver.0));
            let expected = u16::from(event_idx);
            assert_eq!((driver.load(USED), driver.load(AVAIL_EVENT)), (0, expected));
        }
    }

    #[test]
    fn a_broken_ring_rests_until_a_restart() {
        for event_idx in [false, true] {
            let (driver, mut queue) = (Driver::new(), device(event_idx));
            driver.store(AVAIL + 2, SIZE + 1);
            assert!(!queue.enable_notifications(&driver.0), "the caller may sleep");
            assert_eq!((pop(&mut queue, &driver), queue.is_broken()), (None, true));
            // A driver that mends its index without a reset is not trusted again.
            driver.store(AVAIL + 2, 1);
            assert!(!queue.enable_notifications(&driver.0));
            assert_eq!(pop(&mut queue, &driver), None);
            queue.restart(0);
            assert_eq!((pop(&mut queue, &driver), queue.is_broken()), (Some(0), false));
        }
    }

    #[test]
    fn a_head_outside_of_the_table_breaks_the_ring() {
        for stage in [false, true] {
            let (driver, mut queue) = (Driver::new(), device(true));
            driver.offer(&[SIZE, 0]);
            let head = pop(&mut queue, &driver).unwrap();
            if stage {
                queue.stage(&driver.0, head, 0);
            } else {
                queue.complete(&driver.0, head, 0);
            }
            assert!(queue.is_broken());
            assert_eq!((pop(&mut queue, &driver), driver.load(USED + 2)), (None, 0));
        }
    }

    proptest! {
        #[test]
        fn an_interrupt_is_due_when_the_drivers_event_index_is_passed(
            start: u16, behind in 0_u16..40, batches in proptest::collection::vec(1_u16..=SIZE, 1..8)
        ) {
            let (driver, mut queue) = (Driver::new(), device(true));
            queue.restart(start);
            let event = start.wrapping_add(behind);
            driver.store(USED_EVENT, event);
            let mut completed = 0;
            for batch in batches {
                for _ in 1..batch {
                    queue.stage(&driver.0, 0, 0);
                }
                queue.complete(&driver.0, 0, 0);
                // The element with the driver's index is among those of this batch.
                let expected = (completed..completed + batch).contains(&behind);
                completed += batch;
                prop_assert_eq!(queue.unsignalled(), batch);
                prop_assert_eq!(queue.should_interrupt(&driver.0), expected);
                prop_assert_eq!(queue.unsignalled(), 0);
            }
        }

        #[test]
        fn any_rings_are_served_to_an_end(bytes in testing::queue(), event_idx: bool) {
            let (memory, mut queue) = (fuzzing::memory(&bytes), device(event_idx));
            let mut served = 0;
            loop {
                while let Some(chain) = queue.pop(&memory) {
                    queue.complete(&memory, chain.head_index(), 0);
                    served += 1;
                }
                queue.should_interrupt(&memory);
                if !queue.enable_notifications(&memory) {
                    break;
                }
            }
            prop_assert!(served <= SIZE);
        }
    }
}
