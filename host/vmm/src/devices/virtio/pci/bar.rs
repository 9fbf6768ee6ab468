//! The layout of the one BAR: its structures and where each begins (virtio 1.3, 4.1.4).

/// Size of the BAR in bytes, a power of two.
pub const BAR_SIZE: u64 = 0x8000;

/// A structure in the BAR. Each has pages of its own, so that a guest may map them with different attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

impl Region {
    const ALL: [Self; 6] = [Self::Common, Self::Isr, Self::Device, Self::Notify, Self::MsixTable, Self::MsixPending];

    pub(super) fn start(self) -> u64 {
        self as u64 * 0x1000
    }

    pub(super) fn len(self) -> u64 {
        match self {
            // The whole structure (4.1.4.3). Fields of features that are not offered read as zero.
            Self::Common => 0x40,
            _ => 0x1000,
        }
    }

    /// `cfg_type` of the region's capability (virtio 1.3, 4.1.4).
    pub(super) fn cfg_type(self) -> u8 {
        match self {
            Self::Common => 1,
            Self::Notify => 2,
            Self::Isr => 3,
            _ => 4,
        }
    }

    /// Finds the structure that contains the whole access, and the offset in it.
    pub(super) fn find(offset: u64, len: usize) -> Option<(Self, u64)> {
        Self::ALL
            .into_iter()
            .find(|region| offset >= region.start() && offset + len as u64 <= region.start() + region.len())
            .map(|region| (region, offset - region.start()))
    }
}
