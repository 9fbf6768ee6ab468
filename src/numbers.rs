//! Numbers for tests that differ from seed to seed and are the same in each run.

/// Numerical Recipes' generator.
pub(crate) struct Numbers(pub(crate) u32);

impl Numbers {
    /// The next one, less than `end`.
    pub(crate) fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % end
    }
}
