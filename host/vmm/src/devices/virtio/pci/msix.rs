//! MSI-X table and pending bits (PCI local bus specification 3.0, 6.8.2).
//!
//! A vector that is not masked is connected to KVM, which delivers its triggers without this process. Masking
//! disconnects it, so that triggers stay in its eventfd: that is its pending bit, and KVM delivers it with the next
//! connection. No trigger is lost, be it a device's thread or another process that writes to the eventfd meanwhile.

use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_ipc::report::chain;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    devices::virtio::Interrupt,
    interrupts::{MsiMessage, MsiVector},
};

/// Length of a table entry in bytes.
pub(super) const ENTRY: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

struct Entry {
    message: MsiMessage,
    masked: bool,
    /// KVM delivers the vector; otherwise triggers wait in its eventfd.
    connected: bool,
    vector: MsiVector,
}

struct State {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
}

/// The MSI-X state of a function, shared with the interrupts that its device holds.
#[derive(Clone)]
pub(super) struct Msix(Arc<Mutex<State>>);

/// A vector as a device sees it.
struct Vector {
    msix: Msix,
    index: usize,
}

impl Interrupt for Vector {
    fn trigger(&self) {
        self.msix.trigger(self.index);
    }

    fn event(&self) -> Option<EventFd> {
        self.msix.state().entries.get(self.index)?.vector.event().try_clone().ok()
    }
}

/// The interrupt of a queue to which the driver assigned no vector (`VIRTIO_MSI_NO_VECTOR`).
struct NoVector;

impl Interrupt for NoVector {
    fn trigger(&self) {}

    fn event(&self) -> Option<EventFd> {
        None
    }
}

impl Msix {
    pub(super) fn new(vectors: Vec<MsiVector>) -> Self {
        // At reset every vector is masked and MSI-X is disabled.
        let entry = |vector| Entry { message: MsiMessage::default(), masked: true, connected: false, vector };
        let entries = vectors.into_iter().map(entry).collect();
        Self(Arc::new(Mutex::new(State { entries, enabled: false, function_masked: false })))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.state().entries.len()
    }

    /// Returns the interrupt with the vector number that the driver chose.
    pub(super) fn interrupt(&self, vector: u16) -> Arc<dyn Interrupt> {
        if usize::from(vector) < self.len() {
            Arc::new(Vector { msix: self.clone(), index: usize::from(vector) })
        } else {
            Arc::new(NoVector)
        }
    }

    /// The message control word (6.8.2.3).
    pub(super) fn control(&self) -> u16 {
        let state = self.state();
        let flags = u16::from(state.enabled) << 15 | u16::from(state.function_masked) << 14;
        // Table size, encoded as the number of vectors less one.
        flags | (state.entries.len() as u16 - 1)
    }

    pub(super) fn set_control(&self, value: u16) {
        let mut state = self.state();
        state.enabled = value & CONTROL_ENABLE != 0;
        state.function_masked = value & CONTROL_FUNCTION_MASK != 0;
        // Both bits apply to all vectors at once.
        for index in 0..state.entries.len() {
            state.connect(index);
        }
    }

    fn trigger(&self, index: usize) {
        if let Some(entry) = self.state().entries.get(index) {
            // Masked or not: the eventfd keeps the trigger until the vector is connected.
            entry.vector.trigger();
        }
    }

    /// Reads the table. Only aligned accesses of 4 and 8 bytes are defined (6.8.2); others read as zero.
    pub(super) fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        if let Some(entry) = state.entries.get(offset / ENTRY) {
            let bytes = entry.bytes();
            let at = offset % ENTRY;
            if aligned(at, data.len()) {
                data.copy_from_slice(&bytes[at..at + data.len()]);
            }
        }
    }

    pub(super) fn write_table(&self, offset: usize, data: &[u8]) {
        let at = offset % ENTRY;
        if !aligned(at, data.len()) {
            return;
        }
        let mut state = self.state();
        let index = offset / ENTRY;
        let Some(entry) = state.entries.get_mut(index) else { return };
        // Merged into the entry as it is, since the driver may write it in parts.
        let mut bytes = entry.bytes();
        bytes[at..at + data.len()].copy_from_slice(data);
        let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        entry.message = MsiMessage { address: u64::from(word(0)) | u64::from(word(4)) << 32, data: word(8) };
        entry.masked = word(12) & VECTOR_MASKED != 0;
        // A route only for an entry that the driver has completed: while the vector is masked, address and data may be
        // half written (6.8.3.5). The route must be right before the vector is connected below.
        if !entry.masked
            && let Err(error) = entry.vector.route(entry.message)
        {
            tracing::warn!(error = %chain(&error), "cannot route a guest interrupt: it will be lost");
        }
        state.connect(index);
    }

    /// Reads the pending bit array: one bit for each vector, set while a trigger waits.
    pub(super) fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let state = self.state();
        for (i, byte) in data.iter_mut().enumerate() {
            // A connected vector is KVM's: a trigger in its eventfd is being delivered and not pending.
            let first = (offset + i) * 8;
            *byte = (0..8)
                .filter(|bit| {
                    state.entries.get(first + bit).is_some_and(|entry| !entry.connected && entry.vector.is_pending())
                })
                .fold(0, |b, bit| b | 1 << bit);
        }
    }
}

fn aligned(at: usize, len: usize) -> bool {
    matches!(len, 4 | 8) && at.is_multiple_of(len)
}

