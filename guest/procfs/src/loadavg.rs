//! `/proc/loadavg`: the average number of a container's tasks that run or wait for a disk.
//!
//! The kernel has no such number for a cgroup, so a thread counts tasks at an interval. Its cost is bounded however
//! many tasks a container has.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use bulkhead_guest_common::registry::Container;

use crate::cgroup::{CGROUPS, Cgroup};

/// Maximum number of processes and of tasks counted in one container. The load of one with more shows at least that
/// many.
const MAX_PROCESSES: usize = 1024;
const MAX_TASKS: usize = 4096;

/// Time constants of the averages, in seconds.
const SPANS: [f64; 3] = [60.0, 300.0, 900.0];

/// The load of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Load {
    /// Averages over 1, 5 and 15 minutes.
    pub(crate) averages: [f64; 3],
    /// Tasks that run or are runnable.
    pub(crate) running: u64,
    /// Tasks that wait for a disk.
    pub(crate) blocked: u64,
    pub(crate) tasks: u64,
    /// Id of the newest process, in the container's pid namespace.
    pub(crate) newest: u64,
}

impl Load {
    /// The line of `/proc/loadavg`.
    pub(crate) fn line(self) -> String {
        let [one, five, fifteen] = self.averages;
        let Self { running, tasks, newest, .. } = self;
        format!("{one:.2} {five:.2} {fifteen:.2} {running}/{tasks} {newest}\n")
    }

    /// The load after `passed` time with the counted tasks: exponentially damped averages, as the kernel's.
    fn advance(self, count: Self, passed: Duration) -> Self {
        let active = (count.running + count.blocked) as f64;
        let mut averages = self.averages;
        for (average, span) in averages.iter_mut().zip(SPANS) {
            let old = (-passed.as_secs_f64() / span).exp();
            *average = *average * old + active * (1.0 - old);
        }
        Self { averages, ..count }
    }
}

/// The loads of all containers.
#[derive(Debug, Default)]
pub(crate) struct Loads {
    known: Mutex<BTreeMap<u64, (Load, Instant)>>,
}

impl Loads {
    /// Returns the last load of a container; zero before the first count.
    pub(crate) fn get(&self, slot: u64) -> Load {
        let known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.get(&slot).map(|(load, _)| *load).unwrap_or_default()
    }

    /// Counts the tasks of all containers, and forgets those that are gone.
    pub(crate) fn sample(&self, containers: &[Container]) {
        // Counted without the lock, which readers of the file wait for.
        let counts: Vec<_> = containers.iter().map(|one| (one.slot, count(one), Instant::now())).collect();
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = std::mem::take(&mut *known);
        for (slot, count, now) in counts {
            let (load, then) = before.get(&slot).copied().unwrap_or((Load::default(), now));
            known.insert(slot, (load.advance(count, now - then), now));
        }
    }
}

fn count(container: &Container) -> Load {
    let mut load = Load::default();
    let Some(path) = &container.cgroup else { return load };
    let processes = Cgroup::new(Path::new(CGROUPS), path).processes(MAX_PROCESSES);
    load.newest = processes.last().and_then(|pid| inner_number(*pid)).unwrap_or_default();
    for pid in processes {
        // A process may end at any moment; it then counts for nothing.
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            if load.tasks as usize >= MAX_TASKS {
                return load;
            }
            load.tasks += 1;
            match fs::read_to_string(task.path().join("stat")).ok().as_deref().and_then(state) {
                Some('R') => load.running += 1,
                Some('D') => load.blocked += 1,
                _ => {}
            }
        }
    }
    load
}

/// The state in the text of `stat`, behind the command name, which may contain anything.
fn state(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The id of a process in the innermost pid namespace that it is in.
fn inner_number(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_state_is_found_behind_any_command_name() {
        assert_eq!(state("12 (a) R (b) S 1 1"), Some('S'));
        assert_eq!(state("12 (sh) R 1"), Some('R'));
        assert_eq!(state(""), None);
    }

    #[test]
    fn a_steady_load_is_what_the_averages_come_to() {
        let count = Load { running: 2, tasks: 5, newest: 9, ..Load::default() };
        let mut load = Load::default();
        for _ in 0..2000 {
            load = load.advance(count, Duration::from_secs(5));
        }
        assert_eq!(load.line(), "2.00 2.00 2.00 2/5 9\n");
    }

    #[test]
    fn this_process_is_found() {
        assert_eq!(inner_number(std::process::id()).is_some(), Path::new("/proc/self/status").exists());
    }

    proptest! {
        #[test]
        fn averages_stay_between_zero_and_the_highest_count(counts in proptest::collection::vec((0_u64..50, 0_u64..100), 0..50)) {
            let mut load = Load::default();
            for (running, seconds) in &counts {
                load = load.advance(Load { running: *running, ..Load::default() }, Duration::from_secs(*seconds));
            }
            let highest = counts.iter().map(|(running, _)| *running).max().unwrap_or_default() as f64;
            prop_assert!(load.averages.iter().all(|average| (0.0..=highest + 0.01).contains(average)));
        }
    }
}
