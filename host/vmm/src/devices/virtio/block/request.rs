//! Requests (virtio 1.3, 5.2.6): a header, data and a status byte.

use bulkhead_ipc::report::chain;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{
    MAX_RANGES, MAX_SEGMENTS,
    disk::{DiskFile, SERIAL},
};
use crate::memory::GuestRam;

/// Length of `struct virtio_blk_req` before its data: type, reserved, sector.
const HEADER: usize = 16;
/// Length of `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE: usize = 16;
/// Flag of a range: its sectors may be deallocated.
const UNMAP: u32 = 1;

const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// An error in executing a request. The guest sees only the status.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// The type or a flag is unknown, or the disk is read-only.
    #[error("unsupported request")]
    Unsupported,
    /// The request violates the specification, or lies outside of the disk.
    #[error("malformed request")]
    Malformed,
    /// The host's file failed.
    #[error("host I/O failed")]
    Io(#[from] std::io::Error),
}

/// A parsed chain. The header has been copied out of guest memory, so the guest cannot change it after the checks.
pub(super) struct Request<'m> {
    kind: u32,
    sector: u64,
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
    status: GuestAddress,
}

impl<'m> Request<'m> {
    /// Parses a chain; `None` if it has no complete header or no status byte. Such a chain is returned without a
    /// status.
    pub(super) fn parse(chain: DescriptorChain<&'m GuestRam>, memory: &'m GuestRam) -> Option<Self> {
        let mut readable = Vec::new();
        let mut writable = Vec::new();
        let mut status = None;
        for descriptor in chain {
            // A chain through indirect descriptors may be longer than the queue; this bounds what one request holds.
            if readable.len() + writable.len() > MAX_SEGMENTS as usize + 2 {
                return None;
            }
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            let target = if descriptor.is_write_only() { &mut writable } else { &mut readable };
            // A range that crosses regions of memory becomes several slices; one outside of memory ends the request.
            for slice in memory.get_slices(address, len) {
                target.push(slice.ok()?);
            }
            // The last writable byte so far. The status goes there at the end, through checked memory access.
            if descriptor.is_write_only() && len > 0 {
                status = Some(GuestAddress(address.0.checked_add(len as u64 - 1)?));
            }
        }
        // The status byte may share a descriptor with data (2.7.4.1), so only the byte is cut off.
        let last = writable.pop()?;
        if last.len() > 1 {
            writable.push(last.subslice(0, last.len() - 1).ok()?);
        }
        let header = take(&mut readable, HEADER)?;
        Some(Self {
            kind: u32::from_le_bytes(header[..4].try_into().ok()?),
            sector: u64::from_le_bytes(header[8..].try_into().ok()?),
            readable,
            writable,
            status: status?,
        })
    }

    /// Executes the request and returns the number of bytes written to guest memory, including the status.
    pub(super) fn execute(self, disk: &DiskFile, memory: &GuestRam) -> u32 {
        let (status, written) = match self.run(disk) {
            Ok(written) => (STATUS_OK, written),
            Err(RequestError::Unsupported) => (STATUS_UNSUPPORTED, 0),
            // The guest sees only an I/O error. The cause is in the vmm's log.
            Err(error) => {
                tracing::warn!(kind = self.kind, sector = self.sector, error = %chain(&error), "disk request failed");
                (STATUS_ERROR, 0)
            }
        };
        match memory.write_obj(status, self.status) {
            Ok(()) => written + 1,
            Err(_) => 0,
        }
    }

