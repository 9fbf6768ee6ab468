//! Leaves as AMD defines them (AMD64 manual, volume 3, appendix E).

use kvm_bindings::kvm_cpuid_entry2;

use super::{Place, field::Field};

/// Leaf 0x8000_0001: HTT means several cores, not threads.
const CMP_LEGACY: Field = Field::new(1, 1);
/// Leaf 0x8000_0001: counters of the core, the northbridge and the last-level cache.
const COUNTERS: [Field; 3] = [Field::new(23, 1), Field::new(24, 1), Field::new(28, 1)];
/// Leaf 0x8000_0008: one less than the number of cores, and the bits of an APIC ID that number them.
const LAST_CORE: Field = Field::new(0, 8);
const CORE_ID_BITS: Field = Field::new(12, 4);

/// Sets the leaves that depend on the vCPU.
pub(super) fn place(entry: &mut kvm_cpuid_entry2, place: Place) {
    match entry.function {
        0x8000_0001 => CMP_LEGACY.set(&mut entry.ecx, u32::from(place.cpus > 1)),
        0x8000_0008 => {
            LAST_CORE.set(&mut entry.ecx, place.cpus - 1);
            CORE_ID_BITS.set(&mut entry.ecx, place.core_bits());
        }
        // A leaf without a cache ends the list, and is zero.
        0x8000_001d if entry.eax != 0 => place.share_cache(&mut entry.eax),
        // APIC ID, core ID with one thread for each core, node 0 of one.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (place.id, place.id, 0),
        _ => {}
    }
}

/// Announces no performance counters.
pub(super) fn hide_counters(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        0x8000_0001 => COUNTERS.iter().for_each(|counters| counters.set(&mut entry.ecx, 0)),
        // Performance monitoring and debug.
        0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}
