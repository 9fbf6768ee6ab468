//! The raw file behind the device.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
};

use super::SECTOR;

/// Length of the serial number in bytes (`VIRTIO_BLK_ID_BYTES`; virtio 1.3, 5.2.6).
pub(super) const SERIAL: usize = 20;

/// A disk: a file of whole sectors.
pub struct DiskFile {
    file: File,
    sectors: u64,
    readonly: bool,
    serial: [u8; SERIAL],
}

impl DiskFile {
    /// Creates a disk over `file`. The size is the offset of its end, which is right for block devices, too.
    pub fn new(mut file: File, readonly: bool, serial: &str) -> io::Result<Self> {
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let mut padded = [0; SERIAL];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self { file, sectors, readonly, serial: padded })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// True if the guest may only read.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    pub(super) fn serial(&self) -> &[u8; SERIAL] {
        &self.serial
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// True if `bytes` are whole sectors, and those from `sector` on lie on the disk.
    pub(super) fn contains(&self, sector: u64, bytes: u64) -> bool {
        bytes.is_multiple_of(SECTOR) && sector.checked_add(bytes / SECTOR).is_some_and(|end| end <= self.sectors)
    }
}
