//! The memory map, which both boot protocols pass in the form of E820.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{layout, memory::GuestRam};

/// Type of usable memory.
pub(super) const RAM: u32 = 1;
/// Type of an area that is neither memory nor free for devices.
pub(super) const RESERVED: u32 = 2;

/// Returns the entries `(start, length, type)` in ascending order.
pub(super) fn entries(memory: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::EBDA_START, RAM),
        // Guest memory in fact, which holds the ACPI and SMBIOS tables. The kernel must not use it for anything else.
        (layout::EBDA_START, layout::ONE_MIB - layout::EBDA_START, RESERVED),
    ];
    // Linux uses ECAM only if the memory map or ACPI reserves it. It lies between low and high memory.
    let mut ecam = Some((layout::PCI_ECAM_START, layout::PCI_ECAM_SIZE, RESERVED));
    for region in memory.iter() {
        // The first megabyte is covered above.
        let start = region.start_addr().0.max(layout::ONE_MIB);
        let end = region.start_addr().0 + region.len();
        if start >= layout::HIGH_MEMORY_START {
            map.extend(ecam.take());
        }
        map.push((start, end - start, RAM));
    }
    // A small machine has no memory behind the hole.
    map.extend(ecam.take());
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn entries_ascend_without_overlap_and_cover_all_memory_but_the_low_hole() {
        for mib in [64, 3072, 5000] {
            let map = entries(&memory::create(mib).unwrap());
            assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{map:?}");
            let ram: u64 = map.iter().filter(|entry| entry.2 == RAM).map(|entry| entry.1).sum();
            assert_eq!(ram, (mib << 20) - (layout::ONE_MIB - layout::EBDA_START));
        }
    }
}
