//! Processes that were killed and have not ended.
//!
//! A container may have a FUSE file system that never answers. Linux waits for its answer uninterruptibly once the
//! server has read the request (`request_wait_answer` in `fs/fuse/dev.c`), so a process that looks into such a file
//! system, or into memory that is mapped from it, ends only with the container's server. It is left behind then, and
//! counted: a container must not collect processes of the VM.
//!
//! Process groups are counted: a judge, or a worker with the child that it has forked into the container. The child is
//! the one that gets stuck. It stays a child of this service when the worker is killed, because the service is the
//! reaper of its descendants.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, WaitOptions, set_child_subreaper, waitpgid};

use super::sys;

/// Maximum number of one container. Each stands for a call that took as long as the time limit.
const MAX_PER_CONTAINER: usize = 8;

/// Maximum number of all containers together. Beyond it a container may have one: no container's processes keep the
/// first call of another one from being served.
const MAX_TOTAL: usize = 256;

/// A process group that was killed.
#[derive(Clone, Copy, Debug)]
struct Group {
    leader: Pid,
    /// The container's number.
    slot: u64,
}

static GROUPS: Mutex<Vec<Group>> = Mutex::new(Vec::new());

fn groups() -> MutexGuard<'static, Vec<Group>> {
    GROUPS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes this process the parent of what its children leave behind. Call it before any is started.
pub(crate) fn adopt_orphans() -> std::io::Result<()> {
    set_child_subreaper(Some(rustix::process::getpid())).map_err(Into::into)
}

/// Kills a process group and counts it until all of it has ended. Its leader must not have been waited for.
pub(super) fn kill(leader: u32, slot: u64) {
    // The number is the group's own as long as the leader, alive or not, has not been waited for.
    sys::kill_group(leader);
    count(leader, slot);
}

/// Counts a process group until all of it has ended: the leader has died, and what it has forked dies with it.
pub(super) fn count(leader: u32, slot: u64) {
    let Some(leader) = Pid::from_raw(leader.cast_signed()) else { return };
    let mut groups = groups();
    groups.push(Group { leader, slot });
    groups.retain(|group| !has_ended(*group));
    if groups.iter().filter(|group| group.slot == slot).count() == MAX_PER_CONTAINER {
        eprintln!(
            "bulkhead-procfs: {MAX_PER_CONTAINER} processes wait for file systems of container {slot} that do not \
             answer; its mounts fail with EAGAIN until one of them does"
        );
    }
}

/// Returns whether another process may be started for a container.
///
/// A container's calls come one after the other, and those of its `exec` sessions beside them, so it can exceed the
/// maximum by the number of these sessions.
pub(super) fn may_start(slot: u64) -> bool {
    let mut groups = groups();
    // Reaped here and not in a thread of its own: only a container that keeps asking can make more of them.
    groups.retain(|group| !has_ended(*group));
    is_within_bounds(groups.iter().filter(|group| group.slot == slot).count(), groups.len())
}

fn is_within_bounds(own: usize, all: usize) -> bool {
    own == 0 || (own < MAX_PER_CONTAINER && all < MAX_TOTAL)
}

/// Reaps what has ended of a group, and returns whether nothing is left.
fn has_ended(group: Group) -> bool {
    loop {
        match waitpgid(group.leader, WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return false,
            // ECHILD: all are reaped. The number is free from then on, but the kernel gives all others out before it
            // returns to this one.
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        os::unix::process::CommandExt,
        process::{Command, Stdio},
        time::{Duration, Instant},
    };

    use super::*;

    /// Starts a group of two: a shell, and a process that it waits for.
    #[expect(clippy::zombie_processes, reason = "what is tested is that the group is reaped")]
    fn start() -> u32 {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 >/dev/null & echo; wait"]).stdin(Stdio::null()).process_group(0);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        child.id()
    }

    #[test]
    fn a_group_counts_until_all_of_it_has_ended() {
        adopt_orphans().unwrap();
        let slot = u64::MAX;
        let of_slot = || groups().iter().filter(|group| group.slot == slot).count();
        for _ in 0..MAX_PER_CONTAINER {
            assert!(may_start(slot));
            count(start(), slot);
        }
        assert!(!may_start(slot));
        assert!(may_start(slot - 1), "another container is not concerned");
        let leaders: Vec<_> = groups().iter().filter(|group| group.slot == slot).map(|group| group.leader).collect();
        // Only the leaders: what each has forked goes on, and counts.
        for leader in &leaders {
            rustix::process::kill_process(*leader, rustix::process::Signal::KILL).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(!may_start(slot));
        assert_eq!(of_slot(), MAX_PER_CONTAINER);
        for leader in leaders {
            sys::kill_group(leader.as_raw_nonzero().get().cast_unsigned());
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while !may_start(slot) || of_slot() > 0 {
            assert!(Instant::now() < deadline, "{} are left", of_slot());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn one_container_keeps_no_other_from_being_served() {
        assert!(is_within_bounds(0, MAX_TOTAL + 100));
        assert!(is_within_bounds(MAX_PER_CONTAINER - 1, MAX_TOTAL - 1));
        assert!(!is_within_bounds(MAX_PER_CONTAINER, MAX_PER_CONTAINER));
        assert!(!is_within_bounds(1, MAX_TOTAL));
    }
}
