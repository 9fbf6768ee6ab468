//! Tables of the kernel that all containers of a user namespace's owner share: one container takes all entries, another
//! looks for one.

use std::{io, os::fd::OwnedFd, time::Duration};

use crate::sys;

/// Entries that one process takes at most: more than any table has.
const MAX_ENTRIES: usize = 1 << 20;

/// Takes one entry, which lasts until the process ends.
type Take = fn(usize) -> io::Result<()>;

const TABLES: &[(&str, Take)] =
    &[("mqueue", message_queue), ("inotify", inotify), ("timer", timer), ("namespace", namespace), ("pty", terminal)];

fn forget(fd: OwnedFd) {
    // Kept open on purpose: the entry is taken for as long as this process lives.
    std::mem::forget(fd);
}

fn message_queue(number: usize) -> io::Result<()> {
    let name = sys::c(&format!("probe{}-{number}", std::process::id())).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = libc::O_CREAT | libc::O_RDWR;
    sys::open_call(libc::SYS_mq_open, &[&&name, &flags, &0o600, &0]).map(forget)
}

fn inotify(_: usize) -> io::Result<()> {
    sys::open_call(libc::SYS_inotify_init1, &[&0]).map(forget)
}

fn timer(_: usize) -> io::Result<()> {
    let mut id = 0_i32;
    sys::call(libc::SYS_timer_create, &[&libc::CLOCK_MONOTONIC, &0, &&raw mut id]).map(drop)
}

fn namespace(_: usize) -> io::Result<()> {
    sys::unshare(libc::CLONE_NEWUTS)?;
    let path = sys::c("/proc/self/ns/uts").map_err(|_| io::ErrorKind::InvalidInput)?;
    sys::open_call(libc::SYS_openat, &[&libc::AT_FDCWD, &&path, &libc::O_RDONLY]).map(forget)
}

fn terminal(_: usize) -> io::Result<()> {
    let path = sys::c("/dev/ptmx").map_err(|_| io::ErrorKind::InvalidInput)?;
    sys::open_call(libc::SYS_openat, &[&libc::AT_FDCWD, &&path, &(libc::O_RDWR | libc::O_NOCTTY)]).map(forget)
}

/// Takes all entries of a table, says how many those were, and keeps them. Returns false for an unknown table.
pub(crate) fn hog(name: &str) -> bool {
    let Some((_, take)) = TABLES.iter().find(|(table, _)| *table == name) else { return false };
    let ended = (0..MAX_ENTRIES).find_map(|number| take(number).err().map(|error| (number, error)));
    match ended {
        Some((taken, error)) => println!("hog\t{taken}\t{error}"),
        None => println!("hog\t{MAX_ENTRIES}\tno end"),
    }
    std::thread::sleep(Duration::from_secs(3600));
    true
}

/// Takes one entry of a table and says whether there was one. Returns false for an unknown table.
pub(crate) fn take(name: &str) -> bool {
    let Some((_, take)) = TABLES.iter().find(|(table, _)| *table == name) else { return false };
    match take(0) {
        Ok(()) => println!("taken"),
        Err(error) => println!("none left: {error}"),
    }
    true
}
