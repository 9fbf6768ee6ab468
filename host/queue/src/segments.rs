//! Guest memory as a list of slices for vectored system calls.
//!
//! Slices are addresses in this process with a length, not references: the guest may change the memory at any time.

use vm_memory::VolatileSlice;

/// A contiguous piece of guest memory.
pub type Segment<'m> = VolatileSlice<'m, ()>;

/// Fills `out` with the part of `from` that starts after `skip` bytes and has at most `limit` bytes.
pub fn window<'m>(
    from: impl IntoIterator<Item = Segment<'m>>,
    mut skip: usize,
    mut limit: usize,
    out: &mut Vec<Segment<'m>>,
) {
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
pub fn total(segments: &[Segment<'_>]) -> usize {
    segments.iter().map(Segment::len).sum()
}

/// Copies out of guest memory, as much as both sides have, and returns the number of bytes.
pub fn copy_out(segments: &[Segment<'_>], bytes: &mut [u8]) -> usize {
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
pub fn copy_in(segments: &[Segment<'_>], bytes: &[u8]) -> usize {
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
