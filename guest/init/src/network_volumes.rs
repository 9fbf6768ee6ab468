//! Volumes on servers (NFS, SMB): the ids that containers have there, and the end of their mounts.
//!
//! A server can stop answering at any time, and the kernel waits for it where it has something to write. Nothing here
//! waits for long.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use bulkhead_guest_common::{id_ranges, mountinfo};
use bulkhead_policy::volumes;
use nix::mount::{MntFlags, umount2};

use crate::log;

/// Parameters of the kernel's RPC client, by a patch of the guest's kernel.
const PARAMETERS: &str = "/sys/module/sunrpc/parameters";

/// Time for the kernel to write to all servers together what containers have left unwritten.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Has the kernel send to NFS servers the ids that containers have by themselves, and not those of their ranges.
pub(crate) fn send_ids_of_containers() {
    for (name, value) in [("id_range_first", id_ranges::FIRST), ("id_range_length", id_ranges::LENGTH)] {
        let path = Path::new(PARAMETERS).join(name);
        if let Err(error) = fs::write(&path, value.to_string()) {
            log::info(&format!("cannot set {}: {error}", path.display()));
        }
    }
}

/// The mount points of file systems that are on a server, the latest first.
fn on_servers(table: &[u8]) -> Vec<PathBuf> {
    let is_on_server = |mount: &mountinfo::Mount<'_>| volumes::is_on_server(mount.fs_type);
    mountinfo::parse(table).rev().filter(is_on_server).map(|mount| mount.point()).collect()
}

/// Takes all of them out of the tree of mounts, and gives the kernel some time to write out what belongs there.
///
/// Each one in a thread of its own: the kernel may wait for a server at the end of the call.
pub(crate) fn detach(table: &[u8]) {
    let (ended, wait) = mpsc::channel();
    let mut left = 0;
    for point in on_servers(table) {
        let ended = ended.clone();
        let detached = move || {
            // Detached first, so that nothing finds the mount any more, whatever becomes of the rest.
            let result = umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let _ = ended.send(result);
        };
        match thread::Builder::new().spawn(detached) {
            Ok(_) => left += 1,
            Err(error) => log::info(&format!("cannot start a thread: {error}")),
        }
    }
    let deadline = Instant::now() + TIMEOUT;
    while left > 0 && wait.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok() {
        left -= 1;
    }
    if left > 0 {
        log::info(&format!("{left} volumes on servers do not answer; going on without them"));
    }
}

/// Writes a file system out, if it is there, and no other: sync(2) would wait for servers.
pub(crate) fn sync_file_system(path: &str) {
    match File::open(path).and_then(|file| Ok(nix::unistd::syncfs(file)?)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::info(&format!("cannot write {path} out: {error}"));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_systems_on_servers_are_found_and_inner_ones_first() {
        let table = b"1 0 0:1 / / ro - erofs x ro\n\
                    2 1 8:1 / /var/lib/docker rw - ext4 x rw\n\
                    3 2 0:9 / /var/lib/docker/volumes/a/_data rw - nfs4 :/a rw\n\
                    4 3 0:8 / /var/lib/docker/volumes/a/_data/b rw - nfs4 :/a/b rw\n\
                    5 2 0:7 / /var/lib/docker/volumes/c/_data rw - cifs //s/c rw\n\
                    6 2 0:6 / /var/lib/docker/volumes/nfs/_data rw - tmpfs nfs rw\n";
        let names = ["c/_data", "a/_data/b", "a/_data"].map(|name| Path::new("/var/lib/docker/volumes").join(name));
        assert_eq!(on_servers(table), names);
        assert!(on_servers(b"").is_empty());
    }
}
