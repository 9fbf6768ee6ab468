//! Helpers of property tests: small guest memories with a queue in them, and repeatable numbers.

use proptest::{collection::vec, prelude::*};

/// The beginning of a guest memory: 16 descriptors at 0 that are nearly right, an available ring at 0x100 that
/// offers some of them, and any bytes behind.
pub fn queue() -> impl Strategy<Value = Vec<u8>> {
    let address = prop_oneof![8 => 0x300_u64..0x1_0100, 1 => any::<u64>()];
    let len = prop_oneof![8 => 0_u32..0x800, 1 => any::<u32>()];
    // VIRTQ_DESC_F_NEXT, WRITE and INDIRECT, and a flag that does not exist.
    let descriptor = (address, len, 0_u16..16, 0_u16..18).prop_map(|(address, len, flags, next)| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    });
    let indirect = vec(descriptor.clone(), 0..8);
    let available = (0_u16..4, 0_u16..20, vec(0_u16..18, 16));
    (vec(descriptor, 16), available, indirect, vec(any::<u8>(), 0..600)).prop_map(
        |(descriptors, (flags, index, heads), indirect, rest)| {
            let mut bytes = descriptors.concat();
            bytes.extend(flags.to_le_bytes());
            bytes.extend(index.to_le_bytes());
            bytes.extend(heads.iter().flat_map(|head| head.to_le_bytes()));
            bytes.resize(0x300, 0);
            bytes.extend(indirect.concat());
            bytes.extend(rest);
            bytes
        },
    )
}

/// Numerical Recipes' generator.
pub struct Numbers(pub u32);

impl Numbers {
    /// The next one, less than `end`.
    pub fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % end
    }
}
