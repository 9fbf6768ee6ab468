//! A vCPU's thread: enters the guest, handles its exits and counts them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{
    api::ExitReason,
    bus::Bus,
    error::{VmmError, host},
    exit::ExitSignal,
    threads,
    vcpu_state::SnapshotSlot,
};

/// The two address spaces of a PC.
pub(super) struct Buses {
    pub(super) ports: Bus,
    pub(super) memory: Bus,
}

/// The part of a vCPU that other threads read.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) exits: ExitCounters,
    pub(super) snapshot: SnapshotSlot,
}

/// Exits of one vCPU that reached this process, by kind. Those that KVM handles itself are not seen here.
#[derive(Default)]
pub(super) struct ExitCounters {
    pub(super) port: AtomicU64,
    pub(super) mmio: AtomicU64,
    pub(super) other: AtomicU64,
}

fn count(counter: &AtomicU64) {
    // Only a statistic, so no order with other memory is needed.
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Runs the vCPU on a new thread until the machine ends.
pub(super) fn spawn(
    id: u8,
    mut vcpu: VcpuFd,
    buses: Arc<Buses>,
    shared: Arc<Shared>,
    exit: ExitSignal,
) -> Result<(), VmmError> {
    let body = move || {
        shared.snapshot.attach_thread();
        // The thread is never joined: the process exits while the other vCPUs are still in the guest.
        loop {
            step(&mut vcpu, &buses, &shared)?;
        }
    };
    threads::spawn(&format!("vcpu{id}"), exit, body).map_err(host("start a vCPU thread"))?;
    Ok(())
}

/// Enters the guest once and handles its exit (KVM API, KVM_RUN and the `kvm_run` structure).
fn step(vcpu: &mut VcpuFd, buses: &Buses, shared: &Shared) -> Result<(), ExitReason> {
    let counters = &shared.exits;
    match vcpu.run() {
        // `data` lies in the memory shared with KVM, which completes the instruction with it at the next entry. A
        // string instruction (`rep insb`) may bring more than one element, which the devices ignore.
        Ok(VcpuExit::IoIn(port, data)) => {
            count(&counters.port);
            buses.ports.read(u64::from(port), data);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            count(&counters.port);
            buses.ports.write(u64::from(port), data);
        }
        // Queue notifications do not come here: their ioeventfds take them inside of KVM.
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&counters.mmio);
            buses.memory.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&counters.mmio);
            buses.memory.write(address, data);
        }
        // A triple fault. Any guest kernel can cause one at will, so this is an end of the machine like any other.
        Ok(VcpuExit::Shutdown) => return Err(ExitReason::TripleFault),
        // With the in-kernel local APIC these stay in KVM as a rule. None of them needs an action.
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => count(&counters.other),
        // The processor refused the guest's state, or KVM cannot continue: the machine is lost.
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return Err(failed(vcpu, &format!("VM entry failed on the host's CPU {cpu} (reason {reason:#x})")));
        }
        Ok(VcpuExit::InternalError) => {
            let what = internal_error(vcpu);
            return Err(failed(vcpu, &what));
        }
        Ok(VcpuExit::SystemEvent(kind, _)) => return Err(failed(vcpu, &format!("unexpected system event {kind}"))),
        Ok(other) => {
            let message = format!("unexpected exit {other:?}");
            return Err(ExitReason::Error { message });
        }
        // The signal of a thread that wants a snapshot, as a rule.
        Err(error) if error.errno() == libc::EINTR => shared.snapshot.fill_if_requested(vcpu),
        // An application processor left its wait for INIT and SIPI: it starts with the next entry.
        Err(error) if error.errno() == libc::EAGAIN => {}
        Err(error) => return Err(failed(vcpu, &format!("KVM_RUN failed: {error}"))),
    }
    Ok(())
}

/// Describes an internal error by what KVM says of it, often the only clue on new hardware.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which KVM fills in this member of the union; any bits are
    // valid integers.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let data = internal.data.get(..internal.ndata as usize).unwrap_or(&internal.data);
    // KVM API, KVM_EXIT_INTERNAL_ERROR.
    let what = match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit came while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit of an unknown kind",
        _ => "internal error of KVM",
    };
    format!("{what} (suberror {}, data {data:x?})", internal.suberror)
}

fn failed(vcpu: &VcpuFd, what: &str) -> ExitReason {
    // The address identifies the instruction in a report; without it the message is still of use.
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    let message = format!(
        "a vCPU stopped at rip {rip:#x}: {what}; if no Bulkhead VM has run on this host before, \
         its KVM may be unable to run Linux guests (see: bulkhead doctor)"
    );
    ExitReason::Error { message }
}
