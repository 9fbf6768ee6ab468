//! The guest's file systems, except for the data disk.
//!
//! The root is a read-only EROFS. Everything writable is either a tmpfs, and new at each start, or on the data disk.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use bulkhead_policy::shares::MOUNT_POINT;
use bulkhead_protocol::SHARES_TAG;
use nix::mount::{MsFlags, mount};

use crate::error::Error;

/// Directory of the sockets and files that init, the gate, the runtime and dockerd share, closed to everything else
/// (mode 0700).
pub(crate) const PRIVATE_DIRECTORY: &str = "/run/bulkhead";

/// A line of an fstab.
struct Entry {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const fn entry(kind: &'static str, target: &'static str, flags: MsFlags, data: Option<&'static str>) -> Entry {
    Entry { kind, target, flags, data }
}

/// Flags for file systems that have no reason to hold programs or devices.
const RESTRICTED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NOSUID: MsFlags = MsFlags::MS_NOSUID;

/// File systems that are mounted after `/proc` and `/dev`, in this order.
const MOUNTS: [Entry; 7] = [
    entry("sysfs", "/sys", RESTRICTED, None),
    // nsdelegate: a cgroup namespace is a boundary for delegation, so a container cannot change the limits at its root.
    // memory_recursiveprot: memory.min and memory.low of a group protect its whole subtree (cgroup-v2.rst).
    entry("cgroup2", "/sys/fs/cgroup", RESTRICTED, Some("nsdelegate,memory_recursiveprot")),
    // gid 5 is `tty`: terminals can be written to by that group only.
    entry("devpts", "/dev/pts", NOSUID.union(MsFlags::MS_NOEXEC), Some("gid=5,mode=620,ptmxmode=666")),
    entry("tmpfs", "/dev/shm", NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
    entry("mqueue", "/dev/mqueue", RESTRICTED, None),
    entry("tmpfs", "/run", NOSUID.union(MsFlags::MS_NODEV), Some("mode=755")),
    entry("tmpfs", "/tmp", NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
];

/// Trees of the read-only root that the engine writes to; changes last until the next start.
const WRITABLE_TREES: [&str; 2] = ["/etc", "/var"];

fn mount_one(entry: &Entry) -> Result<(), Error> {
    let source = Some(entry.kind);
    mount(source, entry.target, source, entry.flags, entry.data).map_err(|errno| Error::Mount {
        what: entry.kind.to_owned(),
        target: entry.target.into(),
        source: errno.into(),
    })
}

/// Mounts `/proc`, and `/dev` unless the kernel has (`CONFIG_DEVTMPFS_MOUNT`): enough for logging.
pub(crate) fn early() -> Result<(), Error> {
    mount_one(&entry("proc", "/proc", RESTRICTED, None))?;
    if !Path::new("/dev/kmsg").exists() {
        mount_one(&entry("devtmpfs", "/dev", NOSUID, Some("mode=755")))?;
    }
    Ok(())
}

/// Mounts everything else but the data disk.
pub(crate) fn rest() -> Result<(), Error> {
    for entry in &MOUNTS {
        // devtmpfs lacks these directories; all others are part of the root file system.
        if entry.target.starts_with("/dev/") {
            make_directory(entry.target, 0o755)?;
        }
        mount_one(entry)?;
    }
    // Links that programs expect in /dev, and devtmpfs does not make.
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let link = Path::new("/dev").join(link);
        if !link.exists() {
            symlink(target, &link).map_err(Error::file("create", link))?;
        }
    }
    // Before the overlays, whose upper layers are in it.
    make_directory(PRIVATE_DIRECTORY, 0o700)?;
    for tree in WRITABLE_TREES {
        overlay(tree)?;
    }
    // Containers can ask for shared or slave propagation, for which the VM's mounts have to be shared; the kernel
    // starts with a private root.
    propagation("/", MsFlags::MS_SHARED | MsFlags::MS_REC)
}

/// Mounts the file system of the host's directories. The root file system has its mount point.
pub(crate) fn shares() -> Result<(), Error> {
    // Programs of the host may be executed; a device node there is a file of the host's user.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some(SHARES_TAG), MOUNT_POINT, Some("virtiofs"), flags, None::<&str>).map_err(|errno| Error::Mount {
        what: "the host's directories".to_owned(),
        target: MOUNT_POINT.into(),
        source: errno.into(),
    })
}

/// Mounts a tmpfs on a directory, lets `fill` put something into it, and makes it read-only as a whole: of a mount that
/// is, root of a container could have another one that is not.
pub(crate) fn sealed<T>(
    what: &str,
    path: &str,
    options: &str,
    fill: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    mount(Some(what), path, Some("tmpfs"), RESTRICTED, Some(options)).map_err(Error::file("mount", path))?;
    let filled = fill()?;
    let flags = RESTRICTED | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>).map_err(Error::file("make read-only", path))?;
    Ok(filled)
}

/// Creates a directory with this mode, and its parents with the default mode.
pub(crate) fn make_directory(path: impl AsRef<Path>, mode: u32) -> Result<(), Error> {
    let path = path.as_ref();
    fs::create_dir_all(path).map_err(Error::file("create the directory", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::file("set the mode of", path))
}

/// Changes the propagation or the flags of the mount at `path`.
pub(crate) fn propagation(path: &str, flags: MsFlags) -> Result<(), Error> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
        .map_err(Error::file("set the mount propagation of", path))
}

/// Makes the mount at `path` read-only; its file system stays writable through other mounts.
pub(crate) fn make_read_only(path: &str) -> Result<(), Error> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>).map_err(Error::file("make read-only", path))
}

/// Mounts an overlay over `tree`, a directory of the read-only root, with its changes on the tmpfs of `/run`.
pub(crate) fn overlay(tree: &str) -> Result<(), Error> {
    // overlayfs needs upper and work directory in one file system, and the work directory empty.
    let layers = format!("{PRIVATE_DIRECTORY}/overlay{tree}");
    make_directory(format!("{layers}/upper"), 0o755)?;
    make_directory(format!("{layers}/work"), 0o700)?;
    let options = format!("lowerdir={tree},upperdir={layers}/upper,workdir={layers}/work");
    mount(Some("overlay"), tree, Some("overlay"), MsFlags::empty(), Some(options.as_str())).map_err(|errno| {
        Error::Mount { what: "a writable overlay".to_owned(), target: tree.into(), source: errno.into() }
    })
}

/// Bind-mounts `source` over `target`, which must exist.
pub(crate) fn bind(source: &Path, target: &Path) -> Result<(), Error> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|errno| Error::Mount {
        what: source.display().to_string(),
        target: target.into(),
        source: errno.into(),
    })
}
