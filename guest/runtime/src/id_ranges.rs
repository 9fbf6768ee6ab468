//! The ranges of user and group ids that containers have; this module alone writes the table.
//!
//! Each container has 65536 ids that no other container has, from 100000 up. Containers that share namespaces share a
//! user namespace, and with it a range. The table is a directory on a tmpfs with a small file for each container,
//! changed under a lock. No range has to be given back: a record counts only while crun knows the container, or while
//! the process that creates it lives, so a crash leaks none.
//!
//! Nor is the table believed when it says less than the kernel: a range in which processes live is not free, even if
//! its record is lost ([`crate::sys::new_userns`]).

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

pub(crate) use bulkhead_guest_common::id_ranges::{FIRST, LENGTH};
use bulkhead_guest_common::{bounded, namespace::Identity, process::Process};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

/// The number of ranges. The last id of all, 2^32 - 1, means "no id" to the kernel and is in none.
const RANGES: u32 = (u32::MAX - FIRST) / LENGTH;

/// The size limit of a record in bytes.
const MAX_RECORD: u64 = 16 * 1024;

/// The reason why a container gets no range; the first text is sysbox-runc's own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RangeError {
    /// All ranges are in use.
    #[error(
        "error in the container spec: invalid user/group ID config: subid allocation failed: all {RANGES} ranges are in use"
    )]
    Exhausted,
    /// A living container has the id.
    #[error("container {0} already exists")]
    Exists(String),
    /// A file or directory of the table cannot be read or written.
    #[error("cannot use the table of id ranges {}", path.display())]
    Table {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The entry of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    /// crun's state directory for it; container ids are unique only within one.
    pub(crate) state_root: PathBuf,
    pub(crate) range: IdRange,
    /// The process that creates it, which becomes or waits for crun.
    pub(crate) creator: Process,
}

/// A range and the user namespace that maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdRange {
    pub(crate) start: u32,
    pub(crate) userns: Identity,
}

/// A container that asks for a range.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    /// See [`Record::id`].
    pub(crate) id: String,
    /// See [`Record::state_root`].
    pub(crate) state_root: PathBuf,
    /// See [`Record::creator`].
    pub(crate) creator: Process,
}

impl Record {
    /// True while the container exists, or is being created.
    pub(crate) fn lives(&self) -> bool {
        // crun makes the directory during `create` and removes it with `delete`. Before it does, the creator is the
        // proof of life: this process, which waits for crun or becomes it.
        self.state_root.join(&self.id).exists() || self.creator.lives()
    }
}

/// The table in its directory.
#[derive(Clone, Debug)]
pub(crate) struct IdRangeTable {
    directory: PathBuf,
}

/// The table while this process alone can change it.
#[derive(Debug)]
pub(crate) struct LockedTable {
    directory: PathBuf,
    _lock: File,
}

impl IdRangeTable {
    /// Opens the table in `directory`, which is created when missing.
    pub(crate) fn open(directory: &Path) -> Result<Self, RangeError> {
        let records = directory.join("ranges");
        DirBuilder::new().recursive(true).mode(0o711).create(directory).map_err(failed(directory))?;
        DirBuilder::new().recursive(true).mode(0o700).create(&records).map_err(failed(&records))?;
        Ok(Self { directory: records })
    }

    /// Locks the table, and waits while another process has it.
    ///
    /// The lock is held from the search for a free range until it is stored, else two containers could find the same.
    pub(crate) fn lock(&self) -> Result<LockedTable, RangeError> {
        let path = self.directory.join("lock");
        let lock = File::options().create(true).append(true).open(&path).map_err(failed(&path))?;
        // The kernel drops the lock with the process, so one that is killed blocks nobody.
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(failed(&path))?;
        Ok(LockedTable { directory: self.directory.clone(), _lock: lock })
    }

    /// The entries of all containers with this id, in any state directory.
    ///
    /// No lock is needed: a record appears and disappears as a whole.
    pub(crate) fn named(&self, id: &str) -> Vec<Record> {
        let files = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        files.filter_map(|file| read(&file.path())).filter(|record| record.id == id).collect()
    }
}

