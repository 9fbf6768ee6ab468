//! A virtio function: configuration space and BAR in front of a device.

use std::sync::{Arc, Mutex};

use bulkhead_ipc::report::chain;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    bar::Region,
    common::{Common, Request},
    config_space::ConfigSpace,
    msix::Msix,
};
use crate::{
    bus::BusDevice,
    devices::{
        pci_root::PciFunction,
        virtio::{Activation, ActiveQueue, VirtioDevice},
    },
    error::{VmmError, host, kvm},
    exit::ExitSignal,
    interrupts::GsiRouter,
    memory::GuestRam,
};

/// A virtio device as a function on the PCI bus.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestRam>,
    config: ConfigSpace,
    common: Common,
    msix: Msix,
    kicks: Vec<EventFd>,
    exit: ExitSignal,
    /// The device was activated since the last reset.
    active: bool,
}

impl VirtioPci {
    /// Creates a function whose BAR is at `bar` in front of `device`, with an ioeventfd for each queue. A thread of the
    /// device that fails raises `exit`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestRam>,
        vm: &VmFd,
        router: &Arc<GsiRouter>,
        bar: u64,
        exit: ExitSignal,
    ) -> Result<Arc<Mutex<Self>>, VmmError> {
        let sizes = device.queue_max_sizes().to_vec();
        // One vector for configuration changes, one for each queue.
        let vectors = (0..=sizes.len()).map(|_| router.vector()).collect::<Result<Vec<_>, _>>()?;
        let msix = Msix::new(vectors);
        let kicks = (0..sizes.len())
            .map(|queue| {
                let kick = EventFd::new(EFD_NONBLOCK).map_err(host("create an eventfd"))?;
                // The address decides, not the value, so one of any width raises the event.
                let address = IoEventAddress::Mmio(bar + Region::Notify.start() + queue as u64 * 4);
                vm.register_ioevent(&kick, &address, NoDatamatch).map_err(kvm("attach an ioeventfd"))?;
                Ok(kick)
            })
            .collect::<Result<Vec<_>, VmmError>>()?;
        let config = ConfigSpace::new(device.device_type(), class(device.device_type()), bar as u32, &msix);
        let common = Common::new(device.features(), &sizes, sizes.len() + 1);
        Ok(Arc::new(Mutex::new(Self { device, memory, config, common, msix, kicks, exit, active: false })))
    }

    /// Starts the device with the queues that the driver has set up.
    fn activate(&mut self) {
        // A driver that placed a queue outside of memory gets no device, but a status that says so (2.1.2).
        let Some(built) = self.common.build_queues(&self.memory) else {
            tracing::warn!(device = self.device.device_type(), "the guest configured a virtqueue wrongly");
            return self.needs_reset();
        };
        let mut queues = Vec::new();
        for (kick, built) in self.kicks.iter().zip(built) {
            let Some((queue, vector)) = built else {
                queues.push(None);
                continue;
            };
            let Ok(kick) = kick.try_clone() else { return self.needs_reset() };
            // Drops a kick from before the reset. None of the new driver's is lost: the device looks at the queue
            // first.
            let _ = kick.read();
            queues.push(Some(ActiveQueue { queue, kick, interrupt: self.msix.interrupt(vector) }));
        }
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            features: self.common.features(),
            queues,
            config_interrupt: self.msix.interrupt(self.common.config_vector()),
            exit: self.exit.clone(),
        };
        // Also if it fails: a reset must clean up after a device that came halfway.
        self.active = true;
        if let Err(error) = self.device.activate(activation) {
            tracing::warn!(device = self.device.device_type(), error = %chain(&error), "cannot start a virtio device");
            self.needs_reset();
        }
    }

    /// Reports an error that only a reset by the driver can end, with the notification that belongs to it (2.1.2).
    fn needs_reset(&mut self) {
        self.common.set_needs_reset();
        self.msix.interrupt(self.common.config_vector()).trigger();
    }

    fn reset(&mut self) {
        // The vCPU that wrote the status waits until the device's thread has ended. The registers are cleared
        // afterwards, so the driver reads 0 only when nothing touches its memory any more (2.4.1).
        if std::mem::take(&mut self.active) {
            self.device.reset();
        }
        self.common.reset();
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match Region::find(offset, data.len()) {
            Some((Region::Common, at)) => self.common.read(at, data),
            Some((Region::Device, at)) => self.device.read_config(at, data),
            Some((Region::MsixTable, at)) => self.msix.read_table(at as usize, data),
            Some((Region::MsixPending, at)) => self.msix.read_pending(at as usize, data),
            // The ISR status serves interrupt pins, so without them it is always zero. Notifications are write-only.
            Some((Region::Isr | Region::Notify, _)) | None => {}
        }
    }
}

/// Returns the PCI class code: programming interface, subclass, class (PCI code and ID assignment specification).
fn class(device_type: u32) -> [u8; 3] {
    match device_type {
        1 => [0, 0, 2],    // Ethernet controller
        2 => [0, 0, 1],    // mass storage
        3 => [0, 0x80, 7], // other communication controller
        _ => [0, 0, 0xff],
    }
}

impl BusDevice for VirtioPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bar_read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match Region::find(offset, data.len()) {
            Some((Region::Common, at)) => match self.common.write(at, data) {
                Request::Activate => self.activate(),
                Request::Reset => self.reset(),
                Request::None => {}
            },
            Some((Region::MsixTable, at)) => self.msix.write_table(at as usize, data),
            // KVM handles notifications by its ioeventfds; those through the window of configuration space come here.
            Some((Region::Notify, at)) => {
                if let Some(kick) = self.kicks.get(at as usize / 4) {
                    let _ = kick.write(1);
                }
            }
            _ => {}
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        // A read of pci_cfg_data performs the access to the BAR that the window describes (4.1.4.9.1).
        self.config.read(offset, data, &self.msix);
        if let Some(access) = self.config.window(offset, data.len()) {
            self.bar_read(access.offset, &mut data[..access.len]);
        }
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        if let Some(access) = self.config.window(offset, data.len()) {
            BusDevice::write(self, access.offset, &data[..access.len]);
        } else {
            self.config.write(offset, data, &self.msix);
        }
    }
}
