//! The memory map, as both boot protocols tell it.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{layout, memory::GuestRam};

/// Type of an entry: usable memory.
pub(super) const RAM: u32 = 1;
/// Type of an entry: not to be used, nor given to devices.
pub(super) const RESERVED: u32 = 2;

/// `(start, length, type)` in ascending order.
pub(super) fn entries(memory: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::EBDA_START, RAM),
        // ACPI tables live here; Linux finds them by address, the rest of the hole stays unused.
        (layout::EBDA_START, layout::ONE_MIB - layout::EBDA_START, RESERVED),
    ];
    let mut ecam = Some((layout::PCI_ECAM_START, layout::PCI_ECAM_SIZE, RESERVED));
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::ONE_MIB);
        let end = region.start_addr().0 + region.len();
        if start >= layout::HIGH_MEMORY_START {
            map.extend(ecam.take());
        }
        map.push((start, end - start, RAM));
    }
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