impl LockedTable {
    /// The entries of the living containers; those of the dead are removed.
    pub(crate) fn living(&self, lives: impl Fn(&Record) -> bool) -> Result<Vec<Record>, RangeError> {
        let mut living = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed(&self.directory))? {
            let path = entry.map_err(failed(&self.directory))?.path();
            // The lock itself, and the unfinished records of processes that were killed.
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Some(record) if lives(&record) => living.push(record),
                // A record that cannot be read does not belong to a container: it is complete before it gets its name.
                _ => fs::remove_file(&path).map_err(failed(&path))?,
            }
        }
        Ok(living)
    }

    /// Enters the container with its range: the lowest free one, or that of the living container that it joins.
    pub(crate) fn store(&self, claim: Claim, range: IdRange, living: &[Record]) -> Result<Record, RangeError> {
        let Claim { id, state_root, creator } = claim;
        let record = Record { id, state_root, range, creator };
        // crun would refuse the id as well, but only after the record of the living container was replaced.
        if living.iter().any(|r| r.id == record.id && r.state_root == record.state_root) {
            return Err(RangeError::Exists(record.id));
        }
        write(&self.directory, &record)?;
        Ok(record)
    }
}

/// The first ids of the ranges that no living container has, the lowest first.
///
/// The caller asks the kernel about each before it takes it: the table knows only what was written into it.
pub(crate) fn free(living: &[Record]) -> impl Iterator<Item = u32> {
    // The lowest one, so that the first container of a VM has the documented 100000.
    let taken = living.iter().map(|r| r.range.start).collect::<BTreeSet<_>>();
    (0..RANGES).map(|n| FIRST + n * LENGTH).filter(move |start| !taken.contains(start))
}

fn write(directory: &Path, record: &Record) -> Result<(), RangeError> {
    let path = directory.join(file_name(&record.state_root, &record.id));
    // Written under another name first: a crash in the middle leaves no half record, and readers need no lock.
    let new = path.with_extension("new");
    let text = serde_json::to_vec(record).map_err(io::Error::from).map_err(failed(&path))?;
    File::create(&new).and_then(|mut file| file.write_all(&text)).map_err(failed(&new))?;
    fs::rename(&new, &path).map_err(failed(&path))
}

fn failed<E: Into<io::Error>>(path: &Path) -> impl FnOnce(E) -> RangeError {
    let path = path.to_owned();
    move |source| RangeError::Table { path, source: source.into() }
}

fn read(path: &Path) -> Option<Record> {
    serde_json::from_slice(&bounded::read_file(path, MAX_RECORD).ok()?).ok()
}

