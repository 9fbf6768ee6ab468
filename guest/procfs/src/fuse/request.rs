//! Parses requests of the kernel.
//!
//! The kernel is trusted, but names, data and offsets in its requests are a container's. Every field is read with a
//! bound.

/// Length of `struct fuse_in_header`, in bytes.
const HEADER: usize = 40;

/// Maximum length of a write in bytes; the kernel splits longer ones.
pub(crate) const MAX_WRITE: u32 = 4096;

/// Size of the buffer for a request, in bytes; the kernel requires 8 KiB or more (`FUSE_MIN_READ_BUFFER`).
pub(crate) const BUFFER: usize = 16 * 1024;

/// `FATTR_*` of `struct fuse_setattr_in`: mode, owner and group.
const OWNERSHIP: u32 = 0b111;

/// `FUSE_READ_LOCKOWNER`: set when a program reads, not when the kernel fills its page cache.
const BY_PROGRAM: u32 = 1 << 1;

/// The operation of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Operation<'a> {
    /// The handshake: the kernel's minor version and flags.
    Init {
        /// Major version of the protocol.
        major: u32,
        /// Minor version of the protocol.
        minor: u32,
        /// Lower half of the flags.
        flags: u32,
    },
    /// Looks up a name in a directory.
    Lookup(&'a [u8]),
    GetAttributes,
    /// Changes attributes. Only sizes and times may change, and without effect.
    SetAttributes {
        /// True if mode, owner or group would change.
        ownership: bool,
    },
    Open {
        /// Flags of open(2).
        flags: u32,
    },
    Read(Read),
    Write {
        offset: u64,
        /// The bytes to write.
        data: &'a [u8],
    },
    /// Closes a file for good.
    Release {
        /// The handle that `open` returned.
        handle: u64,
    },
    OpenDirectory,
    ReadDirectory(Read),
    /// Closes a directory or syncs a file: succeeds without an effect.
    Acknowledge,
    /// Returns figures of the file system.
    Statistics,
    /// An operation without a reply.
    Silent,
    Unknown,
}

/// A read of a part of a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    /// The handle that `open` returned.
    pub(crate) handle: u64,
    /// Position: in bytes for a file, the number of an entry for a directory.
    pub(crate) offset: u64,
    /// Maximum number of bytes.
    pub(crate) size: u32,
    /// True if a program reads, past the page cache.
    pub(crate) direct: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    /// Id of the request, which the reply repeats.
    pub(crate) unique: u64,
    pub(crate) node: u64,
    /// Id of the calling thread, in the VM's pid namespace.
    pub(crate) pid: u32,
    pub(crate) operation: Operation<'a>,
}

/// The fields of a request that have not been read yet, in native byte order.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*head))
    }

    fn u64(&mut self) -> Option<u64> {
        let (head, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*head))
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.0 = self.0.get(bytes..)?;
        Some(())
    }

    /// A string, without its final zero.
    fn name(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let name = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Some(name)
    }

    /// `struct fuse_read_in`; `struct fuse_write_in` begins with the same fields.
    fn read(&mut self) -> Option<Read> {
        let (handle, offset, size) = (self.u64()?, self.u64()?, self.u32()?);
        Some(Read { handle, offset, size, direct: self.u32()? & BY_PROGRAM != 0 })
    }
}

/// Parses a request; `None` when it is shorter than its own length or than its operation.
pub(crate) fn parse(bytes: &[u8]) -> Option<Request<'_>> {
    let mut fields = Fields(bytes);
    let length = fields.u32()? as usize;
    let opcode = fields.u32()?;
    let unique = fields.u64()?;
    let node = fields.u64()?;
    // User and group id: access is checked by the kernel (`default_permissions`).
    fields.skip(8)?;
    let pid = fields.u32()?;
    let mut body = Fields(bytes.get(HEADER..length)?);
    let operation = operation(opcode, &mut body)?;
    Some(Request { unique, node, pid, operation })
}

fn operation<'a>(opcode: u32, body: &mut Fields<'a>) -> Option<Operation<'a>> {
    Some(match opcode {
        1 => Operation::Lookup(body.name()?),
        // FORGET, INTERRUPT and BATCH_FORGET. Nothing is counted per inode, and every request is answered at once.
        2 | 36 | 42 => Operation::Silent,
        3 => Operation::GetAttributes,
        4 => Operation::SetAttributes { ownership: body.u32()? & OWNERSHIP != 0 },
        14 => Operation::Open { flags: body.u32()? },
        15 => Operation::Read(body.read()?),
        16 => {
            let Read { offset, size, .. } = body.read()?;
            // The lock owner, the flags and padding.
            body.skip(16)?;
            Operation::Write { offset, data: body.0.get(..size as usize)? }
        }
        17 => Operation::Statistics,
        18 => Operation::Release { handle: body.u64()? },
        // FSYNC, RELEASEDIR, DESTROY. FLUSH is left unknown on purpose: after one ENOSYS the kernel never sends it
        // again, and no close(2) waits for this service.
        20 | 29 | 38 => Operation::Acknowledge,
        26 => {
            Operation::Init { major: body.u32()?, minor: body.u32()?, flags: body.skip(4).and_then(|()| body.u32())? }
        }
        27 => Operation::OpenDirectory,
        28 => Operation::ReadDirectory(body.read()?),
        _ => Operation::Unknown,
    })
}

#[cfg(test)]
pub(crate) mod testing {
    /// A request as the kernel writes it.
    pub(crate) fn bytes(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend((40 + body.len() as u32).to_ne_bytes());
        out.extend(opcode.to_ne_bytes());
        out.extend(7_u64.to_ne_bytes());
        out.extend(node.to_ne_bytes());
        out.extend([0; 8]);
        out.extend(std::process::id().to_ne_bytes());
        out.extend([0; 4]);
        out.extend(body);
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_write_carries_its_data_behind_forty_bytes() {
        let mut body = vec![0; 40];
        body[8..16].copy_from_slice(&5_u64.to_ne_bytes());
        body[16..20].copy_from_slice(&2_u32.to_ne_bytes());
        body.extend(b"1\nrest");
        let bytes = testing::bytes(16, 257, &body);
        let request = parse(&bytes).unwrap();
        assert_eq!((request.unique, request.node), (7, 257));
        assert_eq!(request.operation, Operation::Write { offset: 5, data: b"1\n" });
    }

    #[test]
    fn a_request_that_is_too_short_is_not_parsed() {
        let bytes = testing::bytes(1, 1, b"name\0");
        assert_eq!(parse(&bytes).unwrap().operation, Operation::Lookup(b"name"));
        assert_eq!(parse(&bytes[..bytes.len() - 1]), None);
        assert_eq!(parse(&testing::bytes(1, 1, b"name")), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(opcode in 0_u32..60, node: u64, body in proptest::collection::vec(any::<u8>(), 0..100), cut in 0..140_usize) {
            let bytes = testing::bytes(opcode, node, &body);
            let _ = parse(&bytes);
            let _ = parse(&bytes[..cut.min(bytes.len())]);
            let _ = parse(&body);
        }
    }
}
