//! Block device (virtio 1.3, section 5.2) over a raw file; the format is never probed.

mod disk;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod request;
mod worker;

#[cfg(test)]
mod tests;

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

pub use disk::DiskFile;
use virtio_bindings::{
    virtio_blk as blk,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::devices::virtio::{ActivateError, Activation, VirtioDevice, Worker};

/// Bytes of a sector, the unit of every address of this device (5.2.4).
pub const SECTOR: u64 = 512;
/// Most segments of a request, a bound on what one request makes us hold.
const MAX_SEGMENTS: u32 = 254;
/// Most sectors of one DISCARD or WRITE_ZEROES range: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Most ranges of one DISCARD or WRITE_ZEROES request.
const MAX_RANGES: u32 = 256;

/// The device.
pub struct Block {
    disk: Arc<DiskFile>,
    config: [u8; 60],
    worker: Option<Worker>,
}

impl Block {
    /// A device over `file`, whose size is the disk's, rounded down to whole sectors.
    pub fn new(file: File, readonly: bool, serial: &str) -> io::Result<Self> {
        let disk = Arc::new(DiskFile::new(file, readonly, serial)?);
        let config = config(disk.sectors());
        Ok(Self { disk, config, worker: None })
    }
}

/// `struct virtio_blk_config` (5.2.4).
fn config(sectors: u64) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &8u32.to_le_bytes()); // discard in units of the host's pages
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]); // write zeroes may unmap
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        2
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256]
    }

    fn features(&self) -> u64 {
        let common = 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
            | 1 << blk::VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX;
        if self.disk.readonly() {
            common | 1 << blk::VIRTIO_BLK_F_RO
        } else {
            common | 1 << blk::VIRTIO_BLK_F_DISCARD | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().flatten().ok_or(ActivateError::MissingQueue(0))?;
        let (memory, disk) = (activation.memory, Arc::clone(&self.disk));
        self.worker = Some(Worker::spawn("block", move |stop| worker::run(&stop, queue, &memory, &disk))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Writes zeroes where the file system cannot punch holes.
fn write_zeroes(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    while len > 0 {
        let piece = len.min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..piece as usize], offset)?;
        offset += piece;
        len -= piece;
    }
    Ok(())
}
