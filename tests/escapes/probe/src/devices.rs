//! Devices of the VM: disks, consoles, memory.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
};

use crate::{
    attempt::{At, Blocked, Outcome, any},
    sys,
};

fn number(major: u64, minor: u64) -> u64 {
    libc::makedev(major as u32, minor as u32)
}

/// Makes a device node and opens it.
fn node(kind: u32, major: u64, minor: u64) -> Result<File, Blocked> {
    let path = format!("/tmp/device-{kind:x}-{major}-{minor}");
    let _ = fs::remove_file(&path);
    let name = sys::c(&path)?;
    let made = sys::call(libc::SYS_mknodat, &[&libc::AT_FDCWD, &&name, &(kind | 0o600), &number(major, minor)]);
    made.at(&format!("mknod {major}:{minor}"))?;
    open(&path)
}

fn open(path: &str) -> Result<File, Blocked> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path);
    file.at(&format!("open {path}"))
}

/// Block devices as the kernel lists them, to everybody: major, minor, name.
fn disks() -> Vec<(u64, u64, String)> {
    let table = fs::read_to_string("/proc/partitions").unwrap_or_default();
    let parse = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        Some((words.first()?.parse().ok()?, words.get(1)?.parse().ok()?, (*words.get(3)?).to_owned()))
    };
    table.lines().filter_map(parse).collect()
}

fn read_sector(disk: Result<File, Blocked>, name: &str) -> Outcome {
    let mut sector = [0; 4096];
    disk?.read_exact(&mut sector).at(&format!("read {name}"))?;
    Ok(format!("read a block of {name}"))
}

/// The VM's disks, by a node of our own and by the VM's.
pub(crate) fn block_devices() -> Outcome {
    let disks = disks();
    any(disks.iter().flat_map(|(major, minor, name)| {
        [
            read_sector(node(libc::S_IFBLK, *major, *minor), name),
            read_sector(open(&format!("/dev/{name}")), &format!("/dev/{name}")),
        ]
    }))
}

/// The file systems on the VM's disks.
pub(crate) fn mount_disks() -> Outcome {
    sys::unshare(libc::CLONE_NEWNS).at("unshare mounts")?;
    let _ = fs::create_dir_all("/tmp/disk");
    let disks = disks();
    any(disks.iter().flat_map(|(major, minor, name)| {
        let made =
            node(libc::S_IFBLK, *major, *minor).map(|_| format!("/tmp/device-{:x}-{major}-{minor}", libc::S_IFBLK));
        let sources = [made.unwrap_or_else(|_| format!("/dev/{name}")), format!("/dev/{name}")];
        sources.map(|source| {
            any(["ext4", "erofs"].map(|kind| {
                sys::mount(&source, "/tmp/disk", kind, libc::MS_RDONLY, "").map(|()| format!("mounted {source}"))
            }))
        })
    }))
}

/// Memory, ports and registers of the machine, and its log.
pub(crate) fn machine() -> Outcome {
    const NODES: [(u64, u64, &str); 8] = [
        (1, 1, "mem"),
        (1, 2, "kmem"),
        (1, 4, "port"),
        (1, 11, "kmsg"),
        (202, 0, "cpu/0/msr"),
        (10, 232, "kvm"),
        (10, 237, "loop-control"),
        (10, 236, "mapper/control"),
    ];
    any(NODES.into_iter().flat_map(|(major, minor, name)| {
        let masked = |file: File| -> Outcome {
            use std::os::unix::fs::MetadataExt;
            let is = file.metadata().at(name)?.rdev();
            if is == number(major, minor) {
                Ok(format!("opened {name}"))
            } else {
                Err(Blocked::Refused(format!("{name} is masked")))
            }
        };
        [node(libc::S_IFCHR, major, minor).and_then(masked), open(&format!("/dev/{name}")).and_then(masked)]
    }))
}

/// The VM's own consoles.
pub(crate) fn consoles() -> Outcome {
    any([(229, 0), (5, 1), (4, 64)]
        .into_iter()
        .map(|(major, minor)| node(libc::S_IFCHR, major, minor).map(|_| format!("opened the console {major}:{minor}"))))
}

/// A file system of all devices, or one that shows the kernel's insides.
pub(crate) fn file_systems() -> Outcome {
    sys::unshare(libc::CLONE_NEWNS).at("unshare mounts")?;
    let _ = fs::create_dir_all("/tmp/other");
    any(["devtmpfs", "debugfs", "tracefs", "securityfs", "pstore", "configfs", "efivarfs", "nsfs"]
        .map(|kind| sys::mount("none", "/tmp/other", kind, 0, "").map(|()| format!("mounted {kind}"))))
}

/// A file of another mount, by its handle (the way of `shocker.c`): the root of the disk that the bind mounts are from.
pub(crate) fn file_handles() -> Outcome {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        id: [u32; 4],
    }
    any(["/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/vol", "/"].map(|path| {
        let at = File::options().read(true).open(path).at(path)?;
        // FILEID_INO32_GEN of inode 2, which is the root of an ext4 file system.
        let handle = Handle { bytes: 8, kind: 1, id: [2, 0, 0, 0] };
        let fd = std::os::fd::AsRawFd::as_raw_fd(&at);
        let opened = sys::open_call(libc::SYS_open_by_handle_at, &[&fd, &&raw const handle, &libc::O_RDONLY]);
        let root = opened.at(&format!("open_by_handle_at from {path}"))?;
        let names = list(&root).at("list")?;
        Ok(format!("the disk behind {path}: {names}"))
    }))
}

fn list(directory: &std::os::fd::OwnedFd) -> io::Result<String> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(directory));
    let names: Vec<_> =
        fs::read_dir(path)?.flatten().take(8).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    Ok(names.join(" "))
}
