//! Names of the guest kernel's functions, from the symbol table of its ELF file. The guest's kernel is not moved at its
//! start (no KASLR), so the addresses are those of the file.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
};

use elf::{
    ElfBytes,
    abi::{STT_FUNC, STT_NOTYPE},
    endian::LittleEndian,
};

/// Largest kernel that is read, in bytes.
const MAX_KERNEL: u64 = 256 << 20;

/// Longest name that is shown, in bytes.
const MAX_NAME: usize = 100;

/// Lowest address of the kernel's half of the address space.
const KERNEL_HALF: u64 = 1 << 63;

/// Reason that a kernel has no names.
#[derive(Debug, thiserror::Error)]
pub(super) enum SymbolsError {
    /// The file cannot be read.
    #[error("cannot read the guest's kernel")]
    Read(#[source] io::Error),
    /// It is not an ELF file that can be parsed, such as a bzImage.
    #[error("the guest's kernel is not a valid ELF file")]
    Elf(#[from] elf::ParseError),
    /// It was stripped.
    #[error("the guest's kernel has no symbols; `strip --strip-debug` keeps them")]
    Stripped,
}

/// The functions of a kernel by their addresses.
#[derive(Debug, Default)]
pub(super) struct Symbols(Vec<(u64, String)>);

/// A place in a function.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place<'a> {
    function: &'a str,
    offset: u64,
}

impl Symbols {
    /// Reads the symbols of a kernel.
    pub(super) fn read(kernel: &Path) -> Result<Self, SymbolsError> {
        let mut bytes = Vec::new();
        File::open(kernel)
            .and_then(|file| file.take(MAX_KERNEL).read_to_end(&mut bytes))
            .map_err(SymbolsError::Read)?;
        Self::parse(&bytes)
    }

    fn parse(kernel: &[u8]) -> Result<Self, SymbolsError> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(kernel)?;
        let (table, names) = file.symbol_table()?.ok_or(SymbolsError::Stripped)?;
        let functions = table.iter().filter(|symbol| {
            // Code in assembly has no type. Per-CPU variables and constants are below the kernel's half.
            matches!(symbol.st_symtype(), STT_FUNC | STT_NOTYPE)
                && !symbol.is_undefined()
                && symbol.st_value >= KERNEL_HALF
        });
        let mut functions: Vec<_> = functions
            .filter_map(|symbol| {
                let name = names.get(symbol.st_name as usize).ok().filter(|name| !name.is_empty())?;
                Some((symbol.st_value, symbol.st_symtype() != STT_FUNC, name))
            })
            .collect();
        // Of several names for an address, a function's comes first.
        functions.sort_unstable();
        functions.dedup_by_key(|(address, ..)| *address);
        if functions.is_empty() {
            return Err(SymbolsError::Stripped);
        }
        let shorten = |name: &str| name.chars().filter(char::is_ascii_graphic).take(MAX_NAME).collect();
        Ok(Self(functions.into_iter().map(|(address, _, name)| (address, shorten(name))).collect()))
    }

    /// Returns the function at an address; `None` for an address before all of them.
    pub(super) fn place(&self, address: u64) -> Option<Place<'_>> {
        let after = self.0.partition_point(|(start, _)| *start <= address);
        let (start, function) = self.0.get(after.checked_sub(1)?)?;
        Some(Place { function, offset: address - start })
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.function, self.offset)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns an ELF file with these symbols: value, type and name.
    pub(in crate::cli::doctor) fn kernel(symbols: &[(u64, u8, &str)]) -> Vec<u8> {
        let mut names = vec![0];
        let mut table = vec![0; 24];
        for (value, kind, name) in symbols {
            table.extend((names.len() as u32).to_le_bytes());
            // Type, visibility and the index of a section.
            table.extend([*kind, 0, 1, 0]);
            table.extend(value.to_le_bytes());
            table.extend(0_u64.to_le_bytes());
            names.extend(name.bytes().chain([0]));
        }
        // The file is its header, the names, the table and three section headers.
        let (names_at, table_at) = (64, 64 + names.len());
        let sections_at = table_at + table.len();
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        file.extend([0; 16]);
        file.extend((sections_at as u64).to_le_bytes());
        file.extend([0, 0, 0, 0, 64, 0, 56, 0, 0, 0, 64, 0, 3, 0, 1, 0]);
        file.extend(&names);
        file.extend(&table);
        let mut section = |kind: u32, at: usize, size: usize, link: u32, entry: u64| {
            file.extend([0; 4]);
            file.extend(kind.to_le_bytes());
            file.extend([0; 16]);
            file.extend((at as u64).to_le_bytes());
            file.extend((size as u64).to_le_bytes());
            file.extend(link.to_le_bytes());
            file.extend([0; 4]);
            file.extend(8_u64.to_le_bytes());
            file.extend(entry.to_le_bytes());
        };
        section(0, 0, 0, 0, 0);
        section(3, names_at, names.len(), 0, 0);
        section(2, table_at, table.len(), 1, 24);
        file
    }

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    #[test]
    fn an_address_has_the_name_of_the_function_before_it() {
        let symbols = Symbols::parse(&kernel(&[
            (TEXT + 0x100, STT_FUNC, "__send_to_port"),
            (TEXT, STT_NOTYPE, "_stext"),
            (TEXT, STT_FUNC, "startup_64"),
            (0x1_8000, STT_NOTYPE, "per_cpu_variable"),
        ]))
        .unwrap();
        let name = |address| symbols.place(address).map(|place| place.to_string());
        assert_eq!(name(TEXT + 0x1c2).unwrap(), "__send_to_port+0xc2");
        assert_eq!(name(TEXT).unwrap(), "startup_64+0x0");
        assert_eq!(name(TEXT - 1), None);
    }

    #[test]
    fn a_kernel_without_names_is_an_error_that_tells_why() {
        assert!(matches!(Symbols::parse(&kernel(&[])), Err(SymbolsError::Stripped)));
        assert!(matches!(Symbols::parse(b"MZ\0\0"), Err(SymbolsError::Elf(_))));
        assert!(matches!(Symbols::read(Path::new("/nowhere")), Err(SymbolsError::Read(_))));
    }

    proptest! {
        #[test]
        fn no_damage_to_a_kernel_makes_it_panic(
            damage in proptest::collection::vec((0_usize..600, any::<u8>()), 0..20),
            length in 0_usize..600,
            address: u64,
        ) {
            let mut file = kernel(&[(TEXT, STT_FUNC, "one"), (TEXT + 9, STT_FUNC, "two")]);
            for (at, byte) in damage {
                if let Some(place) = file.get_mut(at) {
                    *place = byte;
                }
            }
            file.truncate(length);
            if let Ok(symbols) = Symbols::parse(&file) {
                let _ = symbols.place(address).map(|place| place.to_string());
            }
        }
    }
}
