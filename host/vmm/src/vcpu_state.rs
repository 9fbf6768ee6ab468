//! Snapshots of running vCPUs, for the diagnosis of a guest that does not respond.
//!
//! A vCPU's state may only be read by its own thread (KVM API, section 2). So the thread that wants a snapshot sets a
//! flag and sends a signal, the signal makes `KVM_RUN` return, and the vCPU's thread fills in its state and goes on.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_lapic_state};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::api::VcpuView;

/// Time that the vCPUs' threads have to fill in their snapshots. One that handles an exit all that time is left out.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_millis(200);

/// Time between two signals to a thread.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(1);

/// Offsets of the local APIC's registers of 32 vectors each (AMD64 manual, volume 2, 16.3.2).
const ISR: usize = 0x100;
const IRR: usize = 0x200;

/// The place for a vCPU's snapshot, shared by its thread and the thread that asks.
#[derive(Default)]
pub(super) struct SnapshotSlot {
    /// Thread ID of the vCPU, or 0 before it runs.
    thread: AtomicI32,
    requested: AtomicBool,
    view: Mutex<Option<VcpuView>>,
}

/// Installs the handler of the signal that interrupts `KVM_RUN`. Must be called before the vCPUs run.
pub(super) fn prepare() -> io::Result<()> {
    // Without a handler the signal would end the process, and an ignored signal interrupts nothing.
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(io::Error::from)
}

impl SnapshotSlot {
    /// Registers the calling thread as the vCPU's.
    pub(super) fn attach_thread(&self) {
        // SAFETY: gettid(2) takes nothing and cannot fail.
        self.thread.store(unsafe { libc::gettid() }, Ordering::Release);
    }

    /// Fills the slot if a snapshot was requested. The vCPU's thread calls this when `KVM_RUN` was interrupted.
    pub(super) fn fill_if_requested(&self, vcpu: &VcpuFd) {
        if self.requested.load(Ordering::Acquire) {
            *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view(vcpu).ok();
            // Cleared last: the thread that asks takes the snapshot as soon as it sees this.
            self.requested.store(false, Ordering::Release);
        }
    }

    fn interrupt_thread(&self) {
        let thread = self.thread.load(Ordering::Acquire);
        if thread > 0 {
            // SAFETY: tgkill(2) takes no pointers; for a thread that is gone it fails without effect.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

/// Takes a snapshot of every vCPU; `None` for one whose thread did not fill it in time.
pub(super) fn snapshot_all(slots: &[&SnapshotSlot]) -> Vec<Option<VcpuView>> {
    for slot in slots {
        // A thread that was too late for the last snapshot may have left one.
        slot.view.lock().unwrap_or_else(PoisonError::into_inner).take();
        slot.requested.store(true, Ordering::Release);
    }
    let until = Instant::now() + SNAPSHOT_TIMEOUT;
    loop {
        let waiting: Vec<_> = slots.iter().filter(|slot| slot.requested.load(Ordering::Acquire)).collect();
        if waiting.is_empty() || Instant::now() >= until {
            break;
        }
        // A signal that arrives between two entries runs the empty handler and is lost, so signals are repeated until
        // the thread has answered.
        for slot in waiting {
            slot.interrupt_thread();
        }
        thread::sleep(SIGNAL_INTERVAL);
    }
    let take = |slot: &&SnapshotSlot| {
        slot.requested.store(false, Ordering::Release);
        slot.view.lock().unwrap_or_else(PoisonError::into_inner).take()
    };
    slots.iter().map(take).collect()
}

fn view(vcpu: &VcpuFd) -> Result<VcpuView, kvm_ioctls::Error> {
    let (registers, special, apic) = (vcpu.get_regs()?, vcpu.get_sregs()?, vcpu.get_lapic()?);
    Ok(VcpuView {
        rip: registers.rip,
        rflags: registers.rflags,
        cr3: special.cr3,
        user: special.cs.dpl == 3,
        halted: vcpu.get_mp_state()?.mp_state == KVM_MP_STATE_HALTED,
        pending: vectors(&apic, IRR),
        in_service: vectors(&apic, ISR),
    })
}

/// Returns the vectors whose bits are set in eight registers, 16 bytes apart (AMD64 manual, volume 2, 16.3.2).
fn vectors(apic: &kvm_lapic_state, first: usize) -> Vec<u8> {
    let set = |vector: &u8| {
        let vector = usize::from(*vector);
        let byte = apic.regs[first + vector / 32 * 16 + vector % 32 / 8];
        byte >> (vector % 8) & 1 == 1
    };
    (0..=u8::MAX).filter(set).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_is_a_bit_of_one_of_eight_registers() {
        let mut apic = kvm_lapic_state::default();
        apic.regs[0x200 + 7 * 16 + 1] = 0x10;
        apic.regs[0x200] = -128;
        apic.regs[0x100 + 2 * 16 + 3] = 1;
        assert_eq!(vectors(&apic, IRR), [7, 7 * 32 + 12]);
        assert_eq!(vectors(&apic, ISR), [2 * 32 + 24]);
    }

    #[test]
    fn a_vcpu_whose_thread_does_not_answer_is_missing() {
        let begun = Instant::now();
        assert_eq!(snapshot_all(&[&SnapshotSlot::default(), &SnapshotSlot::default()]), [None, None]);
        assert!(begun.elapsed() < 20 * SNAPSHOT_TIMEOUT);
    }
}
