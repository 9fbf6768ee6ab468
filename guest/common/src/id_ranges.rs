//! The place of containers' ids among those of the VM: one range behind the other.

/// The first id of the first range.
pub const FIRST: u32 = 100_000;

/// Ids in a range.
pub const LENGTH: u32 = 65_536;
