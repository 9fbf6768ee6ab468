//! The memory that outlives a process: what its successor has to know of the guest's nodes, names and open files.
//!
//! The backend holds this memory and hands it to each process. A process may be killed between any two instructions, so
//! it holds neither locks nor a log, only slots: one counts once its first word, which is written last, is nonzero.
//! The successor is of the same program, starts when its predecessor is gone, and looks all that it finds up again: the
//! memory gives it no right that it does not have. Still every word is checked, since the guest caused it.
//!
//! Slots that are full are not kept: what they would hold is `ESTALE` after a crash.

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Length in bytes. Pages that are not used take no memory.
pub(crate) const LEN: usize = WAITS.end();

/// Words of the header: version, next numbers of nodes and handles, order of names, slots that were ever used.
const VERSION: usize = 0;
const NEXT_NODE: usize = 1;
const NEXT_HANDLE: usize = 2;
const ORDER: usize = 3;
const USED: usize = 4;
/// Place of the requests under way, and words of each.
const REQUESTS: usize = 64;
const REQUEST_WORDS: usize = 8;
/// Place of the devices' numbers, and how many fit.
const DEVICES: usize = 256;
const MAX_DEVICES: usize = 256;
/// Bytes before the first slot.
const HEADER: usize = 4096;

/// The format; another one counts as empty.
const FORMAT: u64 = 0x6275_6c6b_7368_0002;

/// An array of slots.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    at: usize,
    words: usize,
    count: usize,
    /// Word of the header with the number of slots that were ever used.
    used: usize,
}

impl Table {
    /// Number of slots.
    pub(crate) const fn count(&self) -> usize {
        self.count
    }

    const fn end(&self) -> usize {
        self.at + 8 * self.words * self.count
    }
}

/// Nodes: number, times that the guest has it, device, inode number, seconds and nanoseconds of birth, type, watch.
pub(crate) const NODES: Table = Table { at: HEADER, words: 8, count: 2_000_000, used: USED };
/// Names: length and kind, node, directory, order, next part, and bytes; further parts: a mark, next part, and bytes.
pub(crate) const NAMES: Table = Table { at: NODES.end(), words: 8, count: 4_000_000, used: USED + 1 };
/// Open files and directories: number, node, flags, and whether there are locks.
pub(crate) const HANDLES: Table = Table { at: NAMES.end(), words: 4, count: 1 << 20, used: USED + 2 };
/// Requests that wait for a lock: queue and one, head of the chain, `used.idx` behind it once it is being completed,
/// place of the reply; id, node, handle, owner, first and last byte, kind and flags, process.
pub(crate) const WAITS: Table = Table { at: HANDLES.end(), words: 12, count: 256, used: USED + 3 };

/// The memory.
pub(crate) struct State(MmapRegion);

impl State {
    /// Maps the memory behind a file of [`LEN`] bytes, which cannot shrink.
    pub(crate) fn map(file: File) -> io::Result<Arc<Self>> {
        let state = Self(MmapRegion::from_file(FileOffset::new(file, 0), LEN).map_err(io::Error::other)?);
        if state.word(VERSION).load(Ordering::Acquire) != FORMAT {
            state.clear();
        }
        Ok(Arc::new(state))
    }

