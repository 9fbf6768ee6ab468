//! The jail's root: the list of everything that dockerd and containerd find, made of copies of the VM's mounts.
//!
//! Copies are made before they have a place and get their attributes first, so nothing is ever there with more rights than
//! in the end. Mount points that the image does not have are in the jail's own `/run`.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use bulkhead_guest_common::mount as mounts;
use bulkhead_policy::sources::HOST_SERVICES;
use bulkhead_protocol::{ENGINE_SOCKET, PORTS_SOCKET, RUNTIME_SOCKET, RUNTIME_TREES};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{error::JailError, sys};
use crate::{cgroup, handover, notify, services};

/// The engine's directories of the data disk. They stay shared with the VM's: see the module.
pub(super) const ENGINE: [&str; 2] = ["/var/lib/docker", "/var/lib/containerd"];

/// The directory of volumes, in which containers write.
const VOLUMES: &str = "/var/lib/docker/volumes";

/// The place where the root is put together.
const ROOT: &str = "/run/bulkhead/jail";

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NO_DEVICES: u64 = libc::MOUNT_ATTR_NODEV;

/// Mounts of the VM, whether those below come along, and the attributes that are added to them.
///
/// `/proc/sys` is read-only but for the network: dockerd configures bridges and forwarding. `/sys` is read-only with the
/// cgroups: the runtime makes those of containers, outside of the jail.
const COPIES: [(&str, bool, u64); 10] = [
    // With what is mounted over the names of runtimes.
    ("/usr", true, READ_ONLY),
    // With the host's time zone, which is mounted over files.
    ("/etc", true, READ_ONLY),
    ("/var", false, READ_ONLY),
    ("/proc", false, 0),
    ("/proc/sys", false, READ_ONLY),
    ("/proc/sys/net", false, 0),
    ("/sys", false, READ_ONLY),
    ("/sys/fs/cgroup", false, READ_ONLY),
    // Names and numbers of all devices, for dockerd's list; none can be opened here.
    ("/dev", false, READ_ONLY | NO_DEVICES),
    ("/dev/pts", false, 0),
];

/// Devices that containers may have; each that the kernel has is mounted so that it can be opened.
pub(super) const DEVICES: [&str; 9] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx", "net/tun", "fuse"];

/// New file systems: a place and its options.
const NEW: [(&str, &str); 3] =
    [("/run", "mode=755,size=1m"), ("/tmp", "mode=1777"), ("/dev/shm", "mode=1777,size=64k")];

/// Directories in the VM's `/run` that the engine writes to.
const RUN_DIRECTORIES: [&str; 3] = ["/run/docker", "/run/containerd", services::ENGINE_DIRECTORY];

/// The one file of the cgroup of all containers that containerd's shims write: they enable the controllers of containers once more, and log an
/// error for each container if they cannot.
const CONTROLLERS: &str = "cgroup.subtree_control";

/// Sockets of init: the path in the VM and in the jail.
const SOCKETS: [(&str, &str); 3] =
    [(notify::SOCKET, notify::SOCKET), (PORTS_SOCKET, PORTS_SOCKET), (handover::SOCKET, RUNTIME_SOCKET)];

/// A file of iptables' own in the jail.
const LOCK: &str = "/run/xtables.lock";

/// The path in the jail while it is made.
fn inside(path: &str) -> PathBuf {
    Path::new(ROOT).join(path.trim_start_matches('/'))
}

fn failed<E: Into<io::Error>>(action: &'static str, path: &str) -> impl FnOnce(E) -> JailError {
    let path = path.to_owned();
    move |source| JailError::Root { action, path, source: source.into() }
}

/// Copies a mount and adds attributes to the copy.
fn copy(path: &str, recursive: bool, attributes: u64) -> Result<OwnedFd, JailError> {
    let tree = mounts::clone_tree_at(Path::new(path), recursive).map_err(failed("copy", path))?;
    if attributes != 0 {
        sys::set_attributes(&tree, attributes, 0).map_err(failed("restrict", path))?;
    }
    Ok(tree)
}

fn attach(tree: OwnedFd, path: &str) -> Result<(), JailError> {
    mounts::attach(tree, &inside(path)).map_err(failed("mount", path))
}

/// Shows a file as it is in the VM, if it is there.
fn show(path: &str) -> Result<(), JailError> {
    if Path::new(path).exists() { attach(copy(path, false, 0)?, path) } else { Ok(()) }
}

