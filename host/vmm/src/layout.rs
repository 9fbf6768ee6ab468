//! The guest's physical address space: all fixed addresses.

/// End of the memory that is contiguous from 0, and start of the hole for devices below 4 GiB.
pub const LOW_MEMORY_END: u64 = 0xC000_0000;
/// Start of the memory behind the hole.
pub const HIGH_MEMORY_START: u64 = 0x1_0000_0000;

/// Start of the area of EBDA, video memory and ROMs, which is reserved in the memory map as on any PC.
pub const EBDA_START: u64 = 0x9_FC00;
/// End of that area.
pub const ONE_MIB: u64 = 0x10_0000;

/// Initial GDT: five descriptors, 40 bytes.
pub const GDT_START: u64 = 0x500;
/// Initial IDT. Its one empty gate is at offset 8, behind the GDT's last descriptor.
pub const IDT_START: u64 = 0x520;
/// PVH `hvm_start_info`.
pub const PVH_INFO_START: u64 = 0x6000;
/// PVH memory map.
pub const PVH_MEMMAP_START: u64 = 0x6800;
/// Linux `boot_params` ("zero page").
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Identity-mapping page tables for the 64-bit entry: PML4, PDPT and four page directories.
pub const PAGE_TABLES_START: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Longest command line, terminator included.
pub const MAX_CMDLINE: usize = 0x1_0000;
/// ACPI tables, in the BIOS area that is reserved in the memory map.
pub const ACPI_START: u64 = 0xE_0000;
/// First byte after the area for ACPI tables.
pub const ACPI_END: u64 = SMBIOS_START;
/// SMBIOS entry point and structures: the first of the paragraphs that are searched for it (DSP0134, 5.2).
pub const SMBIOS_START: u64 = 0xF_0000;
/// Load address of a bzImage's protected-mode part.
pub const BZIMAGE_START: u64 = ONE_MIB;

/// 32-bit window for PCI BARs.
pub const PCI_MMIO_START: u64 = 0xC000_0000;
/// Its size in bytes.
pub const PCI_MMIO_SIZE: u64 = 0x1000_0000;
/// Enhanced configuration space (PCI Express base specification, 7.2.2): one bus.
pub const PCI_ECAM_START: u64 = 0xE000_0000;
/// Its size in bytes: 32 devices of 8 functions of 4 KiB.
pub const PCI_ECAM_SIZE: u64 = 0x10_0000;

/// I/O APIC registers (KVM's in-kernel irqchip).
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Local APIC registers.
pub const LOCAL_APIC_START: u64 = 0xFEE0_0000;
/// Three pages that VMX needs for real mode (`KVM_SET_TSS_ADDR`).
pub const TSS_START: u64 = 0xFFFB_D000;

/// I/O port of the 16550, when there is one.
pub const SERIAL_PORT: u16 = 0x3F8;
/// GSI of the 16550.
pub const SERIAL_GSI: u32 = 4;
/// I/O port of the ACPI sleep control register (ACPI 6.5, 4.8.3.7); status and reset follow.
pub const POWER_PORT: u16 = 0x600;

/// GSIs below this are the I/O APIC's pins; message-signalled interrupts are routed from here on.
pub const FIRST_MSI_GSI: u32 = 24;
