//! A read-only mount of the container's, made writable.

use std::{fs, os::fd::AsRawFd};

use crate::{
    attempt::{At, Blocked, Outcome},
    sys,
};

/// A way to try it; takes the mount point and says where it is writable then.
pub(crate) type Way = (&'static str, fn(&str) -> Result<String, Blocked>);

/// All ways, by mount(2) and by the new mount API, each also from an inner user namespace.
pub(crate) const WAYS: [Way; 8] = [
    ("remount", remount),
    ("remount of a bind", remount_bind),
    ("mount_setattr", set_attributes),
    ("mount_setattr of a clone", set_attributes_of_clone),
    ("fsconfig", reconfigure),
    ("remount after chroot", remount_after_chroot),
    ("lazy unmount", unmount),
    ("move", move_away),
];

const OTHER: &str = "/tmp/elsewhere";

/// `struct mount_attr` with the read-only flag to be cleared.
const WRITABLE: [u64; 4] = [0, libc::MOUNT_ATTR_RDONLY, 0, 0];

fn remount(path: &str) -> Result<String, Blocked> {
    // Every other restriction is kept: the kernel refuses to lift some of them, and that would hide the rest.
    let name = sys::c(path)?;
    // SAFETY: all-zero bytes are a valid statvfs.
    let mut about: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: both point to live data of the right kinds.
    if unsafe { libc::statvfs(name.as_ptr(), &raw mut about) } < 0 {
        return Err(Blocked::at("statvfs", &std::io::Error::last_os_error()));
    }
    let kept = about.f_flag;
    let renamed = [(1024, libc::MS_NOATIME), (2048, libc::MS_NODIRATIME), (4096, libc::MS_RELATIME)];
    let flags =
        renamed.iter().filter(|(shown, _)| kept & shown != 0).fold(kept & (2 | 4 | 8), |all, (_, flag)| all | flag);
    let bind = sys::mount("none", path, "", libc::MS_REMOUNT | libc::MS_BIND | flags, "");
    bind.or_else(|_| sys::mount("none", path, "", libc::MS_REMOUNT | flags, ""))?;
    Ok(path.to_owned())
}

fn remount_bind(path: &str) -> Result<String, Blocked> {
    sys::mount(path, OTHER, "", libc::MS_BIND | libc::MS_REC, "")?;
    remount(OTHER)
}

fn set_attributes(path: &str) -> Result<String, Blocked> {
    let name = sys::c(path)?;
    let size = size_of_val(&WRITABLE);
    sys::call(libc::SYS_mount_setattr, &[&libc::AT_FDCWD, &&name, &0, &WRITABLE.as_ptr(), &size])
        .at("mount_setattr")?;
    Ok(path.to_owned())
}

fn set_attributes_of_clone(path: &str) -> Result<String, Blocked> {
    const CLONE: u32 = 1;
    const EMPTY_PATH: i32 = libc::AT_EMPTY_PATH;
    const MOVE_EMPTY_PATH: u32 = 4;
    let (name, other, empty) = (sys::c(path)?, sys::c(OTHER)?, c"");
    let tree = sys::open_call(libc::SYS_open_tree, &[&libc::AT_FDCWD, &&name, &CLONE]).at("open_tree")?;
    let (fd, size) = (tree.as_raw_fd(), size_of_val(&WRITABLE));
    sys::call(libc::SYS_mount_setattr, &[&fd, &empty, &EMPTY_PATH, &WRITABLE.as_ptr(), &size]).at("mount_setattr")?;
    sys::call(libc::SYS_move_mount, &[&fd, &empty, &libc::AT_FDCWD, &&other, &MOVE_EMPTY_PATH]).at("move_mount")?;
    Ok(OTHER.to_owned())
}

fn reconfigure(path: &str) -> Result<String, Blocked> {
    const SET_FLAG: u32 = 0;
    const RECONFIGURE: u32 = 7;
    let (name, flag) = (sys::c(path)?, c"rw");
    let context = sys::open_call(libc::SYS_fspick, &[&libc::AT_FDCWD, &&name, &0]).at("fspick")?;
    let fd = context.as_raw_fd();
    sys::call(libc::SYS_fsconfig, &[&fd, &SET_FLAG, &flag, &0, &0]).at("fsconfig rw")?;
    sys::call(libc::SYS_fsconfig, &[&fd, &RECONFIGURE, &0, &0, &0]).at("fsconfig reconfigure")?;
    Ok(path.to_owned())
}

fn remount_after_chroot(path: &str) -> Result<String, Blocked> {
    sys::mount("/", OTHER, "", libc::MS_BIND | libc::MS_REC, "")?;
    let root = sys::c(OTHER)?;
    sys::call(libc::SYS_chroot, &[&&root]).at("chroot")?;
    remount(path)
}

/// What is under it is the container's own; what matters is that it is the volume that can't be written.
fn unmount(path: &str) -> Result<String, Blocked> {
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

fn move_away(path: &str) -> Result<String, Blocked> {
    sys::mount(path, OTHER, "", libc::MS_MOVE, "")?;
    remount(OTHER)
}

/// Tries a way and writes to the mount; with `inner`, from a user namespace inside.
pub(crate) fn write(path: &str, way: fn(&str) -> Result<String, Blocked>, inner: bool) -> Outcome {
    if fs::metadata(path).is_err() {
        return Err(Blocked::Absent(format!("there is no {path}")));
    }
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
    let _ = fs::create_dir_all(OTHER);
    let place = way(path)?;
    let file = format!("{place}/escaped");
    fs::write(&file, "x").at(&format!("write {file}"))?;
    let _ = fs::remove_file(&file);
    Ok(format!("wrote {file}"))
}

/// This process's user and group.
fn own_ids() -> (u32, u32) {
    // SAFETY: both calls take nothing and always succeed.
    unsafe { (libc::getuid(), libc::getgid()) }
}
