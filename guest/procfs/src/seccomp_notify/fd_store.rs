//! What outlives a warden: the descriptors, which init keeps, and the number of the last call that was taken from each.

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

use super::{
    KEPT_LISTENERS, KEPT_PREFIX,
    sys::{self, Answer},
};

/// How many calls after the last one known may have been taken before the warden ended. One is taken at a time.
const AFTER: u64 = 16;

/// A descriptor's name, with the number of its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    slot: u64,
    /// When it came: nanoseconds since boot, or the next that none has had.
    time: u64,
}

impl Name {
    /// A new one.
    pub(super) fn new(slot: u64) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let now = rustix::time::clock_gettime(ClockId::Boottime);
        let now = now.tv_sec.unsigned_abs().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.unsigned_abs());
        let time = |last: u64| now.max(last + 1);
        let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(time(last)));
        Self { slot, time: time(last.unwrap_or_default()) }
    }

    /// The container's number; 0 is no container's.
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

impl fmt::Display for Name {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{KEPT_PREFIX}{}x{}", self.slot, self.time)
    }
}

/// The descriptors that an earlier warden left. To be called once, before anything else uses their numbers.
pub(super) fn inherited() -> Vec<(Name, OwnedFd)> {
    let stored = notify::inherited(KEPT_LISTENERS).into_iter();
    stored.filter_map(|(name, listener)| Some((Name::read(&name)?, listener))).collect()
}

/// Has the kernel go on with what an earlier warden took and did not answer.
pub(super) fn answer_last(listener: BorrowedFd<'_>, name: &Name, state: &Path) {
    let Some(last) = fs::read(name.file(state)).ok().and_then(|text| text.try_into().ok()).map(u64::from_ne_bytes)
    else {
        return;
    };
    // What was answered is gone, what was not taken yet refuses an answer and is taken later.
    for after in 0..AFTER {
        let _ = sys::answer(listener, last.wrapping_add(after), Answer::Continue);
    }
}

/// The same for one whose first call was taken and whose number was not written any more.
pub(super) fn answer_before(listener: BorrowedFd<'_>, first: u64) {
    for before in 1..AFTER {
        let _ = sys::answer(listener, first.wrapping_sub(before), Answer::Continue);
    }
}

/// Where the number of the last call is written.
pub(super) struct Record(Option<File>);

impl Record {
    /// Opens it, keeping what is there.
    pub(super) fn open(name: &Name, state: &Path) -> Self {
        let path = name.file(state);
        let make = || {
            fs::create_dir_all(path.parent().unwrap_or(state))?;
            File::options().create(true).truncate(false).write(true).open(&path)
        };
        Self(make().ok())
    }

    /// Writes a number.
    pub(super) fn write(&self, id: u64) {
        if let Some(file) = &self.0 {
            let _ = file.write_all_at(&id.to_ne_bytes(), 0);
        }
    }
}

/// Removes what is left of a descriptor.
pub(super) fn forget(name: &Name, state: &Path) {
    let _ = fs::remove_file(name.file(state));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written_and_made_of_letters_and_digits() {
        let name = Name::new(17);
        let text = name.to_string();
        assert_eq!(Name::read(&text), Some(name));
        assert_ne!(Name::new(17), Name::new(17));
        assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        for other in ["", "mounts", "mounts1", "gate1x2", "mountsx", "mounts1x2x3"] {
            assert_eq!(Name::read(other), None, "{other}");
        }
    }

    #[test]
    fn a_record_keeps_the_last_number() {
        let dir = tempfile::tempdir().unwrap();
        let name = Name::new(1);
        Record::open(&name, dir.path()).write(7);
        Record::open(&name, dir.path()).write(u64::MAX);
        assert_eq!(fs::read(name.file(dir.path())).unwrap(), u64::MAX.to_ne_bytes());
        forget(&name, dir.path());
        assert!(!name.file(dir.path()).exists());
    }
}
