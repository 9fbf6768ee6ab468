//! Files of `/proc` and `/sys` that act on the whole kernel.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

use crate::{
    attempt::{At, Blocked, Outcome, any},
    sys,
};

/// Nodes of `/proc/sys` that the kernel keeps for each namespace: a container may have its own.
const NAMESPACED: &[&str] = &[
    "fs/binfmt_misc",
    "fs/mqueue",
    "kernel/auto_msgmni",
    "kernel/domainname",
    "kernel/hostname",
    "kernel/msg",
    "kernel/ns_last_pid",
    "kernel/sem",
    "kernel/shm",
    "net",
    "user",
];

/// `f_type` of a FUSE file system (statfs(2)).
const FUSE: i64 = 0x6573_5546;

/// Entries of the table of connections, as the kernel has it.
const BUCKETS: &str = "/proc/sys/net/netfilter/nf_conntrack_buckets";

/// Longest value that is read.
const MAX_VALUE: u64 = 4096;

/// A file system of its own, without what was mounted over parts of the first one.
fn fresh(kind: &str) -> Result<PathBuf, Blocked> {
    let path = format!("/tmp/fresh-{kind}");
    sys::unshare(libc::CLONE_NEWNS).at("unshare mounts")?;
    let _ = fs::create_dir_all(&path);
    sys::mount("none", &path, kind, 0, "")?;
    Ok(path.into())
}

/// The mounted one and a fresh one, where that can be had.
fn both(mounted: &str, kind: &str) -> Vec<PathBuf> {
    let mut roots = vec![PathBuf::from(mounted)];
    roots.extend(fresh(kind));
    roots
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut value = Vec::new();
    File::open(path)?.take(MAX_VALUE).read_to_end(&mut value)?;
    Ok(value)
}

fn write(path: &Path, value: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    // One call: that is what a kernel file takes a value from.
    if file.write(value)? == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Writes a value and puts the old one back.
fn exchange(path: &Path, value: &[u8]) -> Outcome {
    let name = path.display().to_string();
    let before = read(path).at(&name)?;
    write(path, value).at(&name)?;
    let _ = write(path, &before);
    Ok(format!("{name} was changed"))
}

/// A program of the container's, to be run by the kernel when something crashes.
pub(crate) fn core_pattern() -> Outcome {
    any(both("/proc", "proc").iter().map(|root| exchange(&root.join("sys/kernel/core_pattern"), b"|/bin/true %p")))
}

/// The kernel's helper for modules and what it runs for hot-plugged devices.
pub(crate) fn usermode_helpers() -> Outcome {
    let nodes =
        ["sys/kernel/modprobe", "sys/kernel/hotplug", "sys/kernel/poweroff_cmd", "sys/kernel/usermodehelper/bset"];
    let mut ways = Vec::new();
    for root in both("/proc", "proc") {
        ways.extend(nodes.map(|node| exchange(&root.join(node), b"/bin/true")));
    }
    ways.push(exchange(Path::new("/sys/kernel/uevent_helper"), b"/bin/true"));
    any(ways)
}

/// Every file below `directory`, links not followed.
fn walk(directory: &Path, leave_out: &dyn Fn(&Path) -> bool, visit: &mut dyn FnMut(&Path)) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if leave_out(&path) || kind.is_symlink() {
            continue;
        }
        if kind.is_dir() {
            walk(&path, leave_out, visit);
        } else {
            visit(&path);
        }
    }
}

fn summary(found: &[PathBuf], tried: usize) -> Outcome {
    if tried == 0 {
        return Err(Blocked::Absent("there are no such files".into()));
    }
    if found.is_empty() {
        return Err(Blocked::Refused(format!("each of {tried} files")));
    }
    let some: Vec<_> = found.iter().take(8).map(|path| path.display().to_string()).collect();
    Ok(format!("{} of {tried} files: {}", found.len(), some.join(" ")))
}

/// Returns whether a file is the container's own, served in the place of the kernel's.
fn is_served(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|at| at.f_type == FUSE)
}

/// Writes another value to a file that is the container's own, and looks at the kernel's below it.
fn passes_to_the_kernel(path: &Path) -> bool {
    let Ok(before) = read(path) else { return false };
    let text = String::from_utf8_lossy(&before);
    let (first, rest) = text.trim_end().split_once(char::is_whitespace).unwrap_or((text.trim_end(), ""));
    let Ok(number) = first.parse::<i64>() else { return false };
    // Downwards: limits of the VM may be raised from a container, by design and up to a ceiling.
    let other = if number > 0 { number - 1 } else { number + 1 };
    let Ok(own) = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path) else { return false };
    if own.write_at(format!("{other} {rest}").trim_end().as_bytes(), 0).is_err() {
        return false;
    }
    let detached = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).map_err(io::Error::from);
    // The size of this table can be read by all under another name only.
    let below = if path.ends_with("nf_conntrack/parameters/hashsize") { Path::new(BUCKETS) } else { path };
    let kernel = detached.and_then(|()| read(below));
    // A procfs of one's own has the container's value as well, and is tried next.
    let _ = own.write_at(&before, 0);
    // A file that cannot be examined counts as the kernel's.
    !kernel.is_ok_and(|kernel| kernel == before)
}

