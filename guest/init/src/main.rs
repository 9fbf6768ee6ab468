//! PID 1 of the guest, and the backend's agent in it.
//!
//! # The guest
//!
//! The root file system is a read-only EROFS with Debian's engine (dockerd, containerd, crun, runc, iptables,
//! e2fsprogs) and Bulkhead's static programs. No package starts anything and there is no initrd, udev or systemd:
//! this program is the only one that starts services, and it reports each stage of the start. `/etc` and `/var` are
//! overlays on a tmpfs, lost at each power-off; with isolation `/etc` is read-only once its last file is written.
//! `/var/lib/docker` and `/var/lib/containerd` are directories of the data disk, an ext4 file system. A data disk that
//! is missing or holds something else fails the start; nothing else is ever used in its place.
//!
//! Each service has a cgroup of its own below `/system`; containers are beside it, in `/docker`, which as a whole
//! leaves memory and threads to the services ([`ceilings`]). init writes dockerd's `daemon.json`: of the user's options
//! those in a list are taken over ([`config`]). dockerd uses the graph driver overlay2, whose one mount of a
//! container's root the isolating runtime id-maps.
//!
//! With Enhanced Container Isolation on, the isolating runtime `sysbox-runc` is bind-mounted, read-only, over every
//! program named `runc` or `crun`, and finds the real crun at `/usr/libexec/bulkhead/crun` ([`oci_runtime`]). BuildKit
//! and an explicit `--runtime` therefore end at the same program, below the gate as well. dockerd and containerd then
//! run in a jail ([`jail`]), which has neither the VM's `/run` nor its disks, and no way to other processes of the VM.
//!
//! # Start
//!
//! Nothing polls: each step waits for a message, a notification, a closed pipe or a deadline.
//!
//! 1. `kernel`: mounts `/proc` and `/dev`, connects to vsock port 1025 of the host and sends Hello, by which the
//!    backend knows that this stage is reached.
//! 2. `agent`: mounts the other file systems, makes cgroups, applies sysctls. By then the backend's answer has arrived:
//!    certificates and the configuration, from which clock, host name and network are set. From then on the clock
//!    follows the host's ([`clock`]).
//! 3. `disk`: finds the data disk by its serial, formats it if it is blank, checks it if it is damaged, mounts it and
//!    grows it. The gate and the procfs service start meanwhile.
//! 4. `engine`: starts containerd and dockerd side by side. Each service reports `READY=1` (sd_notify(3)); the stage is
//!    reached when they all have, and one `GET /_ping` through the gate returns 200.
//!
//! An error before the services start is reported and powers the guest off ([`fatal`]). A later one is reported as
//! well, and the guest stays up until the backend shuts it down. A service that ends is started again ([`restart`]);
//! six bad starts in a row count as a failure, which names the stage and the service's last line of output. The
//! [`supervisor`] has the details.
//!
//! # Shutdown
//!
//! The backend sends `shutdown` with the containers' grace; a signal, or the end of the agent connection, has the same
//! effect with a grace of ten seconds. init sends Goodbye and terminates dockerd, which stops the containers. When the
//! grace is over, it kills them through their cgroup. Then it terminates containerd, kills all other processes, syncs,
//! unmounts the data disk (mounts in the jail go with its last process) and powers off through ACPI, within 30 seconds
//! or without having unmounted ([`shutdown`]).
//!
//! # Trust
//!
//! The backend is trusted, isolated containers are not. They reach neither `/run/bulkhead` (mode 0700, and the runtime
//! refuses mounts of the VM's paths) nor the backend: the agent connection comes from a reserved vsock port, which
//! needs a capability of the VM. The output of services can contain text that a container chose; it is limited in rate
//! and stripped of control characters before it reaches the console. The backend does the same with every message.

mod agent;
mod boot;
mod ceilings;
mod certificates;
mod cgroup;
mod clock;
mod config;
mod diagnostics;
mod disk;
mod error;
mod event;
mod fatal;
mod fd_store;
mod handover;
mod host_sockets;
mod jail;
mod log;
mod mounts;
mod netlink;
mod network;
mod network_volumes;
mod notify;
mod oci_runtime;
mod output;
mod ping;
mod ports;
mod procfs;
mod restart;
mod services;
mod shutdown;
mod superblock;
mod supervisor;
mod swarm;
mod time_zone;
mod tuning;

use std::process::ExitCode;

fn main() -> ExitCode {
    // init's own child, with a part of its work: see `jail`.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == jail::ARGUMENT) {
        return jail::jailer::main();
    }
    // Everything below assumes that this is the guest's first process: it would take over mounts, signals and power of
    // any other machine.
    if !nix::unistd::getpid().as_raw().eq(&1) {
        eprintln!("bulkhead-init: must run as process 1 of a Bulkhead guest; only the guest's kernel can start it");
        return ExitCode::FAILURE;
    }
    fatal::install_panic_hook();
    match boot::run() {
        Ok(mode) => shutdown::finish(mode),
        Err(error) => fatal::give_up(&error::chain(&error)),
    }
}
