//! The guest's buffers of one request: a descriptor chain, sorted into a part to read and a part to write (virtio 1.3,
//! 5.11.6).

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use bulkhead_queue::{GuestRam, segments};

/// Buffers of one direction that a chain may have: as many as one system call takes (`UIO_MAXIOV`). The driver needs
/// some 260 for the largest request.
const MAX_SEGMENTS: usize = 1024;

/// A sequence of buffers in guest memory, which the guest may change at any time.
#[derive(Default)]
pub(crate) struct Segments<'m>(Vec<VolatileSlice<'m>>);

/// Both parts of a chain.
#[derive(Default)]
pub(crate) struct Buffers<'m> {
    /// The request.
    pub(crate) readable: Segments<'m>,
    /// Room for the reply.
    pub(crate) writable: Segments<'m>,
}

impl<'m> Buffers<'m> {
    /// Collects the buffers of a chain; `None` if one of them is outside of guest memory, or if there are too many.
    pub(crate) fn new(chain: DescriptorChain<&GuestRam>, memory: &'m GuestRam) -> Option<Self> {
        let mut buffers = Self::default();
        for descriptor in chain {
            let part = if descriptor.is_write_only() { &mut buffers.writable } else { &mut buffers.readable };
            if part.0.len() == MAX_SEGMENTS {
                return None;
            }
            part.0.push(memory.get_slice(descriptor.addr(), descriptor.len() as usize).ok()?);
        }
        Some(buffers)
    }
}

impl<'m> Segments<'m> {
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn of(slices: Vec<VolatileSlice<'m>>) -> Self {
        Self(slices)
    }

    /// Number of bytes. A chain has at most 2^32 (virtio 1.3, 2.7.5.2), so this does not overflow.
    pub(crate) fn len(&self) -> usize {
        segments::total(&self.0)
    }

    /// The buffers without their first `skip` bytes, cut to `most` bytes.
    pub(crate) fn part(&self, skip: usize, most: usize) -> Vec<VolatileSlice<'m>> {
        let mut part = Vec::with_capacity(self.0.len());
        segments::window(self.0.iter().copied(), skip, most, &mut part);
        part
    }

    /// Copies the first bytes, at most `most`.
    pub(crate) fn copy(&self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most.min(self.len())];
        segments::copy_out(&self.0, &mut bytes);
        bytes
    }

    /// Copies the first bytes, if there are as many.
    pub(crate) fn first<const LEN: usize>(&self) -> Option<[u8; LEN]> {
        let mut bytes = [0; LEN];
        (segments::copy_out(&self.0, &mut bytes) == LEN).then_some(bytes)
    }

    /// Writes bytes from the start on; false if there is too little room for all of them.
    pub(crate) fn fill(&self, bytes: &[u8]) -> bool {
        self.fill_at(0, bytes)
    }

    /// The same behind the first `skip` bytes.
    pub(crate) fn fill_at(&self, skip: usize, bytes: &[u8]) -> bool {
        segments::copy_in_at(&self.0, skip, bytes) == bytes.len()
    }
}
