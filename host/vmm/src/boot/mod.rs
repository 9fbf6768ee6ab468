//! The initial contents of guest memory and of the first vCPU's registers: the kernel, its parameters, ACPI and SMBIOS.

mod acpi;
mod bzimage;
mod memory_map;
mod pvh;
mod registers;
mod smbios;

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use kvm_ioctls::VcpuFd;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability, bootparam::setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{api::VmConfig, error::VmmError, layout, memory::GuestRam};

pub(crate) use registers::set_msrs;

/// The kernel's entry point, by boot protocol.
#[derive(Clone, Copy)]
pub(crate) enum Entry {
    /// PVH: 32-bit protected mode without paging, `ebx` points to `hvm_start_info`.
    Pvh {
        /// Guest-physical address.
        address: u64,
    },
    /// Linux boot protocol: 64-bit mode with identity-mapped pages, `rsi` points to `boot_params`.
    Linux64 {
        /// Guest-physical address.
        address: u64,
    },
}

/// Loads the kernel, the command line and the tables into guest memory and returns the entry point.
pub(crate) fn load(memory: &GuestRam, config: &VmConfig) -> Result<Entry, VmmError> {
    let kernel = &config.kernel;
    write_cmdline(memory, &config.cmdline)?;
    smbios::write(memory, config.uuid)?;
    let rsdp = acpi::write(memory, config.cpus, config.serial.is_some())?;
    let mut image = File::open(kernel).map_err(|source| VmmError::OpenKernel { path: kernel.clone(), source })?;
    // The image is trusted, yet the format decides the boot protocol. The loaders check the rest.
    let mut magic = [0; 4];
    image
        .read_exact(&mut magic)
        .and_then(|()| image.seek(SeekFrom::Start(0)))
        .map_err(|source| VmmError::OpenKernel { path: kernel.clone(), source })?;
    if magic == *b"\x7fELF" {
        let address = load_elf(memory, kernel, &mut image)?;
        // Both protocols carry the RSDP's address, so that the kernel need not search for it.
        pvh::write(memory, rsdp)?;
        Ok(Entry::Pvh { address })
    } else {
        let (address, header) = load_bzimage(memory, kernel, &mut image)?;
        bzimage::write(memory, rsdp, header)?;
        Ok(Entry::Linux64 { address })
    }
}

/// Sets the registers of the first vCPU to the state that the boot protocol of `entry` asks for.
pub(crate) fn set_registers(vcpu: &VcpuFd, memory: &GuestRam, entry: Entry) -> Result<(), VmmError> {
    registers::set(vcpu, memory, entry)
}

fn load_elf(memory: &GuestRam, path: &Path, image: &mut File) -> Result<u64, VmmError> {
    // Segments go to the physical addresses of their program headers; an entry point below 1 MiB is an error.
    let loaded = Elf::load(memory, None, image, Some(GuestAddress(layout::ONE_MIB)))
        .map_err(|source| VmmError::LoadKernel { path: path.to_path_buf(), source })?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Ok(address.0),
        // The ELF header's entry point cannot be used instead: it expects page tables that a boot loader has set up.
        _ => Err(VmmError::NoPvhEntry { path: path.to_path_buf() }),
    }
}

fn load_bzimage(memory: &GuestRam, path: &Path, image: &mut File) -> Result<(u64, setup_header), VmmError> {
    let failed = |source| VmmError::LoadKernel { path: path.to_path_buf(), source };
    let loaded = BzImage::load(memory, Some(GuestAddress(layout::BZIMAGE_START)), image, None).map_err(failed)?;
    // The header goes back to the kernel in the zero page, with our fields filled in.
    let header = loaded.setup_header.ok_or_else(|| VmmError::OpenKernel {
        path: path.to_path_buf(),
        source: io::Error::from(io::ErrorKind::InvalidData),
    })?;
    // The 64-bit entry point is 0x200 bytes behind the load address (Linux boot protocol, 64-bit boot).
    Ok((loaded.kernel_load.0 + 0x200, header))
}

fn write_cmdline(memory: &GuestRam, cmdline: &str) -> Result<(), VmmError> {
    // The terminating zero has to fit into the area, too.
    if cmdline.len() >= layout::MAX_CMDLINE {
        return Err(VmmError::CmdlineTooLong);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE_START))
        .map_err(|_| VmmError::GuestMemory("the command line"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn config(kernel: &Path, cmdline: &str) -> VmConfig {
        VmConfig {
            cpus: 1,
            memory_mib: 64,
            uuid: uuid::Uuid::nil(),
            kernel: kernel.to_owned(),
            cmdline: cmdline.to_owned(),
            disks: Vec::new(),
            vsock: None,
            console: None,
            serial: None,
        }
    }

    #[test]
    fn a_file_that_is_not_a_kernel_is_refused_by_name() {
        let memory = memory::create(64).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        for content in [&b""[..], b"\x7f", b"\x7fELF", b"MZ not a kernel", &[0; 4096]] {
            std::fs::write(&path, content).unwrap();
            let error = load(&memory, &config(&path, "")).err().unwrap();
            assert!(error.to_string().contains("vmlinux"), "{error}");
        }
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let memory = memory::create(64).unwrap();
        let long = "x".repeat(layout::MAX_CMDLINE);
        assert!(matches!(write_cmdline(&memory, &long), Err(VmmError::CmdlineTooLong)));
        write_cmdline(&memory, &long[1..]).unwrap();
    }
}
