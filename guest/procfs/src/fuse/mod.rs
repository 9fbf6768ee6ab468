//! FUSE, as far as a small tree of generated files needs it: `linux/fuse.h`, protocol 7.31 and later.
//!
//! The protocol is implemented here because of restarts. A server that takes over a connection never sees `FUSE_INIT`,
//! and the crate fuser refuses all other requests before it. fuse-backend-rs would accept them, but is larger than this
//! module.
//!
//! No state is kept between requests: an inode number tells what it stands for (see [`crate::tree`]). So a server goes
//! on where its predecessor ended, on the same open `/dev/fuse`.

pub mod mount;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod server;