    /// Memory of this process alone.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn own() -> io::Result<Arc<Self>> {
        let state = Self(MmapRegion::new(LEN).map_err(io::Error::other)?);
        state.clear();
        Ok(Arc::new(state))
    }

    /// Numbers of slots in use: nodes, parts of names, handles.
    #[cfg(test)]
    pub(crate) fn in_use(self: &Arc<Self>) -> (usize, usize, usize) {
        let [nodes, names, handles] = [NODES, NAMES, HANDLES].map(|table| Slots::find(self, table).1.len());
        (nodes, names, handles)
    }

    /// Number of requests that wait.
    #[cfg(test)]
    pub(crate) fn waiting(self: &Arc<Self>) -> usize {
        Slots::find(self, WAITS).1.len()
    }

    fn clear(&self) {
        for at in (0..HEADER / 8).filter(|at| *at != VERSION) {
            self.word(at).store(0, Ordering::Relaxed);
        }
        self.word(VERSION).store(FORMAT, Ordering::Release);
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // All places come from constants and checked indices, so the other word is never used.
        static OUTSIDE: AtomicU64 = AtomicU64::new(0);
        self.0.get_atomic_ref(8 * at).unwrap_or(&OUTSIDE)
    }

    /// A word of a request under way, of a queue that exists.
    pub(crate) fn request(&self, queue: usize, word: usize) -> &AtomicU64 {
        self.word(REQUESTS + REQUEST_WORDS * queue + word)
    }

    /// Forgets the requests under way: those of a new connection have other ids.
    pub(crate) fn forget_requests(&self) {
        (REQUESTS..DEVICES).step_by(REQUEST_WORDS).for_each(|at| self.word(at).store(0, Ordering::Release));
    }

    /// Takes a number for a node that no process has taken; `first` is the least.
    pub(crate) fn next_node(&self, first: u64) -> u64 {
        take(self.word(NEXT_NODE), first)
    }

    /// Takes a number for a handle that no process has taken; `first` is the least.
    pub(crate) fn next_handle(&self, first: u64) -> u64 {
        take(self.word(NEXT_HANDLE), first)
    }

    /// Numbers of the host's devices with a mark, by the order in which they were found.
    pub(crate) fn devices(&self) -> Vec<(u64, bool)> {
        let word = |at: usize| self.word(DEVICES + at).load(Ordering::Acquire);
        // A device's number takes 64 bits, so the mark has a word of its own.
        (0..MAX_DEVICES / 2)
            .map(|at| (word(2 * at), word(2 * at + 1)))
            .take_while(|(_, mark)| *mark != 0)
            .map(|(id, mark)| (id, mark == 2))
            .collect()
    }

    /// Keeps the number of a device.
    pub(crate) fn add_device(&self, at: usize, id: u64, mark: bool) {
        if at < MAX_DEVICES / 2 {
            self.word(DEVICES + 2 * at).store(id, Ordering::Relaxed);
            self.word(DEVICES + 2 * at + 1).store(1 + u64::from(mark), Ordering::Release);
        }
    }
}

fn take(next: &AtomicU64, first: u64) -> u64 {
    let _ = next.fetch_max(first, Ordering::Relaxed);
    next.fetch_add(1, Ordering::Relaxed)
}

/// The slots of a table. One thread at a time uses it.
pub(crate) struct Slots {
    state: Arc<State>,
    table: Table,
    free: Vec<u32>,
}

impl Slots {
    /// The slots of a table, and the indices of those that are in use.
    pub(crate) fn find(state: &Arc<State>, table: Table) -> (Self, Vec<u32>) {
        let mut slots = Self { state: Arc::clone(state), table, free: Vec::new() };
        let used = slots.used().load(Ordering::Acquire).min(table.count as u64) as u32;
        let in_use = (0..used).filter(|slot| slots.get(*slot, 0) != 0).collect();
        slots.free = (0..used).rev().filter(|slot| slots.get(*slot, 0) == 0).collect();
        (slots, in_use)
    }

