//! The guest memory of a descriptor chain, as a list of slices for vectored system calls.
//!
//! Slices are addresses in this process with a length, not references: the guest may change the memory at any time.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use crate::memory::GuestRam;

/// A contiguous piece of guest memory.
pub(super) type Segment<'m> = VolatileSlice<'m, ()>;

/// Maximum length of a chain in descriptors: drivers must not build one longer than the queue (virtio 1.3, 2.7.5.3.1).
pub(super) const MAX_DESCRIPTORS: usize = 256;

/// A selection of a chain's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Those the device reads.
    Readable,
    /// Those the device writes.
    Writable,
}

/// The chain is too long or points outside guest memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Collects the chain's memory into `out` and returns its length in bytes. The descriptors are read exactly once.
pub(super) fn gather<'m>(
    memory: &'m GuestRam,
    chain: DescriptorChain<&'m GuestRam>,
    access: Access,
    out: &mut Vec<Segment<'m>>,
) -> Result<usize, Malformed> {
    out.clear();
    let permissions = match access {
        Access::Readable => Permissions::Read,
        Access::Writable => Permissions::Write,
    };
    let mut total = 0_usize;
    for (index, descriptor) in chain.enumerate() {
        // An indirect table of the guest may have up to 65535 descriptors.
        if index >= MAX_DESCRIPTORS {
            return Err(Malformed);
        }
        // A transmit chain may have writable descriptors and a receive chain readable ones: they are skipped, not
        // trusted.
        let wanted = descriptor.is_write_only() == (access == Access::Writable);
        if !wanted || descriptor.len() == 0 {
            continue;
        }
        // One slice as a rule, two where the descriptor crosses the border of two memory regions. A range outside of
        // memory is an error before a byte of it is touched.
        let len = descriptor.len() as usize;
        let slices = memory.get_slices(descriptor.addr(), len, permissions).map_err(|_| Malformed)?;
        for slice in slices {
            out.push(slice.map_err(|_| Malformed)?);
        }
        // Descriptors may overlap, so their sum may be more than the guest's memory.
        total = total.checked_add(len).ok_or(Malformed)?;
    }
    Ok(total)
}

/// Fills `out` with the part of `from` that starts after `skip` bytes and has at most `limit` bytes.
pub(super) fn window<'m>(from: &[Segment<'m>], mut skip: usize, mut limit: usize, out: &mut Vec<Segment<'m>>) {
    out.clear();
    for segment in from {
        if limit == 0 {
            return;
        }
        // Wholly before the window.
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        let len = (segment.len() - skip).min(limit);
        if let Ok(part) = segment.subslice(skip, len) {
            out.push(part);
        }
        skip = 0;
        limit -= len;
    }
}

/// Returns the length of all segments together.
pub(super) fn total(segments: &[Segment<'_>]) -> usize {
    segments.iter().map(Segment::len).sum()
}

/// Copies out of guest memory, as much as both sides have, and returns the number of bytes.
pub(super) fn copy_out(segments: &[Segment<'_>], bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        if done == bytes.len() {
            break;
        }
        done += segment.copy_to(&mut bytes[done..]);
    }
    done
}

/// Copies into guest memory, as much as both sides have, and returns the number of bytes.
pub(super) fn copy_in(segments: &[Segment<'_>], bytes: &[u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        if done == bytes.len() {
            break;
        }
        let len = segment.len().min(bytes.len() - done);
        segment.copy_from(&bytes[done..done + len]);
        done += len;
    }
    done
}