impl Entry {
    fn bytes(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&u32::from(self.masked).to_le_bytes());
        bytes
    }
}

impl State {
    fn is_unmasked(&self, index: usize) -> bool {
        self.enabled && !self.function_masked && self.entries.get(index).is_some_and(|entry| !entry.masked)
    }

    /// Connects the vector to KVM or disconnects it, in line with the masks.
    fn connect(&mut self, index: usize) {
        let unmasked = self.is_unmasked(index);
        let Some(entry) = self.entries.get_mut(index).filter(|entry| entry.connected != unmasked) else { return };
        let done = if unmasked { entry.vector.connect() } else { entry.vector.disconnect() };
        match done {
            Ok(()) => entry.connected = unmasked,
            Err(error) => tracing::warn!(error = %chain(&error), "cannot mask or unmask a guest interrupt"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use kvm_ioctls::{Kvm, VcpuFd};

    use super::*;
    use crate::interrupts::GsiRouter;

    const VECTOR: u8 = 0x41;
    const ENABLED: u16 = CONTROL_ENABLE;
    /// Interrupt request register (Intel SDM 3A, 11.8.4), the word and bit of the vector.
    const REQUESTED: (usize, i32) = (0x200 + (VECTOR as usize / 32) * 0x10, 1 << (VECTOR % 32));

    /// A CPU that never runs, so an interrupt stays in its local APIC.
    struct Cpu(VcpuFd);

    impl Cpu {
        /// True if the vector was delivered since the last call.
        fn take(&self) -> bool {
            let mut lapic = self.0.get_lapic().unwrap();
            let bytes: Vec<u8> =
                lapic.regs[REQUESTED.0..REQUESTED.0 + 4].iter().map(|byte| byte.cast_unsigned()).collect();
            let word = i32::from_le_bytes(bytes.try_into().unwrap());
            for (to, from) in lapic.regs[REQUESTED.0..].iter_mut().zip((word & !REQUESTED.1).to_le_bytes()) {
                *to = from.cast_signed();
            }
            self.0.set_lapic(&lapic).unwrap();
            word & REQUESTED.1 != 0
        }

        /// Waits for a delivery: KVM may deliver on a thread of its own.
        fn takes(&self) -> bool {
            (0..2000).any(|_| {
                self.take() || {
                    thread::sleep(Duration::from_millis(1));
                    false
                }
            })
        }
    }

    /// Creates a vector that is routed, enabled and masked; `None` without KVM, which is printed.
    fn one_vector() -> Option<(Cpu, Msix)> {
        let Ok(vm) = Kvm::new().and_then(|kvm| kvm.create_vm()) else {
            println!("left out: no /dev/kvm");
            return None;
        };
        vm.set_tss_address(crate::layout::TSS_START as usize).unwrap();
        vm.create_irq_chip().unwrap();
        let cpu = Cpu(vm.create_vcpu(0).unwrap());
        // Switched on by software, or nothing is accepted (spurious-interrupt vector register, 11.9).
        let mut lapic = cpu.0.get_lapic().unwrap();
        (lapic.regs[0xf0], lapic.regs[0xf1]) = (-1, 1);
        cpu.0.set_lapic(&lapic).unwrap();
        let msix = Msix::new(vec![GsiRouter::new(Arc::new(vm)).vector().unwrap()]);
        msix.write_table(0, &0xfee0_0000_u64.to_le_bytes());
        msix.write_table(8, &u32::from(VECTOR).to_le_bytes());
        msix.set_control(ENABLED);
        Some((cpu, msix))
    }

    fn mask(msix: &Msix, masked: bool) {
        msix.write_table(12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix) -> bool {
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        bits[0] & 1 != 0
    }

    #[test]
    fn a_trigger_while_masked_is_pending_and_delivered_once_when_unmasked() {
        let Some((cpu, msix)) = one_vector() else { return };
        let interrupt = msix.interrupt(0);
        interrupt.trigger();
        assert!(pending(&msix) && !cpu.take());
        mask(&msix, false);
        assert!(cpu.takes() && !pending(&msix));
        // The same with the whole function, and with an event of another process.
        msix.set_control(ENABLED | CONTROL_FUNCTION_MASK);
        interrupt.event().unwrap().write(1).unwrap();
        assert!(pending(&msix) && !cpu.take());
        msix.set_control(ENABLED);
        assert!(cpu.takes());
        // Nothing is left over for a further time.
        mask(&msix, true);
        mask(&msix, false);
        thread::sleep(Duration::from_millis(20));
        assert!(!cpu.take());
    }

    #[test]
    fn no_interrupt_is_lost_while_the_driver_masks_and_moves_its_vector() {
        let Some((cpu, msix)) = one_vector() else { return };
        let events = [msix.interrupt(0).event().unwrap(), msix.interrupt(0).event().unwrap()];
        for round in 0..500_u64 {
            let event = events[round as usize % 2].try_clone().unwrap();
            let device = thread::spawn(move || {
                thread::sleep(Duration::from_micros(round * 37 % 400));
                event.write(1).unwrap();
            });
            for _ in 0..3 {
                mask(&msix, true);
                msix.write_table(8, &u32::from(VECTOR).to_le_bytes());
                mask(&msix, false);
            }
            device.join().unwrap();
            assert!(cpu.takes(), "round {round}");
        }
    }
}
