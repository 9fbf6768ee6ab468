//! ACPI 6.5 tables in the hardware-reduced form (4.1): RSDP, XSDT, FADT, MADT, MCFG, and a DSDT with the devices that
//! the kernel cannot find by itself.

use acpi_tables::{
    Aml, aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace as GasSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress};

use crate::{devices::power, error::VmmError, layout, memory::GuestRam};

const OEM: [u8; 6] = *b"BULKHD";
const OEM_TABLE: [u8; 8] = *b"BULKHEAD";
const REVISION: u32 = 1;
/// Size of a table's header in bytes (ACPI 6.5, 5.2.6).
const HEADER: usize = 36;

/// Writes all tables and returns the address of the RSDP.
pub(super) fn write(memory: &GuestRam, cpus: u8, serial: bool) -> Result<u64, VmmError> {
    let mut area = Area { memory, next: layout::ACPI_START };
    // The RSDP comes first, where a kernel that searches the BIOS area finds it, too (5.2.5.1). Its contents need the
    // address of the XSDT, so they are written last.
    let rsdp_at = area.reserve(Rsdp::len())?;
    let dsdt = area.put(dsdt(serial).as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    // The FADT points to the DSDT, the XSDT to all other tables.
    for table in [bytes(&fadt(dsdt)), bytes(&madt(cpus)), bytes(&mcfg())] {
        xsdt.add_entry(area.put(&table)?);
    }
    let xsdt_at = area.put(&bytes(&xsdt))?;
    area.put_at(rsdp_at, &bytes(&Rsdp::new(OEM, xsdt_at)))?;
    Ok(rsdp_at)
}

/// The area for the tables, filled from its start.
struct Area<'a> {
    memory: &'a GuestRam,
    next: u64,
}

impl Area<'_> {
    fn reserve(&mut self, len: usize) -> Result<u64, VmmError> {
        let at = self.next;
        let end = at + len as u64;
        if end > layout::ACPI_END {
            return Err(VmmError::GuestMemory("the ACPI tables"));
        }
        // The RSDP must be aligned so; for the others it is only tidy.
        self.next = end.next_multiple_of(16);
        Ok(at)
    }

    fn put_at(&self, at: u64, table: &[u8]) -> Result<(), VmmError> {
        self.memory.write_slice(table, GuestAddress(at)).map_err(|_| VmmError::GuestMemory("the ACPI tables"))
    }

    fn put(&mut self, table: &[u8]) -> Result<u64, VmmError> {
        let at = self.reserve(table.len())?;
        self.put_at(at, table)?;
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed hardware: there is none but the sleep and reset registers (5.2.9).
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |address: u16| GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sleep_control_reg = port(layout::POWER_PORT + power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::POWER_PORT + power::SLEEP_STATUS);
    fadt.reset_reg = port(layout::POWER_PORT + power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    // VGA and CMOS clock are not present, and no bit announces legacy devices or a keyboard controller (5.2.9.3):
    // nothing for the kernel to probe.
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt.finalize()
}

/// Interrupt controllers: the local APIC of each vCPU and one I/O APIC (5.2.12).
fn madt(cpus: u8) -> MADT {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC_START as u32));
    // Processor UID and APIC ID are the index, as in CPUID.
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    // Its pins are GSIs from 0 on.
    madt.add_structure(IoApic::new(0, layout::IOAPIC_START as u32, 0));
    madt
}

/// The place of ECAM: segment 0, bus 0 to 0 (PCI firmware specification 3.3, 4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    mcfg.add_ecam(layout::PCI_ECAM_START, 0, 0, 0);
    mcfg
}

/// Devices in AML, and the value that switches the machine off.
fn dsdt(serial: bool) -> Sdt {
    let mut code = Vec::new();
    pci_root(&mut code);
    if serial {
        serial_port(&mut code);
    }
    // Soft off: the value for SLP_TYP of the sleep control register (7.4.2). No other sleep state is defined.
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&power::SLEEP_TYPE_OFF, &0u8])).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER as u32, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

/// The PCI Express root with its bus and the window for BARs, and the reservation of ECAM.
fn pci_root(code: &mut Vec<u8>) {
    let window = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MMIO_START as u32,
        (layout::PCI_MMIO_START + layout::PCI_MMIO_SIZE - 1) as u32,
        None,
    );
    // PNP0A08 is a PCI Express root bridge, PNP0A03 a PCI one for kernels that know no other. There is no _PRT: all
    // functions use MSI-X, so no interrupt pin has to be routed.
    aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::AddressSpace::new_bus_number(0u16, 0u16), &window]),
            ),
        ],
    )
    .to_aml_bytes(code);
    // Linux trusts the MCFG only for a range that is reserved, by a motherboard resource (PCI firmware specification,
    // 4.1.2) or by the memory map. Both do it here.
    aml::Device::new(
        "_SB_.ECAM".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(
                    true,
                    layout::PCI_ECAM_START as u32,
                    layout::PCI_ECAM_SIZE as u32,
                )]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

/// A 16550 with its fixed port and interrupt (edge-triggered, active high, as on any PC).
fn serial_port(code: &mut Vec<u8>) {
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    &aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn read(memory: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_its_bytes_sum_to_zero() {
        let memory = memory::create(64).unwrap();
        let rsdp = write(&memory, 32, true).unwrap();
        let root = read(&memory, rsdp, Rsdp::len());
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(sum(&root[..20]), 0);
        assert_eq!(sum(&root), 0);
        let table = |at: u64| {
            let len = u32::from_le_bytes(read(&memory, at + 4, 4).try_into().unwrap());
            let bytes = read(&memory, at, len as usize);
            assert_eq!(sum(&bytes), 0, "{}", String::from_utf8_lossy(&bytes[..4]));
            bytes
        };
        let xsdt = table(u64::from_le_bytes(root[24..32].try_into().unwrap()));
        let mut seen = Vec::new();
        for entry in xsdt[HEADER..].chunks(8) {
            let bytes = table(u64::from_le_bytes(entry.try_into().unwrap()));
            if &bytes[..4] == b"FACP" {
                seen.push(table(u64::from_le_bytes(bytes[140..148].try_into().unwrap()))[..4].to_vec());
            }
            seen.push(bytes[..4].to_vec());
        }
        seen.sort();
        assert_eq!(seen, [b"APIC", b"DSDT", b"FACP", b"MCFG"]);
    }
}