    fn run(&self, disk: &DiskFile) -> Result<u32, RequestError> {
        use virtio_bindings::virtio_blk as blk;
        match self.kind {
            // Reads fill the writable part, whose length is the request's.
            blk::VIRTIO_BLK_T_IN => {
                let bytes = total(&self.writable);
                self.check(disk, bytes)?;
                disk.read(self.sector, &self.writable)?;
                u32::try_from(bytes).map_err(|_| RequestError::Malformed)
            }
            blk::VIRTIO_BLK_T_GET_ID => {
                // A shorter buffer receives the start of the serial number.
                let mut at = 0;
                for slice in &self.writable {
                    let piece = &disk.serial()[at..SERIAL.min(at + slice.len())];
                    slice.copy_from(piece);
                    at += piece.len();
                }
                Ok(at as u32)
            }
            // All types below change the disk, or concern changes. The driver knows from VIRTIO_BLK_F_RO not to use
            // them.
            _ if disk.readonly() => Err(RequestError::Unsupported),
            blk::VIRTIO_BLK_T_OUT => {
                self.check(disk, total(&self.readable))?;
                disk.write(self.sector, &self.readable)?;
                Ok(0)
            }
            // Covers all writes that were completed before, as the guest relies on for its journal (5.2.6.2).
            blk::VIRTIO_BLK_T_FLUSH => {
                disk.flush()?;
                Ok(0)
            }
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                self.ranges(disk)?.into_iter().try_for_each(|range| range.apply(self.kind, disk))?;
                Ok(0)
            }
            _ => Err(RequestError::Unsupported),
        }
    }

    fn check(&self, disk: &DiskFile, bytes: u64) -> Result<(), RequestError> {
        disk.contains(self.sector, bytes).then_some(()).ok_or(RequestError::Malformed)
    }

    /// Returns all ranges of a DISCARD or WRITE_ZEROES. All are checked before the first of them is changed.
    fn ranges(&self, disk: &DiskFile) -> Result<Vec<Range>, RequestError> {
        let mut rest = self.readable.clone();
        let bytes = total(&rest);
        if bytes == 0 || !bytes.is_multiple_of(RANGE as u64) || bytes / RANGE as u64 > u64::from(MAX_RANGES) {
            return Err(RequestError::Malformed);
        }
        (0..bytes / RANGE as u64)
            .map(|_| {
                let raw = take(&mut rest, RANGE).ok_or(RequestError::Malformed)?;
                let range = Range::decode(&raw).ok_or(RequestError::Malformed)?;
                // Unknown flags make the request unsupported (5.2.6.2).
                if range.flags & !UNMAP != 0 {
                    return Err(RequestError::Unsupported);
                }
                let inside = disk.contains(range.sector, u64::from(range.sectors) * super::SECTOR);
                inside.then_some(range).ok_or(RequestError::Malformed)
            })
            .collect()
    }
}

struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Range {
    fn decode(raw: &[u8]) -> Option<Self> {
        Some(Self {
            sector: u64::from_le_bytes(raw.get(..8)?.try_into().ok()?),
            sectors: u32::from_le_bytes(raw.get(8..12)?.try_into().ok()?),
            flags: u32::from_le_bytes(raw.get(12..16)?.try_into().ok()?),
        })
    }

    fn apply(&self, kind: u32, disk: &DiskFile) -> Result<(), RequestError> {
        let discard = kind == virtio_bindings::virtio_blk::VIRTIO_BLK_T_DISCARD;
        let sectors = u64::from(self.sectors);
        // A hole reads as zeroes, so it does for both requests; WRITE_ZEROES allows one only with the flag (5.2.6.2).
        if discard || self.flags & UNMAP != 0 {
            match disk.punch_hole(self.sector, sectors) {
                // Without support for holes a DISCARD, which is a hint, has no effect, and a WRITE_ZEROES writes them
                // below.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                other => return Ok(other?),
            }
            if discard {
                return Ok(());
            }
        }
        Ok(disk.zero(self.sector, sectors)?)
    }
}

fn total(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Removes `len` bytes from the front of `slices` and returns them. They may be split anywhere (2.7.4.1).
fn take(slices: &mut Vec<VolatileSlice<'_>>, len: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let first = slices.first()?;
        let piece = first.len().min(len - bytes.len());
        let at = bytes.len();
        bytes.resize(at + piece, 0);
        first.subslice(0, piece).ok()?.copy_to(&mut bytes[at..]);
        if piece == first.len() {
            slices.remove(0);
        } else {
            slices[0] = first.offset(piece).ok()?;
        }
    }
    Some(bytes)
}
