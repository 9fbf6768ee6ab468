//! The fields of ext4's superblock (Documentation/filesystems/ext4/super.rst) that decide about a disk: blank, ext4, or
//! foreign.
//!
//! All offsets are in bytes from the start of the superblock, all numbers little-endian.

/// Offset of the superblock from the start of the disk in bytes.
const OFFSET: usize = 1024;
const MAGIC: u16 = 0xef53;
/// `s_state`: the kernel or e2fsck has detected errors.
const STATE_ERRORS: u16 = 0x2;
/// `s_feature_incompat`: the block count has 64 bits.
const INCOMPAT_64BIT: u32 = 0x80;

/// Bytes from the start of a disk that [`probe`] needs: one MiB.
pub(crate) const HEAD_BYTES: usize = 1024 * 1024;

/// The content of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing: zeros only.
    Blank,
    /// An ext4 file system.
    Ext4 {
        /// Its size in bytes.
        bytes: u64,
        /// The kernel or e2fsck marked it as having errors.
        errors: bool,
    },
    /// Something else, which must not be touched.
    Foreign,
}

/// Returns the bytes of a field, for `from_le_bytes`; `None` when the disk is too short.
fn le<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(OFFSET + at..OFFSET + at + N)?.try_into().ok()
}

fn ext4(head: &[u8]) -> Option<Content> {
    // s_magic
    if u16::from_le_bytes(le(head, 0x38)?) != MAGIC {
        return None;
    }
    // s_blocks_count_lo, s_log_block_size
    let low = u32::from_le_bytes(le(head, 0x4)?);
    let shift = u32::from_le_bytes(le(head, 0x18)?);
    // The block size is 1 KiB << shift, and 64 KiB is the largest. More is garbage behind a magic number by chance.
    if shift > 6 {
        return None;
    }
    // s_feature_incompat says whether s_blocks_count_hi belongs to the count or is unused space.
    let wide = u32::from_le_bytes(le(head, 0x60)?) & INCOMPAT_64BIT != 0;
    let high = if wide { u32::from_le_bytes(le(head, 0x150)?) } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(low);
    // s_state
    let errors = u16::from_le_bytes(le(head, 0x3a)?) & STATE_ERRORS != 0;
    Some(Content::Ext4 { bytes: blocks.checked_mul(1024 << shift)?, errors })
}

/// Decides about a disk by its first [`HEAD_BYTES`] bytes.
pub(crate) fn probe(head: &[u8]) -> Content {
    // A read that came back short is not a blank disk, even if all of it is zero.
    if let Some(found) = ext4(head) {
        found
    } else if head.len() >= HEAD_BYTES && head.iter().all(|byte| *byte == 0) {
        Content::Blank
    } else {
        Content::Foreign
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk(low: u32, high: u32, shift: u32, state: u16, incompat: u32) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[0x404..0x408].copy_from_slice(&low.to_le_bytes());
        head[0x418..0x41c].copy_from_slice(&shift.to_le_bytes());
        head[0x438..0x43a].copy_from_slice(&MAGIC.to_le_bytes());
        head[0x43a..0x43c].copy_from_slice(&state.to_le_bytes());
        head[0x460..0x464].copy_from_slice(&incompat.to_le_bytes());
        head[0x550..0x554].copy_from_slice(&high.to_le_bytes());
        head
    }

    #[test]
    fn zeros_are_blank_only_over_the_whole_mebibyte() {
        assert_eq!(probe(&vec![0; HEAD_BYTES]), Content::Blank);
        assert_eq!(probe(&vec![0; HEAD_BYTES - 1]), Content::Foreign);
        for at in [0, 512, 4086, 0x8001, HEAD_BYTES - 1] {
            let mut head = vec![0; HEAD_BYTES];
            head[at] = 1;
            assert_eq!(probe(&head), Content::Foreign, "a byte at {at}");
        }
    }

    #[test]
    fn size_and_error_state_are_read_from_the_superblock() {
        assert_eq!(probe(&disk(16, 0, 2, 1, 0)), Content::Ext4 { bytes: 65536, errors: false });
        assert_eq!(probe(&disk(16, 0, 2, 3, 0)), Content::Ext4 { bytes: 65536, errors: true });
    }

    #[test]
    fn the_high_half_of_the_block_count_counts_only_with_the_64bit_feature() {
        assert_eq!(probe(&disk(1, 1, 2, 1, 0)), Content::Ext4 { bytes: 4096, errors: false });
        let wide = Content::Ext4 { bytes: 4096 * ((1 << 32) + 1), errors: false };
        assert_eq!(probe(&disk(1, 1, 2, 1, INCOMPAT_64BIT)), wide);
    }

    #[test]
    fn an_impossible_geometry_is_foreign_and_never_blank() {
        assert_eq!(probe(&disk(1, 0, 7, 1, 0)), Content::Foreign);
        assert_eq!(probe(&disk(u32::MAX, u32::MAX, 6, 1, INCOMPAT_64BIT)), Content::Foreign);
    }

    proptest! {
        #[test]
        fn nothing_but_zeros_is_ever_blank(
            bytes in proptest::collection::vec(any::<u8>(), 0..4096),
            at in 0..HEAD_BYTES,
        ) {
            let mut head = vec![0; HEAD_BYTES];
            let end = (at + bytes.len()).min(HEAD_BYTES);
            head[at..end].copy_from_slice(&bytes[..end - at]);
            let zero = head.iter().all(|byte| *byte == 0);
            prop_assert_eq!(probe(&head) == Content::Blank, zero);
        }

        #[test]
        fn no_bytes_make_the_probe_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            probe(&bytes);
        }
    }
}
