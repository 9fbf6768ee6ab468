//! Mounts the tree, and aborts its connection when nobody serves it.

use std::{
    fs,
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    os::unix::fs::MetadataExt,
    path::Path,
};

use bulkhead_guest_common::mountinfo;
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, UnmountFlags},
};

/// File system type in tables of mounts; programs in containers see it on each file.
pub(crate) const TYPE: &str = "fuse.bulkhead";

/// Mounts a new connection at `target` and returns the descriptor on which its requests arrive.
///
/// As long as any process holds it, requests wait for a server instead of failing.
///
/// # Errors
/// Without `/dev/fuse`, or without `CAP_SYS_ADMIN` in the initial user namespace.
pub fn mount(target: &Path) -> io::Result<OwnedFd> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // default_permissions: the kernel checks mode and owner. allow_other: it serves users other than root, and other
    // user namespaces, which FUSE refuses otherwise so that a server cannot make their processes wait.
    let options = format!(
        "fd={},rootmode=40711,user_id=0,group_id=0,default_permissions,allow_other\0",
        device.as_fd().as_raw_fd()
    );
    let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).map_err(io::Error::other)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("bulkhead-procfs", target, TYPE, flags, options)?;
    Ok(device)
}

/// Unmounts the tree at `target`, and fails every request that is pending or comes later with `ECONNABORTED`.
///
/// # Errors
/// If there is no such mount, or no control file of it in `control`. The mount is detached in any case.
pub fn abort(target: &Path, control: &Path) -> io::Result<()> {
    // From the table of mounts: stat(2) would ask the server, which does not answer.
    let number = connection(&fs::read("/proc/self/mountinfo")?, target);
    let aborted = number.ok_or_else(|| io::ErrorKind::NotFound.into()).and_then(|number| {
        fs::OpenOptions::new().write(true).open(control.join(format!("{number}/abort")))?.write_all(b"1")
    });
    rustix::mount::unmount(target, UnmountFlags::DETACH)?;
    aborted
}

/// The number of the connection that is mounted at `target`, which is the minor number of its device.
fn connection(table: &[u8], target: &Path) -> Option<u32> {
    // The last mount at a place is the one on top.
    let top = mountinfo::parse(table).rfind(|mount| mount.point() == target)?;
    let (_, minor) = std::str::from_utf8(top.device).ok()?.split_once(':')?;
    if top.fs_type == TYPE.as_bytes() { minor.parse().ok() } else { None }
}

/// Mounts fusectl at `control` unless it is there, without which a connection cannot be aborted.
///
/// # Errors
/// As mount(2).
pub fn mount_control(control: &Path) -> io::Result<()> {
    // A mount point is on another device than its parent.
    let mounted = fs::metadata(control)
        .and_then(|own| Ok(own.dev() != fs::metadata(control.join(".."))?.dev()))
        .unwrap_or_default();
    if mounted {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("fusectl", control, "fusectl", flags, None).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_is_that_of_the_last_mount_at_the_place() {
        let table = b"\
            22 1 0:20 / /proc rw - proc proc rw\n\
            40 22 0:44 / /run/w/fs rw,nosuid - fuse.bulkhead bulkhead-procfs rw,user_id=0\n\
            41 22 0:45 / /run/w/fs rw,nosuid shared:4 - fuse.bulkhead bulkhead-procfs rw,user_id=0\n\
            42 22 0:46 / /run/w/other rw - tmpfs tmpfs rw\n";
        assert_eq!(connection(table, Path::new("/run/w/fs")), Some(45));
        assert_eq!(connection(table, Path::new("/run/w/other")), None);
        assert_eq!(connection(table, Path::new("/run/w")), None);
    }
}
