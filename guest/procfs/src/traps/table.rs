//! The table of mounts of a process (proc_pid_mountinfo(5)), as far as unmounts and binds need it.

use super::call::Kind;

/// The type of the warden's own file system in the table.
const OURS: &[u8] = b"fuse.bulkhead";

/// The option that files in a mount which a container made have, and those in its first procfs and sysfs have not. It
/// means nothing for a file, and copies of the mount keep it.
const MARK: &[u8] = b"nodiratime";

/// A mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line<'a> {
    id: u64,
    parent: u64,
    root: &'a [u8],
    options: &'a [u8],
    kind: &'a [u8],
}

impl<'a> Line<'a> {
    fn read(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = number(fields.next()?)?;
        let parent = number(fields.next()?)?;
        let root = fields.nth(1)?;
        let options = fields.nth(1)?;
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some(Self { id, parent, root, options, kind })
    }

    fn is_ours(&self) -> bool {
        self.kind == OURS && self.options.split(|byte| *byte == b',').any(|option| option == MARK)
    }
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn lines(table: &[u8]) -> impl Iterator<Item = Line<'_>> {
    table.split(|byte| *byte == b'\n').filter_map(Line::read)
}

/// Whether there is any file of the warden in a mount that a container made.
pub(crate) fn has_ours(table: &[u8]) -> bool {
    lines(table).any(|line| line.is_ours())
}

/// Whether a mount is a procfs or sysfs and files of the warden, which carry nothing themselves, are all that is mounted
/// on it.
pub(crate) fn has_only_ours(table: &[u8], id: u64) -> bool {
    let mut is_right_kind = false;
    let mut on_it = Vec::new();
    for line in lines(table) {
        if line.id == id {
            is_right_kind = line.kind == b"proc" || line.kind == b"sysfs";
        } else if line.parent == id {
            if !line.is_ours() {
                return false;
            }
            on_it.push(line.id);
        }
    }
    on_it.sort_unstable();
    let carries = |line: &Line<'_>| on_it.binary_search(&line.parent).is_ok();
    is_right_kind && !on_it.is_empty() && !lines(table).any(|line| carries(&line))
}

/// File systems whose places in procfs and sysfs are folders that the kernel keeps empty for them.
const ON_EMPTY_FOLDERS: &[&[u8]] = &[
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

/// Whether there is a procfs or sysfs of which files of the warden, at most, are hidden.
///
/// The kernel lets a new user namespace mount one only if it sees a whole one already, and the warden's files hide
/// something.
pub(crate) fn shows_all(table: &[u8], kind: Kind) -> bool {
    let hides = |line: &Line<'_>| line.kind != OURS && !ON_EMPTY_FOLDERS.contains(&line.kind);
    let is_whole = |line: &Line<'_>| {
        line.kind == kind.name().as_bytes()
            && line.root == b"/"
            && line.options.split(|byte| *byte == b',').next() == Some(b"rw")
    };
    lines(table).filter(is_whole).any(|whole| !lines(table).any(|line| line.parent == whole.id && hides(&line)))
}

/// What a mount is, if it is the whole of a procfs or sysfs.
pub(crate) fn whole(table: &[u8], id: u64) -> Option<Kind> {
    let line = lines(table).find(|line| line.id == id && line.root == b"/")?;
    [Kind::Proc, Kind::Sys].into_iter().find(|kind| kind.name().as_bytes() == line.kind)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TABLE: &[u8] = b"\
        22 1 0:20 / / rw - overlay overlay rw\n\
        23 22 0:21 / /proc rw,nosuid shared:4 - proc proc rw\n\
        24 23 0:22 /1/proc+uptime /proc/uptime rw,nosuid - fuse.bulkhead warden rw\n\
        30 22 0:23 / /p rw,relatime - proc proc rw\n\
        31 30 0:22 /1/proc+uptime /p/uptime rw,nodiratime,relatime - fuse.bulkhead warden rw\n\
        32 30 0:22 /1/proc+meminfo /p/meminfo rw,nodiratime,relatime master:3 - fuse.bulkhead warden rw\n\
        40 22 0:24 / /q rw - proc proc rw\n\
        41 40 0:22 /1/proc+uptime /q/uptime rw,nodiratime - fuse.bulkhead warden rw\n\
        42 40 0:25 / /q/bus rw - tmpfs tmpfs rw\n\
        50 22 0:26 / /r rw - proc proc rw\n\
        51 50 0:22 /1/proc+uptime /r/uptime rw,nodiratime - fuse.bulkhead warden rw\n\
        52 51 0:27 / /r/uptime rw - ext4 /dev/x rw\n\
        60 22 0:28 / /s rw - tmpfs tmpfs rw\n\
        61 60 0:22 /1/proc+uptime /s/x rw,nodiratime - fuse.bulkhead warden rw\n\
        70 22 0:29 / /t rw - proc proc rw\n";

    #[test]
    fn only_what_the_container_mounted_and_left_alone_is_undone() {
        assert!(has_only_ours(TABLE, 30));
        // The first procfs, one with something else on it, one with something on ours, not a procfs, nothing on it, none.
        for other in [23, 40, 50, 60, 70, 99] {
            assert!(!has_only_ours(TABLE, other), "{other}");
        }
    }

    #[test]
    fn a_procfs_that_something_else_is_mounted_on_hides_it() {
        let proc = "9 1 0:1 / /proc rw,nosuid - proc proc rw\n11 9 0:3 /1/proc+uptime /proc/uptime rw - fuse.bulkhead warden rw\n\
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
