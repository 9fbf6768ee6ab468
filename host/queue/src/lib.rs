//! Split virtqueues in guest memory (virtio 1.3, section 2.7), shared by the processes that serve them.

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(feature = "testing")]
pub mod testing;

/// Guest memory as every process on the host maps it.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
