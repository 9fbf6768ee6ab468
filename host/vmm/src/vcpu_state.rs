//! A look at a vCPU from outside, for a person who wonders why a guest does not answer.
//!
//! A signal makes `KVM_RUN` return, and the vCPU's own thread then reads its state: no other may (KVM API, section 2).

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

/// How long a vCPU's thread may be busy with an exit before it is given up.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_millis(200);

/// Between two signals: one that arrives outside of `KVM_RUN` does nothing.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(1);

/// Registers of the local APIC in the form that KVM has them, 32 vectors each.
const ISR: usize = 0x100;
const IRR: usize = 0x200;

/// What a vCPU's thread shares with whoever looks.
#[derive(Default)]
pub(super) struct SnapshotSlot {
    /// The vCPU's thread, or 0 before it runs.
    thread: AtomicI32,
    requested: AtomicBool,
    view: Mutex<Option<VcpuView>>,
}

/// Lets signals interrupt `KVM_RUN`; once in a process, before the vCPUs run.
pub(super) fn prepare() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(io::Error::from)
}

impl SnapshotSlot {
    /// The calling thread is the vCPU's.
    pub(super) fn attach_thread(&self) {
        // SAFETY: gettid(2) takes nothing and cannot fail.
        self.thread.store(unsafe { libc::gettid() }, Ordering::Release);
    }

    /// Shows the vCPU, if somebody looks; called by its thread when `KVM_RUN` was interrupted.
    pub(super) fn fill_if_requested(&self, vcpu: &VcpuFd) {
        if self.requested.load(Ordering::Acquire) {
            *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view(vcpu).ok();
            self.requested.store(false, Ordering::Release);
        }
    }

    fn interrupt_thread(&self) {
        let thread = self.thread.load(Ordering::Acquire);
        if thread > 0 {
            // SAFETY: tgkill(2) takes no pointers; a thread that is gone is an error that changes nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

/// Looks at every vCPU; `None` for one whose thread did not come out of the guest in time.
pub(super) fn snapshot_all(slots: &[&SnapshotSlot]) -> Vec<Option<VcpuView>> {
    for slot in slots {
        slot.view.lock().unwrap_or_else(PoisonError::into_inner).take();
        slot.requested.store(true, Ordering::Release);
    }
    let until = Instant::now() + SNAPSHOT_TIMEOUT;
    loop {
        let waiting: Vec<_> = slots.iter().filter(|slot| slot.requested.load(Ordering::Acquire)).collect();
        if waiting.is_empty() || Instant::now() >= until {
            break;
        }
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

/// The vectors whose bits are set in eight registers, 16 bytes apart (AMD64 manual, volume 2, 16.3.2).
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
    fn a_vcpu_whose_thread_does_not_answer_is_missing_and_the_look_ends() {
        let begun = Instant::now();
        assert_eq!(snapshot_all(&[&SnapshotSlot::default(), &SnapshotSlot::default()]), [None, None]);
        assert!(begun.elapsed() < 20 * SNAPSHOT_TIMEOUT);
    }
}
