//! Finds procfs, sysfs and the nodes on them in a process' table of mounts.
//!
//! The tables are the containers': they decide how long these are, and can make a FUSE file system whose type reads
//! like ours. They deceive only themselves by that.

use bulkhead_guest_common::mountinfo::{Mount, parse};

use super::syscall::Kind;
use crate::fuse::mount::TYPE;

/// The option that marks nodes on a procfs or sysfs that a container mounted. Those on its first ones, which crun
/// mounted and which must stay, lack it. It means nothing for a file, and copies of the mount keep it.
const MARK: &[u8] = b"nodiratime";

/// Returns whether a mount is a node that this service has put on a container's own procfs or sysfs.
fn is_ours(mount: &Mount<'_>) -> bool {
    mount.fs_type == TYPE.as_bytes() && mount.has_option(MARK)
}

/// Returns whether a container has a procfs or sysfs with nodes that it mounted itself.
pub(crate) fn has_ours(table: &[u8]) -> bool {
    parse(table).any(|mount| is_ours(&mount))
}

/// Returns whether a mount is a procfs or sysfs on which there are nodes and nothing else, and nothing on these.
pub(crate) fn has_only_ours(table: &[u8], id: u64) -> bool {
    let mut is_right_kind = false;
    let mut nodes = Vec::new();
    for mount in parse(table) {
        if mount.id == id {
            is_right_kind = mount.fs_type == b"proc" || mount.fs_type == b"sysfs";
        } else if mount.parent == id {
            if !is_ours(&mount) {
                return false;
            }
            nodes.push(mount.id);
        }
    }
    // A second pass, and a search instead of a comparison with each: the table has as many lines as a container wants.
    nodes.sort_unstable();
    let is_on_node = |mount: &Mount<'_>| nodes.binary_search(&mount.parent).is_ok();
    is_right_kind && !nodes.is_empty() && !parse(table).any(|mount| is_on_node(&mount))
}

/// File systems that are mounted on directories which the kernel keeps empty for them (`sysfs_create_mount_point`,
/// `proc_create_mount_point`). They hide nothing, and the kernel does not count them either.
const ON_EMPTY_DIRECTORIES: &[&[u8]] = &[
    b"binfmt_misc",
    b"bpf",
    b"cgroup",
    b"cgroup2",
    b"configfs",
    b"debugfs",
    b"fusectl",
    b"pstore",
    b"securityfs",
    b"tracefs",
];

/// Returns whether there is a procfs or sysfs of which nothing is hidden but by nodes.
///
/// This is the kernel's own condition for a mount in a user namespace (`mnt_already_visible`), except for the nodes.
/// Docker's masked paths (`/proc/kcore` under `/dev/null`) fail it, and the new procfs is refused as with runc.
pub(crate) fn shows_all(table: &[u8], kind: Kind) -> bool {
    let hides = |mount: &Mount<'_>| mount.fs_type != TYPE.as_bytes() && !ON_EMPTY_DIRECTORIES.contains(&mount.fs_type);
    let is_whole = |mount: &Mount<'_>| {
        mount.fs_type == kind.name().as_bytes()
            && mount.is_whole()
            // A read-only one must not become a writable one; the table has `rw` or `ro` first.
            && mount.options.split(|byte| *byte == b',').next() == Some(b"rw")
    };
    parse(table).filter(is_whole).any(|whole| !parse(table).any(|mount| mount.parent == whole.id && hides(&mount)))
}

