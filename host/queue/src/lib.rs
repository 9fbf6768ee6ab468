//! Split virtqueues and their buffers in guest memory (virtio 1.3, 2.7), shared by the processes that serve them.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod segments;
mod split_queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use split_queue::SplitQueue;

/// Guest memory as every process on the host maps it.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
