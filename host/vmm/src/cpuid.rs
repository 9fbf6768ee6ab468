//! What CPUID tells the guest: what KVM supports, with the topology of this machine.

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

/// The leaves for every vCPU; [`for_vcpu`] puts in what differs between them.
pub(super) fn supported(kvm_fd: &Kvm) -> Result<CpuId, VmmError> {
    let mut cpuid = kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("list CPU features"))?;
    let deadline = kvm_fd.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                if deadline {
                    entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
                // Containers get no nested virtualisation: less of KVM in reach of a hostile guest.
                entry.ecx &= !LEAF1_ECX_VMX;
            }
            0x8000_0001 => entry.ecx &= !EXTENDED1_ECX_SVM,
            _ => {}
        }
    }
    Ok(cpuid)
}

/// The leaves of one vCPU. Each vCPU is a core of its own in one package; its APIC id is its index.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, cpus: u8) -> Result<CpuId, VmmError> {
    let mut entries: Vec<_> = supported.as_slice().iter().copied().filter(|e| !is_topology(e.function)).collect();
    let (id, cpus) = (u32::from(id), u32::from(cpus));
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | (cpus.next_power_of_two() & 0xff) << 16 | id << 24;
                if cpus > 1 {
                    entry.edx |= LEAF1_EDX_HTT;
                }
            }
            4 => entry.eax = entry.eax & 0x3fff | ((1 << core_bits) - 1) << 26,
            0x8000_0008 => entry.ecx = (cpus - 1) & 0xff | core_bits << 12,
            0x8000_001d => entry.eax &= 0x3fff,
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
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

/// Leaves that are made here instead of filtered.
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
