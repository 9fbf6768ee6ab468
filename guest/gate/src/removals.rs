//! Removed containers, noticed by their directories, which dockerd deletes.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use tokio::io::{Interest, unix::AsyncFd};

/// A watch for entries that are removed from a directory (inotify(7)).
#[derive(Debug)]
pub(crate) struct Removals(AsyncFd<OwnedFd>);

/// Size of the fixed part of `struct inotify_event`, in bytes.
const EVENT_HEADER: usize = size_of::<libc::inotify_event>();

impl Removals {
    /// Watches `directory` from now on.
    pub(crate) fn of(directory: &Path) -> io::Result<Self> {
        // SAFETY: inotify_init1(2) takes no pointers.
        let raw = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let path = CString::new(directory.as_os_str().as_bytes())?;
        // ONLYDIR refuses anything else at the path. A rename out of the directory is a removal, too.
        let mask = libc::IN_DELETE | libc::IN_MOVED_FROM | libc::IN_ONLYDIR;
        // SAFETY: the path is a string with a NUL at its end that outlives the call.
        if unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: an `OwnedFd` is open and returns the same descriptor for as long as the `AsyncFd` owns it.
        unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map(Self).map_err(io::Error::from)
    }

    /// Returns the names of removed entries; `None` if some were lost and everything has to be checked.
    pub(crate) async fn next(&self) -> io::Result<Option<Vec<String>>> {
        // Large enough for one event with the longest name, which read(2) requires, and for many short ones.
        let mut buffer = vec![0; 16 * 1024];
        let length = self
            .0
            .async_io(Interest::READABLE, |fd| {
                // SAFETY: the buffer is valid for writes of its length.
                let read = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
                usize::try_from(read).map_err(|_| io::Error::last_os_error())
            })
            .await?;
        Ok(names(&buffer[..length]))
    }
}

/// Reads a number in the byte order of x86-64.
fn read_u32(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// Returns the names in a buffer of events; `None` if an event reports that the queue overflowed or the watch ended.
fn names(mut events: &[u8]) -> Option<Vec<String>> {
    let mut names = Vec::new();
    while let Some((head, rest)) = events.split_at_checked(EVENT_HEADER) {
        // struct inotify_event: wd, mask, cookie, len, then `len` bytes of name.
        let (mask, length) = (read_u32(&head[4..8]), read_u32(&head[12..16]) as usize);
        // IN_IGNORED: the directory itself is gone or unmounted. The caller starts a new watch in both cases.
        if mask & (libc::IN_Q_OVERFLOW | libc::IN_IGNORED) != 0 {
            return None;
        }
        let (name, rest) = rest.split_at_checked(length)?;
        // The name is padded with NULs.
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(length);
        // A name that is not UTF-8 is not a container ID, and no ID contains the replacement character.
        names.push(String::from_utf8_lossy(&name[..end]).into_owned());
        events = rest;
    }
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_removed_directory_is_reported_by_its_name() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("one")).unwrap();
        std::fs::create_dir(directory.path().join("two")).unwrap();
        let removals = Removals::of(directory.path()).unwrap();
        std::fs::remove_dir(directory.path().join("two")).unwrap();
        assert_eq!(removals.next().await.unwrap(), Some(vec!["two".to_owned()]));
    }

    #[test]
    fn lost_events_are_reported() {
        let mut event = [0; EVENT_HEADER];
        event[4..8].copy_from_slice(&libc::IN_Q_OVERFLOW.to_le_bytes());
        assert_eq!(names(&event), None);
        assert_eq!(names(&event[..5]), Some(Vec::new()));
    }
}
