//! The vmm: `bulkhead vmm`, a child process of the backend that builds and runs one virtual machine with KVM.
//!
//! The backend describes the machine in the first packet over the control socket ([`api`]). The process opens the
//! machine's files, builds it, loads the kernel, confines itself with seccomp and Landlock, and lets the vCPUs run
//! until the guest or the backend ends the machine. Confined, it opens nothing and connects to nothing: host ends of
//! the guest's connections come from the backend. The thread of a vCPU has the requests to KVM that it needs, all
//! others none. Everything that the guest can write is hostile: guest memory is only touched through `vm-memory` or by
//! system calls, never by Rust references, and values are copied out of it before they are checked.
//!
//! # Memory
//!
//! Guest memory ([`memory`]) is one memfd, mapped shared, sealed against resizing, with huge pages by hint. Nothing is
//! resident until the guest touches it. The fixed addresses ([`layout`]):
//!
//! ```text
//! 0x0000_0500  GDT, IDT         0x0000_6000  PVH start info     0x0000_7000  zero page, page tables (bzImage only)
//! 0x0002_0000  command line     0x000E_0000  ACPI tables        0x000F_0000  SMBIOS
//! 0x0010_0000  kernel
//! 0xC000_0000  end of low memory; window of PCI BARs, 256 MiB, one BAR of 32 KiB for each device
//! 0xE000_0000  PCI configuration space (ECAM), one bus, 1 MiB
//! 0xFEC0_0000  I/O APIC         0xFEE0_0000  local APIC         1_0000_0000  memory beyond the first 3 GiB
//! port 0x600   ACPI sleep control, sleep status, reset          port 0x3F8   serial port, on request
//! ```
//!
//! # Boot
//!
//! There is no firmware, no boot loader and no initrd. An ELF kernel is entered by PVH in 32-bit protected mode with
//! `hvm_start_info`, a bzImage by the Linux 64-bit boot protocol with a zero page. `scripts/image` ships the ELF
//! kernel.
//!
//! ACPI is hardware-reduced, without legacy devices, VGA or a CMOS clock to probe: RSDP, XSDT, FADT (reset and sleep
//! registers), MADT, MCFG and a DSDT (the PCI root with its window, the reservation of ECAM, `_S5_`, the serial port if
//! any). SMBIOS has one system structure. Its UUID is the profile's, which the backend derives from the host's machine
//! ID and the path of the data disk.
//!
//! # vCPUs
//!
//! There are 1 to 32 vCPUs, each a core of its own in one package, each with a thread. CPUID is what KVM supports
//! without VMX and SVM, so containers get no nested virtualization, and without performance counters. Port and MMIO
//! accesses go to two [`bus`]es, which are read-only once the vCPUs run. A triple fault, a failed entry or an internal
//! error of KVM ends the machine with a reason; exits are counted by kind. A reset after the console printed `Kernel
//! panic` is reported as a panic.
//!
//! # Interrupts
//!
//! The interrupt controllers are KVM's. Each MSI-X vector is an irqfd with a route, connected while it is unmasked;
//! each queue's notification register is an ioeventfd. So neither a kick nor an interrupt passes through a vCPU's
//! thread.
//!
//! # Devices
//!
//! Slot 0 of the PCI bus is a host bridge. The others, in order:
//!
//! | Device  | Queues   | Thread    | Notes                                                                       |
//! |---------|----------|-----------|-----------------------------------------------------------------------------|
//! | block   | 1 × 256  | `block`   | the root file system, read-only; raw file by io_uring, else by threads      |
//! | block   | 1 × 256  | `block`   | the data disk; FLUSH syncs the file, DISCARD and WRITE_ZEROES punch holes   |
//! | vsock   | 3 × 256  | `vsock`   | streams with half-close, and credit with the guest's charge for each packet |
//! | rng     | 1 × 64   | `rng`     | `getrandom`                                                                 |
//! | console | 2 × 64   | `console` | output only, to a log; the last 16 KiB are kept to recognize a panic        |
//! | net     | 2 × 1024 | none      | vhost-user frontend: served by another process; absent without a network    |
//! | fs      | 5 × 1024 | none      | vhost-user frontend: served by another process; absent without shares       |
//!
//! A thread of the name `log` writes each log's file, so that a slow one holds up no vCPU: the driver of the console
//! waits for its buffer with interrupts off. A thread that fails ends the machine with a reason, a panic ends the
//! process (`threads`).
//!
//! A device's thread starts at `DRIVER_OK` and is joined at reset, so that nothing touches guest memory afterwards. The
//! driver is interrupted for a completed request within a millisecond and the request under way, however many others
//! wait.

pub mod api;
mod boot;
pub mod bus;
mod control_socket;
mod cpuid;
pub mod devices;
pub mod error;
pub mod exit;
mod files;
pub mod interrupts;
mod kvm_counters;
pub mod layout;
mod machine;
pub mod memory;
mod memory_usage;
pub mod room;
mod threads;
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
use machine::{Machine, Streams};

