//! Reads and changes the records of files (see `owners`).
//!
//! Records are written through descriptors only. They are read by a directory and a name: a file need not be opened for
//! it, which a lookup would have to do each time. Kernels without a call for that are given the name in the thread's
//! working directory. Nothing can be changed by a path.

use std::{
    ffi::{CStr, CString},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    fd::{AsFd, AsRawFd, OwnedFd},
    fs::{self, Mode, Statx, XattrFlags},
    io::Errno,
};

use super::{
    Server,
    attributes::{self, Stamp},
    nodes::Origin,
    owners::{self, LENGTH, MODE_BITS, NAME, Record, VirtualMode},
    resolve::{self, Target, TargetPlace},
    working_directory,
};
use crate::{fuse::reply::Attributes, sys};

/// Age from which on a time of change tells that a record is the same: a clock of the host ticks every few
/// milliseconds, and two changes within a tick have the same time.
const SETTLED: Duration = Duration::from_millis(100);

/// Owner and mode that a file is to have in the guest; `None` leaves them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    /// Permissions, without a type.
    pub(crate) mode: Option<u32>,
    /// Type and number of a device, pipe or socket that stands in an empty file.
    pub(crate) special: Option<(u32, u32)>,
}

/// A record has to be read, in this way or another.
#[derive(Debug)]
struct Unknown;

/// True if changes of that time are over.
pub(crate) fn settled(stamp: Stamp) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let changed = Duration::new(stamp.0.try_into().unwrap_or(0), stamp.1.min(999_999_999));
    now.checked_sub(changed).is_some_and(|age| age > SETTLED)
}

fn decode(result: Result<usize, Errno>, value: &[u8]) -> Option<Record> {
    // Without a record, on a file system without such attributes, and for a file that may not be read.
    Record::decode(value.get(..result.ok()?)?)
}

/// Set once the kernel has turned out to lack the call for a directory and a name, as before Linux 6.13.
static LACKS_CALL: AtomicBool = AtomicBool::new(false);

/// The record of a name in a directory, or of the directory itself by the name `.`.
fn of_name(directory: &Arc<OwnedFd>, name: &CStr) -> Option<Record> {
    let record = by_call(directory, name).or_else(|Unknown| by_working_directory(directory, name));
    record.unwrap_or_else(|Unknown| by_path(directory, name))
}

/// The same by the call for a directory and a name, if the kernel has it.
fn by_call(directory: &Arc<OwnedFd>, name: &CStr) -> Result<Option<Record>, Unknown> {
    if LACKS_CALL.load(Ordering::Relaxed) {
        return Err(Unknown);
    }
    let mut value = [0; LENGTH + 1];
    match sys::xattr_of_name(directory, name, NAME, &mut value) {
        // `EPERM` by a filter of a container's runtime that does not know the call.
        Err(Errno::NOSYS | Errno::PERM) => {
            LACKS_CALL.store(true, Ordering::Relaxed);
            Err(Unknown)
        }
        result => decode_name(name, result, &value),
    }
}

/// The same by the working directory, if the thread has one of its own.
fn by_working_directory(directory: &Arc<OwnedFd>, name: &CStr) -> Result<Option<Record>, Unknown> {
    if !working_directory::enter(directory) {
        return Err(Unknown);
    }
    let mut value = [0; LENGTH + 1];
    decode_name(name, fs::lgetxattr(name, NAME, &mut value), &value)
}

fn decode_name(name: &CStr, result: Result<usize, Errno>, value: &[u8]) -> Result<Option<Record>, Unknown> {
    match result {
        // No name is found in a directory that may be read and not searched, not even its own.
        Err(Errno::ACCESS) if name == c"." => Err(Unknown),
        result => Ok(decode(result, value)),
    }
}

/// The same by a path, which takes much longer.
fn by_path(directory: impl AsFd, name: &CStr) -> Option<Record> {
    if name == c"." {
        return of_directory(directory);
    }
    let mut path = format!("/proc/self/fd/{}/", directory.as_fd().as_raw_fd()).into_bytes();
    path.extend(name.to_bytes());
    let mut value = [0; LENGTH + 1];
    decode(fs::lgetxattr(CString::new(path).ok()?, NAME, &mut value), &value)
}

/// The record of a directory that is open as a place.
fn of_directory(directory: impl AsFd) -> Option<Record> {
    let path = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
    let mut value = [0; LENGTH + 1];
    decode(fs::getxattr(path, NAME, &mut value), &value)
}

