//! Linux boot protocol parameters ("zero page") and the page tables its 64-bit entry wants.

use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::bootparam::{boot_e820_entry, boot_params, setup_header},
};
use vm_memory::{Bytes, GuestAddress};

use super::memory_map;
use crate::{error::VmmError, layout, memory::GuestRam};

/// "No boot loader id assigned".
const LOADER_UNDEFINED: u8 = 0xff;

pub(super) fn write(memory: &GuestRam, rsdp: u64, header: setup_header) -> Result<(), VmmError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE_START as u32;
    params.hdr.cmdline_size = layout::MAX_CMDLINE as u32;
    let map = memory_map::entries(memory);
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (slot, (addr, size, type_)) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, r#type: type_ };
    }
    params.e820_table = table;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(layout::ZERO_PAGE_START)), memory)
        .map_err(|_| VmmError::GuestMemory("the zero page"))?;
    write_page_tables(memory)
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
fn write_page_tables(memory: &GuestRam) -> Result<(), VmmError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 0x1000;
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
