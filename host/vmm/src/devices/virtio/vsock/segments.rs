//! The guest memory behind a descriptor chain, as a list of slices that `readv` and `writev` can take.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use crate::memory::GuestRam;

/// A contiguous piece of guest memory.
pub(super) type Segment<'m> = VolatileSlice<'m, ()>;

/// Longest chain looked at: a driver must not build one longer than the queue (virtio 1.3, 2.7.5.3.1).
pub(super) const MAX_DESCRIPTORS: usize = 256;

/// Which of a chain's descriptors are meant.
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

/// Collects the chain's memory into `out` and returns its bytes. The descriptors are read exactly once.
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
        if index >= MAX_DESCRIPTORS {
            return Err(Malformed);
        }
        let wanted = descriptor.is_write_only() == (access == Access::Writable);
        if !wanted || descriptor.len() == 0 {
            continue;
        }
        let len = descriptor.len() as usize;
        let slices = memory.get_slices(descriptor.addr(), len, permissions).map_err(|_| Malformed)?;
        for slice in slices {
            out.push(slice.map_err(|_| Malformed)?);
        }
        total = total.checked_add(len).ok_or(Malformed)?;
    }
    Ok(total)
}

/// Puts into `out` what lies `skip` bytes into `from`, at most `limit` bytes of it.
pub(super) fn window<'m>(from: &[Segment<'m>], mut skip: usize, mut limit: usize, out: &mut Vec<Segment<'m>>) {
    out.clear();
    for segment in from {
        if limit == 0 {
            return;
        }
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

/// Bytes in all segments together.
pub(super) fn total(segments: &[Segment<'_>]) -> usize {
    segments.iter().map(Segment::len).sum()
}

/// Copies out of guest memory, as much as both sides have; returns the bytes copied.
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

/// Copies into guest memory, as much as both sides have; returns the bytes copied.
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
