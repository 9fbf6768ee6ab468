//! FUSE as Linux 6.12 speaks it: protocol 7.41, `include/uapi/linux/fuse.h`. All numbers are in the byte order of the
//! guest, which is the host's.

pub(crate) mod reply;
pub(crate) mod request;

/// The node that the guest knows without a lookup, in this connection and in any other.
pub(crate) const ROOT: u64 = 1;

/// Opcode of a request of Bulkhead's own, `FUSE_WATCH`: watches a node for changes by others.
pub(crate) const WATCH: u32 = 0x424b_0001;

/// Code of a notification of Bulkhead's own, `FUSE_NOTIFY_HOST_EVENT`: somebody else has changed a watched node.
pub(crate) const NOTIFY_HOST_EVENT: u32 = 0x424b_0001;
