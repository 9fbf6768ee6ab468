//! Guest memory: one memfd, mapped shared, so that vhost-user processes can map it, too.

use std::{fs::File, io};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection};

use super::{
    error::{VmmError, kvm},
    layout,
};

pub use bulkhead_queue::GuestRam;

/// Returns the ranges of a guest memory of so many bytes: below the hole for devices and, for the rest, above 4 GiB.
pub fn ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(layout::LOW_MEMORY_END);
    let mut ranges = vec![(GuestAddress(0), low)];
    if bytes > low {
        ranges.push((GuestAddress(layout::HIGH_MEMORY_START), bytes - low));
    }
    ranges
}

/// Creates guest memory of `mib` MiB, at least 64 MiB. Nothing is resident until the guest touches it.
pub fn create(mib: u64) -> Result<GuestRam, VmmError> {
    // A kernel with its structures needs some memory below the hole; the upper bound keeps sums of addresses far from
    // 2^64.
    let bytes = mib
        .checked_mul(1 << 20)
        .filter(|bytes| (64 << 20..1 << 44).contains(bytes))
        .ok_or(VmmError::Memory { mib, source: io::Error::from(io::ErrorKind::InvalidInput) })?;
    let file = memfd(bytes).map_err(|source| VmmError::Memory { mib, source })?;
    let mut offset = 0;
    let mut files = Vec::new();
    // The ranges follow each other in the file, so the hole costs nothing.
    for (address, len) in ranges(bytes) {
        let file = file.try_clone().map_err(|source| VmmError::Memory { mib, source })?;
        files.push((address, len as usize, Some(FileOffset::new(file, offset))));
        offset += len;
    }
    let memory = GuestRegionCollection::from_ranges_with_files(files).map_err(VmmError::MapMemory)?;
    advise_huge_pages(&memory);
    exclude_from_cores(&memory).map_err(|source| VmmError::Memory { mib, source })?;
    Ok(memory)
}

fn memfd(bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    // The network process maps this memory, too. If it could shrink the file, the next access to the lost pages would
    // end this process with SIGBUS.
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
    Ok(file)
}

/// Asks for transparent huge pages. This is a hint: shmem ignores it unless the host's `shmem_enabled` is `advise` or
/// `always`.
fn advise_huge_pages(memory: &GuestRam) {
    for region in memory.iter() {
        // SAFETY: the range is exactly one mapping of this process, and MADV_HUGEPAGE changes no contents.
        unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
}

/// Keeps guest memory out of core dumps, whatever the limits of the process are: it holds what containers hold.
fn exclude_from_cores(memory: &GuestRam) -> io::Result<()> {
    for region in memory.iter() {
        // SAFETY: the range is exactly one mapping of this process, and MADV_DONTDUMP changes no contents.
        if unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_DONTDUMP) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Maps guest memory into the VM, one slot for each range (KVM API, KVM_SET_USER_MEMORY_REGION).
pub fn register(vm: &VmFd, memory: &GuestRam) -> Result<(), VmmError> {
    for (slot, region) in memory.iter().enumerate() {
        let description = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region stays mapped as long as the VM: both live until the process ends.
        unsafe { vm.set_user_memory_region(description) }.map_err(kvm("map guest memory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_add_up_and_leave_the_device_hole_free(mib in 64u64..1 << 20) {
            let ranges = ranges(mib << 20);
            prop_assert_eq!(ranges.iter().map(|(_, len)| len).sum::<u64>(), mib << 20);
            for (start, len) in ranges {
                let end = start.0 + len;
                prop_assert!(end <= layout::LOW_MEMORY_END || start.0 >= layout::HIGH_MEMORY_START);
            }
        }
    }

    #[test]
    fn guest_memory_is_not_part_of_a_core() {
        let memory = create(64).unwrap();
        let start = format!("{:x}-", memory.iter().next().unwrap().as_ptr() as u64);
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = smaps.split_once(&start).unwrap().1;
        let flags = mapping.lines().find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.split_ascii_whitespace().any(|flag| flag == "dd"), "{flags}");
    }

    #[test]
    fn memory_sizes_that_make_no_machine_are_refused() {
        for mib in [0, 1, 63, 1 << 30, u64::MAX] {
            assert!(create(mib).is_err(), "{mib} MiB");
        }
    }
}