/// The record of an open file.
pub(crate) fn of_file(file: impl AsFd) -> Option<Record> {
    let mut value = [0; LENGTH + 1];
    decode(fs::fgetxattr(file, NAME, &mut value), &value)
}

impl Server {
    /// The record of a file that was found by a name.
    pub(crate) fn record_of_name(
        &self,
        directory: &Arc<OwnedFd>,
        name: &CStr,
        stat: &Statx,
        origin: Origin,
    ) -> Option<Record> {
        self.known_record(stat, origin).unwrap_or_else(|Unknown| of_name(directory, name))
    }

    /// The record of a directory.
    pub(crate) fn record_of_directory(&self, directory: &Arc<OwnedFd>, stat: &Statx, origin: Origin) -> Option<Record> {
        self.record_of_name(directory, c".", stat, origin)
    }

    /// The record that is known for this state of a file.
    fn known_record(&self, stat: &Statx, origin: Origin) -> Result<Option<Record>, Unknown> {
        if !self.ids.records(stat) {
            return Ok(None);
        }
        match self.nodes().record(origin) {
            Some((stamp, record)) if stamp == attributes::stamp(stat) => Ok(record),
            _ => Err(Unknown),
        }
    }

    /// The record of a file.
    pub(crate) fn record(&self, target: &Target) -> Option<Record> {
        let origin = Origin::Host(attributes::key(target.share, &target.stat));
        let known = self.known_record(&target.stat, origin);
        known.unwrap_or_else(|Unknown| {
            let record = match &target.place {
                TargetPlace::Name(directory, name) => of_name(directory, name),
                TargetPlace::Directory(fd) => of_name(fd, c"."),
                TargetPlace::Open(file) => of_file(&file.fd),
            };
            let stamp = attributes::stamp(&target.stat);
            if settled(stamp) {
                self.nodes().remember(target.number, stamp, record);
            }
            record
        })
    }

    /// Attributes of a file for the guest.
    pub(crate) fn attributes(&self, target: &Target) -> Result<Attributes, Errno> {
        let device = self.devices.number(&target.stat, || match &target.place {
            TargetPlace::Name(directory, name) => resolve::place_of(&**directory, name),
            TargetPlace::Directory(fd) => resolve::place_of(&**fd, c"."),
            TargetPlace::Open(file) => file.fd.try_clone().map_err(|_| Errno::MFILE),
        })?;
        self.nodes().give_size(target.number, target.stat.stx_size);
        let number = attributes::number(device, target.stat.stx_ino);
        let attributes = attributes::attributes(number, &target.stat, self.record(target).as_ref(), self.ids);
        Ok(attributes.with_locks(self.locks.on()))
    }

    /// Gives an open file owner and mode for the guest.
    ///
    /// # Errors
    /// `EPERM` if the host cannot keep them: the file is another user's, or its file system has no attributes of users.
    pub(crate) fn set_record(&self, file: impl AsFd, wanted: &Wanted) -> Result<(), Errno> {
        let _records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let stat = &resolve::stat(&file)?;
        let old = if self.ids.records(stat) { of_file(&file) } else { None };
        self.change_record(file, stat, old, wanted).map(drop)
    }

    /// The same for a file that this process has just made; returns its state and its record afterwards.
    pub(crate) fn set_first_record(&self, file: impl AsFd, wanted: &Wanted) -> Result<(Statx, Option<Record>), Errno> {
        let _records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let stat = resolve::stat(&file)?;
        // A directory is opened after it was made, and another one may have its name by then.
        let old = if attributes::kind(&stat) == libc::S_IFDIR { of_file(&file) } else { None };
        let (record, changed) = self.change_record(&file, &stat, old, wanted)?;
        Ok((if changed { resolve::stat(&file)? } else { stat }, record))
    }

    /// Gives a file with this state and record others; returns the record that it has then, and whether anything changed.
    fn change_record(
        &self,
        file: impl AsFd,
        stat: &Statx,
        old: Option<Record>,
        wanted: &Wanted,
    ) -> Result<(Option<Record>, bool), Errno> {
        let (new, host) = self.plan(stat, old, wanted);
        let current = u32::from(stat.stx_mode) & MODE_BITS;
        let (mut record, mut changed) = (old, false);
        if !self.ids.records(stat) {
            // The mode of another user's file is the host's to refuse.
            let plain = self.ids.plain_owner(stat);
            if new.owner.is_some_and(|owner| owner != plain) {
                return Err(Errno::PERM);
            }
        } else if new != old.unwrap_or_default() {
            let kept = write_record(&file, &new, current)?;
            (record, changed) = (Some(new).filter(|new| kept && !new.is_empty()), true);
        }
        let host = Mode::from_raw_mode(host);
        if wanted.mode.is_some() && host.as_raw_mode() != current {
            fs::fchmod(file, host)?;
            changed = true;
        }
        Ok((record, changed))
    }