/// Makes the root and moves this process into it, in a mount namespace of its own. The host's directories are at `shares`
/// in the VM, if there are any.
pub(super) fn enter(shares: &str) -> Result<(), JailError> {
    sys::unshare_mounts().map_err(JailError::system("make a mount namespace"))?;
    // Before the VM's mounts are left alone below: these copies stay peers of the originals.
    let engine = ENGINE.map(|path| (path, copy(path, false, NO_DEVICES)));
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(failed("make private", "/"))?;

    DirBuilder::new().recursive(true).mode(0o700).create(ROOT).map_err(failed("create", ROOT))?;
    // The image alone, without what the VM has mounted on it.
    attach(copy("/", false, READ_ONLY)?, "/")?;
    for (path, recursive, attributes) in COPIES {
        attach(copy(path, recursive, attributes)?, path)?;
    }
    show(&format!("{}/{CONTROLLERS}", cgroup::CONTAINERS))?;
    for name in DEVICES {
        show(&format!("/dev/{name}"))?;
    }
    for (path, options) in NEW {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &inside(path), Some("tmpfs"), flags, Some(options)).map_err(failed("mount", path))?;
    }
    for (path, tree) in engine {
        attach(tree?, path)?;
    }
    mount_volumes()?;
    mount_shares(shares)?;
    fill_run()?;
    change_root()
}

/// Mounts the directory of volumes onto itself, so that the engine follows no link below.
fn mount_volumes() -> Result<(), JailError> {
    let path = inside(VOLUMES);
    // dockerd makes it with this mode.
    DirBuilder::new().recursive(true).mode(0o701).create(&path).map_err(failed("create", VOLUMES))?;
    let tree = mounts::clone_tree_at(&path, false).map_err(failed("copy", VOLUMES))?;
    // No peer of the mount below it, in which every volume's mount would appear a second time. It becomes shared when it
    // gets its place on a shared mount.
    sys::set_attributes(&tree, libc::MOUNT_ATTR_NOSYMFOLLOW | NO_DEVICES, libc::MS_PRIVATE)
        .map_err(failed("restrict", VOLUMES))?;
    attach(tree, VOLUMES)
}

/// Mounts the shares, if there are any, so that the engine follows no link in them.
fn mount_shares(path: &str) -> Result<(), JailError> {
    if !mounts::is_mount_point(Path::new(path)) {
        return Ok(());
    }
    let tree = copy(path, false, 0)?;
    // Shared, because the engine refuses to bind with `rslave` or `rshared` what is not; no peer of the VM's mount.
    let attributes = libc::MOUNT_ATTR_NOSYMFOLLOW | NO_DEVICES | libc::MOUNT_ATTR_NOSUID;
    sys::set_attributes(&tree, attributes, libc::MS_SHARED).map_err(failed("restrict", path))?;
    attach(tree, path)
}

fn directory(path: &str, mode: u32) -> Result<(), JailError> {
    let place = inside(path);
    fs::create_dir_all(&place)
        .and_then(|()| fs::set_permissions(&place, fs::Permissions::from_mode(mode)))
        .map_err(failed("create", path))
}

fn file(path: &str) -> Result<(), JailError> {
    File::create(inside(path)).map(drop).map_err(failed("create", path))
}

/// Fills the jail's `/run` and makes it read-only: the engine can neither add to it nor take the place of what the
/// runtime looks for there.
fn fill_run() -> Result<(), JailError> {
    directory("/run/bulkhead", 0o700)?;
    for path in RUN_DIRECTORIES {
        directory(path, 0o711)?;
        attach(copy(path, false, 0)?, path)?;
    }
    directory(services::CONFIGURATION_DIRECTORY, 0o700)?;
    attach(copy(services::CONFIGURATION_DIRECTORY, false, READ_ONLY)?, services::CONFIGURATION_DIRECTORY)?;
    directory(HOST_SERVICES, 0o755)?;
    attach(copy(HOST_SERVICES, false, READ_ONLY | NO_DEVICES)?, HOST_SERVICES)?;
    for (from, to) in SOCKETS {
        file(to)?;
        attach(copy(from, false, 0)?, to)?;
    }
    // Mount points for the runtime. Those on procfs and sysfs are there.
    for path in RUNTIME_TREES.iter().filter(|path| path.starts_with("/run/")) {
        directory(path, 0o700)?;
    }
    // The name that clients bind; the runtime puts the container's own socket there.
    file(ENGINE_SOCKET)?;
    // Mounted onto itself, it stays writable.
    file(LOCK)?;
    let lock = mounts::clone_tree_at(&inside(LOCK), false).map_err(failed("copy", LOCK))?;
    attach(lock, LOCK)?;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(None::<&str>, &inside("/run"), None::<&str>, flags, None::<&str>).map_err(failed("make read-only", "/run"))
}

/// Makes the new root this process's root, and the old one unreachable.
fn change_root() -> Result<(), JailError> {
    let step = || -> nix::Result<()> {
        nix::unistd::chdir(ROOT)?;
        // Both names at one place: the old root is then on top of the new one, and goes (pivot_root(2)).
        nix::unistd::pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        nix::unistd::chdir("/")
    };
    step().map_err(JailError::system("change the root directory"))
}
