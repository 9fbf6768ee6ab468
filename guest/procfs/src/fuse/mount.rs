//! Mounts the tree, and lets go of one that nobody serves.

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

/// The file system type that `/proc/mounts` shows.
pub(crate) const TYPE: &str = "fuse.bulkhead";

/// Mounts an empty connection at `target` and returns the descriptor on which its requests arrive.
///
/// As long as anybody holds it, requests wait for a server instead of failing.
///
/// # Errors
/// Without `/dev/fuse`, or without `CAP_SYS_ADMIN` in the initial user namespace.
pub fn mount(target: &Path) -> io::Result<OwnedFd> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // The kernel judges by mode and owner; other user namespaces may come in.
    let options = format!(
        "fd={},rootmode=40711,user_id=0,group_id=0,default_permissions,allow_other\0",
        device.as_fd().as_raw_fd()
    );
    let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).map_err(io::Error::other)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("warden", target, TYPE, flags, options)?;
    Ok(device)
}

/// Takes the mount at `target` away and makes every request that waits in it fail (`ECONNABORTED`), now and later.
///
/// # Errors
/// When the mount is not there or the kernel has no control file for it; it is detached in any case.
pub fn abort(target: &Path, control: &Path) -> io::Result<()> {
    // The device number must be known without asking the server: the table of mounts has it.
    let number = connection(&fs::read("/proc/self/mountinfo")?, target);
    let aborted = number.ok_or_else(|| io::ErrorKind::NotFound.into()).and_then(|number| {
        fs::OpenOptions::new().write(true).open(control.join(format!("{number}/abort")))?.write_all(b"1")
    });
    rustix::mount::unmount(target, UnmountFlags::DETACH)?;
    aborted
}

/// The number of the connection that is mounted at `target`: the minor number of its device.
fn connection(table: &[u8], target: &Path) -> Option<u32> {
    let top = mountinfo::parse(table).rfind(|mount| mount.point() == target)?;
    let (_, minor) = std::str::from_utf8(top.device).ok()?.split_once(':')?;
    if top.fs_type == TYPE.as_bytes() { minor.parse().ok() } else { None }
}

/// Makes the file system of `fusectl` available, without which a connection can't be aborted.
///
/// # Errors
/// When it is neither there nor can be mounted.
pub fn mount_control(control: &Path) -> io::Result<()> {
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
            40 22 0:44 / /run/w/fs rw,nosuid - fuse.bulkhead warden rw,user_id=0\n\
            41 22 0:45 / /run/w/fs rw,nosuid shared:4 - fuse.bulkhead warden rw,user_id=0\n\
            42 22 0:46 / /run/w/other rw - tmpfs tmpfs rw\n";
        assert_eq!(connection(table, Path::new("/run/w/fs")), Some(45));
        assert_eq!(connection(table, Path::new("/run/w/other")), None);
        assert_eq!(connection(table, Path::new("/run/w")), None);
    }
}
