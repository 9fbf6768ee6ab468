//! Diagnostics for `bulkhead doctor`: load, memory, and the busiest threads of the guest.
//!
//! Made for a guest whose engine does not respond, so it uses nothing but `/proc`, and a thread of its own.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fs,
    sync::mpsc::Sender,
    thread,
    time::{Duration, Instant},
};

use bulkhead_protocol::{Description, GuestThread};

use crate::{
    error::Error,
    event::{Event, spawn},
};

/// Time between the two samples of the threads' CPU time.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);

/// `USER_HZ`, in which the kernel counts CPU time for all programs, whatever its own tick is.
const TICKS_PER_SECOND: u128 = 100;

/// Maximum of listed threads. Names are 15 bytes and places about 30, so a message of 64 KiB has room for far more.
const MAX_THREADS: usize = 24;

/// The fields of `/proc/PID/task/TID/stat` in use.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: char,
    /// User and system time in ticks.
    ticks: u64,
}

/// Process id and thread id.
type Ids = (u32, u32);

/// Collects diagnostics on a thread of its own, which ends with [`Event::Described`].
pub(crate) fn start(events: Sender<Event>) -> Result<(), Error> {
    spawn("diagnostics", move || {
        let _ = events.send(Event::Described(collect()));
    })
}

/// Collects the diagnostics, which takes [`SAMPLE_INTERVAL`] and the time to read `/proc` twice.
fn collect() -> Description {
    let (before, begun) = (threads(), Instant::now());
    thread::sleep(SAMPLE_INTERVAL);
    let (now, watched) = (threads(), begun.elapsed());
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Description {
        load: fs::read_to_string("/proc/loadavg").unwrap_or_default().trim_end().to_owned(),
        memory_kib: kib(&memory, "MemTotal:"),
        available_kib: kib(&memory, "MemAvailable:"),
        threads: now.len() as u64,
        busiest: busiest(&before, &now, watched)
            .into_iter()
            .map(|(ids, busy)| {
                let Stat { name, state, .. } = &now[&ids];
                GuestThread { process: ids.0, name: name.clone(), state: *state, busy, waits: waits(ids) }
            })
            .collect(),
    }
}

/// Returns the threads that used the CPU between the samples or are in uninterruptible sleep, the busiest first, with
/// their share of one CPU in per cent.
fn busiest(before: &BTreeMap<Ids, Stat>, now: &BTreeMap<Ids, Stat>, watched: Duration) -> Vec<(Ids, u16)> {
    let whole = (TICKS_PER_SECOND * watched.as_millis() / 1000).max(1);
    let share = |ids: &Ids, stat: &Stat| {
        // A new thread has used all of its time since the first sample. If it has the number of one that ended, the
        // result is only too small.
        let used = stat.ticks.saturating_sub(before.get(ids).map_or(0, |before| before.ticks));
        u16::try_from(u128::from(used) * 100 / whole).unwrap_or(u16::MAX)
    };
    let mut listed: Vec<_> = now
        .iter()
        .map(|(ids, stat)| (*ids, share(ids, stat), stat.state == 'D'))
        // `D` threads use no CPU, but what they wait for is often the reason why nothing responds.
        .filter(|(_, busy, stuck)| *busy > 0 || *stuck)
        .collect();
    listed.sort_by_key(|(_, busy, _)| Reverse(*busy));
    listed.truncate(MAX_THREADS);
    listed.into_iter().map(|(ids, busy, _)| (ids, busy)).collect()
}

/// Reads the state of every thread of the guest.
fn threads() -> BTreeMap<Ids, Stat> {
    let numbers = |directory: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).collect::<Vec<_>>()
    };
    let mut all = BTreeMap::new();
    for process in numbers("/proc") {
        for thread in numbers(&format!("/proc/{process}/task")) {
            // A thread can end between the listing and this line; it is then left out.
            let stat = fs::read_to_string(format!("/proc/{process}/task/{thread}/stat")).unwrap_or_default();
            if let Some(stat) = parse(&stat) {
                all.insert((process, thread), stat);
            }
        }
    }
    all
}

/// Parses a line of proc_pid_stat(5).
fn parse(line: &str) -> Option<Stat> {
    // Programs choose the name in parentheses, which can contain spaces, parentheses and line feeds. No later field can
    // contain a parenthesis, so the last one ends the name, and field 3 follows.
    let (head, rest) = line.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<_> = rest.split_ascii_whitespace().collect();
    // Fields 14 and 15: user and system time.
    let ticks = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Stat { name, state: fields.first()?.chars().next()?, ticks: ticks(14)?.saturating_add(ticks(15)?) })
}

/// Returns the kernel function in which a thread waits (proc_pid_wchan(5)), or nothing.
fn waits((process, thread): Ids) -> String {
    let place = fs::read_to_string(format!("/proc/{process}/task/{thread}/wchan")).unwrap_or_default();
    // The kernel writes `0` for a thread that runs.
    if place == "0" { String::new() } else { place }
}

/// Returns a value of `/proc/meminfo` in KiB, where it is `Key:   123 kB`.
fn kib(memory: &str, key: &str) -> u64 {
    let line = memory.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_name_may_hold_what_separates_the_fields() {
        let line = "7 (a) (b) R 1 7 7 0 -1 4194560 0 0 0 0 11 4 0 0 20 0 1 0 5 0 0";
        assert_eq!(parse(line).unwrap(), Stat { name: "a) (b".into(), state: 'R', ticks: 15 });
        for broken in ["", "7 (a)", "7 (a) R 1", "7 a R 1 7 7 0 -1 4194560 0 0 0 0 11 4"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn busy_and_stuck_threads_are_told_the_busiest_first_and_idle_ones_are_not() {
        let stat = |state, ticks| Stat { name: "x".into(), state, ticks };
        let before = BTreeMap::from([((1, 1), stat('S', 90)), ((2, 2), stat('R', 10)), ((3, 3), stat('D', 0))]);
        let now = BTreeMap::from([
            ((1, 1), stat('S', 90)),
            ((2, 2), stat('R', 20)),
            ((3, 3), stat('D', 0)),
            ((4, 4), stat('R', 50)),
        ]);
        assert_eq!(busiest(&before, &now, SAMPLE_INTERVAL), [((4, 4), 100), ((2, 2), 20), ((3, 3), 0)]);
    }

    #[test]
    fn this_process_is_among_the_threads() {
        assert!(threads().keys().any(|(process, _)| *process == std::process::id()));
        let description = collect();
        assert!(description.threads > 0 && description.memory_kib >= description.available_kib);
        assert!(description.available_kib > 0 && !description.load.is_empty());
    }
}
