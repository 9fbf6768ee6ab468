//! Open directories, the most recently used ones. Most requests are about names in a directory that was used before.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::fd::OwnedFd;

/// Number of directories that are kept open.
const CAPACITY: usize = 1024;

/// Time for which a directory is taken to be where it was found. Then its way is walked again: the host may have moved
/// it out of its share.
const TRUSTED: Duration = Duration::from_secs(1);

struct Slot {
    node: u64,
    directory: Arc<OwnedFd>,
    found: Instant,
    /// Used since the hand passed it last.
    used: bool,
}

/// Descriptors by node, replaced by second chance (the clock algorithm).
#[derive(Default)]
pub(crate) struct Cache {
    slots: Vec<Slot>,
    places: HashMap<u64, usize>,
    hand: usize,
}

impl Cache {
    /// An open directory, whose way may have to be walked again.
    pub(crate) fn stale(&self, node: u64) -> Option<Arc<OwnedFd>> {
        self.places.get(&node).map(|place| Arc::clone(&self.slots[*place].directory))
    }

    /// An open directory that was found a short time ago.
    pub(crate) fn fresh(&mut self, node: u64) -> Option<Arc<OwnedFd>> {
        let slot = &mut self.slots[*self.places.get(&node)?];
        slot.used = true;
        (slot.found.elapsed() < TRUSTED).then(|| Arc::clone(&slot.directory))
    }

    /// Keeps a directory that has just been found.
    pub(crate) fn put(&mut self, node: u64, directory: Arc<OwnedFd>) {
        let slot = Slot { node, directory, found: Instant::now(), used: false };
        if let Some(place) = self.places.get(&node) {
            self.slots[*place] = slot;
        } else if self.slots.len() < CAPACITY {
            self.places.insert(node, self.slots.len());
            self.slots.push(slot);
        } else {
            while std::mem::take(&mut self.slots[self.hand].used) {
                self.hand = (self.hand + 1) % CAPACITY;
            }
            self.places.remove(&self.slots[self.hand].node);
            self.places.insert(node, self.hand);
            self.slots[self.hand] = slot;
            self.hand = (self.hand + 1) % CAPACITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_are_used_stay_and_others_make_room() {
        let open = || Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
        let directory = open();
        let mut cache = Cache::default();
        for node in 0..CAPACITY as u64 {
            cache.put(node, Arc::clone(&directory));
        }
        for node in 0..10 {
            assert!(cache.fresh(node).is_some());
        }
        for node in 0..CAPACITY as u64 / 2 {
            cache.put(10_000 + node, Arc::clone(&directory));
        }
        assert!((0..10).all(|node| cache.fresh(node).is_some()));
        assert!(cache.fresh(10).is_none() && cache.stale(10).is_none());
        assert_eq!((cache.slots.len(), cache.places.len()), (CAPACITY, CAPACITY));
    }
}
