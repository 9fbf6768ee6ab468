//! Message-signalled interrupts: GSIs, their routes in KVM and the irqfds behind them.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    error::{VmmError, host, kvm},
    layout,
};

/// Address and data of a message-signalled interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// The GSI routing table; KVM takes it only as a whole.
pub struct GsiRouter {
    vm: Arc<VmFd>,
    messages: Mutex<Vec<Option<MsiMessage>>>,
}

/// One MSI-X vector: an eventfd that KVM turns into the routed message while it is connected. What is triggered before
/// stays in the eventfd, and KVM looks there when it is connected.
pub struct MsiVector {
    gsi: u32,
    event: EventFd,
    router: Arc<GsiRouter>,
}

impl GsiRouter {
    /// A table with the I/O APIC's pins and no message yet.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, messages: Mutex::new(Vec::new()) })
    }

    /// Takes the next free GSI. Its route exists once [`MsiVector::route`] is called, its irqfd while it is connected.
    pub fn vector(self: &Arc<Self>) -> Result<MsiVector, VmmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(host("create an eventfd"))?;
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let gsi = layout::FIRST_MSI_GSI + messages.len() as u32;
        messages.push(None);
        Ok(MsiVector { gsi, event, router: Arc::clone(self) })
    }

    fn set(&self, gsi: u32, message: MsiMessage) -> Result<(), VmmError> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = messages.get_mut((gsi - layout::FIRST_MSI_GSI) as usize).ok_or(VmmError::UnknownGsi(gsi))?;
        if *slot == Some(message) {
            return Ok(());
        }
        *slot = Some(message);
        let entries: Vec<_> =
            (0..layout::FIRST_MSI_GSI)
                .map(ioapic_entry)
                .chain(messages.iter().enumerate().filter_map(|(i, message)| {
                    message.map(|message| msi_entry(layout::FIRST_MSI_GSI + i as u32, message))
                }))
                .collect();
        let table =
            KvmIrqRouting::from_entries(&entries).map_err(|_| VmmError::KvmCapability("so many interrupt routes"))?;
        self.vm.set_gsi_routing(&table).map_err(kvm("route interrupts"))
    }
}

impl MsiVector {
    /// Makes KVM deliver `message` when the vector is triggered.
    pub fn route(&self, message: MsiMessage) -> Result<(), VmmError> {
        self.router.set(self.gsi, message)
    }

    /// From now on KVM delivers what is triggered, and what was triggered since the vector was last connected.
    pub fn connect(&self) -> Result<(), VmmError> {
        // KVM would find it by itself, but leave it there and deliver it again the next time.
        let waited = self.event.read().is_ok();
        self.router.vm.register_irqfd(&self.event, self.gsi).map_err(kvm("attach an irqfd"))?;
        if waited {
            self.trigger();
        }
        Ok(())
    }

    /// From now on what is triggered waits.
    pub fn disconnect(&self) -> Result<(), VmmError> {
        self.router.vm.unregister_irqfd(&self.event, self.gsi).map_err(kvm("detach an irqfd"))
    }

    /// What triggers the vector, also for other processes.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether something was triggered that KVM has not taken.
    pub fn is_pending(&self) -> bool {
        // SAFETY: the event keeps its descriptor open for as long as it is borrowed here.
        let event = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        let mut fds = [PollFd::new(event, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Triggers the interrupt. An eventfd write can only fail when 2^64-1 triggers are unread: then one is pending.
    pub fn trigger(&self) {
        let _ = self.event.write(1);
    }
}

fn ioapic_entry(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = gsi;
    entry
}

fn msi_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
