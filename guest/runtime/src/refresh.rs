//! `refresh`: lets the engine and a container see each other's changes to the container's files.
//!
//! Both have an overlay of their own over one writable layer (see [`crate::rootfs`]). The data of files is shared, but
//! each overlay caches which names exist in which layer. The kernel drops every cached name that is not in use when an
//! overlay is reconfigured, even without a change. The gate runs `sysbox-runc refresh ID` before it lets the engine look
//! into a running container's files, and after the engine has changed them.

use std::{io, path::Path};

use bulkhead_guest_common::bounded;
use rustix::{fs::CWD, mount::FsPickFlags};
use serde_json::Value;

use crate::id_ranges::IdRangeTable;

/// The size limit of crun's state file in bytes.
const MAX_STATUS: u64 = 1 << 20;

/// Has the overlay mounted at `path` drop the names that it has cached.
pub(crate) fn drop_name_cache(path: &Path) -> io::Result<()> {
    let context = rustix::mount::fspick(CWD, path, FsPickFlags::FSPICK_CLOEXEC)?;
    rustix::mount::fsconfig_reconfigure(context).map_err(Into::into)
}

/// Drops the cached names of both overlays of a running container; one that does not run is left alone.
pub(crate) fn refresh_container(table: &IdRangeTable, id: &str) {
    for record in table.named(id) {
        let Some(pid) = first_process(&record.state_root.join(id)) else { continue };
        // A failure on one side must not spare the other: an overlay that is gone has nothing cached.
        let _ = drop_name_cache(&record.root);
        // The container's overlay is mounted in its own namespace only, and is reached through its first process. That may
        // have changed its root; a reconfiguration without options changes nothing there either.
        let _ = drop_name_cache(Path::new(&format!("/proc/{pid}/root")));
    }
}

/// The id of the container's first process, from crun's state.
fn first_process(state: &Path) -> Option<u64> {
    let text = bounded::read_file(state.join("status"), MAX_STATUS).ok()?;
    serde_json::from_slice::<Value>(&text).ok()?["pid"].as_u64().filter(|pid| *pid > 0)
}
