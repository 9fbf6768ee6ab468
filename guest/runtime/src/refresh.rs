//! Lets the engine and a container see what the other wrote.
//!
//! Both have an overlay of their own over one writable layer (see [`crate::rootfs`]). The data of files is shared, but
//! each overlay remembers which names exist in which layer. Reconfiguring an overlay without any change makes the
//! kernel forget every name that is not in use. Whoever asks the engine to look into a running container's files, or
//! to change them, asks for that first.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use rustix::{fs::CWD, mount::FsPickFlags};
use serde_json::Value;

use crate::id_ranges::Table;

/// Longest state file of crun that is read, in bytes.
const MAX_STATUS: u64 = 1 << 20;

/// Makes the overlay mounted at `path` forget the names it has cached.
pub(crate) fn forget(path: &Path) -> io::Result<()> {
    let context = rustix::mount::fspick(CWD, path, FsPickFlags::FSPICK_CLOEXEC)?;
    rustix::mount::fsconfig_reconfigure(context).map_err(Into::into)
}

/// Does so on both sides of a running container; one that does not run is left alone.
pub(crate) fn container(table: &Table, id: &str) {
    for record in table.named(id) {
        let Some(pid) = first_process(&record.state_root.join(id)) else { continue };
        // A side that is gone has nothing cached.
        let _ = forget(&record.root);
        let _ = forget(Path::new(&format!("/proc/{pid}/root")));
    }
}

/// The process id in crun's state.
fn first_process(state: &Path) -> Option<u64> {
    let mut text = Vec::new();
    File::open(state.join("status")).ok()?.take(MAX_STATUS).read_to_end(&mut text).ok()?;
    serde_json::from_slice::<Value>(&text).ok()?["pid"].as_u64().filter(|pid| *pid > 0)
}
