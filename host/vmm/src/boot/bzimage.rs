//! Parameters of the Linux boot protocol (the "zero page"), and the page tables that its 64-bit entry point requires
//! (`Documentation/arch/x86/boot.rst` and `zero-page.rst`).

use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::bootparam::{boot_e820_entry, boot_params, setup_header},
};
use vm_memory::{Bytes, GuestAddress};

use super::memory_map;
use crate::{error::VmmError, layout, memory::GuestRam};

/// `type_of_loader` of a boot loader without an assigned ID.
const LOADER_UNDEFINED: u8 = 0xff;

pub(super) fn write(memory: &GuestRam, rsdp: u64, header: setup_header) -> Result<(), VmmError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    // The fields that a boot loader has to fill in; all others stay as the image has them.
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE_START as u32;
    params.hdr.cmdline_size = layout::MAX_CMDLINE as u32;
    let map = memory_map::entries(memory);
    // A handful of entries, far below the table's 128.
    params.e820_entries = map.len() as u8;
    // Copied out and back: the structure is packed, and a reference to its field could be unaligned.
    let mut table = params.e820_table;
    for (slot, (addr, size, type_)) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, r#type: type_ };
    }
    params.e820_table = table;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(layout::ZERO_PAGE_START)), memory)
        .map_err(|_| VmmError::GuestMemory("the zero page"))?;
    write_page_tables(memory)
}

/// Maps the first 4 GiB to themselves with pages of 2 MiB. Kernel, zero page and command line must be mapped.
fn write_page_tables(memory: &GuestRam) -> Result<(), VmmError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 0x1000;
    // One PML4 entry, four entries of the next level, and four page directories (Intel SDM 3A, 4.5).
    let pdpt = layout::PAGE_TABLES_START + PAGE;
    let put = |value: u64, at: u64| {
        memory.write_obj(value.to_le(), GuestAddress(at)).map_err(|_| VmmError::GuestMemory("the page table"))
    };
    put(pdpt | PRESENT_WRITABLE, layout::PAGE_TABLES_START)?;
    for gib in 0..4 {
        let directory = pdpt + PAGE * (gib + 1);
        put(directory | PRESENT_WRITABLE, pdpt + gib * 8)?;
        for i in 0..512 {
            put((gib << 30) | (i << 21) | LARGE | PRESENT_WRITABLE, directory + i * 8)?;
        }
    }
    Ok(())
}