/// Returns the kind of a mount that shows the whole of a procfs or sysfs.
pub(crate) fn whole(table: &[u8], id: u64) -> Option<Kind> {
    let mount = parse(table).find(|mount| mount.id == id && mount.is_whole())?;
    [Kind::Proc, Kind::Sys].into_iter().find(|kind| kind.name().as_bytes() == mount.fs_type)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TABLE: &[u8] = b"\
        22 1 0:20 / / rw - overlay overlay rw\n\
        23 22 0:21 / /proc rw,nosuid shared:4 - proc proc rw\n\
        24 23 0:22 /1/proc+uptime /proc/uptime rw,nosuid - fuse.bulkhead bulkhead-procfs rw\n\
        30 22 0:23 / /p rw,relatime - proc proc rw\n\
        31 30 0:22 /1/proc+uptime /p/uptime rw,nodiratime,relatime - fuse.bulkhead bulkhead-procfs rw\n\
        32 30 0:22 /1/proc+meminfo /p/meminfo rw,nodiratime,relatime master:3 - fuse.bulkhead bulkhead-procfs rw\n\
        40 22 0:24 / /q rw - proc proc rw\n\
        41 40 0:22 /1/proc+uptime /q/uptime rw,nodiratime - fuse.bulkhead bulkhead-procfs rw\n\
        42 40 0:25 / /q/bus rw - tmpfs tmpfs rw\n\
        50 22 0:26 / /r rw - proc proc rw\n\
        51 50 0:22 /1/proc+uptime /r/uptime rw,nodiratime - fuse.bulkhead bulkhead-procfs rw\n\
        52 51 0:27 / /r/uptime rw - ext4 /dev/x rw\n\
        60 22 0:28 / /s rw - tmpfs tmpfs rw\n\
        61 60 0:22 /1/proc+uptime /s/x rw,nodiratime - fuse.bulkhead bulkhead-procfs rw\n\
        70 22 0:29 / /t rw - proc proc rw\n";

    #[test]
    fn only_what_the_container_mounted_and_left_alone_is_undone() {
        assert!(has_only_ours(TABLE, 30));
        // The first procfs, one with something else on it, one with something on ours, not a procfs, nothing on it,
        // none.
        for other in [23, 40, 50, 60, 70, 99] {
            assert!(!has_only_ours(TABLE, other), "{other}");
        }
    }

    #[test]
    fn a_procfs_that_something_else_is_mounted_on_hides_it() {
        let proc = "9 1 0:1 / /proc rw,nosuid - proc proc rw\n11 9 0:3 /1/proc+uptime /proc/uptime rw - fuse.bulkhead bulkhead-procfs rw\n\
                    12 9 0:4 / /proc/sys/fs/binfmt_misc rw - binfmt_misc b rw\n";
        assert!(shows_all(proc.as_bytes(), Kind::Proc));
        assert!(!shows_all(proc.as_bytes(), Kind::Sys));
        for hiding in [
            "13 9 0:5 / /proc/acpi ro - tmpfs tmpfs ro",
            "13 9 0:1 /sys /proc/sys ro - proc proc rw",
            "13 9 0:1 / /proc rw - fuse.x x rw",
        ] {
            assert!(!shows_all(format!("{proc}{hiding}\n").as_bytes(), Kind::Proc), "{hiding}");
        }
        assert!(!shows_all(proc.replace("/proc rw,", "/proc ro,").as_bytes(), Kind::Proc));
        assert!(!shows_all(proc.replace("0:1 /", "0:1 /sys").as_bytes(), Kind::Proc));
    }

    #[test]
    fn a_part_of_a_procfs_is_not_the_whole() {
        let table = b"9 1 0:1 / /proc rw - proc proc rw\n10 1 0:1 /sys /proc/sys ro - proc proc rw\n11 1 0:2 / /s rw - sysfs s rw\n";
        assert_eq!([9, 10, 11, 12].map(|id| whole(table, id)), [Some(Kind::Proc), None, Some(Kind::Sys), None]);
        assert_eq!(whole(TABLE, 22), None);
    }

    #[test]
    fn a_container_that_mounted_none_has_none() {
        assert!(has_ours(TABLE));
        let first = TABLE.split_inclusive(|byte| *byte == b'\n').take(3).collect::<Vec<_>>().concat();
        assert!(!has_ours(&first));
    }

    proptest! {
        #[test]
        fn no_table_panics(table in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..300),
            "(1|2| |-|\n|proc|fuse.bulkhead|nodiratime|,){0,60}".prop_map(String::into_bytes),
        ]) {
            let _ = (has_ours(&table), has_only_ours(&table, 1), whole(&table, 1), shows_all(&table, Kind::Proc));
        }
    }
}
