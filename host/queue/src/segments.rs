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
    copy_in_at(segments, 0, bytes)
}

/// The same behind the first `skip` bytes.
pub fn copy_in_at(segments: &[Segment<'_>], mut skip: usize, bytes: &[u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        if done == bytes.len() {
            break;
        }
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        let len = (segment.len() - skip).min(bytes.len() - done);
        // Inside, by the two lines above.
        if let Ok(part) = segment.subslice(skip, len) {
            part.copy_from(&bytes[done..done + len]);
        }
        skip = 0;
        done += len;
    }
    done
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_are_put_behind_as_many_as_are_skipped_and_nowhere_else(
            lengths in proptest::collection::vec(0_usize..5, 0..6), skip in 0_usize..30, len in 0_usize..30
        ) {
            let mut memory: Vec<_> = lengths.iter().map(|len| vec![0; *len]).collect();
            let segments: Vec<_> = memory.iter_mut().map(|part| Segment::from(&mut part[..])).collect();
            let bytes: Vec<u8> = (1..=len as u8).collect();
            let done = copy_in_at(&segments, skip, &bytes);
            let mut expected = vec![0; lengths.iter().sum()];
            let room = expected.len().saturating_sub(skip).min(len);
            expected.iter_mut().skip(skip).zip(&bytes).for_each(|(to, from)| *to = *from);
            prop_assert_eq!((done, memory.concat()), (room, expected));
        }
    }
}
