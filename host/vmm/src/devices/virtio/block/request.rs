//! The wire format of requests (virtio 1.3, 5.2.6): a header, data and a status byte.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::GuestRam;

use super::MAX_SEGMENTS;

/// Length of `struct virtio_blk_req` before its data: type, reserved, sector.
const HEADER: usize = 16;
/// Length of `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
pub(super) const RANGE: usize = 16;
/// Flag of a range: its sectors may be deallocated.
pub(super) const UNMAP: u32 = 1;

/// A piece of guest memory inside of one region. Checked when the chain was parsed; regions never change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) address: GuestAddress,
    pub(super) len: usize,
}

/// A parsed chain. The header has been copied out of guest memory, so the guest cannot change it after the checks.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) kind: u32,
    pub(super) sector: u64,
    pub(super) readable: Vec<Piece>,
    pub(super) writable: Vec<Piece>,
    pub(super) status: GuestAddress,
}

impl Request {
    /// Parses a chain; `None` if it has no complete header or no status byte. Such a chain is returned without a
    /// status.
    pub(super) fn parse(chain: DescriptorChain<&GuestRam>, memory: &GuestRam) -> Option<Self> {
        let mut readable = Vec::new();
        let mut writable = Vec::new();
        for descriptor in chain {
            // A chain through indirect descriptors may be longer than the queue; this bounds what one request holds.
            if readable.len() + writable.len() > MAX_SEGMENTS as usize + 2 {
                return None;
            }
            let mut address = descriptor.addr();
            let target = if descriptor.is_write_only() { &mut writable } else { &mut readable };
            // A range that crosses regions of memory becomes several pieces; one outside of memory ends the request.
            for slice in memory.get_slices(address, descriptor.len() as usize) {
                let len = slice.ok()?.len();
                target.push(Piece { address, len });
                address = GuestAddress(address.0.checked_add(len as u64)?);
            }
        }
        // The status byte may share a descriptor with data (2.7.4.1), so only the last byte is cut off.
        let last = writable.last_mut()?;
        last.len = last.len.checked_sub(1)?;
        let status = GuestAddress(last.address.0 + last.len as u64);
        if last.len == 0 {
            writable.pop();
        }
        let header = take(&mut readable, HEADER, memory)?;
        Some(Self {
            kind: u32::from_le_bytes(header[..4].try_into().ok()?),
            sector: u64::from_le_bytes(header[8..].try_into().ok()?),
            readable,
            writable,
            status,
        })
    }
}

/// A range of a DISCARD or WRITE_ZEROES.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) flags: u32,
}

impl Range {
    pub(super) fn decode(raw: &[u8]) -> Option<Self> {
        Some(Self {
            sector: u64::from_le_bytes(raw.get(..8)?.try_into().ok()?),
            sectors: u32::from_le_bytes(raw.get(8..12)?.try_into().ok()?),
            flags: u32::from_le_bytes(raw.get(12..16)?.try_into().ok()?),
        })
    }
}

pub(super) fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.len as u64).sum()
}

/// Removes `len` bytes from the front of `pieces` and returns them. They may be split anywhere (2.7.4.1).
pub(super) fn take(pieces: &mut Vec<Piece>, len: usize, memory: &GuestRam) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let first = pieces.first_mut()?;
        let (at, step) = (bytes.len(), first.len.min(len - bytes.len()));
        bytes.resize(at + step, 0);
        memory.read_slice(&mut bytes[at..], first.address).ok()?;
        first.address = GuestAddress(first.address.0 + step as u64);
        first.len -= step;
        if first.len == 0 {
            pieces.remove(0);
        }
    }
    Some(bytes)
}
