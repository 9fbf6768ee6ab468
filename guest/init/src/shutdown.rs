//! The shutdown: stops containers and daemons, unmounts the data disk, powers off or resets.
//!
//! Each step has a time limit, because a machine that is asked to stop must stop: ext4's journal and the sync before
//! the unmount protect the data even where a step fails.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::mpsc::Receiver,
    thread,
    time::{Duration, Instant},
};

use bulkhead_guest_common::mountinfo;
use bulkhead_protocol::{GuestMessage, ShutdownMode};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        reboot::{RebootMode, reboot},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::{
    agent::Agent,
    cgroup,
    disk::{DATA_MOUNT, ENGINE_DIRECTORIES},
    event::Event,
    fatal, log, network_volumes, procfs,
    services::Service,
};

/// Time for a daemon to end once its containers are gone.
const DAEMON_GRACE: Duration = Duration::from_secs(5);
/// Time limit for killing, syncing and unmounting; the machine then powers off regardless.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest grace that is honoured: a guest that is shutting down must not stay forever.
const MAX_GRACE: Duration = Duration::from_secs(600);

/// `linux/loop.h`.
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;

/// A request to take the guest down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShutdownRequest {
    /// Power off or reboot.
    pub(crate) mode: ShutdownMode,
    /// Time that containers get between SIGTERM and SIGKILL.
    pub(crate) grace: Duration,
}

impl ShutdownRequest {
    /// The request behind a signal, or behind the loss of the backend.
    pub(crate) const DEFAULT: Self = Self { mode: ShutdownMode::PowerOff, grace: Duration::from_secs(10) };

    /// The backend's request, with a grace of [`MAX_GRACE`] at most.
    pub(crate) fn new(mode: ShutdownMode, grace: Duration) -> Self {
        Self { mode, grace: grace.min(MAX_GRACE) }
    }
}

/// Removes ended children from `running`.
fn reap(running: &mut Vec<(Service, i32)>) {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
        if let Some(ended) = status.pid() {
            running.retain(|(_, pid)| *pid != ended.as_raw());
        }
    }
}

/// Waits until `service` has ended; returns false after `timeout`.
fn wait_for(service: Service, running: &mut Vec<(Service, i32)>, events: &Receiver<Event>, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        // Before each wait: the event of an end may have been taken from the channel before this function was called.
        reap(running);
        if running.iter().all(|(one, _)| *one != service) {
            return true;
        }
        // Any event is a reason to look; those of services and of published ports mean nothing any more.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || events.recv_timeout(left).is_err() {
            return false;
        }
    }
}

fn terminate(service: Service, running: &[(Service, i32)]) {
    for (_, pid) in running.iter().filter(|(one, _)| *one == service) {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGTERM);
    }
}

/// Sends Goodbye and stops the services. dockerd is first: it stops the containers, which take at most `grace`.
pub(crate) fn stop_services(mut agent: Agent, events: &Receiver<Event>, running: &[(Service, i32)], grace: Duration) {
    log::info("going down");
    agent.send(&GuestMessage::Goodbye);
    let mut running = running.to_vec();
    // dockerd needs containerd to stop the containers and to record how they ended. The gate is not stopped here:
    // clients that wait for a container still see its end.
    terminate(Service::Dockerd, &running);
    if !wait_for(Service::Dockerd, &mut running, events, grace) {
        log::info("the grace period is over; killing the containers");
        cgroup::kill_containers();
        // dockerd now sees them end, and records how.
        wait_for(Service::Dockerd, &mut running, events, DAEMON_GRACE);
    }
    terminate(Service::Containerd, &running);
    wait_for(Service::Containerd, &mut running, events, DAEMON_GRACE);
}

/// Kills all other processes, so that none keeps a file system busy, and waits for their ends.
fn kill_the_rest() {
    // A process that waits for an answer of the FUSE server may not react to SIGKILL. This ends such waits for good.
    procfs::abort();
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    // -1 spares PID 1 and kernel threads. Orphans become children of PID 1, so ECHILD means that no process is left.
    loop {
        match waitpid(None, None) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return,
        }
    }
}

