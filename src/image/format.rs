//! Quick checks that a file has the format of its name and is not truncated.
//!
//! They read headers only. Copies that broke off and swapped options are found; a changed byte is not.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

/// Reads `N` bytes at `offset`; `None` if the file of `size` bytes ends before.
fn read_at<const N: usize>(file: &mut File, size: u64, offset: u64) -> io::Result<Option<[u8; N]>> {
    // The offset may come from a damaged header: the sum can overflow, and lseek(2) refuses negative offsets.
    if offset.checked_add(N as u64).is_none_or(|end| end > size) {
        return Ok(None);
    }
    let mut bytes = [0; N];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(Some(bytes))
}

fn u16_at(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..offset + 2].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..offset + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Accepts a 64-bit x86 ELF file with all its segments, or a bzImage (Linux boot protocol 2.15, `HdrS` at 0x202).
pub(super) fn kernel(file: &mut File, size: u64) -> io::Result<Result<(), &'static str>> {
    const NO_KERNEL: &str = "is neither an ELF kernel for x86-64 nor a bzImage";
    // The magic number only: a truncated bzImage is found by the size in its manifest, if it has one.
    if read_at::<4>(file, size, 0x202)? == Some(*b"HdrS") {
        return Ok(Ok(()));
    }
    let Some(header) = read_at::<64>(file, size, 0)? else { return Ok(Err(NO_KERNEL)) };
    // ELFCLASS64, ELFDATA2LSB, EM_X86_64 (62) (elf(5)).
    if header[..6] != *b"\x7fELF\x02\x01" || u16_at(&header, 18) != 62 {
        return Ok(Err(NO_KERNEL));
    }
    // e_phoff, e_phentsize and e_phnum: the table of segments.
    let (offset, entry_size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    for index in 0..count {
        let entry = offset.checked_add(index * entry_size);
        let entry = match entry {
            Some(entry) => read_at::<56>(file, size, entry)?,
            None => None,
        };
        // p_offset and p_filesz: a segment that ends behind the file's end means that the file is truncated.
        let end = entry.and_then(|entry| u64_at(&entry, 8).checked_add(u64_at(&entry, 32)));
        if end.is_none_or(|end| end > size) {
            return Ok(Err("is truncated"));
        }
    }
    Ok(Ok(()))
}

/// Accepts an EROFS file system with all its blocks (superblock at 1024, `fs/erofs/erofs_fs.h`).
pub(super) fn erofs(file: &mut File, size: u64) -> io::Result<Result<(), &'static str>> {
    let superblock = read_at::<64>(file, size, 1024)?;
    let Some(superblock) = superblock.filter(|bytes| bytes[..4] == 0xE0F5_E1E2_u32.to_le_bytes()) else {
        return Ok(Err("is not an EROFS file system"));
    };
    // blkszbits at 12, blocks at 36.
    let block_bits = u32::from(superblock[12]);
    let blocks = u64::from(u32::from_le_bytes([superblock[36], superblock[37], superblock[38], superblock[39]]));
    // From a sector to 64 KiB, the largest page of a kernel; this also bounds the shift below.
    if !(9..=16).contains(&block_bits) {
        return Ok(Err("has an invalid EROFS block size"));
    }
    Ok(if blocks << block_bits > size { Err("is truncated") } else { Ok(()) })
}

/// The smallest files that pass the checks.
#[cfg(test)]
pub(super) mod samples {
    pub(in crate::image) fn elf() -> Vec<u8> {
        let mut file = vec![0; 4096];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        // One segment: offset 2048, 2048 bytes.
        file[64 + 8..64 + 16].copy_from_slice(&2048_u64.to_le_bytes());
        file[64 + 32..64 + 40].copy_from_slice(&2048_u64.to_le_bytes());
        file
    }

    pub(in crate::image) fn erofs() -> Vec<u8> {
        let mut file = vec![0; 8192];
        file[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
        file[1024 + 12] = 12;
        file[1024 + 36] = 2;
        file
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> (File, u64) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        (file, bytes.len() as u64)
    }

    #[test]
    fn every_truncation_of_a_whole_file_is_noticed() {
        for length in (0..4096).step_by(61) {
            let (mut cut, size) = file(&samples::elf()[..length]);
            assert!(kernel(&mut cut, size).unwrap().is_err(), "{length}");
        }
        for length in (0..8192).step_by(61) {
            let (mut cut, size) = file(&samples::erofs()[..length]);
            assert!(erofs(&mut cut, size).unwrap().is_err(), "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_the_checks_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1200), elf: bool) {
            let mut bytes = bytes;
            if elf && bytes.len() > 20 {
                bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
                bytes[18..20].copy_from_slice(&[62, 0]);
            }
            let (mut file, size) = file(&bytes);
            let _ = kernel(&mut file, size).unwrap();
            let _ = erofs(&mut file, size).unwrap();
        }
    }
}
