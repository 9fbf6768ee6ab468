//! The KVM process: `bulkhead vmm`, a child of the backend that runs one machine.

pub mod api;
mod boot;
pub mod bus;
mod control_socket;
mod cpuid;
pub mod devices;
pub mod error;
pub mod exit;
pub mod interrupts;
pub mod layout;
mod machine;
pub mod memory;
mod memory_usage;
mod vcpu;
mod vcpu_state;

use std::{
    os::fd::{AsFd, AsRawFd},
    process::ExitCode,
    time::Instant,
};

use api::{Command, Event, ExitReason};
use control_socket::ControlSocket;
use error::VmmError;
use machine::Machine;

use bulkhead_ipc::report::chain;

/// The process: takes its machine from the control socket, runs it, tells how it ended.
///
/// Returns success when the guest ended by itself or the backend ended it, failure otherwise.
pub fn run() -> ExitCode {
    let started = Instant::now();
    let control = match ControlSocket::inherited() {
        Ok(control) => control,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    let reason = serve(&control, started).unwrap_or_else(|error| Some(ExitReason::Error { message: chain(&error) }));
    let Some(reason) = reason else { return ExitCode::SUCCESS };
    let failed = matches!(reason, ExitReason::Error { .. });
    control.send(&Event::Exited(reason));
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs the machine; `None` when the backend ended it.
fn serve(control: &ControlSocket, started: Instant) -> Result<Option<ExitReason>, VmmError> {
    let (config, network) = match control.receive()? {
        Some((Command::Boot(config), network)) => (config, network),
        Some(_) => return Err(VmmError::NotBoot),
        None => return Ok(None),
    };
    let machine = Machine::start(&config, network)?;
    control.send(&Event::Started { since_exec_us: started.elapsed().as_micros() as u64 });
    loop {
        if !wait(control, &machine) {
            let reason = machine.exit().take().unwrap_or(ExitReason::Reset);
            return Ok(Some(machine.classify(reason)));
        }
        match control.receive()? {
            Some((Command::VsockConnect { port }, Some(stream))) => {
                if let Some(vsock) = machine.vsock() {
                    vsock.connect(port, stream);
                }
            }
            Some((Command::Network, Some(stream))) => {
                if let Some(net) = machine.net() {
                    net.replace(stream.into());
                }
            }
            Some((Command::Statistics, _)) => control.send(&Event::Statistics(machine.statistics())),
            Some((Command::Look, _)) => control.send(&Event::Vcpus { views: machine.vcpu_views() }),
            Some((Command::Kill, _)) | None => return Ok(None),
            Some((Command::VsockConnect { .. } | Command::Network | Command::Boot(_), _)) => {
                tracing::warn!("ignoring a command that is not valid now");
            }
        }
    }
}

/// Waits for a command (true) or the machine's end (false).
fn wait(control: &ControlSocket, machine: &Machine) -> bool {
    let poll_in = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll_in(machine.exit().event().as_raw_fd()), poll_in(control.as_fd().as_raw_fd())];
    loop {
        // SAFETY: `fds` is a valid array of its length for the duration of the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready > 0 {
            return fds[0].revents == 0;
        }
    }
}
