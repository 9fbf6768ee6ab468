//! Small guests: an ELF kernel with a PVH entry made of a few instructions.

use std::path::{Path, PathBuf};

use bulkhead_vmm::api::VmConfig;

/// Physical address of the first instruction.
pub const ENTRY: u32 = 0x10_0000;

/// An ELF file with one segment of 32-bit `code` at [`ENTRY`] and the PVH note that names it.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    const NOTE: usize = 12 + 4 + 8;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for (value, len) in [
        (2u64, 2usize), // executable
        (62, 2),        // x86-64
        (1, 4),
        (u64::from(ENTRY), 8),
        (64, 8), // program headers
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (2, 2),
        (0, 2),
        (0, 2),
        (0, 2),
    ] {
        file.extend(&value.to_le_bytes()[..len]);
    }
    let note_at = HEADERS as u64;
    let code_at = (HEADERS + NOTE) as u64;
    let segment = |kind: u32, flags: u32, at: u64, address: u64, len: u64, align: u64| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(flags.to_le_bytes());
        for value in [at, address, address, len, len, align] {
            header.extend(value.to_le_bytes());
        }
        header
    };
    file.extend(segment(1, 5, code_at, u64::from(ENTRY), code.len() as u64, 1));
    file.extend(segment(4, 4, note_at, 0, NOTE as u64, 4));
    // XEN_ELFNOTE_PHYS32_ENTRY
    file.extend(4u32.to_le_bytes());
    file.extend(8u32.to_le_bytes());
    file.extend(18u32.to_le_bytes());
    file.extend(b"Xen\0");
    file.extend(u64::from(ENTRY).to_le_bytes());
    file.extend(code);
    file
}

/// Writes `code` as a kernel into `dir`.
pub fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
    let path = dir.join("vmlinux");
    std::fs::write(&path, elf(code)).unwrap();
    path
}

/// A machine of one vCPU and 64 MiB around a kernel.
pub fn machine(kernel: PathBuf) -> VmConfig {
    VmConfig {
        cpus: 1,
        memory_mib: 64,
        uuid: uuid::Uuid::nil(),
        kernel,
        cmdline: String::new(),
        disks: Vec::new(),
        vsock: None,
        console: None,
        serial: None,
    }
}

/// `mov dx, port; mov al, value; out dx, al`
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `jmp $`
pub const SPIN: [u8; 2] = [0xeb, 0xfe];
