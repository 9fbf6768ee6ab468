//! Disk requests in any guest memory, on any kind of disk.
#![no_main]

use std::{fs::File, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};

static DISK: LazyLock<File> = LazyLock::new(|| {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.set_len(64 * 512).expect("room for a disk");
    file
});

fuzz_target!(|data: (bool, &[u8])| bulkhead_vmm::devices::virtio::block::fuzzing::requests(&DISK, data.0, data.1));
