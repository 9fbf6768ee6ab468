//! CPUID of the guest: the features that KVM supports, with the topology of this machine (Intel SDM 2A, CPUID; AMD64
//! manual, volume 3, appendix E). The leaves on which the vendors differ are in [`intel`] and [`amd`].

mod amd;
mod field;
mod intel;
#[cfg(test)]
mod tests;

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::error::{VmmError, kvm};
use field::Field;

const LEAF1_EBX_IDS: Field = Field::new(16, 8);
const LEAF1_EBX_APIC_ID: Field = Field::new(24, 8);
const LEAF1_ECX_VMX: Field = Field::new(5, 1);
const LEAF1_ECX_TSC_DEADLINE: Field = Field::new(24, 1);
const LEAF1_ECX_HYPERVISOR: Field = Field::new(31, 1);
const LEAF1_EDX_HTT: Field = Field::new(28, 1);
const EXTENDED1_ECX_SVM: Field = Field::new(2, 1);
/// Fields of a cache, in the same places on both vendors' leaves: its level, and one less than the number of APIC IDs
/// that share it.
const CACHE_LEVEL: Field = Field::new(5, 3);
const CACHE_SHARING: Field = Field::new(14, 12);
/// The last level that a core has for itself.
const LAST_PRIVATE_LEVEL: u32 = 2;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// The processor's name, 48 bytes in three leaves.
const BRAND: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

/// The vendors whose leaves are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Intel,
    /// Also Hygon.
    Amd,
    Other,
}

/// The place of a vCPU among the others. Each is a core of its own in one package, and its APIC ID is its index.
#[derive(Clone, Copy)]
struct Place {
    id: u32,
    cpus: u32,
}

impl Place {
    /// Bits of an APIC ID that number the cores. IDs are cut into fields of whole bits.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    /// One less than the number of APIC IDs of the package.
    fn last_id(self) -> u32 {
        self.cpus.next_power_of_two() - 1
    }

    /// Sets the sharing of the cache that `eax` describes. The caches next to a core are its own, the last level is
    /// shared by all: the guest's scheduler looks for an idle vCPU among those with a common cache.
    fn share_cache(self, eax: &mut u32) {
        let shared = if CACHE_LEVEL.get(*eax) > LAST_PRIVATE_LEVEL { self.last_id() } else { 0 };
        CACHE_SHARING.set(eax, shared);
    }
}

/// Returns the leaves that all vCPUs share; [`for_vcpu`] adds those that differ.
pub(super) fn supported(kvm_fd: &Kvm) -> Result<CpuId, VmmError> {
    let cpuid = kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("list CPU features"))?;
    common(cpuid.as_slice(), kvm_fd.check_extension(Cap::TscDeadlineTimer), &brand())
}

/// Returns the leaves of one vCPU.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, cpus: u8) -> Result<CpuId, VmmError> {
    let place = Place { id: u32::from(id), cpus: u32::from(cpus) };
    let vendor = vendor(supported.as_slice());
    let mut entries: Vec<_> = supported.as_slice().iter().copied().filter(|e| !is_topology(e.function)).collect();
    for entry in &mut entries {
        if entry.function == 1 {
            LEAF1_EBX_APIC_ID.set(&mut entry.ebx, place.id);
            // The number of IDs in the package counts only with HTT set.
            LEAF1_EBX_IDS.set(&mut entry.ebx, place.last_id() + 1);
            LEAF1_EDX_HTT.set(&mut entry.edx, u32::from(cpus > 1));
        }
        match vendor {
            Vendor::Intel => intel::place(entry, place),
            Vendor::Amd => amd::place(entry, place),
            Vendor::Other => {}
        }
    }
    // Extended topology, which both vendors' kernels prefer to the leaves above: one thread in a core, `cpus` cores in
    // the package. KVM returns zeroes for further levels, which ends the list.
    let leaf_b = |index, eax, ebx, level: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | level << 8,
        edx: place.id,
        ..Default::default()
    };
    entries.extend([leaf_b(0, 0, 1, LEVEL_SMT), leaf_b(1, place.core_bits(), place.cpus, LEVEL_CORE)]);
    leaves(&entries)
}

fn common(supported: &[kvm_cpuid_entry2], deadline: bool, brand: &[kvm_cpuid_entry2]) -> Result<CpuId, VmmError> {
    let vendor = vendor(supported);
    let mut entries = supported.to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => {
                // Makes the guest look for KVM's own leaves at 0x4000_0000 (clock, steal time).
                LEAF1_ECX_HYPERVISOR.set(&mut entry.ecx, 1);
                // KVM never lists this feature by itself, because it depends on the in-kernel interrupt controller,
                // which this machine has (KVM API, KVM_GET_SUPPORTED_CPUID).
                if deadline {
                    LEAF1_ECX_TSC_DEADLINE.set(&mut entry.ecx, 1);
                }
                // No nested virtualization: much less of KVM is in reach of a hostile guest.
                LEAF1_ECX_VMX.set(&mut entry.ecx, 0);
            }
            0x8000_0001 => EXTENDED1_ECX_SVM.set(&mut entry.ecx, 0),
            _ => {}
        }
        match vendor {
            Vendor::Intel => intel::hide_counters(entry),
            Vendor::Amd => amd::hide_counters(entry),
            Vendor::Other => {}
        }
    }
    // KVM lists no name, and a guest would show the family and model instead.
    if let (Some(last), Some(extended)) = (brand.last(), entries.iter_mut().find(|entry| entry.function == 0x8000_0000))
    {
        extended.eax = extended.eax.max(last.function);
        entries.retain(|entry| !BRAND.contains(&entry.function));
        entries.extend(brand);
    }
    leaves(&entries)
}

/// Returns the host's name of its processor; nothing if it has none.
fn brand() -> Vec<kvm_cpuid_entry2> {
    // SAFETY: every x86-64 processor has the instruction. Older compilers call it unsafe for the sake of others.
    #[allow(unused_unsafe, reason = "newer compilers call it safe")]
    let cpuid = |function| unsafe { __cpuid(function) };
    if cpuid(0x8000_0000).eax < *BRAND.end() {
        return Vec::new();
    }
    let leaf = |function| {
        let raw = cpuid(function);
        kvm_cpuid_entry2 { function, eax: raw.eax, ebx: raw.ebx, ecx: raw.ecx, edx: raw.edx, ..Default::default() }
    };
    BRAND.map(leaf).collect()
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> Vendor {
    let name = entries.iter().find(|entry| entry.function == 0).map(|entry| {
        let words = [entry.ebx, entry.edx, entry.ecx];
        words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()
    });
    match name.as_deref() {
        Some(b"GenuineIntel") => Vendor::Intel,
        Some(b"AuthenticAMD" | b"HygonGenuine") => Vendor::Amd,
        _ => Vendor::Other,
    }
}

/// Leaves that describe the host's topology: 0xb is built here, the others are left out.
fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_0026)
}

fn leaves(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, VmmError> {
    CpuId::from_entries(entries).map_err(|_| VmmError::KvmCapability("so many CPUID leaves"))
}