/// Writes the value that is there already to each sysctl that no namespace has of its own.
pub(crate) fn sysctls() -> Outcome {
    let (mut found, mut tried) = (Vec::new(), 0);
    for root in both("/proc", "proc") {
        let root = root.join("sys");
        let leave_out = |path: &Path| {
            let name = path.strip_prefix(&root).unwrap_or(path).as_os_str().as_bytes();
            NAMESPACED.iter().any(|prefix| name.starts_with(prefix.as_bytes()))
        };
        walk(&root, &leave_out, &mut |path| {
            tried += 1;
            let written = match read(path) {
                _ if is_served(path) => {
                    passes_to_the_kernel(path).then_some(()).ok_or(io::ErrorKind::PermissionDenied.into())
                }
                Ok(value) if !value.is_empty() => write(path, &value),
                // A file that cannot be read is an action; opening it is enough.
                _ => File::options().write(true).open(path).map(drop),
            };
            if written.is_ok() {
                found.push(path.to_owned());
            }
        });
    }
    summary(&found, tried)
}

/// Files of sysfs that can be opened for writing, those of the container's own network left out.
pub(crate) fn sysfs() -> Outcome {
    let (mut found, mut tried) = (Vec::new(), 0);
    for root in both("/sys", "sysfs") {
        let groups = root.join("fs/cgroup");
        let leave_out = |path: &Path| {
            path == groups || path.components().any(|part| part.as_os_str() == "net") || path.ends_with("net")
        };
        walk(&root, &leave_out, &mut |path| {
            tried += 1;
            let opened = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).is_ok();
            if opened && (!is_served(path) || passes_to_the_kernel(path)) {
                found.push(path.to_owned());
            }
        });
    }
    summary(&found, tried)
}

/// Files of procfs, outside of the processes and the sysctls, that can be opened for writing.
pub(crate) fn procfs() -> Outcome {
    let (mut found, mut tried) = (Vec::new(), 0);
    for root in both("/proc", "proc") {
        let leave_out = |path: &Path| {
            let first = path.strip_prefix(&root).ok().and_then(|rest| rest.components().next());
            let name = first.map(|part| part.as_os_str().to_string_lossy().into_owned()).unwrap_or_default();
            // The kernel lets everybody watch the pressure, which is what these are opened for.
            name.bytes().all(|byte| byte.is_ascii_digit()) || matches!(name.as_str(), "sys" | "pressure")
        };
        walk(&root, &leave_out, &mut |path| {
            // The memory and the events of processes are among these names in `self` only, which is a link.
            if path.file_name().is_some_and(|name| name == "kmsg") {
                return;
            }
            // A null device over a file that is masked takes everything.
            let is_null = fs::metadata(path).is_ok_and(|file| {
                use std::os::unix::fs::MetadataExt;
                file.rdev() == 0x103
            });
            if is_null {
                return;
            }
            tried += 1;
            if File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).is_ok() {
                found.push(path.to_owned());
            }
        });
    }
    summary(&found, tried)
}

/// The kernel's memory, log and the addresses of its functions.
pub(crate) fn kernel_memory() -> Outcome {
    let mut ways = Vec::new();
    for root in both("/proc", "proc") {
        for name in ["kcore", "kmsg", "vmcore", "kpageflags"] {
            let path = root.join(name);
            ways.push(opened_for_reading(&path));
        }
    }
    any(ways)
}

fn opened_for_reading(path: &Path) -> Outcome {
    let name = path.display().to_string();
    let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).at(&name)?;
    let mut bytes = [0; 8];
    match file.read(&mut bytes) {
        Ok(0) => Err(Blocked::Absent(format!("{name} is empty"))),
        Ok(_) => Ok(format!("{name} was read")),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Ok(format!("{name} was opened, fd {}", file.as_raw_fd()))
        }
        Err(error) => Err(Blocked::at(&name, &error)),
    }
}

/// Addresses of kernel functions that are not hidden.
pub(crate) fn kernel_addresses() -> Outcome {
    let mut text = Vec::new();
    let file = File::open("/proc/kallsyms").at("/proc/kallsyms")?;
    // The first symbols are offsets, most of them 0.
    file.take(1 << 20).read_to_end(&mut text).at("/proc/kallsyms")?;
    let text = String::from_utf8_lossy(&text);
    let kernel = |line: &&str| line.starts_with("ffffffff");
    let shown = text.lines().find(kernel);
    shown.map(str::to_owned).ok_or_else(|| Blocked::Refused("all addresses are 0".into()))
}

/// A limit of the container's own control group, set by the engine.
pub(crate) fn cgroup_limits() -> Outcome {
    let mut ways = Vec::new();
    let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
    roots.extend(fresh("cgroup2"));
    for root in roots {
        for (node, value) in [("pids.max", "max"), ("memory.max", "max"), ("cpu.max", "max 100000")] {
            let path = root.join(node);
            let name = path.display().to_string();
            ways.push(write(&path, value.as_bytes()).at(&name).map(|()| format!("{name} was lifted")));
        }
        let above = root.join("../cgroup.procs");
        ways.push(write(&above, b"0").at("the group above").map(|()| "moved to the group above".to_owned()));
    }
    any(ways)
}

/// CVE-2022-0492: a version 1 hierarchy names a program that the kernel runs as root of the VM.
pub(crate) fn release_agent() -> Outcome {
    let flags = [0, libc::CLONE_NEWCGROUP, libc::CLONE_NEWUSER | libc::CLONE_NEWCGROUP];
    any(["none,name=escape", "memory", "rdma", "misc", "pids"].into_iter().flat_map(|options| {
        flags.map(|flags| {
            sys::unshare(libc::CLONE_NEWNS | flags).at("unshare")?;
            let _ = fs::create_dir_all("/tmp/group");
            sys::mount("none", "/tmp/group", "cgroup", 0, options)?;
            let written = exchange(Path::new("/tmp/group/release_agent"), b"/bin/true");
            let path = sys::c("/tmp/group")?;
            let _ = sys::call(libc::SYS_umount2, &[&&path, &libc::MNT_DETACH]);
            written
        })
    }))
}
