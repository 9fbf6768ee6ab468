//! Which container has which user and group ids: the single owner of the table.
//!
//! Every container has 65536 ids that no other has, from 100000 up; containers that share namespaces share a user
//! namespace and with it a range. The table is one small file a container in a directory on a tmpfs, changed under a
//! lock. Nobody has to give a range back: a record counts only as long as crun knows the container or the process
//! that creates it lives, so no crash can leak one.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use bulkhead_warden::{namespace::Identity, registry::Process};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

/// The first id of the first range.
pub(crate) const FIRST: u32 = 100_000;

/// Ids in a range.
pub(crate) const LENGTH: u32 = 65_536;

/// Ranges there are; the last id of all, 2^32 - 1, means "no id" to the kernel.
const COUNT: u32 = (u32::MAX - FIRST) / LENGTH;

/// Longest record in bytes.
const MAX_RECORD: u64 = 16 * 1024;

/// Why there is no range.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RangeError {
    /// All ranges are in use.
    #[error(
        "error in the container spec: invalid user/group ID config: subid allocation failed: all {COUNT} ranges are in use"
    )]
    Exhausted,
    /// The id is taken.
    #[error("a container with the id {0} exists already")]
    Exists(String),
    /// The directory of the table can't be used.
    #[error("can't use the table of id ranges {}", path.display())]
    Table {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One container's entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The container's id.
    pub(crate) id: String,
    /// The state directory of crun that it lives in; ids are unique only within one.
    pub(crate) state_root: PathBuf,
    /// The root that the engine gave it, as the engine sees it.
    pub(crate) root: PathBuf,
    /// Its ids.
    pub(crate) range: Range,
    /// The process that creates it, which turns into crun.
    pub(crate) creator: Process,
}

/// A range and the user namespace that maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Range {
    /// The first id.
    pub(crate) start: u32,
    /// The user namespace.
    pub(crate) userns: Identity,
}

/// A container that is to get a range.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    /// See [`Record::id`].
    pub(crate) id: String,
    /// See [`Record::state_root`].
    pub(crate) state_root: PathBuf,
    /// See [`Record::root`].
    pub(crate) root: PathBuf,
    /// See [`Record::creator`].
    pub(crate) creator: Process,
}

impl Record {
    /// Whether the container exists or is about to.
    pub(crate) fn lives(&self) -> bool {
        self.state_root.join(&self.id).exists() || self.creator.lives()
    }
}

/// The table in its directory.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    directory: PathBuf,
}

/// The table while nobody else can change it.
#[derive(Debug)]
pub(crate) struct Locked {
    directory: PathBuf,
    _lock: File,
}

impl Table {
    /// The table in `directory`, which is made when missing.
    pub(crate) fn open(directory: &Path) -> Result<Self, RangeError> {
        let records = directory.join("ranges");
        DirBuilder::new().recursive(true).mode(0o711).create(directory).map_err(failed(directory))?;
        DirBuilder::new().recursive(true).mode(0o700).create(&records).map_err(failed(&records))?;
        Ok(Self { directory: records })
    }

    /// Waits until no other process changes the table.
    pub(crate) fn lock(&self) -> Result<Locked, RangeError> {
        let path = self.directory.join("lock");
        let lock = File::options().create(true).append(true).open(&path).map_err(failed(&path))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(failed(&path))?;
        Ok(Locked { directory: self.directory.clone(), _lock: lock })
    }

    /// The entries of all containers with this id, whatever the state directory; read without the lock, since
    /// records only ever change as a whole.
    pub(crate) fn named(&self, id: &str) -> Vec<Record> {
        let files = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        files.filter_map(|file| read(&file.path())).filter(|record| record.id == id).collect()
    }
}

