//! State that survives a restart: the descriptors, which init stores, and the id of the last call received from each.
//!
//! The kernel does not show which calls a process received and left without an answer, and the callers wait for exactly
//! that answer. Notification ids count up within a filter, so one id tells where to look.

use std::{
    fmt, fs,
    fs::File,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bulkhead_guest_common::notify;
use rustix::time::ClockId;

use super::sys::{self, Answer};

/// Environment variable in which init lists the stored descriptors: `NAME=FD,…`.
pub const KEPT_LISTENERS: &str = "BULKHEAD_KEPT_LISTENERS";

/// Prefix of the stored descriptors' names, by which init tells them from those of other services.
pub const KEPT_PREFIX: &str = "mounts";

/// Ids around the recorded one that may have been received without being recorded. Calls are received one at a time, so
/// each process that was killed in the wrong moment adds one at most.
const REPLAY_WINDOW: u64 = 16;

/// Name of a stored descriptor: the number of its container, and a time to tell several of one container apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListenerName {
    slot: u64,
    /// Nanoseconds since boot when it arrived, or the next value that no other name has.
    time: u64,
}

impl ListenerName {
    /// A name that no other descriptor has had since boot.
    pub(super) fn new(slot: u64) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let now = rustix::time::clock_gettime(ClockId::Boottime);
        let now = now.tv_sec.unsigned_abs().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.unsigned_abs());
        // CLOCK_BOOTTIME never goes back, so names of earlier processes are older, too.
        let time = |last: u64| now.max(last + 1);
        let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(time(last)));
        Self { slot, time: time(last.unwrap_or_default()) }
    }

    /// The container's number, or 0 if it is not known.
    pub(super) fn slot(self) -> u64 {
        self.slot
    }

    fn read(text: &str) -> Option<Self> {
        let (slot, time) = text.strip_prefix(KEPT_PREFIX)?.split_once('x')?;
        Some(Self { slot: slot.parse().ok()?, time: time.parse().ok()? })
    }

    fn file(self, state: &Path) -> PathBuf {
        state.join("calls").join(self.to_string())
    }
}

impl fmt::Display for ListenerName {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{KEPT_PREFIX}{}x{}", self.slot, self.time)
    }
}

/// Takes the descriptors that an earlier process stored. Call it once, before anything else is opened or closed.
pub(super) fn inherited() -> Vec<(ListenerName, OwnedFd)> {
    let stored = notify::inherited(KEPT_LISTENERS).into_iter();
    stored.filter_map(|(name, seccomp_fd)| Some((ListenerName::read(&name)?, seccomp_fd))).collect()
}

/// Continues in the kernel the calls that an earlier process received and did not answer.
pub(super) fn answer_last(seccomp_fd: BorrowedFd<'_>, name: &ListenerName, state: &Path) {
    let Some(last) = fs::read(name.file(state)).ok().and_then(|text| text.try_into().ok()).map(u64::from_ne_bytes)
    else {
        return;
    };
    // Answering an id is harmless whatever became of it: ENOENT when it was answered or its caller is gone, EINPROGRESS
    // when nobody has received it, and then it arrives as usual.
    for after in 0..REPLAY_WINDOW {
        let _ = sys::answer(seccomp_fd, last.wrapping_add(after), Answer::Continue);
    }
}

/// Continues the calls before the first one that this process receives: with no file at all, an earlier process was
/// killed between receiving a call and recording it.
pub(super) fn answer_before(seccomp_fd: BorrowedFd<'_>, first: u64) {
    for before in 1..REPLAY_WINDOW {
        let _ = sys::answer(seccomp_fd, first.wrapping_sub(before), Answer::Continue);
    }
}

/// The file that records the last received id; without one (a full tmpfs) calls are served all the same.
pub(super) struct LastCall(Option<File>);

impl LastCall {
    /// Opens the file without truncating it: until the first write it holds the id of an earlier process.
    pub(super) fn open(name: &ListenerName, state: &Path) -> Self {
        let path = name.file(state);
        let make = || {
            fs::create_dir_all(path.parent().unwrap_or(state))?;
            File::options().create(true).truncate(false).write(true).open(&path)
        };
        Self(make().ok())
    }

    pub(super) fn write(&self, id: u64) {
        if let Some(file) = &self.0 {
            // Eight bytes at one offset: a kill leaves the old or the new id, never a mixture.
            let _ = file.write_all_at(&id.to_ne_bytes(), 0);
        }
    }
}

/// Removes the file of a descriptor that is closed.
pub(super) fn forget(name: &ListenerName, state: &Path) {
    let _ = fs::remove_file(name.file(state));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written_and_made_of_letters_and_digits() {
        let name = ListenerName::new(17);
        let text = name.to_string();
        assert_eq!(ListenerName::read(&text), Some(name));
        assert_ne!(ListenerName::new(17), ListenerName::new(17));
        assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        for other in ["", "mounts", "mounts1", "gate1x2", "mountsx", "mounts1x2x3"] {
            assert_eq!(ListenerName::read(other), None, "{other}");
        }
    }

    #[test]
    fn a_record_keeps_the_last_number() {
        let dir = tempfile::tempdir().unwrap();
        let name = ListenerName::new(1);
        LastCall::open(&name, dir.path()).write(7);
        LastCall::open(&name, dir.path()).write(u64::MAX);
        assert_eq!(fs::read(name.file(dir.path())).unwrap(), u64::MAX.to_ne_bytes());
        forget(&name, dir.path());
        assert!(!name.file(dir.path()).exists());
    }
}
