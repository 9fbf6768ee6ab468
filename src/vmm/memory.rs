//! Guest memory: one memfd, mapped shared, so that vhost-user processes can map it too.

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

/// Guest memory as every part of the VMM uses it.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// The ranges of guest memory of this size: below the device hole and, for the rest, above 4 GiB.
pub fn ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(layout::LOW_MEMORY_END);
    let mut ranges = vec![(GuestAddress(0), low)];
    if bytes > low {
        ranges.push((GuestAddress(layout::HIGH_MEMORY_START), bytes - low));
    }
    ranges
}

/// Makes guest memory of `mib` MiB. Nothing is resident until the guest touches it.
pub fn create(mib: u64) -> Result<GuestRam, VmmError> {
    let bytes = mib
        .checked_mul(1 << 20)
        .filter(|bytes| (64 << 20..1 << 44).contains(bytes))
        .ok_or(VmmError::Memory { mib, source: io::Error::from(io::ErrorKind::InvalidInput) })?;
    let file = memfd(bytes).map_err(|source| VmmError::Memory { mib, source })?;
    let mut offset = 0;
    let mut files = Vec::new();
    for (address, len) in ranges(bytes) {
        let file = file.try_clone().map_err(|source| VmmError::Memory { mib, source })?;
        files.push((address, len as usize, Some(FileOffset::new(file, offset))));
        offset += len;
    }
    let memory = GuestRegionCollection::from_ranges_with_files(files).map_err(VmmError::MapMemory)?;
    advise_huge_pages(&memory);
    Ok(memory)
}

fn memfd(bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    // A process that maps this memory may not shrink it under us (SIGBUS).
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
    Ok(file)
}

/// Asks for transparent huge pages; only a hint, shmem ignores it unless `shmem_enabled` is `advise` or `always`.
fn advise_huge_pages(memory: &GuestRam) {
    for region in memory.iter() {
        // SAFETY: the range is exactly one mapping of ours, and MADV_HUGEPAGE changes no contents.
        unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
}

/// Gives guest memory to the VM.
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
pub(crate) mod testing {
    //! Little guest memories with a queue in them, for property tests.

    use proptest::{collection::vec, prelude::*};

    /// The beginning of a guest memory: 16 descriptors at 0 that are nearly right, an available ring at 0x100 that
    /// offers some of them, and any bytes behind.
    pub(crate) fn queue() -> impl Strategy<Value = Vec<u8>> {
        let address = prop_oneof![8 => 0x300_u64..0x1_0100, 1 => any::<u64>()];
        let len = prop_oneof![8 => 0_u32..0x800, 1 => any::<u32>()];
        // VIRTQ_DESC_F_NEXT, WRITE and INDIRECT, and a flag that does not exist.
        let descriptor = (address, len, 0_u16..16, 0_u16..18).prop_map(|(address, len, flags, next)| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            bytes
        });
        let indirect = vec(descriptor.clone(), 0..8);
        let available = (0_u16..4, 0_u16..20, vec(0_u16..18, 16));
        (vec(descriptor, 16), available, indirect, vec(any::<u8>(), 0..600)).prop_map(
            |(descriptors, (flags, index, heads), indirect, rest)| {
                let mut bytes = descriptors.concat();
                bytes.extend(flags.to_le_bytes());
                bytes.extend(index.to_le_bytes());
                bytes.extend(heads.iter().flat_map(|head| head.to_le_bytes()));
                bytes.resize(0x300, 0);
                bytes.extend(indirect.concat());
                bytes.extend(rest);
                bytes
            },
        )
    }
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
    fn memory_sizes_that_make_no_machine_are_refused() {
        for mib in [0, 1, 63, 1 << 30, u64::MAX] {
            assert!(create(mib).is_err(), "{mib} MiB");
        }
    }
}