    fn used(&self) -> &AtomicU64 {
        self.state.word(self.table.used)
    }

    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
    }

    fn word(&self, slot: u32, word: usize) -> Option<&AtomicU64> {
        let inside = (slot as usize) < self.table.count && word < self.table.words;
        inside.then(|| self.state.word(self.table.at / 8 + slot as usize * self.table.words + word))
    }

    /// A word; 0 for a slot that does not exist.
    pub(crate) fn get(&self, slot: u32, word: usize) -> u64 {
        self.word(slot, word).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Changes a word of a slot in use.
    pub(crate) fn set(&self, slot: u32, word: usize, value: u64) {
        if let Some(word) = self.word(slot, word) {
            word.store(value, Ordering::Release);
        }
    }

    /// Fills a slot with words, the first of them nonzero; `None` if the table is full.
    pub(crate) fn add(&mut self, words: &[u64]) -> Option<u32> {
        let slot = self.free.pop().or_else(|| {
            let used = self.used().load(Ordering::Relaxed);
            (used < self.table.count as u64).then(|| {
                self.used().store(used + 1, Ordering::Release);
                used as u32
            })
        })?;
        for (at, value) in words.iter().enumerate().skip(1) {
            self.set(slot, at, *value);
        }
        self.set(slot, 0, words[0]);
        Some(slot)
    }

    /// Empties a slot.
    pub(crate) fn remove(&mut self, slot: u32) {
        self.set(slot, 0, 0);
        self.free.push(slot);
    }

    /// Empties all slots.
    pub(crate) fn clear(&mut self) {
        let used = self.used().load(Ordering::Relaxed) as u32;
        for slot in (0..used).filter(|slot| self.get(*slot, 0) != 0).collect::<Vec<_>>() {
            self.remove(slot);
        }
    }
}

/// Bytes of a name in its first part, and in each other one.
const FIRST: usize = 24;
const NEXT: usize = 48;
/// Longest name: a path of the host.
const MAX_NAME: usize = 4096;
/// Bits of the first word: what it is, and above them the length.
const KIND_BITS: u32 = 3;
const PART: u64 = 1;

/// Meanings of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameKind {
    /// A name in a directory.
    Child = 2,
    /// The path of a share, or of a directory on the way to one, without a slash at its start.
    Path = 3,
}

/// A name of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) slot: u32,
    pub(crate) kind: NameKind,
    pub(crate) node: u64,
    pub(crate) directory: u64,
    /// Larger for newer names.
    pub(crate) order: u64,
    pub(crate) bytes: Vec<u8>,
}

/// Names of any length in slots of one.
pub(crate) struct Names(Slots);

impl Names {
    /// The names that were kept, in the order in which they were. Parts that belong to none are free.
    pub(crate) fn find(state: &Arc<State>) -> (Self, Vec<Name>) {
        let (slots, in_use) = Slots::find(state, NAMES);
        let mut names = Self(slots);
        let (mut parts, heads): (Vec<_>, Vec<_>) =
            in_use.into_iter().partition(|slot| names.0.get(*slot, 0) & ((1 << KIND_BITS) - 1) == PART);
        let mut found = Vec::new();
        let mut taken = std::collections::HashSet::new();
        for slot in heads {
            match names.read(slot, &mut taken) {
                Some(name) => found.push(name),
                None => names.0.remove(slot),
            }
        }
        parts.retain(|part| !taken.contains(part));
        for part in parts {
            names.0.remove(part);
        }
        found.sort_by_key(|name| name.order);
        (names, found)
    }

    fn read(&self, slot: u32, taken: &mut std::collections::HashSet<u32>) -> Option<Name> {
        let word = |at| self.0.get(slot, at);
        let kind = match word(0) & ((1 << KIND_BITS) - 1) {
            2 => NameKind::Child,
            3 => NameKind::Path,
            _ => return None,
        };
        let len = usize::try_from(word(0) >> KIND_BITS).ok().filter(|len| *len <= MAX_NAME)?;
        let mut bytes: Vec<u8> = (5..8).flat_map(|at| word(at).to_ne_bytes()).collect();
        let mut next = word(4);
        while bytes.len() < len {
            let part = u32::try_from(next).ok()?;
            // A part belongs to one name, which also rules out a circle.
            if self.0.get(part, 0) != PART || !taken.insert(part) {
                return None;
            }
            bytes.extend((2..8).flat_map(|at| self.0.get(part, at).to_ne_bytes()));
            next = self.0.get(part, 1);
        }
        bytes.truncate(len);
        Some(Name { slot, kind, node: word(1), directory: word(2), order: word(3), bytes })
    }

