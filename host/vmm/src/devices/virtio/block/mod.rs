//! Block device (virtio 1.3, 5.2) over a raw file. The format is never probed: a guest could otherwise write the header
//! of another format to its disk, and name any file of the host as its backing file.
//!
//! Requests are performed beside each other and returned as they are done, so that a FLUSH holds up no read. `request`
//! is the wire format, `job` decides on the operations of a request, `cached` performs those that the host's page cache
//! makes quick, and one of two engines all others: `ring` by io_uring where the kernel offers it, else `pool` by threads.
//! A write for which the host has no room waits until there is some.
//!
//! The device has a queue for each vCPU, each with a thread and a ring of its own: the driver gets the interrupt on the vCPU
//! that waits, instead of waking one for the other.

mod cached;
mod disk;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod job;
mod perform;
mod pool;
mod request;
mod ring;
mod worker;

#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    sync::{Arc, Mutex, PoisonError},
};

pub use disk::DiskFile;
use virtio_bindings::{
    virtio_blk as blk,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::{
    pool::Pool,
    ring::Ring,
    worker::{Engine, Parts},
};
use crate::{
    devices::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice, Worker},
    exit::ExitSignal,
    memory::GuestRam,
    room::RoomSignal,
};

/// Length of a sector in bytes. All addresses of this device count sectors (5.2.4).
pub const SECTOR: u64 = 512;
/// Maximum number of data segments in a request. With header and status it fits into the queue of 256 descriptors.
const MAX_SEGMENTS: u32 = 254;
/// Maximum length of a DISCARD or WRITE_ZEROES range in sectors: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Maximum number of ranges in a DISCARD or WRITE_ZEROES request.
const MAX_RANGES: u32 = 256;

/// Number of descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Maximum number of requests of a queue under way: as many as it holds chains.
const MAX_IN_FLIGHT: usize = QUEUE_SIZE as usize;
/// Maximum number of queues. vCPUs beyond it share them.
const MAX_QUEUES: usize = 4;
const QUEUE_SIZES: [u16; MAX_QUEUES] = [QUEUE_SIZE; MAX_QUEUES];

/// The device.
pub struct Block {
    disk: Arc<DiskFile>,
    room: RoomSignal,
    config: [u8; 60],
    /// One for each queue.
    lanes: Vec<Lane>,
    workers: Vec<Worker>,
}

/// The parts of a queue that outlive a reset.
struct Lane {
    /// Absent where the kernel does not offer io_uring.
    ring: Option<Arc<Mutex<Ring>>>,
    /// Raised by the engine.
    done: EventFd,
}

impl Block {
    /// Creates a device over `file` for a machine of so many vCPUs. The disk has the file's size, rounded down to whole
    /// sectors. A lack of room on the host is reported to `room`. Must be called before the process confines itself,
    /// which then makes no ring.
    pub fn new(file: File, readonly: bool, serial: &str, cpus: usize, room: RoomSignal) -> io::Result<Self> {
        let disk = Arc::new(DiskFile::new(file, readonly, serial)?);
        let rings: io::Result<Vec<_>> = (0..cpus.clamp(1, MAX_QUEUES)).map(|_| Lane::with_ring(&disk)).collect();
        // Off for this user (`kernel.io_uring_disabled`), or refused by the filter of a container. One queue then: each
        // would have threads of its own.
        let lanes = match rings.inspect_err(|error| tracing::info!(%error, "no io_uring: using threads")) {
            Ok(lanes) => lanes,
            Err(_) => vec![Lane { ring: None, done: EventFd::new(EFD_NONBLOCK)? }],
        };
        let config = config(disk.sectors(), lanes.len() as u16);
        Ok(Self { disk, room, config, lanes, workers: Vec::new() })
    }

    /// Starts the thread of a queue.
    fn start(&self, index: usize, queue: ActiveQueue, activation: &Common) -> io::Result<Worker> {
        let Common { memory, exit, write_through } = activation.clone();
        let (disk, room, lane) = (Arc::clone(&self.disk), self.room.queue(index), &self.lanes[index]);
        let (done, ring) = (lane.done.try_clone()?, lane.ring.clone());
        // Threads start here, on the vCPU's: those of devices start none.
        let pool = match &ring {
            Some(_) => None,
            None => Some(Pool::start(&disk, &memory, done.try_clone()?, &exit)?),
        };
        Worker::spawn("block", &exit, move |stop| {
            let parts = Parts { memory: &memory, disk: &disk, done: &done, room: &room, write_through };
            let mut ring = ring.as_ref().map(|ring| ring.lock().unwrap_or_else(PoisonError::into_inner));
            let engine = match (&mut ring, pool) {
                (Some(ring), _) => Engine::Ring(ring.flights(&memory)),
                (None, Some(pool)) => Engine::Pool(pool),
                (None, None) => return Ok(()),
            };
            worker::run(&stop, queue, parts, engine)
        })
    }
}

impl Lane {
    fn with_ring(disk: &DiskFile) -> io::Result<Self> {
        let done = EventFd::new(EFD_NONBLOCK)?;
        let ring = Ring::new(disk, &done)?;
        Ok(Self { ring: Some(Arc::new(Mutex::new(ring))), done })
    }
}

/// The parts of an activation that all queues share.
#[derive(Clone)]
struct Common {
    memory: Arc<GuestRam>,
    exit: ExitSignal,
    /// The driver did not negotiate flushes.
    write_through: bool,
}

/// `struct virtio_blk_config` (5.2.4).
fn config(sectors: u64, queues: u16) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    // capacity, seg_max, blk_size. Fields of features that are not offered stay zero.
    put(0, &sectors.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // num_queues.
    put(34, &queues.to_le_bytes());
    // max_discard_sectors, max_discard_seg, discard_sector_alignment: the host's pages.
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &8u32.to_le_bytes());
    // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap.
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        2
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES[..self.lanes.len()]
    }

    fn features(&self) -> u64 {
        let common = 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
            | 1 << blk::VIRTIO_BLK_F_FLUSH
            | 1 << blk::VIRTIO_BLK_F_MQ
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX;
        // DISCARD and WRITE_ZEROES change the disk, so only a writable one offers them.
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
        let write_through = activation.features & 1 << blk::VIRTIO_BLK_F_FLUSH == 0;
        let common = Common { memory: activation.memory, exit: activation.exit, write_through };
        // A driver uses as many queues as it likes, from the first on (5.2.5).
        for (index, queue) in activation.queues.into_iter().enumerate() {
            match queue {
                Some(queue) => self.workers.push(self.start(index, queue, &common)?),
                None if index == 0 => return Err(ActivateError::MissingQueue(0)),
                None => {}
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        // Dropping a worker waits for its requests under way.
        self.workers.clear();
    }
}
