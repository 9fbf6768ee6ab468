//! A driver's accesses to a function's configuration space and registers, interrupts included. Needs /dev/kvm.
#![no_main]

use std::{
    cell::RefCell,
    sync::{Arc, Mutex},
};

use arbitrary::Arbitrary;
use bulkhead_vmm::{
    bus::BusDevice,
    devices::{
        pci_root::PciFunction,
        virtio::{ActivateError, Activation, VirtioDevice, pci::VirtioPci},
    },
    exit::ExitSignal,
    interrupts::GsiRouter,
    memory::GuestRam,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

#[derive(Arbitrary, Debug)]
enum Step {
    ConfigRead {
        offset: u16,
        width: u8,
    },
    ConfigWrite {
        offset: u8,
        width: u8,
        value: u32,
    },
    Read {
        offset: u16,
        width: u8,
    },
    Write {
        offset: u16,
        width: u8,
        value: u64,
    },
    /// A register of the common structure.
    Common {
        offset: u8,
        width: u8,
        value: u64,
    },
    /// The MSI-X table.
    Table {
        offset: u8,
        width: u8,
        value: u64,
    },
}

/// A device that triggers all that it was given.
struct Device;

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        4
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 16]
    }

    fn features(&self) -> u64 {
        0xff00_00ff
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        activation.config_interrupt.trigger();
        for queue in activation.queues.into_iter().flatten() {
            queue.interrupt.trigger();
        }
        Ok(())
    }

    fn reset(&mut self) {}
}

fn make() -> Option<Arc<Mutex<VirtioPci>>> {
    let vm = kvm_ioctls::Kvm::new().ok()?.create_vm().ok()?;
    vm.create_irq_chip().ok()?;
    let vm = Arc::new(vm);
    let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).ok()?);
    let router = GsiRouter::new(Arc::clone(&vm));
    VirtioPci::new(Box::new(Device), memory, &vm, &router, 0xc000_0000, ExitSignal::new().ok()?).ok()
}

thread_local! {
    /// One function for all inputs, reset before each: a VM costs milliseconds.
    static FUNCTION: RefCell<Option<Arc<Mutex<VirtioPci>>>> = RefCell::new(make());
}

fn width(code: u8) -> usize {
    1 << (code % 4)
}

fuzz_target!(|steps: Vec<Step>| {
    FUNCTION.with_borrow(|function| {
        let function = function.as_ref().expect("this target needs a usable /dev/kvm");
        let mut function = function.lock().expect("no target holds it");
        // Status 0 resets the device (virtio 1.3, 4.1.4.3).
        function.write(0x14, &[0]);
        for step in steps.into_iter().take(64) {
            match step {
                Step::ConfigRead { offset, width: code } => {
                    function.config_read(usize::from(offset % 4096), &mut [0; 8][..width(code).min(4)]);
                }
                Step::ConfigWrite { offset, width: code, value } => {
                    function.config_write(usize::from(offset), &value.to_le_bytes()[..width(code).min(4)]);
                }
                Step::Read { offset, width: code } => function.read(u64::from(offset), &mut [0; 8][..width(code)]),
                Step::Write { offset, width: code, value } => {
                    function.write(u64::from(offset), &value.to_le_bytes()[..width(code)]);
                }
                Step::Common { offset, width: code, value } => {
                    function.write(u64::from(offset % 0x40), &value.to_le_bytes()[..width(code)]);
                }
                Step::Table { offset, width: code, value } => {
                    function.write(0x4000 + u64::from(offset), &value.to_le_bytes()[..width(code)]);
                }
            }
        }
    });
});