use bulkhead_ipc::report::chain;

/// Runs the process: receives a machine over the control socket, runs it, and reports how it ended.
///
/// Returns success if the guest or the backend ended the machine, failure if the vmm or KVM failed.
pub fn run() -> ExitCode {
    let started = Instant::now();
    let control = match ControlSocket::inherited() {
        Ok(control) => control,
        Err(error) => {
            // Without a control socket there is no backend to report to: the process was started by hand.
            eprintln!("error: {}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    match control.try_clone_fd() {
        Ok(control) => threads::abort_on_panic(control),
        Err(error) => tracing::warn!(%error, "a panic of this process will not be reported"),
    }
    let reason = serve(&control, started).unwrap_or_else(|error| Some(ExitReason::Error { message: chain(&error) }));
    // The backend knows why it ended the machine, and may not be there to receive anything.
    let Some(reason) = reason else { return ExitCode::SUCCESS };
    let failed = matches!(reason, ExitReason::Error { .. });
    control.send(&Event::Exited(reason));
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs the machine; `None` when the backend ended it.
fn serve(control: &ControlSocket, started: Instant) -> Result<Option<ExitReason>, VmmError> {
    let mut streams = Streams::default();
    let config = loop {
        match control.receive()? {
            Some((Command::VsockOffer { port }, Some(stream))) => streams.offers.push((port, stream)),
            Some((Command::Shares, Some(stream))) => streams.shares = Some(stream),
            Some((Command::Boot(config), network)) => {
                streams.network = network;
                break config;
            }
            Some(_) => return Err(VmmError::NotBoot),
            None => return Ok(None),
        }
    };
    let machine = Machine::start(&config, streams)?;
    let end = command_loop(control, &machine, started);
    machine.flush_logs();
    end
}

/// Serves the backend while the guest runs; `None` when the backend ended the machine.
fn command_loop(control: &ControlSocket, machine: &Machine, started: Instant) -> Result<Option<ExitReason>, VmmError> {
    // From here on the guest runs and this thread only serves the backend.
    control.send(&Event::Started { since_exec_us: started.elapsed().as_micros() as u64 });
    loop {
        match wait(control, machine) {
            Wake::End => {
                // The event is raised after the reason is set, so there is one.
                let reason = machine.exit().take().unwrap_or(ExitReason::Reset);
                return Ok(Some(machine.classify(reason)));
            }
            Wake::Room => {
                control.send(&Event::NoRoom { disks: machine.room().waiting() });
                continue;
            }
            Wake::Command => {}
        }
        match control.receive()? {
            Some((Command::VsockConnect { port }, Some(stream))) => {
                if let Some(vsock) = machine.vsock() {
                    vsock.connect(port, stream);
                }
            }
            Some((Command::VsockOffer { port }, Some(stream))) => {
                if let Some(vsock) = machine.vsock() {
                    vsock.offer(port, stream);
                }
            }
            Some((Command::Network, Some(stream))) => {
                if let Some(net) = machine.net() {
                    net.replace(stream.into());
                }
            }
            Some((Command::Shares, Some(stream))) => {
                if let Some(shares) = machine.shares() {
                    shares.replace(stream.into());
                }
            }
            Some((Command::Statistics, _)) => control.send(&Event::Statistics(machine.statistics())),
            Some((Command::Look, _)) => control.send(&Event::Sample(machine.sample())),
            // Returning ends the process, and with it vCPUs and devices at whatever they are doing.
            Some((Command::Kill, _)) | None => return Ok(None),
            // A second machine, or a connection without its descriptor.
            Some((
                Command::VsockConnect { .. }
                | Command::VsockOffer { .. }
                | Command::Network
                | Command::Shares
                | Command::Boot(_),
                _,
            )) => {
                tracing::warn!("ignoring a command that is not valid now");
            }
        }
    }
}

/// Something to do for the thread that serves the backend.
enum Wake {
    /// The machine ended.
    End,
    /// A command waits.
    Command,
    /// The host ran out of room for a disk, or has some again.
    Room,
}

/// Waits for something to do.
fn wait(control: &ControlSocket, machine: &Machine) -> Wake {
    let poll_in = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let events = [machine.room().event().as_raw_fd(), machine.exit().event().as_raw_fd(), control.as_fd().as_raw_fd()];
    let mut fds = events.map(poll_in);
    loop {
        // Only a signal can interrupt the call; then it is repeated.
        // SAFETY: `fds` is a valid array of its length for the duration of the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready > 0 {
            // The news of a disk comes before the end, as it happened before: a block device reports room before it
            // completes the request that waited. Commands come last; a machine that has ended has no use for them.
            return match fds.map(|fd| fd.revents != 0) {
                [true, ..] => Wake::Room,
                [_, true, _] => Wake::End,
                _ => Wake::Command,
            };
        }
    }
}
