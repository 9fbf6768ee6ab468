//! A mount of the container's from which something is taken away, and how to get it back.

use std::{fs, io::Write, os::fd::AsRawFd};

use crate::{
    attempt::{At, Blocked, Outcome},
    sys,
};

/// A way to try it; takes the mount point and what to get back, and says where it is to be had then.
pub(crate) type Way = (&'static str, fn(&str, u64) -> Result<String, Blocked>);

/// All ways, by mount(2) and by the new mount API, each also from an inner user namespace.
pub(crate) const WAYS: [Way; 10] = [
    ("remount", remount),
    ("remount of a bind", remount_bind),
    ("mount_setattr", set_attributes),
    ("recursive mount_setattr", set_attributes_of_all),
    ("mount_setattr of a clone", set_attributes_of_clone),
    ("mount_setattr of a recursive clone", set_attributes_of_clones),
    ("fsconfig", reconfigure),
    ("remount after chroot", remount_after_chroot),
    ("lazy unmount", unmount),
    ("move", move_away),
];

/// The restrictions of a mount by their names; mount(2), `mount_setattr(2)` and statvfs(3) have the same bit for each.
pub(crate) const FLAGS: [(&str, u64); 4] =
    [("ro", READ_ONLY), ("nosuid", libc::MS_NOSUID), ("nodev", libc::MS_NODEV), ("noexec", libc::MS_NOEXEC)];

const READ_ONLY: u64 = libc::MS_RDONLY;

/// Of the kind of what is tried.
const OTHER: &str = "/tmp/elsewhere";

const OTHER_ROOT: &str = "/tmp/root";

const RECURSIVE: u32 = 0x8000;

/// The mount flags of a path.
fn flags_of(path: &str) -> Result<u64, Blocked> {
    let name = sys::c(path)?;
    // SAFETY: all-zero bytes are a valid statvfs.
    let mut about: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: both point to live data of the right kinds.
    if unsafe { libc::statvfs(name.as_ptr(), &raw mut about) } < 0 {
        return Err(Blocked::at("statvfs", &std::io::Error::last_os_error()));
    }
    Ok(about.f_flag)
}

fn remount(path: &str, lift: u64) -> Result<String, Blocked> {
    // Every other restriction is kept: the kernel refuses to lift some of them, and that would hide the rest.
    let kept = flags_of(path)?;
    let renamed = [(1024, libc::MS_NOATIME), (2048, libc::MS_NODIRATIME), (4096, libc::MS_RELATIME)];
    let same = FLAGS.iter().fold(0, |all, (_, flag)| all | flag) & !lift;
    let flags = renamed.iter().filter(|(shown, _)| kept & shown != 0).fold(kept & same, |all, (_, flag)| all | flag);
    let bind = sys::mount("none", path, "", libc::MS_REMOUNT | libc::MS_BIND | flags, "");
    bind.or_else(|_| sys::mount("none", path, "", libc::MS_REMOUNT | flags, ""))?;
    Ok(path.to_owned())
}

fn remount_bind(path: &str, lift: u64) -> Result<String, Blocked> {
    sys::mount(path, OTHER, "", libc::MS_BIND | libc::MS_REC, "")?;
    remount(OTHER, lift)
}

/// `struct mount_attr` with a flag to be cleared.
fn without(lift: u64) -> [u64; 4] {
    [0, lift, 0, 0]
}

fn set_attributes(path: &str, lift: u64) -> Result<String, Blocked> {
    set_attributes_at(path, lift, 0)
}

fn set_attributes_of_all(path: &str, lift: u64) -> Result<String, Blocked> {
    set_attributes_at(path, lift, RECURSIVE)
}

fn set_attributes_at(path: &str, lift: u64, flags: u32) -> Result<String, Blocked> {
    let (name, attributes) = (sys::c(path)?, without(lift));
    let size = size_of_val(&attributes);
    sys::call(libc::SYS_mount_setattr, &[&libc::AT_FDCWD, &&name, &flags, &attributes.as_ptr(), &size])
        .at("mount_setattr")?;
    Ok(path.to_owned())
}

fn set_attributes_of_clone(path: &str, lift: u64) -> Result<String, Blocked> {
    set_attributes_cloned(path, lift, 0)
}

fn set_attributes_of_clones(path: &str, lift: u64) -> Result<String, Blocked> {
    set_attributes_cloned(path, lift, RECURSIVE)
}

fn set_attributes_cloned(path: &str, lift: u64, recursive: u32) -> Result<String, Blocked> {
    const CLONE: u32 = 1;
    const EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;
    const MOVE_EMPTY_PATH: u32 = 4;
    let (name, other, empty, attributes) = (sys::c(path)?, sys::c(OTHER)?, c"", without(lift));
    let (cloned, changed) = (CLONE | recursive, EMPTY_PATH | recursive);
    let tree = sys::open_call(libc::SYS_open_tree, &[&libc::AT_FDCWD, &&name, &cloned]).at("open_tree")?;
    let (fd, size) = (tree.as_raw_fd(), size_of_val(&attributes));
    sys::call(libc::SYS_mount_setattr, &[&fd, &empty, &changed, &attributes.as_ptr(), &size]).at("mount_setattr")?;
    sys::call(libc::SYS_move_mount, &[&fd, &empty, &libc::AT_FDCWD, &&other, &MOVE_EMPTY_PATH]).at("move_mount")?;
    Ok(OTHER.to_owned())
}

fn reconfigure(path: &str, lift: u64) -> Result<String, Blocked> {
    const SET_FLAG: u32 = 0;
    const RECONFIGURE: u32 = 7;
    if lift != READ_ONLY {
        return Err(Blocked::Absent("a file system has no such flag".into()));
    }
    let (name, flag) = (sys::c(path)?, c"rw");
    let context = sys::open_call(libc::SYS_fspick, &[&libc::AT_FDCWD, &&name, &0]).at("fspick")?;
    let fd = context.as_raw_fd();
    sys::call(libc::SYS_fsconfig, &[&fd, &SET_FLAG, &flag, &0, &0]).at("fsconfig rw")?;
    sys::call(libc::SYS_fsconfig, &[&fd, &RECONFIGURE, &0, &0, &0]).at("fsconfig reconfigure")?;
    Ok(path.to_owned())
}

fn remount_after_chroot(path: &str, lift: u64) -> Result<String, Blocked> {
    sys::mount("/", OTHER_ROOT, "", libc::MS_BIND | libc::MS_REC, "")?;
    let root = sys::c(OTHER_ROOT)?;
    sys::call(libc::SYS_chroot, &[&&root]).at("chroot")?;
    remount(path, lift)
}

/// The files below it are the container's own; the attempt is about writing to the volume.
fn unmount(path: &str, _: u64) -> Result<String, Blocked> {
    use std::os::unix::fs::MetadataExt;
    let name = sys::c(path)?;
    let before = fs::metadata(path).at(path)?;
    let held = fs::File::open(path).at(path)?;
    sys::call(libc::SYS_umount2, &[&&name, &libc::MNT_DETACH]).at("umount2")?;
    let after = fs::metadata(path).at(path)?;
    if (before.dev(), before.ino()) != (after.dev(), after.ino()) {
        // The unmounted tree, by a descriptor that was opened before.
        return Ok(format!("/proc/self/fd/{}", std::os::fd::IntoRawFd::into_raw_fd(held)));
    }
    Ok(path.to_owned())
}

fn move_away(path: &str, lift: u64) -> Result<String, Blocked> {
    sys::mount(path, OTHER, "", libc::MS_MOVE, "")?;
    remount(OTHER, lift)
}

/// Tries a way to get `lift` back, and uses it; with `inner`, from a user namespace inside.
pub(crate) fn take_back(path: &str, way: Way, lift: u64, inner: bool) -> Outcome {
    let Ok(about) = fs::metadata(path) else { return Err(Blocked::Absent(format!("there is no {path}"))) };
    let flags = if inner { libc::CLONE_NEWUSER } else { 0 };
    let ids = (inner, own_ids());
    sys::unshare(libc::CLONE_NEWNS | flags).at("unshare")?;
    if let (true, (user, group)) = ids {
        let _ = fs::write("/proc/self/setgroups", "deny");
        fs::write("/proc/self/uid_map", format!("0 {user} 1")).at("uid_map")?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1")).at("gid_map")?;
    }
    let propagation = libc::MS_REC | libc::MS_PRIVATE;
    let _ = sys::mount("none", "/", "", propagation, "");
    let _ = sys::mount("none", "/tmp", "tmpfs", 0, "");
    let _ = fs::create_dir_all(OTHER_ROOT);
    let _ = if about.is_dir() { fs::create_dir_all(OTHER) } else { fs::write(OTHER, "") };
    let place = (way.1)(path, lift)?;
    if lift == READ_ONLY {
        return write(&place, about.is_dir());
    }
    let left = flags_of(&place)?;
    if left & lift == 0 { Ok(format!("{place} is without it")) } else { Err(Blocked::Refused("it is kept".into())) }
}

fn write(place: &str, is_directory: bool) -> Outcome {
    let file = if is_directory { format!("{place}/escaped") } else { place.to_owned() };
    let make = || fs::OpenOptions::new().append(true).create(is_directory).open(&file)?.write_all(b"escaped");
    make().at(&format!("write {file}"))?;
    if is_directory {
        let _ = fs::remove_file(&file);
    }
    Ok(format!("wrote {file}"))
}

/// This process's user and group.
fn own_ids() -> (u32, u32) {
    // SAFETY: both calls take nothing and always succeed.
    unsafe { (libc::getuid(), libc::getgid()) }
}