    /// Keeps a name; `None` if the table is full.
    pub(crate) fn add(&mut self, kind: NameKind, node: u64, directory: u64, bytes: &[u8]) -> Option<u32> {
        if bytes.len() > MAX_NAME {
            return None;
        }
        let (first, rest) = bytes.split_at(bytes.len().min(FIRST));
        let mut next = u64::MAX;
        // From the last part, so that each knows its successor.
        for part in rest.chunks(NEXT).rev() {
            let mut words = vec![PART, next];
            words.extend(words_of(part, NEXT));
            let Some(slot) = self.0.add(&words) else {
                self.remove_parts(next);
                return None;
            };
            next = slot.into();
        }
        let order = self.0.state.word(ORDER).fetch_add(1, Ordering::Relaxed);
        let mut words = vec![(bytes.len() as u64) << KIND_BITS | kind as u64, node, directory, order, next];
        words.extend(words_of(first, FIRST));
        let slot = self.0.add(&words);
        if slot.is_none() {
            self.remove_parts(next);
        }
        slot
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        let next = self.0.get(slot, 4);
        self.0.remove(slot);
        self.remove_parts(next);
    }

    fn remove_parts(&mut self, mut next: u64) {
        while let Some(part) = u32::try_from(next).ok().filter(|part| self.0.get(*part, 0) == PART) {
            next = self.0.get(part, 1);
            self.0.remove(part);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

fn words_of(bytes: &[u8], room: usize) -> Vec<u64> {
    let mut padded = bytes.to_vec();
    padded.resize(room, 0);
    padded.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_lengths_survive_and_parts_of_none_are_free_again() {
        let state = State::own().unwrap();
        let (mut names, found) = Names::find(&state);
        assert!(found.is_empty());
        let lengths = [0, 1, 24, 25, 72, 73, 255, 4096];
        let slots: Vec<_> = lengths
            .iter()
            .map(|len| {
                let bytes: Vec<u8> = (0..*len).map(|at| at as u8).collect();
                names.add(NameKind::Child, *len as u64 + 1, 9, &bytes).unwrap()
            })
            .collect();
        assert_eq!(names.add(NameKind::Path, 1, 1, &[0; 4097]), None);
        // A process that died before it wrote the first part.
        names.0.add(&[PART, u64::MAX]).unwrap();
        let used = names.0.used().load(Ordering::Relaxed);
        let (mut names, found) = Names::find(&state);
        assert_eq!(found.iter().map(|name| name.bytes.len()).collect::<Vec<_>>(), lengths);
        assert!(found.iter().all(|name| name.bytes.iter().enumerate().all(|(at, byte)| *byte == at as u8)));
        for slot in slots {
            names.remove(slot);
        }
        assert_eq!(names.0.free.len() as u64, used);
        assert!(Names::find(&state).1.is_empty());
    }

    #[test]
    fn a_table_that_is_full_or_has_any_content_harms_nobody() {
        let state = State::own().unwrap();
        let small = Table { count: 2, ..NODES };
        let (mut slots, _) = Slots::find(&state, small);
        let added = [slots.add(&[1]), slots.add(&[2]), slots.add(&[3])];
        assert!(added[0].is_some() && added[1].is_some() && added[2].is_none());
        slots.remove(0);
        assert_eq!(slots.add(&[4]), Some(0));
        for at in HEADER / 8..HEADER / 8 + 100_000 {
            state.word(at).store((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (at % 64), Ordering::Relaxed);
        }
        for at in NAMES.at / 8..NAMES.at / 8 + 80_000 {
            state.word(at).store((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (at % 64), Ordering::Relaxed);
        }
        state.word(USED + 1).store(u64::MAX, Ordering::Relaxed);
        let (_, found) = Names::find(&state);
        assert!(found.iter().all(|name| name.bytes.len() <= MAX_NAME));
    }
}
