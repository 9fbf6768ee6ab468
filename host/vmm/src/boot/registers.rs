//! Initial registers of the first vCPU. The others keep KVM's reset state, since the kernel wakes them by INIT and
//! SIPI.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::Entry;
use crate::{
    error::{VmmError, kvm},
    layout,
    memory::GuestRam,
};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Interrupts disabled; bit 1 is reserved and always set (Intel SDM 1, 3.4.3).
const RFLAGS: u64 = 2;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MSR_MISC_ENABLE: u32 = 0x1a0;

/// Returns a flat segment of 4 GiB for slot `index` of the GDT.
fn segment(index: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Returns a segment's descriptor in the GDT (Intel SDM 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    // With the granularity bit the limit counts in units of 4 KiB.
    let limit = u64::from(segment.limit >> 12);
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

pub(super) fn set(vcpu: &VcpuFd, memory: &GuestRam, entry: Entry) -> Result<(), VmmError> {
    let long = matches!(entry, Entry::Linux64 { .. });
    // The Linux boot protocol asks for __BOOT_CS at 0x10 and __BOOT_DS at 0x18. PVH asks for flat segments only, so
    // both get the same. Types: code, execute and read, accessed; data, read and write, accessed.
    let code = segment(2, 0xb, long);
    let data = segment(3, 0x3, false);
    // A busy TSS: without one a VM entry fails (Intel SDM 3C, 27.3.1.2). Nothing uses it before the kernel loads its
    // own.
    let mut task = segment(4, 0xb, false);
    (task.s, task.limit, task.db, task.g) = (0, 0x67, 0, 0);
    for (i, value) in [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)].into_iter().enumerate() {
        memory
            .write_obj(value, GuestAddress(layout::GDT_START + i as u64 * 8))
            .map_err(|_| VmmError::GuestMemory("the GDT"))?;
    }
    // One gate that is not present: an exception before the kernel has an IDT of its own ends in a triple fault, which
    // ends the machine with a reason instead of running wild. The GDT reaches into the first 8 bytes of the area.
    memory.write_obj(0u64, GuestAddress(layout::IDT_START + 8)).map_err(|_| VmmError::GuestMemory("the IDT"))?;

    let mut special = vcpu.get_sregs().map_err(kvm("read registers"))?;
    special.gdt.base = layout::GDT_START;
    special.gdt.limit = 5 * 8 - 1;
    special.idt.base = layout::IDT_START + 8;
    special.idt.limit = 7;
    special.cs = code;
    for segment in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
        *segment = data;
    }
    special.tr = task;
    // Protected mode; ET is hard-wired on today's processors.
    special.cr0 = CR0_PE | CR0_ET;
    special.cr4 = 0;
    let mut general = kvm_regs { rflags: RFLAGS, ..Default::default() };
    match entry {
        Entry::Pvh { address } => {
            general.rip = address;
            general.rbx = layout::PVH_INFO_START;
        }
        Entry::Linux64 { address } => {
            general.rip = address;
            general.rsi = layout::ZERO_PAGE_START;
            // Long mode is active (LMA) once it is enabled (LME) and paging is on, which takes PAE (Intel SDM 3A,
            // 10.8.5).
            special.cr3 = layout::PAGE_TABLES_START;
            special.cr4 = CR4_PAE;
            special.cr0 |= CR0_PG;
            special.efer = EFER_LME | EFER_LMA;
        }
    }
    vcpu.set_sregs(&special).map_err(kvm("set registers"))?;
    vcpu.set_regs(&general).map_err(kvm("set registers"))
}

/// Sets the model-specific registers of a vCPU: fast string operations, and write-back as the default type of memory.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<(), VmmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    // Bit 11 enables the MTRRs, type 6 is write-back (Intel SDM 3A, 12.11.2.1). At reset they are disabled, and the
    // kernel would take all memory for uncacheable.
    let entries = [entry(MSR_MISC_ENABLE, 1), entry(MSR_MTRR_DEF_TYPE, 1 << 11 | 6)];
    let msrs = Msrs::from_entries(&entries).map_err(|_| VmmError::KvmCapability("setting two MSRs at once"))?;
    // KVM stops at the first register that it does not take, without an error (KVM API, KVM_SET_MSRS).
    match entries.get(vcpu.set_msrs(&msrs).map_err(kvm("set MSRs"))?) {
        None => Ok(()),
        Some(refused) => Err(VmmError::Msr(refused.index)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_code_segment_has_the_descriptor_every_manual_shows() {
        assert_eq!(descriptor(&segment(2, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(3, 0x3, false)), 0x00cf_9300_0000_ffff);
    }
}
