//! `refresh`: lets the engine and a container see each other's changes to the container's files.
//!
//! Both have an overlay of their own over one writable layer (see [`crate::rootfs`]). The data of files is shared, but
//! each overlay caches which names exist in which layer. The kernel drops every cached name that is not in use when an
//! overlay is reconfigured, even without a change. The gate runs `sysbox-runc refresh ID` before it lets the engine look
//! into a running container's files, and after the engine has changed them.

use std::{io, os::fd::AsFd, path::Path};

use bulkhead_guest_common::bounded;
use rustix::{
    fs::{AtFlags, StatxFlags},
    mount::FsPickFlags,
};
use serde_json::Value;

use crate::{id_ranges::IdRangeTable, mount_fd};

/// The size limit of crun's state file in bytes.
const MAX_STATUS: u64 = 1 << 20;

/// Overlayfs in statfs(2), `OVERLAYFS_SUPER_MAGIC` of linux/magic.h.
const OVERLAY: u32 = 0x794c_7630;

/// Has the overlay mounted at the engine's `path` drop the names that it has cached.
pub(crate) fn drop_name_cache(path: &Path) -> io::Result<()> {
    let root = mount_fd::open_path(path)?;
    // After the engine has unmounted it, there is the data disk.
    if rustix::fs::fstatfs(&root)?.f_type as u32 != OVERLAY {
        return Ok(());
    }
    reconfigure(&root)
}

fn reconfigure(root: impl AsFd) -> io::Result<()> {
    let context = rustix::mount::fspick(root, c"", FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH)?;
    rustix::mount::fsconfig_reconfigure(context).map_err(Into::into)
}

/// The device number of the file system at an open file.
///
/// A FUSE file system is not asked, which could take for ever: a device number is the kernel's own knowledge.
pub(crate) fn device(root: impl AsFd) -> io::Result<(u32, u32)> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(root, c"", flags, StatxFlags::empty())?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

/// Drops the cached names of both overlays of a running container; one that does not run is left alone.
pub(crate) fn refresh_container(table: &IdRangeTable, id: &str) {
    for record in table.named(id) {
        let Some(pid) = first_process(&record.state_root.join(id)) else { continue };
        // A failure on one side must not spare the other: an overlay that is gone has nothing cached.
        let _ = drop_name_cache(&record.root);
        // The container's overlay is mounted in its own namespace only, and is reached through its first process. That may
        // have changed its root, to one that answers when it likes: then nothing of ours is there.
        let Ok(root) = mount_fd::open_path(Path::new(&format!("/proc/{pid}/root"))) else { continue };
        if record.overlay.is_some() && device(&root).ok() == record.overlay {
            let _ = reconfigure(&root);
        }
    }
}

/// The id of the container's first process, from crun's state.
fn first_process(state: &Path) -> Option<u64> {
    let text = bounded::read_file(state.join("status"), MAX_STATUS).ok()?;
    serde_json::from_slice::<Value>(&text).ok()?["pid"].as_u64().filter(|pid| *pid > 0)
}
