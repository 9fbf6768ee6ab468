//! Fields of registers.

/// Some adjacent bits of a register.
#[derive(Clone, Copy)]
pub(super) struct Field {
    low: u32,
    mask: u32,
}

impl Field {
    /// The field of `bits` bits, fewer than 32, from bit `low` on.
    pub(super) const fn new(low: u32, bits: u32) -> Self {
        Self { low, mask: (1 << bits) - 1 }
    }

    pub(super) fn get(self, register: u32) -> u32 {
        register >> self.low & self.mask
    }

    /// Sets the field. Bits of `value` that it does not have are lost.
    pub(super) fn set(self, register: &mut u32, value: u32) {
        *register = *register & !(self.mask << self.low) | (value & self.mask) << self.low;
    }
}
