//! SMBIOS 3.7 (DMTF DSP0134): manufacturer, product and UUID of the machine, which the guest shows in
//! `/sys/class/dmi/id`.

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use crate::{error::VmmError, layout, memory::GuestRam};

/// Length of the 64-bit entry point in bytes (5.2.2).
const ENTRY_LENGTH: u8 = 24;
/// Version of the specification that the structures follow: major, minor, revision.
const VERSION: [u8; 3] = [3, 7, 0];
/// Strings of the system structure: manufacturer and product. Its fields refer to them by number, from 1.
const STRINGS: [&str; 2] = ["Bulkhead", "Virtual Machine"];
/// Wake-up type "Power Switch" (7.2.2).
const POWER_SWITCH: u8 = 6;

/// Writes the entry point to an address at which kernels search for it (5.2), and the structures behind it.
pub(super) fn write(memory: &GuestRam, uuid: Uuid) -> Result<(), VmmError> {
    let structures = structures(uuid);
    let at = layout::SMBIOS_START + u64::from(ENTRY_LENGTH).next_multiple_of(16);
    let put = |bytes: &[u8], at| {
        memory.write_slice(bytes, GuestAddress(at)).map_err(|_| VmmError::GuestMemory("the SMBIOS tables"))
    };
    put(&structures, at)?;
    put(&entry_point(structures.len() as u32, at), layout::SMBIOS_START)
}

/// Returns the 64-bit entry point (5.2.2).
fn entry_point(length: u32, at: u64) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    // The checksum comes last.
    entry.extend([0, ENTRY_LENGTH]);
    entry.extend(VERSION);
    // Entry point revision 1, a reserved byte.
    entry.extend([1, 0]);
    entry.extend(length.to_le_bytes());
    entry.extend(at.to_le_bytes());
    // The sum of all bytes has to be zero.
    entry[5] = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

/// Returns the structures: system information (type 1, 7.2) and the end of the table (type 127, 7.45).
fn structures(uuid: Uuid) -> Vec<u8> {
    // Type, length, handle 1; strings 1 and 2, no version and no serial number.
    let mut table = vec![1, 27, 1, 0, 1, 2, 0, 0];
    // The first three fields of the UUID are little-endian (7.2.1).
    table.extend(uuid.to_bytes_le());
    // No stock-keeping number, no family.
    table.extend([POWER_SWITCH, 0, 0]);
    for string in STRINGS {
        table.extend(string.as_bytes());
        table.push(0);
    }
    // A further zero ends the list of strings; a structure without strings has two (6.1.3).
    table.push(0);
    table.extend([127, 4, 2, 0, 0, 0]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    const UUID: Uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

    #[test]
    fn the_entry_point_sums_to_zero_and_leads_to_the_structures() {
        let memory = memory::create(64).unwrap();
        write(&memory, UUID).unwrap();
        let mut entry = [0; ENTRY_LENGTH as usize];
        memory.read_slice(&mut entry, GuestAddress(layout::SMBIOS_START)).unwrap();
        assert_eq!(entry[..5], *b"_SM3_");
        assert_eq!(entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let length = u32::from_le_bytes(entry[12..16].try_into().unwrap());
        let mut table = vec![0; length as usize];
        memory.read_slice(&mut table, GuestAddress(u64::from_le_bytes(entry[16..].try_into().unwrap()))).unwrap();
        assert_eq!(table, structures(UUID));
    }

    #[test]
    fn the_first_three_fields_of_the_uuid_are_little_endian() {
        let table = structures(UUID);
        assert_eq!(
            table[8..24],
            [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]
        );
    }

    #[test]
    fn each_structure_is_followed_by_its_strings_and_the_table_ends() {
        let table = structures(UUID);
        let strings = &table[usize::from(table[1])..];
        assert_eq!(strings, [&b"Bulkhead\0Virtual Machine\0\0"[..], &[127, 4, 2, 0, 0, 0]].concat());
    }
}
