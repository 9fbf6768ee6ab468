//! Message-signalled interrupts: GSIs, their routes in KVM and their irqfds (KVM API, KVM_SET_GSI_ROUTING and
//! KVM_IRQFD).
//!
//! A GSI is KVM's number for an interrupt, a route its meaning: a pin of the I/O APIC or a message to a local APIC. An
//! irqfd is an eventfd whose writes trigger a GSI inside of the kernel.

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

/// The GSI routing table. KVM accepts it only as a whole, so this is the copy from which it is built again.
pub struct GsiRouter {
    vm: Arc<VmFd>,
    messages: Mutex<Vec<Option<MsiMessage>>>,
}

/// An MSI-X vector: an eventfd that KVM turns into the routed message while it is connected. While it is not, triggers
/// stay in the eventfd, where they count as pending.
pub struct MsiVector {
    gsi: u32,
    event: EventFd,
    router: Arc<GsiRouter>,
}

impl GsiRouter {
    /// Creates a table with the pins of the I/O APIC and no messages.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self { vm, messages: Mutex::new(Vec::new()) })
    }

    /// Allocates the next GSI. Its route exists once [`MsiVector::route`] is called, its irqfd while it is connected.
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
        // Each unmasking comes here, mostly with the message that the vector had. Replacing the table is slow: KVM
        // waits until no thread uses the old one.
        if *slot == Some(message) {
            return Ok(());
        }
        let before = slot.replace(message);
        let result = self.replace_table(&messages);
        // A message that KVM did not take must be set again by the next unmasking.
        if result.is_err()
            && let Some(slot) = messages.get_mut((gsi - layout::FIRST_MSI_GSI) as usize)
        {
            *slot = before;
        }
        result
    }

    fn replace_table(&self, messages: &[Option<MsiMessage>]) -> Result<(), VmmError> {
        // Pins first: a table of our own replaces the one that KVM_CREATE_IRQCHIP made. Vectors that the driver has not
        // unmasked yet have no message and are left out.
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

    /// Lets KVM deliver triggers, and those that came while the vector was not connected as one interrupt.
    pub fn connect(&self) -> Result<(), VmmError> {
        // KVM looks at the eventfd by itself when it is connected, but does not reset it: the same trigger would be
        // delivered again with the next connection. So it is taken out here, and put back afterwards.
        let waited = self.event.read().is_ok();
        let connected = self.router.vm.register_irqfd(&self.event, self.gsi).map_err(kvm("attach an irqfd"));
        // Also after a failure, which leaves the trigger pending.
        if waited {
            self.trigger();
        }
        connected
    }

    /// Lets triggers wait in the eventfd.
    pub fn disconnect(&self) -> Result<(), VmmError> {
        self.router.vm.unregister_irqfd(&self.event, self.gsi).map_err(kvm("detach an irqfd"))
    }

    /// The eventfd that triggers the vector, which may be handed to other processes.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// True if a trigger waits that KVM has not delivered.
    pub fn is_pending(&self) -> bool {
        // SAFETY: the event keeps its descriptor open for as long as it is borrowed here.
        let event = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        // A look that takes nothing: reading the eventfd would lose the trigger.
        let mut fds = [PollFd::new(event, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Triggers the interrupt. Writing to the eventfd fails only when its counter is full, and then a trigger is
    /// pending anyway.
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
