//! Helpers of property tests: small guest memories with a queue in them, and repeatable numbers.

use proptest::{collection::vec, prelude::*};

/// The start of a guest memory: 16 nearly valid descriptors at 0, an available ring at 0x100 that offers some of them,
/// and arbitrary bytes behind.
pub fn queue() -> impl Strategy<Value = Vec<u8>> {
    // Mostly inside of the memory of 64 KiB or just past its end, where the checks decide.
    let address = prop_oneof![8 => 0x300_u64..0x1_0100, 1 => any::<u64>()];
    let len = prop_oneof![8 => 0_u32..0x800, 1 => any::<u32>()];
    // The flags NEXT, WRITE and INDIRECT, and one that does not exist; next descriptors just past the table's end.
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
            // The used ring at 0x200 belongs to the device. Indirect tables start where buffers may, too.
            bytes.resize(0x300, 0);
            bytes.extend(indirect.concat());
            bytes.extend(rest);
            bytes
        },
    )
}

/// A reproducible sequence of numbers: the linear congruential generator of Numerical Recipes, from this seed.
pub struct Numbers(pub u32);

impl Numbers {
    /// Returns the next number, less than `end`.
    pub fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // The low bits of such a generator have short periods.
        (self.0 >> 8) % end
    }
}
