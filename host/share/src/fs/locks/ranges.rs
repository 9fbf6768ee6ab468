//! The byte ranges that an owner has locked, as the host's kernel keeps them (fcntl(2)): a new range takes the place of
//! what it covers, and neighbours of one kind are one range.

use std::collections::BTreeMap;

/// The last byte that can be locked: offsets are signed.
pub(super) const LAST: u64 = i64::MAX as u64;

/// Locked ranges without overlaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, (u64, bool)>);

impl Ranges {
    /// Number of ranges, of which each takes memory of the host's kernel.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// First byte, last byte, and whether the lock is exclusive.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64, bool)> {
        self.0.iter().map(|(start, (end, exclusive))| (*start, *end, *exclusive))
    }

    /// True if a byte of the range is locked in a way that excludes this kind of lock.
    pub(super) fn conflicts(&self, (start, end): (u64, u64), exclusive: bool) -> bool {
        self.0
            .range(..=end)
            .rev()
            .take_while(|(_, (last, _))| *last >= start)
            .any(|(_, (_, other))| exclusive || *other)
    }

    /// Locks from `start` to `end`, exclusively or not, or unlocks with `None`.
    pub(super) fn set(&mut self, start: u64, end: u64, exclusive: Option<bool>) {
        let touched = self.0.range(..=end.saturating_add(1)).rev();
        // Sorted and without overlaps, so the first one that ends before the range is the last to look at.
        let touched = touched.take_while(|(_, (last, _))| last.saturating_add(1) >= start);
        let touched: Vec<_> = touched.map(|(first, (last, kind))| (*first, *last, *kind)).collect();
        let (mut from, mut to) = (start, end);
        for (first, last, kind) in touched {
            self.0.remove(&first);
            if exclusive == Some(kind) {
                (from, to) = (from.min(first), to.max(last));
                continue;
            }
            if first < start {
                self.0.insert(first, (last.min(start - 1), kind));
            }
            if last > end {
                self.0.insert(first.max(end + 1), (last, kind));
            }
        }
        if let Some(kind) = exclusive {
            self.0.insert(from, (to, kind));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BYTES: usize = 24;

    proptest! {
        #[test]
        fn ranges_are_those_of_single_bytes(
            steps in prop::collection::vec((0..BYTES, 0..BYTES, prop::option::of(any::<bool>())), 0..40),
            (from, to, exclusive) in (0..BYTES, 0..BYTES, any::<bool>()),
        ) {
            let (mut ranges, mut bytes) = (Ranges::default(), [None; BYTES]);
            for (one, other, kind) in steps {
                let (start, end) = (one.min(other), one.max(other));
                ranges.set(start as u64, end as u64, kind);
                bytes[start..=end].fill(kind);
            }
            let mut found = [None; BYTES];
            let mut before = None;
            for (start, end, kind) in ranges.iter() {
                found[start as usize..=end as usize].fill(Some(kind));
                // Neighbours differ, as they would be one otherwise.
                prop_assert!(before.is_none_or(|(last, other)| last + 1 < start || last + 1 == start && other != kind));
                before = Some((end, kind));
            }
            prop_assert_eq!(found, bytes);
            let (start, end) = (from.min(to), from.max(to));
            let expected = bytes[start..=end].iter().flatten().any(|other| exclusive || *other);
            prop_assert_eq!(ranges.conflicts((start as u64, end as u64), exclusive), expected);
        }
    }

    #[test]
    fn the_last_byte_can_be_locked_and_unlocked() {
        let mut ranges = Ranges::default();
        ranges.set(0, LAST, Some(true));
        ranges.set(LAST, LAST, None);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(0, LAST - 1, true)]);
        ranges.set(0, LAST, None);
        assert!(ranges.is_empty());
    }
}
