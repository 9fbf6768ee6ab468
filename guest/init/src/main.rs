//! PID 1 of the guest and the backend's agent in it.
//!
//! It makes the file systems, fetches its configuration from the host over vsock, prepares the data disk, starts
//! containerd, dockerd and the gate, keeps them running, and takes the guest down again. Every wait is for an event
//! that somebody pushes: a signal, a message, a notification or a deadline.

mod agent;
mod boot;
mod certificates;
mod cgroup;
mod config;
mod diagnostics;
mod disk;
mod error;
mod event;
mod fatal;
mod fd_store;
mod log;
mod mounts;
mod netlink;
mod network;
mod notify;
mod oci_runtime;
mod output;
mod ping;
mod ports;
mod restart;
mod services;
mod shutdown;
mod superblock;
mod supervisor;
mod tuning;
mod warden;

use std::process::ExitCode;

fn main() -> ExitCode {
    if !nix::unistd::getpid().as_raw().eq(&1) {
        eprintln!("bulkhead-init: only the kernel of a Bulkhead guest can start this program, as process 1");
        return ExitCode::FAILURE;
    }
    fatal::install_panic_hook();
    match boot::run() {
        Ok(mode) => shutdown::finish(mode),
        Err(error) => fatal::give_up(&error::chain(&error)),
    }
}
