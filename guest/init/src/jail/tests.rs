//! The jail on a copy of this machine's mounts, in a process of its own: what is there, and what can be reached.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::Path,
    process::Command,
};

use bulkhead_policy::sources::{HOST_SERVICES, SSH_AGENT, TIME_ZONE_FILES};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::kill,
    unistd::Pid,
};

use super::{confine, root, sys};
use crate::{handover, notify, services};

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn names(directory: &str) -> BTreeSet<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn tmpfs(path: &str) {
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

/// The place of the host's directories. `/host_mnt` is on the VM's image, and this one everywhere.
const SHARES: &str = "/mnt";

/// Gives this process a mount namespace with the directories and sockets of the VM.
fn imitate_vm() {
    sys::unshare_mounts().unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
    for path in ["/etc", "/run", "/var", SHARES] {
        tmpfs(path);
    }
    fs::write("/etc/passwd", "").unwrap();
    // The first of them is a mount, as where the host has a time zone; the other is a file of the image.
    let [zone, name] = TIME_ZONE_FILES;
    fs::write(name, "of the image").unwrap();
    fs::write(zone, "").unwrap();
    fs::write("/run/zone", "of the host").unwrap();
    mount(Some("/run/zone"), zone, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    for path in root::ENGINE {
        fs::create_dir_all(path).unwrap();
        tmpfs(path);
        mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    }
    for path in [
        "/run/docker",
        "/run/containerd",
        "/run/crun",
        "/run/sysbox-runc",
        services::ENGINE_DIRECTORY,
        services::CONFIGURATION_DIRECTORY,
    ] {
        fs::create_dir_all(path).unwrap();
    }
    for path in [notify::SOCKET, bulkhead_protocol::PORTS_SOCKET, handover::SOCKET] {
        // The sockets' files are enough: nothing is sent.
        drop(UnixDatagram::bind(path).unwrap());
    }
    fs::create_dir(HOST_SERVICES).unwrap();
    tmpfs(HOST_SERVICES);
    let listener = UnixListener::bind(SSH_AGENT).unwrap();
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, HOST_SERVICES, None::<&str>, flags, None::<&str>).unwrap();
    std::thread::spawn(move || listener.accept());
    fs::write("/run/bulkhead/secret", "").unwrap();
    fs::write(format!("{}/daemon.json", services::CONFIGURATION_DIRECTORY), "{}").unwrap();
    fs::create_dir_all("/var/lib/docker/volumes/v/_data").unwrap();
    std::os::unix::fs::symlink("/etc", "/var/lib/docker/volumes/v/_data/link").unwrap();
    std::os::unix::fs::symlink("/etc", "/var/lib/docker/link").unwrap();
    std::os::unix::fs::symlink("/etc", format!("{SHARES}/link")).unwrap();
}

/// Runs in a process of its own, which the jail changes for good.
#[test]
#[ignore = "a part of the other test"]
fn inside() {
    let outside = nix::unistd::getppid();
    imitate_vm();
    // Allowed until the domain takes it away.
    for name in ["root", "fd/0"] {
        fs::read_link(format!("/proc/{outside}/{name}")).unwrap();
    }
    root::enter(SHARES).unwrap();
    confine::confine().unwrap();

    // Only what is listed, and no more.
    let run =
        ["bulkhead", "containerd", "crun", "docker", "docker.sock", "host-services", "sysbox-runc", "xtables.lock"];
    assert_eq!(names("/run"), run.map(str::to_owned).into());
    assert_eq!(names(HOST_SERVICES), [SSH_AGENT.rsplit('/').next().unwrap().to_owned()].into());
    let bulkhead = ["configuration", "engine", "notify", "ports.sock", "runtime.sock", "sockets"];
    assert_eq!(names("/run/bulkhead"), bulkhead.map(str::to_owned).into());
    assert!(["/tmp", "/run/sysbox-runc", "/run/crun"].iter().all(|path| names(path).is_empty()));

    // Nothing of the VM can be written, and the engine's own can.
    for path in [
        "/x",
        "/etc/x",
        "/usr/x",
        "/var/x",
        "/run/x",
        "/run/sysbox-runc/x",
        "/run/crun/x",
        "/run/bulkhead/configuration/x",
        "/run/host-services/x",
        "/dev/x",
    ] {
        assert_eq!(errno(File::create(path)), Some(libc::EROFS), "{path}");
    }
    let [zone, name] = TIME_ZONE_FILES.map(|path| fs::read_to_string(path).unwrap());
    assert_eq!((zone.as_str(), name.as_str()), ("of the host", "of the image"));
    // A socket on a file system that is read-only can be connected to, and is what it was.
    UnixStream::connect(SSH_AGENT).unwrap();
    assert_eq!(errno(fs::set_permissions(SSH_AGENT, fs::Permissions::from_mode(0o0))), Some(libc::EROFS));
    let write = |path: &str| OpenOptions::new().write(true).open(path);
    for path in ["/proc/sys/kernel/core_pattern", "/sys/fs/cgroup/cgroup.subtree_control"] {
        // The control file is not there where cgroups have their first version.
        assert!(!Path::new(path).exists() || errno(write(path)) == Some(libc::EROFS), "{path}");
    }
    write("/proc/sys/net/ipv4/ip_forward").unwrap();
    for path in ["/run/docker/x", "/run/containerd/x", "/run/bulkhead/engine/x", "/var/lib/docker/x", "/tmp/x"] {
        File::create(path).unwrap();
    }
    write("/run/xtables.lock").unwrap();

    // No other process: neither its files nor its memory, and no signal to it. This one's own are there.
    for pid in [1, outside.as_raw()] {
        for name in ["root", "cwd", "exe", "ns/mnt"] {
            assert!(fs::read_link(format!("/proc/{pid}/{name}")).is_err(), "{pid} {name}");
        }
        // Not `environ`: kernels from 6.16 on let CAP_SYS_ADMIN read it, which the guest's kernel does not.
        assert!(File::open(format!("/proc/{pid}/mem")).is_err());
        assert!(fs::read_link(format!("/proc/{pid}/fd/0")).is_err());
        assert_eq!(kill(Pid::from_raw(pid), None), Err(nix::Error::EPERM));
        // Lists of processes work, for docker top.
        fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    }
    fs::read_link("/proc/self/root").unwrap();

    // No device but those of containers.
    File::open("/dev/null").unwrap();
    for entry in fs::read_dir("/dev").unwrap().flatten() {
        let (kind, name) = (entry.file_type().unwrap(), entry.file_name().into_string().unwrap());
        if (kind.is_block_device() || kind.is_char_device()) && !root::DEVICES.contains(&name.as_str()) {
            assert_eq!(errno(File::open(entry.path())), Some(libc::EACCES), "{name}");
        }
    }

    // Links are followed beside the volumes and shares and not among them.
    assert_eq!(errno(fs::metadata(format!("{SHARES}/link/passwd"))), Some(libc::ELOOP));
    fs::create_dir(format!("{SHARES}/new")).unwrap();
    // The engine may bind a share in any way.
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let share = mounts.lines().find(|line| line.split(' ').nth(4) == Some(SHARES)).unwrap();
    assert!(share.contains(" shared:") && !share.contains(" master:"), "{share}");
    assert_eq!(errno(fs::metadata("/var/lib/docker/volumes/v/_data/link/passwd")), Some(libc::ELOOP));
    assert!(Path::new("/var/lib/docker/link/passwd").exists());
    assert_eq!(fs::read_link("/var/lib/docker/volumes/v/_data/link").unwrap(), Path::new("/etc"));

    // The engine mounts; what it does not do is refused.
    fs::create_dir("/var/lib/docker/m").unwrap();
    tmpfs("/var/lib/docker/m");
    // SAFETY: takes a valid string; the filter answers before the kernel looks at it.
    assert_eq!(unsafe { libc::swapoff(c"/nothing".as_ptr()) }, -1);
    assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EPERM));
}

#[test]
fn the_engine_finds_what_it_needs_and_nothing_of_the_vm() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let test = std::env::current_exe().unwrap();
    let output =
        Command::new(test).args(["--exact", "jail::tests::inside", "--ignored", "--nocapture"]).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs in a process of its own, which loses its capabilities.
#[test]
#[ignore = "a part of the other test"]
fn without_capabilities() {
    let bounding = || {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    // A machine that runs the test may have fewer than all.
    let before = bounding();
    confine::drop_capabilities().unwrap();
    assert_eq!(bounding(), before & 0x89ac_35fb);
}

#[test]
fn containerd_keeps_the_capabilities_in_the_list() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let test = std::env::current_exe().unwrap();
    let name = "jail::tests::without_capabilities";
    let output = Command::new(test).args(["--exact", name, "--ignored", "--nocapture"]).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
