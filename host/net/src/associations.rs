//! Who talks to whom without a connection: a bounded table whose oldest entry gives way and whose silent ones end.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// One association.
struct Entry<K, T> {
    key: K,
    value: T,
    used: Instant,
}

/// Associations by their ends and by number; numbers are not used again.
pub(super) struct Associations<K, T> {
    most: usize,
    silence: Duration,
    next: u64,
    entries: HashMap<u64, Entry<K, T>>,
    by_key: HashMap<K, u64>,
}

impl<K: Copy + Eq + Hash, T> Associations<K, T> {
    /// A table of at most `most` associations, which end after so long without use.
    pub(super) fn new(most: usize, silence: Duration) -> Self {
        Self { most, silence, next: 0, entries: HashMap::new(), by_key: HashMap::new() }
    }

    /// The number that the next association gets.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The number of the association between these ends.
    pub(super) fn find(&self, key: &K) -> Option<u64> {
        self.by_key.get(key).copied()
    }

    /// An association, which is not used by that.
    pub(super) fn get(&self, id: u64) -> Option<(K, &T)> {
        self.entries.get(&id).map(|entry| (entry.key, &entry.value))
    }

    /// Uses an association.
    pub(super) fn touch(&mut self, id: u64) -> Option<(K, &mut T)> {
        let entry = self.entries.get_mut(&id)?;
        entry.used = Instant::now();
        Some((entry.key, &mut entry.value))
    }

    /// Adds an association under the next number; what gave way for it, if the table was full.
    pub(super) fn insert(&mut self, key: K, value: T) -> Option<T> {
        let oldest = || self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| *id);
        let oldest = if self.entries.len() >= self.most { oldest() } else { None };
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

    /// Ends what is silent, and returns it.
    pub(super) fn sweep(&mut self, now: Instant) -> Vec<T> {
        let silent = |entry: &Entry<K, T>| now.duration_since(entry.used) > self.silence;
        let old: Vec<_> = self.entries.iter().filter(|(_, entry)| silent(entry)).map(|(id, _)| *id).collect();
        old.into_iter().filter_map(|id| self.remove(id)).collect()
    }

    /// Whether anything could become silent.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many there are, each way they are kept.
    #[cfg(test)]
    pub(super) fn lens(&self) -> [usize; 2] {
        [self.entries.len(), self.by_key.len()]
    }
}
