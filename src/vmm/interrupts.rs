//! Message-signalled interrupts: GSIs, their routes in KVM and the irqfds behind them.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
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

/// One MSI-X vector: an eventfd that KVM turns into the routed message.
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

    /// Takes the next free GSI. Its irqfd exists from now on, its route once [`MsiVector::route`] is called.
    pub fn vector(self: &Arc<Self>) -> Result<MsiVector, VmmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(host("an eventfd"))?;
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let gsi = layout::FIRST_MSI_GSI + messages.len() as u32;
        messages.push(None);
        self.vm.register_irqfd(&event, gsi).map_err(kvm("attach an irqfd"))?;
        Ok(MsiVector { gsi, event, router: Arc::clone(self) })
    }

    fn set(&self, gsi: u32, message: MsiMessage) -> Result<(), VmmError> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = messages
            .get_mut((gsi - layout::FIRST_MSI_GSI) as usize)
            .ok_or(VmmError::GuestMemory("an interrupt route"))?;
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
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| VmmError::KvmCapability("enough GSI routes"))?;
        self.vm.set_gsi_routing(&table).map_err(kvm("route interrupts"))
    }
}

impl MsiVector {
    /// Makes KVM deliver `message` when the vector is triggered.
    pub fn route(&self, message: MsiMessage) -> Result<(), VmmError> {
        self.router.set(self.gsi, message)
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