/// Returns the mount points that can keep the data disk busy, the latest first, so that inner ones go before outer
/// ones.
fn to_unmount(table: &[u8]) -> Vec<PathBuf> {
    let roots = ENGINE_DIRECTORIES.map(|(_, target, _)| target);
    // /run/docker and /run/containerd have mounts of network namespaces and of containers' roots.
    let is_below = |path: &PathBuf| {
        let mut roots = roots.iter().chain(&[DATA_MOUNT, "/run/docker", "/run/containerd"]);
        roots.any(|root| path.starts_with(root))
    };
    mountinfo::parse(table).rev().map(|mount| mount.point()).filter(is_below).collect()
}

fn unmount_all() {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    for path in to_unmount(&table) {
        // A failure shows in the next look at mountinfo.
        let _ = umount2(&path, MntFlags::UMOUNT_NOFOLLOW);
    }
}

/// Detaches loop devices: without isolation, containers can attach files of the data disk to them.
fn detach_loops() {
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        if !entry.path().join("loop/backing_file").exists() {
            continue;
        }
        let node = format!("/dev/{}", entry.file_name().to_string_lossy());
        if let Ok(device) = File::open(&node) {
            // SAFETY: LOOP_CLR_FD takes no argument.
            unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) };
        }
    }
}

fn data_is_mounted() -> bool {
    fs::read("/proc/self/mountinfo").is_ok_and(|table| !to_unmount(&table).is_empty())
}

fn release_data_disk() {
    // A file system on a loop device keeps the device busy, and that keeps its file on the disk busy, hence two rounds.
    unmount_all();
    if !data_is_mounted() {
        return;
    }
    detach_loops();
    unmount_all();
    if data_is_mounted() {
        // Read-only serves as well: ext4 writes everything back and marks itself as clean.
        log::info("the data disk is busy; mounting it read-only");
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let _ = mount(None::<&str>, DATA_MOUNT, None::<&str>, flags, None::<&str>);
    }
}

/// Ends the machine; the second half of a shutdown, after [`stop_services`].
pub(crate) fn finish(mode: ShutdownMode) -> ! {
    // A thread of PID 1 survives the killing below, and can power off while this one hangs in the kernel.
    thread::spawn(|| {
        thread::sleep(UNMOUNT_TIMEOUT);
        log::kernel("unmounting takes too long; powering off");
        // Without a sync, which may be the call that hangs.
        let _ = reboot(RebootMode::RB_POWER_OFF);
    });
    // Before all that can wait for a server: the end of the last process that sees a volume, and unmounting.
    network_volumes::sync_file_system(DATA_MOUNT);
    kill_the_rest();
    network_volumes::sync_file_system(DATA_MOUNT);
    network_volumes::detach(&fs::read("/proc/self/mountinfo").unwrap_or_default());
    release_data_disk();
    network_volumes::sync_file_system(DATA_MOUNT);
    log::kernel("down");
    if mode == ShutdownMode::Reboot {
        let _ = reboot(RebootMode::RB_AUTOBOOT);
    }
    fatal::power_off()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn inner_mounts_of_the_data_disk_go_first_and_nothing_else_goes() {
        let info = b"1 0 0:1 / / ro - erofs x ro\n\
                    2 1 8:1 / /run/bulkhead/data rw - ext4 x rw\n\
                    3 1 8:1 /docker /var/lib/docker rw - ext4 x rw\n\
                    4 3 0:9 / /var/lib/docker/overlay2/a\\040b/merged rw - overlay x rw\n\
                    5 1 0:8 / /var/lib/docker-other rw - tmpfs x rw\n";
        let paths: Vec<_> = to_unmount(info).into_iter().map(|path| path.display().to_string()).collect();
        assert_eq!(paths, ["/var/lib/docker/overlay2/a b/merged", "/var/lib/docker", "/run/bulkhead/data"]);
    }

    proptest! {
        #[test]
        fn no_mountinfo_makes_the_reader_panic(text in ".{0,300}") {
            to_unmount(text.as_bytes());
        }
    }
}
