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

/// `struct file_handle` with room for the handles that are tried.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    id: [u32; 4],
}

impl Handle {
    /// `FILEID_INO32_GEN` of a file of ext4. Generation 0 stands for any (`ext4_nfs_get_inode`).
    fn ext4(inode: u32) -> Self {
        Self { bytes: 8, kind: 1, id: [inode, 0, 0, 0] }
    }

    /// `FILEID_KERNFS` of a file of cgroup2 or sysfs; its root is the first one.
    fn kernfs(number: u32) -> Self {
        Self { bytes: 8, kind: 0xfe, id: [number, 0, 0, 0] }
    }
}

/// Flags with which a handle is opened. Since Linux 6.11 root of a user namespace needs `CAP_DAC_READ_SEARCH` only
/// there, and not in the first one, for a directory: with `O_DIRECTORY` alone (`may_decode_fh`).
const HANDLE_FLAGS: [i32; 4] = [
    libc::O_RDONLY,
    libc::O_DIRECTORY,
    libc::O_DIRECTORY | libc::O_PATH,
    libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NOATIME,
];

/// A directory above or beside a mount, by its handle (the way of `shocker.c`).
pub(crate) fn file_handles() -> Outcome {
    let here = handles();
    if here.is_ok() {
        return here;
    }
    // The owner of a mount namespace may open the handles of directories in it. In a new one that is this process, also
    // in a container without privilege.
    let owner = sys::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS).at("unshare users and mounts");
    any([here, owner.and_then(|()| handles())])
}

fn handles() -> Outcome {
    // The first ones are on the disk with the VM's data.
    let on_disk = ["/vol", "/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/"].into_iter().flat_map(|path| {
        // Inode 2 is the root of an ext4 file system. A directory's parent was made right before it, mostly.
        let own = fs::metadata(path).map(|data| std::os::unix::fs::MetadataExt::ino(&data)).unwrap_or_default();
        let before = u32::try_from(own).map(|own| own.saturating_sub(16)..own).unwrap_or_default();
        std::iter::once(2).chain(before.rev()).map(move |inode| (path, Handle::ext4(inode)))
    });
    let of_kernel = ["/sys/fs/cgroup", "/sys"].into_iter().map(|path| (path, Handle::kernfs(1)));
    any(on_disk.chain(of_kernel).flat_map(|(path, handle)| HANDLE_FLAGS.map(|flags| by_handle(path, &handle, flags))))
}

/// Opens a handle by way of the mount at `path`. A place below `path` does not count.
fn by_handle(path: &str, handle: &Handle, flags: i32) -> Outcome {
    let at = File::options().read(true).open(path).at(path)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&at);
    let what = format!("open_by_handle_at from {path}");
    let opened = sys::open_call(libc::SYS_open_by_handle_at, &[&fd, &std::ptr::from_ref(handle), &flags]).at(&what)?;
    let place = fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened))).at(&what)?;
    if path != "/" && place.starts_with(path) {
        return Err(Blocked::Refused(format!("{what}: only what is below it")));
    }
    // A descriptor out there is enough, even if it cannot be read.
    let names = list(&opened).unwrap_or_else(|error| error.to_string());
    Ok(format!("a directory behind {path}: {names}"))
}

fn list(directory: &std::os::fd::OwnedFd) -> io::Result<String> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(directory));
    let names: Vec<_> =
        fs::read_dir(path)?.flatten().take(8).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    Ok(names.join(" "))
}
