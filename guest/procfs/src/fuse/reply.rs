//! Builds replies and notifications to the kernel (`linux/fuse.h`), in native byte order.

use crate::tree::Attributes;

/// `FOPEN_DIRECT_IO`: each read is a request, nothing is cached.
const DIRECT_IO: u32 = 1;

/// `FUSE_ATOMIC_O_TRUNC`: opening for writing is one request.
const ATOMIC_TRUNCATE: u32 = 1 << 3;

/// Time in seconds for which the kernel may cache a name, and attributes that cannot change: an inode number never
/// stands for anything else.
const VALID: u64 = 3600;

/// `FUSE_NOTIFY_*`.
const NOTIFY_INVALID_ENTRY: i32 = 3;
const NOTIFY_RESEND: i32 = 7;

/// The body of a reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Body(pub(crate) Vec<u8>);

impl Body {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// `struct fuse_attr`.
    fn attributes(self, node: u64, attributes: Attributes) -> Self {
        let Attributes { mode, owner, size } = attributes;
        // Inode, size, blocks and three times; then their nanoseconds, mode, one link, ids, no device, block size,
        // flags.
        let body = self.u64(node).u64(size).u64(0).u64(0).u64(0).u64(0);
        body.u32(0).u32(0).u32(0).u32(mode).u32(1).u32(owner).u32(owner).u32(0).u32(4096).u32(0)
    }

    /// `struct fuse_init_out`.
    pub(crate) fn init(minor: u32, flags: u32) -> Self {
        // The older of the two minor versions counts; 38 is that of Linux 6.2, whose structures these are.
        let body = Self::default().u32(7).u32(minor.min(38)).u32(0).u32(flags & ATOMIC_TRUNCATE);
        // At most 16 background requests, congested at 12; times in nanoseconds.
        let body = body.u16(16).u16(12).u32(super::request::MAX_WRITE).u32(1).u16(0).u16(0);
        body.u32(0).u32(0).u64(0).u64(0).u64(0)
    }

    /// `struct fuse_entry_out`; `lasting` if the attributes cannot change.
    pub(crate) fn entry(node: u64, attributes: Attributes, lasting: bool) -> Self {
        let valid = if lasting { VALID } else { 0 };
        Self::default().u64(node).u64(0).u64(VALID).u64(valid).u32(0).u32(0).attributes(node, attributes)
    }

    /// `struct fuse_attr_out`; `lasting` if the attributes cannot change.
    pub(crate) fn attribute(node: u64, attributes: Attributes, lasting: bool) -> Self {
        Self::default().u64(if lasting { VALID } else { 0 }).u32(0).u32(0).attributes(node, attributes)
    }

    /// `struct fuse_open_out`.
    pub(crate) fn open(handle: u64) -> Self {
        Self::default().u64(handle).u32(DIRECT_IO).u32(0)
    }

    /// `struct fuse_write_out`.
    pub(crate) fn written(length: u32) -> Self {
        Self::default().u32(length).u32(0)
    }

    /// `struct fuse_statfs_out`.
    pub(crate) fn statistics() -> Self {
        let body = Self::default().u64(0).u64(0).u64(0).u64(0).u64(0);
        body.u32(4096).u32(255).u32(4096).u32(0).u64(0).u64(0).u64(0)
    }

    /// Appends a `struct fuse_dirent`; returns whether it fitted within `size` bytes. `next` is the offset behind it.
    pub(crate) fn directory_entry(&mut self, node: u64, next: u64, kind: u32, name: &str, size: usize) -> bool {
        // Entries begin at multiples of eight bytes.
        let padded = name.len().next_multiple_of(8);
        if self.0.len() + 24 + padded > size {
            return false;
        }
        let body = std::mem::take(self).u64(node).u64(next).u32(name.len() as u32).u32(kind);
        *self = body;
        self.0.extend(name.as_bytes());
        self.0.resize(self.0.len() + padded - name.len(), 0);
        true
    }
}

/// The whole reply: `struct fuse_out_header` and, unless the result is an error number, the body.
pub(crate) fn answer(unique: u64, result: Result<Body, i32>) -> Vec<u8> {
    let (error, body) = match result {
        Ok(body) => (0, body.0),
        Err(errno) => (-errno, Vec::new()),
    };
    message(unique, error, &body)
}

fn message(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + body.len());
    out.extend((16 + body.len() as u32).to_ne_bytes());
    out.extend(error.to_ne_bytes());
    out.extend(unique.to_ne_bytes());
    out.extend(body);
    out
}

/// The notification that has the kernel send all requests again that were read and never answered (Linux 6.9).
pub(crate) fn resend() -> Vec<u8> {
    message(0, NOTIFY_RESEND, &[])
}

/// The notification that has the kernel drop a name of the top directory from its cache.
pub(crate) fn forget(name: &str) -> Vec<u8> {
    let mut body = Body::default().u64(crate::tree::ROOT).u32(name.len() as u32).u32(0);
    body.0.extend(name.as_bytes());
    body.0.push(0);
    message(0, NOTIFY_INVALID_ENTRY, &body.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ANY: Attributes = Attributes { mode: 0o100_644, owner: 100_000, size: 0 };

    #[test]
    fn bodies_have_the_lengths_of_the_kernels_structures() {
        let lengths = [
            Body::init(40, 0),
            Body::entry(2, ANY, true),
            Body::attribute(2, ANY, true),
            Body::open(1),
            Body::written(1),
            Body::statistics(),
        ]
        .map(|body| body.0.len());
        assert_eq!(lengths, [64, 128, 104, 16, 8, 80]);
    }

    #[test]
    fn an_error_is_negative_and_without_a_body() {
        let bytes = answer(3, Err(libc::ENOENT));
        assert_eq!(bytes.len(), 16);
        assert_eq!(bytes[4..8], (-libc::ENOENT).to_ne_bytes());
    }

    proptest! {
        #[test]
        fn directory_entries_are_aligned_and_never_longer_than_asked(names in proptest::collection::vec("[a-z]{1,40}", 0..20), size in 0_usize..600) {
            let mut body = Body::default();
            for name in &names {
                body.directory_entry(1, 1, 8, name, size);
                prop_assert!(body.0.len() <= size && body.0.len() % 8 == 0);
            }
        }
    }
}
