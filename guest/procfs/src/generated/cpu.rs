//! `/proc/cpuinfo` and `/proc/stat`.

use std::{collections::BTreeMap, fmt::Write};

use super::uptime::TICKS;
use crate::loadavg::Load;

/// Microseconds in a clock tick.
const TICK_US: u64 = 1_000_000 / TICKS;

/// `/proc/cpuinfo`: the VM's text without the blocks of CPUs that are not visible.
pub(super) fn info(host: &str, visible: &[u32]) -> String {
    let number = |block: &str| {
        let line = block.lines().find(|line| line.starts_with("processor"))?;
        line.split_once(':')?.1.trim().parse::<u32>().ok()
    };
    let mut out = String::with_capacity(host.len());
    for block in host.split_inclusive("\n\n") {
        if number(block).is_some_and(|cpu| visible.contains(&cpu)) {
            out.push_str(block);
        }
    }
    out
}

/// Time since the container's start, in clock ticks, by kind of use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Times {
    user: u64,
    system: u64,
    idle: u64,
}

impl Times {
    /// The share of the CPU at index `place` of `count`. Shares add up to the whole: the first ones get the remainder.
    fn part(self, place: u64, count: u64) -> Self {
        let share = |all: u64| all / count + u64::from(place < all % count);
        Self { user: share(self.user), system: share(self.system), idle: share(self.idle) }
    }

    fn line(self, name: &str, out: &mut String) {
        let Self { user, system, idle } = self;
        let _ = writeln!(out, "{name} {user} 0 {system} {idle} 0 0 0 0 0 0");
    }
}

/// `/proc/stat`. The kernel accounts a cgroup's CPU time, but not by CPU, so each visible CPU gets an equal share.
///
/// `age` is in clock ticks, `begun` in seconds since 1970.
pub(super) fn statistics(visible: &[u32], used: &BTreeMap<String, u64>, age: u64, begun: u64, load: Load) -> String {
    let ticks = |name: &str| used.get(name).copied().unwrap_or_default() / TICK_US;
    let count = visible.len().max(1) as u64;
    let (user, system) = (ticks("user_usec"), ticks("system_usec"));
    // The rest of the time that the visible CPUs had. Usage exceeds it for a moment when a quota shows fewer CPUs.
    let idle = age.saturating_mul(count).saturating_sub(user.saturating_add(system));
    let all = Times { user, system, idle };
    let mut out = String::new();
    // Two spaces after the name of the sum, as the kernel writes it.
    all.line("cpu ", &mut out);
    for (place, cpu) in visible.iter().enumerate() {
        all.part(place as u64, count).line(&format!("cpu{cpu}"), &mut out);
    }
    let _ = writeln!(out, "intr 0\nctxt 0\nbtime {begun}\nprocesses {}", load.tasks);
    // The reader itself runs, even if the last count of tasks did not see it.
    let _ = writeln!(out, "procs_running {}\nprocs_blocked {}", load.running.max(1), load.blocked);
    out.push_str("softirq 0 0 0 0 0 0 0 0 0 0 0\n");
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TWO: &str = "processor\t: 0\nvendor_id\t: A\n\nprocessor\t: 1\nvendor_id\t: B\n\n";

    #[test]
    fn only_visible_cpus_are_described() {
        assert_eq!(info(TWO, &[1]), "processor\t: 1\nvendor_id\t: B\n\n");
        assert_eq!(info(TWO, &[0, 1]), TWO);
    }

    #[test]
    fn times_are_those_of_the_cgroup_and_the_rest_is_idle() {
        let used = [("user_usec", 1_500_000), ("system_usec", 250_000)].map(|(k, v)| (k.to_owned(), v)).into();
        let load = Load { tasks: 3, ..Load::default() };
        let text = statistics(&[0, 2], &used, 1000, 5, load);
        let expected = "cpu  150 0 25 1825 0 0 0 0 0 0\ncpu0 75 0 13 913 0 0 0 0 0 0\ncpu2 75 0 12 912 0 0 0 0 0 0\n\
                        intr 0\nctxt 0\nbtime 5\nprocesses 3\nprocs_running 1\nprocs_blocked 0\n";
        assert!(text.starts_with(expected), "{text}");
    }

    proptest! {
        #[test]
        fn the_cpus_add_up_to_the_whole(user: u64, system: u64, idle: u64, count in 1_u64..64) {
            let all = Times { user, system, idle };
            let parts = (0..count).map(|place| all.part(place, count));
            let sum = parts.fold((0_u64, 0_u64, 0_u64), |sum, part| (sum.0 + part.user, sum.1 + part.system, sum.2 + part.idle));
            prop_assert_eq!(sum, (user, system, idle));
        }

        #[test]
        fn no_number_panics(used: u64, age: u64, visible in proptest::collection::vec(any::<u32>(), 0..8)) {
            let used = [("user_usec".to_owned(), used), ("system_usec".to_owned(), used)].into();
            prop_assert!(statistics(&visible, &used, age, 0, Load::default()).starts_with("cpu  "));
        }
    }
}
