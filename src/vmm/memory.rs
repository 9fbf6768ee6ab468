//! Guest memory.

/// Guest memory as every part of the VMM uses it: one memfd, mapped shared.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
