//! A frame of the guest where the guest has put it. Only what is looked at is copied, and only once: the guest can
//! change its buffers at any time. Data that nobody looks at goes on from there.

use bulkhead_queue::{GuestRam, segments};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::frame::{MAX_FRAME, VIRTIO_HEADER};

/// An Ethernet frame in guest memory, in one or more parts.
pub(super) struct GuestFrame<'m> {
    parts: Vec<VolatileSlice<'m>>,
    /// Bytes before the Ethernet frame.
    start: usize,
    /// Length of the Ethernet frame.
    len: usize,
}

impl<'m> GuestFrame<'m> {
    /// The frame in a chain; `None` if its length cannot be a frame's or a part of it is not in memory.
    pub(super) fn in_chain(chain: DescriptorChain<&'m GuestRam>, memory: &'m GuestRam) -> Option<Self> {
        let mut parts = Vec::new();
        let mut total = 0_usize;
        for descriptor in chain.readable() {
            let slice = memory.get_slice(descriptor.addr(), descriptor.len() as usize).ok()?;
            total += slice.len();
            if total > VIRTIO_HEADER + MAX_FRAME {
                return None;
            }
            parts.push(slice);
        }
        let len = total.checked_sub(VIRTIO_HEADER)?;
        Some(Self { parts, start: VIRTIO_HEADER, len })
    }

    /// The frame in this memory.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn in_slice(slice: VolatileSlice<'m>) -> Self {
        Self { len: slice.len(), parts: vec![slice], start: 0 }
    }

    /// The same with virtio's header before it.
    pub(super) fn with_header(self) -> Self {
        Self { len: self.len + self.start, start: 0, ..self }
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The parts of the bytes from `from` on, at most `len` bytes.
    pub(super) fn parts(&self, from: usize, len: usize) -> Vec<VolatileSlice<'m>> {
        let mut parts = Vec::with_capacity(self.parts.len());
        let most = len.min(self.len.saturating_sub(from));
        segments::window(self.parts.iter().copied(), self.start + from, most, &mut parts);
        parts
    }

    /// Copies the bytes from `from` on; returns their number.
    pub(super) fn copy(&self, from: usize, to: &mut [u8]) -> usize {
        segments::copy_out(&self.parts(from, to.len()), to)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_bytes_of_any_range_are_found_however_they_are_split(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300), cuts in prop::collection::vec(0_usize..300, 0..6),
            start in 0_usize..20, from in 0_usize..320, len in 0_usize..320
        ) {
            let expected = bytes.clone();
            let whole = VolatileSlice::from(&mut bytes[..]);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(whole.len())).chain([0, whole.len()]).collect();
            cuts.sort_unstable();
            let parts = cuts.windows(2).map(|cut| whole.subslice(cut[0], cut[1] - cut[0]).unwrap()).collect();
            let start = start.min(expected.len());
            let frame = GuestFrame { parts, start, len: expected.len() - start };
            let mut copy = vec![0; len];
            let copied = frame.copy(from, &mut copy);
            let expected = expected[start..].get(from..).unwrap_or_default();
            prop_assert_eq!(&copy[..copied], &expected[..len.min(expected.len())]);
        }
    }
}
