//! FUSE as Linux 6.12 speaks it: protocol 7.41, `include/uapi/linux/fuse.h`. All numbers are in the byte order of the
//! guest, which is the host's.

pub(crate) mod reply;
pub(crate) mod request;

/// The node that the guest knows without a lookup, in this connection and in any other.
pub(crate) const ROOT: u64 = 1;
