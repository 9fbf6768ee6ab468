//! The guest's file systems, apart from the data disk.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use nix::mount::{MsFlags, mount};

use crate::error::Error;

/// Directory for everything that only init, the gate and dockerd share; mode 0700.
pub(crate) const PRIVATE_DIRECTORY: &str = "/run/bulkhead";

struct Entry {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const fn entry(kind: &'static str, target: &'static str, flags: MsFlags, data: Option<&'static str>) -> Entry {
    Entry { kind, target, flags, data }
}

const RESTRICTED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NOSUID: MsFlags = MsFlags::MS_NOSUID;

/// In this order, after `/proc` and `/dev`.
const MOUNTS: [Entry; 7] = [
    entry("sysfs", "/sys", RESTRICTED, None),
    entry("cgroup2", "/sys/fs/cgroup", RESTRICTED, Some("nsdelegate,memory_recursiveprot")),
    entry("devpts", "/dev/pts", NOSUID.union(MsFlags::MS_NOEXEC), Some("gid=5,mode=620,ptmxmode=666")),
    entry("tmpfs", "/dev/shm", NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
    entry("mqueue", "/dev/mqueue", RESTRICTED, None),
    entry("tmpfs", "/run", NOSUID.union(MsFlags::MS_NODEV), Some("mode=755")),
    entry("tmpfs", "/tmp", NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
];

/// Trees of the read-only root that must be writable until the next start.
const WRITABLE_TREES: [&str; 2] = ["/etc", "/var"];

fn mount_one(entry: &Entry) -> Result<(), Error> {
    let source = Some(entry.kind);
    mount(source, entry.target, source, entry.flags, entry.data).map_err(|errno| Error::Mount {
        what: entry.kind.to_owned(),
        target: entry.target.into(),
        source: errno.into(),
    })
}

/// Mounts `/proc`, and `/dev` if the kernel has not; enough to log.
pub(crate) fn early() -> Result<(), Error> {
    mount_one(&entry("proc", "/proc", RESTRICTED, None))?;
    if !Path::new("/dev/kmsg").exists() {
        mount_one(&entry("devtmpfs", "/dev", NOSUID, Some("mode=755")))?;
    }
    Ok(())
}

/// Mounts the rest.
pub(crate) fn rest() -> Result<(), Error> {
    for entry in &MOUNTS {
        // devtmpfs comes without these.
        if entry.target.starts_with("/dev/") {
            make_directory(entry.target, 0o755)?;
        }
        mount_one(entry)?;
    }
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let link = Path::new("/dev").join(link);
        if !link.exists() {
            symlink(target, &link).map_err(Error::file("make", link))?;
        }
    }
    make_directory(PRIVATE_DIRECTORY, 0o700)?;
    for tree in WRITABLE_TREES {
        overlay(tree)?;
    }
    // Containers may ask for shared or slave propagation, which a private root can't give.
    propagation("/", MsFlags::MS_SHARED | MsFlags::MS_REC)
}

/// Makes `path` (and its parents) a directory with this mode.
pub(crate) fn make_directory(path: impl AsRef<Path>, mode: u32) -> Result<(), Error> {
    let path = path.as_ref();
    fs::create_dir_all(path).map_err(Error::file("make the directory", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::file("set the mode of", path))
}

/// Sets the propagation of the mount at `path`.
pub(crate) fn propagation(path: &str, flags: MsFlags) -> Result<(), Error> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
        .map_err(Error::file("set the mount propagation of", path))
}

/// Lays a tmpfs-backed overlay over `tree`, a directory of the read-only root.
pub(crate) fn overlay(tree: &str) -> Result<(), Error> {
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
