//! FUSE, as far as a small tree of generated files needs it: `linux/fuse.h`, protocol 7.31 and later.
//!
//! Nothing that a request needs is remembered between requests: inode numbers say what they mean. So a server that is
//! started anew goes on where the last one ended, on the same open `/dev/fuse`.

pub mod mount;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod server;
