//! CPUID of the guest: the features that KVM supports, with the topology of this machine (Intel SDM 2A, CPUID; AMD64
//! manual, volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::error::{VmmError, kvm};

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXTENDED1_ECX_SVM: u32 = 1 << 2;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Returns the leaves that all vCPUs share; [`for_vcpu`] adds those that differ.
pub(super) fn supported(kvm_fd: &Kvm) -> Result<CpuId, VmmError> {
    let mut cpuid = kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("list CPU features"))?;
    let deadline = kvm_fd.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                // Makes the guest look for KVM's own leaves at 0x4000_0000 (clock, steal time).
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                // KVM never lists this feature by itself, because it depends on the in-kernel interrupt controller,
                // which this machine has (KVM API, KVM_GET_SUPPORTED_CPUID).
                if deadline {
                    entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
                // No nested virtualization: much less of KVM is in reach of a hostile guest.
                entry.ecx &= !LEAF1_ECX_VMX;
            }
            0x8000_0001 => entry.ecx &= !EXTENDED1_ECX_SVM,
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Returns the leaves of one vCPU. Each vCPU is a core of its own in one package, and its APIC ID is its index.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, cpus: u8) -> Result<CpuId, VmmError> {
    let mut entries: Vec<_> = supported.as_slice().iter().copied().filter(|e| !is_topology(e.function)).collect();
    let (id, cpus) = (u32::from(id), u32::from(cpus));
    // APIC IDs are cut into fields of whole bits, so numbers of cores are rounded up where an ID is derived from them.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    for entry in &mut entries {
        match entry.function {
            1 => {
                // Initial APIC ID, and the number of IDs in the package. The latter counts only with HTT set.
                entry.ebx = entry.ebx & 0xffff | (cpus.next_power_of_two() & 0xff) << 16 | id << 24;
                if cpus > 1 {
                    entry.edx |= LEAF1_EDX_HTT;
                }
            }
            // Caches, Intel: none is shared between cores (25:14 = 0); number of core IDs in the package (31:26).
            4 => entry.eax = entry.eax & 0x3fff | ((1 << core_bits) - 1) << 26,
            // AMD: number of cores (7:0), and bits of the APIC ID that number them (15:12).
            0x8000_0008 => entry.ecx = (cpus - 1) & 0xff | core_bits << 12,
            // Caches, AMD: none is shared between cores (25:14 = 0).
            0x8000_001d => entry.eax &= 0x3fff,
            // AMD: APIC ID, core ID with one thread for each core, node 0.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    // Extended topology, which both vendors' kernels prefer to the leaves above: one thread in a core, `cpus` cores in
    // the package. KVM returns zeroes for further levels, which ends the list.
    let leaf_b = |index, eax, ebx, level: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: 1, // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        eax,
        ebx,
        ecx: index | level << 8,
        edx: id,
        ..Default::default()
    };
    entries.extend([leaf_b(0, 0, 1, LEVEL_SMT), leaf_b(1, core_bits, cpus, LEVEL_CORE)]);
    CpuId::from_entries(&entries).map_err(|_| VmmError::KvmCapability("so many CPUID leaves"))
}

/// Leaves that describe the host's topology: 0xb is built here, the others are left out.
fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_0026)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_all_agree_on_the_topology() {
        let supported = CpuId::from_entries(&[
            kvm_cpuid_entry2 { function: 1, ..Default::default() },
            kvm_cpuid_entry2 { function: 0xb, edx: 99, ..Default::default() },
        ])
        .unwrap();
        for cpus in 1..=32 {
            for id in 0..cpus {
                let cpuid = for_vcpu(&supported, id, cpus).unwrap();
                let leaf = |function, index| {
                    *cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
                };
                assert_eq!(leaf(1, 0).ebx >> 24, u32::from(id));
                assert_eq!((leaf(0xb, 0).edx, leaf(0xb, 1).edx), (u32::from(id), u32::from(id)));
                assert_eq!(leaf(0xb, 1).ebx, u32::from(cpus));
                assert!(u32::from(cpus) <= 1 << leaf(0xb, 1).eax);
            }
        }
    }
}
