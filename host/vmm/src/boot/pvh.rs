//! Boot parameters of PVH (Xen, `docs/misc/pvh.pandoc`: x86/HVM direct boot ABI).

use linux_loader::{
    configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator},
    loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info},
};
use vm_memory::GuestAddress;

use super::memory_map;
use crate::{error::VmmError, layout, memory::GuestRam};

/// `XEN_HVM_START_MAGIC_VALUE`, "xEn3" with the top bit of the E set.
const MAGIC: u32 = 0x336e_c578;

pub(super) fn write(memory: &GuestRam, rsdp: u64) -> Result<(), VmmError> {
    let map: Vec<_> = memory_map::entries(memory)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        // The first version with a memory map. A kernel of version 0 ignores it.
        version: 1,
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMMAP_START,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_INFO_START));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMMAP_START));
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|_| VmmError::GuestMemory("the PVH start information"))
}
