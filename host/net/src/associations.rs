//! A bounded table of associations, for protocols without connections (UDP, pings): the least recently used one gives
//! way to a new one, and idle ones expire.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

struct Entry<K, T> {
    key: K,
    value: T,
    used: Instant,
}

/// Associations by their ends (`K`) and by number. Numbers are never used again, so an event that comes late for one
/// that is gone finds nothing.
pub(super) struct Associations<K, T> {
    capacity: usize,
    idle_timeout: Duration,
    next: u64,
    entries: HashMap<u64, Entry<K, T>>,
    by_key: HashMap<K, u64>,
}

impl<K: Copy + Eq + Hash, T> Associations<K, T> {
    /// A table of at most `capacity` associations, which expire when they are not used for `idle_timeout`.
    pub(super) fn new(capacity: usize, idle_timeout: Duration) -> Self {
        Self { capacity, idle_timeout, next: 0, entries: HashMap::new(), by_key: HashMap::new() }
    }

    /// The number that the next association gets.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The number of the association between these ends.
    pub(super) fn find(&self, key: &K) -> Option<u64> {
        self.by_key.get(key).copied()
    }

    /// An association, without marking it as used.
    pub(super) fn get(&self, id: u64) -> Option<(K, &T)> {
        self.entries.get(&id).map(|entry| (entry.key, &entry.value))
    }

    /// An association, which counts as used now.
    pub(super) fn touch(&mut self, id: u64) -> Option<(K, &mut T)> {
        let entry = self.entries.get_mut(&id)?;
        entry.used = Instant::now();
        Some((entry.key, &mut entry.value))
    }

    /// Adds an association under the next number; returns the one that gave way, if the table was full.
    pub(super) fn insert(&mut self, key: K, value: T) -> Option<T> {
        // A scan, not a heap: it runs only when a guest opens more than `capacity` at a time.
        let oldest = || self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| *id);
        let oldest = if self.entries.len() >= self.capacity { oldest() } else { None };
        let gone = oldest.and_then(|id| self.remove(id));
        self.entries.insert(self.next, Entry { key, value, used: Instant::now() });
        self.by_key.insert(key, self.next);
        self.next += 1;
        gone
    }

    /// Ends an association.
    pub(super) fn remove(&mut self, id: u64) -> Option<T> {
        let entry = self.entries.remove(&id)?;
        self.by_key.remove(&entry.key);
        Some(entry.value)
    }

    /// Removes the idle associations and returns them.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<T> {
        let idle = |entry: &Entry<K, T>| now.duration_since(entry.used) > self.idle_timeout;
        let old: Vec<_> = self.entries.iter().filter(|(_, entry)| idle(entry)).map(|(id, _)| *id).collect();
        old.into_iter().filter_map(|id| self.remove(id)).collect()
    }

    /// True if nothing can expire.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Sizes of both maps, which must agree.
    #[cfg(test)]
    pub(super) fn lens(&self) -> [usize; 2] {
        [self.entries.len(), self.by_key.len()]
    }
}
