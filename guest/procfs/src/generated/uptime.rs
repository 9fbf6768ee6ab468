//! `/proc/uptime`.

use bulkhead_guest_common::registry::Container;
use rustix::time::ClockId;

/// Clock ticks in a second, as programs see them (`USER_HZ`, the same on every x86-64 Linux).
pub(super) const TICKS: u64 = 100;

/// The container's age in clock ticks: the time since its creator started.
pub(super) fn age(container: &Container) -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    // CLOCK_BOOTTIME and the start time in `stat` count from the same moment.
    let ticks = now.tv_sec.unsigned_abs() * TICKS + now.tv_nsec.unsigned_abs() / (1_000_000_000 / TICKS);
    ticks.saturating_sub(container.creator.started)
}

/// The file's line. Both fields, uptime and idle time, are the same, as with Docker's Enhanced Container Isolation.
pub(super) fn line(age: u64) -> String {
    let (seconds, rest) = (age / TICKS, age % TICKS);
    format!("{seconds}.{rest:02} {seconds}.{rest:02}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::container;

    #[test]
    fn uptime_has_the_same_number_twice_and_begins_with_the_container() {
        assert_eq!(line(586), "5.86 5.86\n");
        assert_eq!(line(3), "0.03 0.03\n");
        // The container of the test is as old as this process.
        assert!(age(&container("a")) < 600 * TICKS);
    }
}