    /// The new record of a file, and its permissions on the host.
    fn plan(&self, stat: &Statx, old: Option<Record>, wanted: &Wanted) -> (Record, u32) {
        let shown = self.ids.shown(stat, old.as_ref());
        let plain = self.ids.plain_owner(stat);
        let owner = (wanted.uid.unwrap_or(shown.uid), wanted.gid.unwrap_or(shown.gid));
        let current = u32::from(stat.stx_mode) & MODE_BITS;
        let directory = attributes::kind(stat) == libc::S_IFDIR;
        let kind = wanted.special.map_or(shown.mode & libc::S_IFMT, |(kind, _)| kind);
        let device = wanted.special.map_or(shown.device, |(_, device)| device);
        let mode = wanted.mode.unwrap_or(shown.mode) & MODE_BITS;
        let host = if wanted.mode.is_some() { owners::host_mode(mode, current, directory) } else { current };
        let plain_kind = kind == attributes::kind(stat);
        let record = Record {
            owner: (owner != plain).then_some(owner),
            mode: (mode != host || !plain_kind).then_some(VirtualMode { mode: kind | mode, host, device }),
        };
        (record, host)
    }
}

/// Writes or removes a record, for which the owner's own permissions have to allow writing; returns false if the host
/// cannot keep it and need not.
fn write_record(file: impl AsFd, record: &Record, current: u32) -> Result<bool, Errno> {
    let write = || {
        if record.is_empty() {
            match fs::fremovexattr(&file, NAME) {
                Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
                result => result,
            }
        } else {
            fs::fsetxattr(&file, NAME, &record.encode(), XattrFlags::empty())
        }
    };
    let mut result = write();
    if result == Err(Errno::ACCESS) {
        fs::fchmod(&file, Mode::from_raw_mode(current | 0o200))?;
        result = write();
        fs::fchmod(&file, Mode::from_raw_mode(current))?;
    }
    match result {
        // A mode alone is kept as far as the host's file can have it.
        Err(Errno::OPNOTSUPP) if record.owner.is_none() && record.mode.is_none_or(is_plain) => Ok(false),
        Err(Errno::OPNOTSUPP) => Err(Errno::PERM),
        result => result.map(|()| true),
    }
}

fn is_plain(mode: VirtualMode) -> bool {
    matches!(mode.mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_to_read_a_record_agree_and_follow_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let record = Record { owner: Some((1, 2)), mode: None };
        for name in ["with", "without"] {
            std::fs::write(directory.path().join(name), b"").unwrap();
        }
        fs::setxattr(directory.path().join("with"), NAME, &record.encode(), XattrFlags::empty()).unwrap();
        std::os::unix::fs::symlink("with", directory.path().join("link")).unwrap();
        let place = fs::OFlags::PATH | fs::OFlags::DIRECTORY;
        let opened = Arc::new(fs::open(directory.path(), place, Mode::empty()).unwrap());
        let agree = |name, expected: Option<Record>| {
            assert_eq!((of_name(&opened, name), by_path(&opened, name)), (expected, expected), "{name:?}");
            assert_eq!(by_working_directory(&opened, name).ok(), Some(expected), "{name:?}");
        };
        working_directory::separate().unwrap();
        for (name, expected) in [(c"with", Some(record)), (c"without", None), (c"link", None), (c"none", None)] {
            agree(name, expected);
        }
        agree(c".", None);
        fs::setxattr(directory.path(), NAME, &record.encode(), XattrFlags::empty()).unwrap();
        agree(c".", Some(record));
    }

    #[test]
    fn a_thread_that_shares_its_working_directory_reads_by_a_path() {
        let directory = tempfile::tempdir().unwrap();
        let opened = Arc::new(std::fs::File::open(directory.path()).unwrap().into());
        assert!(by_working_directory(&opened, c".").is_err());
        assert_eq!(of_name(&opened, c"."), None);
    }
}
