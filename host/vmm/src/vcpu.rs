//! A vCPU's thread: enters the guest, answers its exits, counts them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{
    api::ExitReason,
    bus::Bus,
    error::{VmmError, host},
    exit::ExitSignal,
    vcpu_state::SnapshotSlot,
};

/// The two address spaces, read-only once the vCPUs run.
pub(super) struct Buses {
    pub(super) ports: Bus,
    pub(super) memory: Bus,
}

/// What others may know of a running vCPU.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) exits: ExitCounters,
    pub(super) snapshot: SnapshotSlot,
}

/// Exits of one vCPU that reached this process, by kind.
#[derive(Default)]
pub(super) struct ExitCounters {
    pub(super) port: AtomicU64,
    pub(super) mmio: AtomicU64,
    pub(super) other: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Runs the vCPU on a thread of its own until the machine ends.
pub(super) fn spawn(
    id: u8,
    mut vcpu: VcpuFd,
    buses: Arc<Buses>,
    shared: Arc<Shared>,
    exit: ExitSignal,
) -> Result<(), VmmError> {
    let body = move || {
        shared.snapshot.attach_thread();
        loop {
            if let Err(reason) = step(&mut vcpu, &buses, &shared) {
                return exit.raise(reason);
            }
        }
    };
    thread::Builder::new().name(format!("vcpu{id}")).spawn(body).map_err(host("start a vCPU thread"))?;
    Ok(())
}

/// One entry into the guest.
fn step(vcpu: &mut VcpuFd, buses: &Buses, shared: &Shared) -> Result<(), ExitReason> {
    let counters = &shared.exits;
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            count(&counters.port);
            buses.ports.read(u64::from(port), data);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            count(&counters.port);
            buses.ports.write(u64::from(port), data);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&counters.mmio);
            buses.memory.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&counters.mmio);
            buses.memory.write(address, data);
        }
        Ok(VcpuExit::Shutdown) => return Err(ExitReason::TripleFault),
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => count(&counters.other),
        Ok(VcpuExit::FailEntry(reason, _)) => return Err(failed(vcpu, &format!("VM entry failed ({reason:#x})"))),
        Ok(VcpuExit::InternalError) => return Err(failed(vcpu, "KVM cannot emulate an instruction")),
        Ok(VcpuExit::SystemEvent(kind, _)) => return Err(failed(vcpu, &format!("unexpected system event {kind}"))),
        Ok(other) => {
            let message = format!("unexpected exit {other:?}");
            return Err(ExitReason::Error { message });
        }
        Err(error) if error.errno() == libc::EINTR => shared.snapshot.fill_if_requested(vcpu),
        Err(error) if error.errno() == libc::EAGAIN => {}
        Err(error) => return Err(failed(vcpu, &format!("KVM_RUN failed: {error}"))),
    }
    Ok(())
}

fn failed(vcpu: &VcpuFd, what: &str) -> ExitReason {
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    let message = format!(
        "a vCPU stopped at rip {rip:#x}: {what}; if this host has never run a VM of Bulkhead, \
         its KVM may be unable to run Linux guests (see: bulkhead doctor)"
    );
    ExitReason::Error { message }
}