impl Locked {
    /// The entries of the containers that live; those of the dead are removed.
    pub(crate) fn living(&self, lives: impl Fn(&Record) -> bool) -> Result<Vec<Record>, RangeError> {
        let mut living = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed(&self.directory))? {
            let path = entry.map_err(failed(&self.directory))?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Some(record) if lives(&record) => living.push(record),
                // Also what can't be read: a record is complete before it gets its name.
                _ => fs::remove_file(&path).map_err(failed(&path))?,
            }
        }
        Ok(living)
    }

    /// Enters the container with its range: the lowest free one, or that of a living container it shares with.
    pub(crate) fn store(&self, claim: Claim, range: Range, living: &[Record]) -> Result<Record, RangeError> {
        let Claim { id, state_root, root, creator } = claim;
        let record = Record { id, state_root, root, range, creator };
        if living.iter().any(|r| r.id == record.id && r.state_root == record.state_root) {
            return Err(RangeError::Exists(record.id));
        }
        let path = self.directory.join(file_name(&record.state_root, &record.id));
        let new = path.with_extension("new");
        let text = serde_json::to_vec(&record).map_err(io::Error::from).map_err(failed(&path))?;
        File::create(&new).and_then(|mut file| file.write_all(&text)).map_err(failed(&new))?;
        fs::rename(&new, &path).map_err(failed(&path))?;
        Ok(record)
    }
}

/// The first id of the lowest range that no living container has.
pub(crate) fn lowest_free(living: &[Record]) -> Result<u32, RangeError> {
    let taken = living.iter().map(|r| r.range.start).collect::<BTreeSet<_>>();
    (0..COUNT).map(|n| FIRST + n * LENGTH).find(|start| !taken.contains(start)).ok_or(RangeError::Exhausted)
}

fn failed<E: Into<io::Error>>(path: &Path) -> impl FnOnce(E) -> RangeError {
    let path = path.to_owned();
    move |source| RangeError::Table { path, source: source.into() }
}

fn read(path: &Path) -> Option<Record> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(MAX_RECORD).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The id and a digest (FNV-1a) of the state directory; `store` and `lives` compare the whole.
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
        Claim { id: format!("c{id}"), state_root: "/run/r".into(), root: "/x".into(), creator }
    }

    fn claim(table: &Table, id: usize, lives: impl Fn(&Record) -> bool) -> Result<Record, RangeError> {
        let locked = table.lock()?;
        let living = locked.living(lives)?;
        let start = lowest_free(&living)?;
        locked.store(new(id), Range { start, userns: Identity { device: 0, inode: u64::from(start) } }, &living)
    }

    fn share(table: &Table, id: usize, start: u32, lives: impl Fn(&Record) -> bool) -> Result<Record, RangeError> {
        let locked = table.lock()?;
        let living = locked.living(lives)?;
        locked.store(new(id), Range { start, userns: Identity { device: 0, inode: u64::from(start) } }, &living)
    }

    #[test]
    fn the_first_range_starts_at_100000_and_the_next_follows_it() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(dir.path()).unwrap();
        let starts = [1, 2, 3].map(|n| claim(&table, n, |_| true).unwrap().range.start);
        assert_eq!(starts, [100_000, 165_536, 231_072]);
        assert_eq!(table.named("c2").iter().map(|r| r.range.start).collect::<Vec<_>>(), [165_536]);
        assert_eq!(table.named("c4"), []);
    }

    #[test]
    fn a_living_id_is_not_given_a_second_range() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(dir.path()).unwrap();
        claim(&table, 1, |_| true).unwrap();
        assert!(matches!(claim(&table, 1, |_| true), Err(RangeError::Exists(_))));
    }

    #[test]
    fn a_shared_range_is_free_only_after_the_last_container() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(dir.path()).unwrap();
        let first = claim(&table, 1, |_| true).unwrap();
        share(&table, 2, first.range.start, |_| true).unwrap();
        let third = claim(&table, 3, |r| r.id != "c1").unwrap();
        assert_eq!(third.range.start, 165_536);
        let fourth = claim(&table, 4, |r| r.id == "c3").unwrap();
        assert_eq!(fourth.range.start, 100_000);
    }

    #[test]
    fn every_range_fits_below_the_id_that_means_none() {
        let end = u64::from(FIRST) + u64::from(COUNT) * u64::from(LENGTH);
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
        let table = Table::open(dir.path()).unwrap();
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
            let table = Table::open(dir.path()).unwrap();
            // Container -> (range, group of those that share).
            let mut model = BTreeMap::<usize, (u32, usize)>::new();
            for (group, step) in steps.into_iter().enumerate() {
                let names = model.keys().map(|n| format!("c{n}")).collect::<BTreeSet<_>>();
                let lives = |r: &Record| names.contains(&r.id);
                match step {
                    Step::Create(n) => match claim(&table, n, lives) {
                        Ok(record) => {
                            let lowest = (0..COUNT).map(|k| FIRST + k * LENGTH)
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
