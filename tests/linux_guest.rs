//! The guest kernel on a KVM that can run it. `scripts/test` runs this suite where there is one, or inside the
//! emulated AMD-V machine; `BULKHEAD_KERNEL` names the directory that `firmware/build guest` prints.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

use std::{path::PathBuf, time::Duration};

use bulkhead_vmm::api::{Event, ExitReason, VmConfig};
use support::{guest::machine, vmm::Vmm};

/// Emulation is some thirty times slower than hardware.
const BOOT: Duration = Duration::from_secs(60);

fn kernel(image: &str) -> PathBuf {
    PathBuf::from(std::env::var("BULKHEAD_KERNEL").expect("BULKHEAD_KERNEL names the kernel's directory")).join(image)
}

/// Boots without a root file system: the kernel goes through all of its start and panics.
fn last_words(image: &str, change: impl FnOnce(&mut VmConfig)) -> (ExitReason, String) {
    let dir = tempfile::tempdir().unwrap();
    let console = dir.path().join("console.log");
    let mut config = machine(kernel(image));
    config.memory_mib = 256;
    config.console = Some(console.clone());
    config.cmdline = "console=hvc0 panic=-1 8250.nr_uarts=0".into();
    change(&mut config);
    let vmm = Vmm::boot(config);
    assert!(matches!(vmm.event(BOOT), Some(Event::Started { .. })));
    let reason = vmm.exit(BOOT);
    (reason, std::fs::read_to_string(console).unwrap())
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn an_elf_kernel_boots_by_pvh_and_its_panic_ends_the_machine_with_its_last_words() {
    let (reason, words) = last_words("vmlinux", |_| {});
    assert_eq!(reason, ExitReason::Panic, "{words}");
    assert!(words.contains("6.12.") && words.contains("Unable to mount root fs"), "{words}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_bzimage_boots_by_the_64_bit_entry() {
    let (reason, words) = last_words("bzImage", |_| {});
    assert_eq!(reason, ExitReason::Panic, "{words}");
    assert!(words.contains("Unable to mount root fs"), "{words}");
}

/// Everything that the kernel says, from its first line on: the virtio console begins only when its driver does.
fn whole_log(change: impl FnOnce(&mut VmConfig)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial.log");
    last_words("vmlinux", |config| {
        config.serial = Some(serial.clone());
        config.cmdline = "console=ttyS0 panic=-1".into();
        change(config);
    });
    std::fs::read_to_string(&serial).unwrap()
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn all_vcpus_come_up_and_memory_above_4_gib_is_there() {
    let log = whole_log(|config| (config.cpus, config.memory_mib) = (4, 4096));
    assert!(log.contains("smp: Brought up 1 node, 4 CPUs"), "{log}");
    assert!(log.contains("[mem 0x0000000100000000-0x000000013fffffff] usable"), "{log}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_serial_console_works_when_asked_for() {
    let log = whole_log(|_| {});
    assert!(log.contains("Linux version 6.12"), "{log}");
    assert!(log.contains("ACPI: Using ACPI (MADT) for SMP configuration information"), "{log}");
}
