//! Leaves as Intel defines them (SDM 2A, CPUID).

use kvm_bindings::kvm_cpuid_entry2;

use super::{Place, field::Field};

/// Leaf 4: one less than the number of core IDs in the package.
const CACHE_CORE_IDS: Field = Field::new(26, 6);
/// Leaf 1: the MSR IA32_PERF_CAPABILITIES.
const LEAF1_ECX_PDCM: Field = Field::new(15, 1);

/// Sets the leaves that depend on the vCPU.
pub(super) fn place(entry: &mut kvm_cpuid_entry2, place: Place) {
    // A leaf 4 without a cache ends the list, and is zero.
    if entry.function == 4 && entry.eax != 0 {
        place.share_cache(&mut entry.eax);
        CACHE_CORE_IDS.set(&mut entry.eax, place.last_id());
    }
}

/// Announces no performance counters.
pub(super) fn hide_counters(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => LEAF1_ECX_PDCM.set(&mut entry.ecx, 0),
        // Architectural performance monitoring, and its extension.
        0xa | 0x23 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}