/// The id and a digest (FNV-1a) of the state directory, whose path cannot be part of a file name.
///
/// There are only a few state directories, those of containerd and of BuildKit, so 64 bits are plenty.
fn file_name(state_root: &Path, id: &str) -> String {
    let digest = state_root
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{id}@{digest:016x}.json")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn new(id: usize) -> Claim {
        let creator = Process { pid: 0, started: 0 };
        Claim { id: format!("c{id}"), state_root: "/run/r".into(), creator }
    }

    fn claim(table: &IdRangeTable, id: usize, lives: impl Fn(&Record) -> bool) -> Result<Record, RangeError> {
        let locked = table.lock()?;
        let living = locked.living(lives)?;
        let start = free(&living).next().ok_or(RangeError::Exhausted)?;
        locked.store(new(id), IdRange { start, userns: Identity { device: 0, inode: u64::from(start) } }, &living)
    }

    fn share(
        table: &IdRangeTable,
        id: usize,
        start: u32,
        lives: impl Fn(&Record) -> bool,
    ) -> Result<Record, RangeError> {
        let locked = table.lock()?;
        let living = locked.living(lives)?;
        locked.store(new(id), IdRange { start, userns: Identity { device: 0, inode: u64::from(start) } }, &living)
    }

    #[test]
    fn the_first_range_starts_at_100000_and_the_next_follows_it() {
        let dir = tempfile::tempdir().unwrap();
        let table = IdRangeTable::open(dir.path()).unwrap();
        let starts = [1, 2, 3].map(|n| claim(&table, n, |_| true).unwrap().range.start);
        assert_eq!(starts, [100_000, 165_536, 231_072]);
        assert_eq!(table.named("c2").iter().map(|r| r.range.start).collect::<Vec<_>>(), [165_536]);
        assert_eq!(table.named("c4"), []);
    }

    #[test]
    fn a_living_id_is_not_given_a_second_range() {
        let dir = tempfile::tempdir().unwrap();
        let table = IdRangeTable::open(dir.path()).unwrap();
        claim(&table, 1, |_| true).unwrap();
        assert!(matches!(claim(&table, 1, |_| true), Err(RangeError::Exists(_))));
    }

    #[test]
    fn a_shared_range_is_free_only_after_the_last_container() {
        let dir = tempfile::tempdir().unwrap();
        let table = IdRangeTable::open(dir.path()).unwrap();
        let first = claim(&table, 1, |_| true).unwrap();
        share(&table, 2, first.range.start, |_| true).unwrap();
        let third = claim(&table, 3, |r| r.id != "c1").unwrap();
        assert_eq!(third.range.start, 165_536);
        let fourth = claim(&table, 4, |r| r.id == "c3").unwrap();
        assert_eq!(fourth.range.start, 100_000);
    }

    #[test]
    fn every_range_fits_below_the_id_that_means_none() {
        let end = u64::from(FIRST) + u64::from(RANGES) * u64::from(LENGTH);
        assert!(u32::try_from(end).is_ok());
        assert!(end + u64::from(LENGTH) > u64::from(u32::MAX));
    }

    #[test]
    fn a_process_is_not_taken_for_a_later_one_with_its_number() {
        let own = Process::find(std::process::id()).unwrap();
        assert!(own.lives());
        assert!(!Process { started: own.started + 1, ..own }.lives());
    }

    #[test]
    fn a_torn_record_does_not_keep_the_table_from_working() {
        let dir = tempfile::tempdir().unwrap();
        let table = IdRangeTable::open(dir.path()).unwrap();
        fs::write(dir.path().join("ranges/x@0.json"), "{\"id\":").unwrap();
        fs::write(dir.path().join("ranges/y@0.new"), "{").unwrap();
        assert_eq!(claim(&table, 1, |_| true).unwrap().range.start, FIRST);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Create(usize),
        Join(usize, usize),
        Die(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..12_usize).prop_map(Step::Create),
            (0..12_usize, 0..12_usize).prop_map(|(a, b)| Step::Join(a, b)),
            (0..12_usize).prop_map(Step::Die),
        ];
        proptest::collection::vec(step, 0..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_two_living_containers_ever_have_one_range_unless_they_share_it(steps in steps()) {
            let dir = tempfile::tempdir().unwrap();
            let table = IdRangeTable::open(dir.path()).unwrap();
            // Container -> (range, group of those that share).
            let mut model = BTreeMap::<usize, (u32, usize)>::new();
            for (group, step) in steps.into_iter().enumerate() {
                let names = model.keys().map(|n| format!("c{n}")).collect::<BTreeSet<_>>();
                let lives = |r: &Record| names.contains(&r.id);
                match step {
                    Step::Create(n) => match claim(&table, n, lives) {
                        Ok(record) => {
                            let lowest = (0..RANGES).map(|k| FIRST + k * LENGTH)
                                .find(|s| model.values().all(|(t, _)| t != s)).unwrap();
                            prop_assert_eq!(record.range.start, lowest);
                            prop_assert!(model.insert(n, (record.range.start, group)).is_none());
                        }
                        Err(_) => prop_assert!(model.contains_key(&n)),
                    },
                    Step::Join(n, owner) => {
                        let Some(&(start, group)) = model.get(&owner) else { continue };
                        if share(&table, n, start, lives).is_ok() {
                            model.insert(n, (start, group));
                        }
                    }
                    Step::Die(n) => drop(model.remove(&n)),
                }
                for (a, (start_a, group_a)) in &model {
                    for (b, (start_b, group_b)) in &model {
                        prop_assert!(a == b || group_a == group_b || start_a.abs_diff(*start_b) >= LENGTH);
                    }
                }
            }
        }
    }
}
