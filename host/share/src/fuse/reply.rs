//! Builds the bodies of replies.

use std::ffi::CStr;

/// Length of `struct fuse_out_header` in bytes.
pub(crate) const HEADER: usize = 16;

/// Time in seconds for which the guest may use a name or attributes without asking again. Programs of the host change
/// files at any time, and nothing announces it.
const VALID: u64 = 1;

/// Largest write, and largest read, in bytes: 256 pages.
pub(crate) const MAX_WRITE: u32 = 1 << 20;
/// `FUSE_MAX_PAGES`: pages of one request.
const MAX_PAGES: u16 = 256;

/// `FOPEN_DIRECT_IO`: reads and writes pass the guest's cache.
pub(crate) const DIRECT_IO: u32 = 1;
/// `FOPEN_KEEP_CACHE`: data that the guest has of the file is still right.
pub(crate) const KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_PARALLEL_DIRECT_WRITES`: writes past the cache need not wait for each other. Those that move the file's end do
/// all the same, and so do all while another program has the file open in the usual way.
pub(crate) const PARALLEL_WRITES: u32 = 1 << 6;

/// Flags of FUSE_INIT that this server accepts.
///
/// Without `WRITEBACK_CACHE`, with which the guest alone would decide about sizes and times. Without `SUBMOUNTS`: the
/// guest would mount them by itself, and those mounts cannot be id-mapped. Without `POSIX_ACL`, whose ids nothing
/// translates.
const FLAGS: u64 = ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | AUTO_INVAL_DATA
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | PARALLEL_DIROPS
    | MAX_PAGES_FLAG
    | CACHE_SYMLINKS
    | HANDLE_KILLPRIV_V2
    | INIT_EXT
    | DIRECT_IO_ALLOW_MMAP
    | ALLOW_IDMAP;

/// Flags that are accepted if the host keeps the locks. Without them the guest's kernel keeps them, for all containers.
const LOCK_FLAGS: u64 = POSIX_LOCKS | FLOCK_LOCKS;

const ASYNC_READ: u64 = 1;
const POSIX_LOCKS: u64 = 1 << 1;
const ATOMIC_O_TRUNC: u64 = 1 << 3;
const BIG_WRITES: u64 = 1 << 5;
const FLOCK_LOCKS: u64 = 1 << 10;
const AUTO_INVAL_DATA: u64 = 1 << 12;
const DO_READDIRPLUS: u64 = 1 << 13;
const READDIRPLUS_AUTO: u64 = 1 << 14;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES_FLAG: u64 = 1 << 22;
// The target of a symbolic link never changes; another link at its place is another node.
const CACHE_SYMLINKS: u64 = 1 << 23;
const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
const INIT_EXT: u64 = 1 << 30;
// A file that is open past the cache can be mapped, as on a disk (Linux 6.6).
const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
const ALLOW_IDMAP: u64 = 1 << 40;

/// Attributes as the guest sees them: `struct fuse_attr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) number: u64,
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    pub(crate) accessed: (i64, u32),
    pub(crate) modified: (i64, u32),
    pub(crate) changed: (i64, u32),
    pub(crate) mode: u32,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) device: u32,
    pub(crate) block_size: u32,
    /// The guest asks again each time, and so drops data that it has cached when the file has changed.
    pub(crate) brief: bool,
}

impl Attributes {
    /// The same for a file whose data a lock protects, which is of no use to who reads what was there before.
    pub(crate) fn with_locks(self, on: bool) -> Self {
        Self { brief: on && self.mode & libc::S_IFMT == libc::S_IFREG, ..self }
    }

    fn valid(&self) -> u64 {
        if self.brief { 0 } else { VALID }
    }
}

/// Figures of a file system: `struct fuse_kstatfs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Statistics {
    pub(crate) blocks: u64,
    pub(crate) free: u64,
    pub(crate) available: u64,
    pub(crate) files: u64,
    pub(crate) free_files: u64,
    pub(crate) block_size: u32,
    pub(crate) name_length: u32,
    pub(crate) fragment_size: u32,
}

/// The body of a reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Body(pub(crate) Vec<u8>);

/// Length of the longest body of fixed length in bytes: an entry with an open file.
const LONGEST: usize = 128 + 16;

impl Body {
    /// An empty body with room for all bodies of fixed length.
    fn new() -> Self {
        Self(Vec::with_capacity(LONGEST))
    }

    // Slices, which are copied as a whole where an array is copied by its bytes: half of the time of a reply.
    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn attributes(self, of: &Attributes) -> Self {
        let body = self.u64(of.number).u64(of.size).u64(of.blocks);
        let times = [of.accessed, of.modified, of.changed];
        let body = times.iter().fold(body, |body, time| body.u64(time.0.cast_unsigned()));
        let body = times.iter().fold(body, |body, time| body.u32(time.1));
        // The last field has flags: a submount, direct access.
        body.u32(of.mode).u32(of.links).u32(of.uid).u32(of.gid).u32(of.device).u32(of.block_size).u32(0)
    }

    /// `struct fuse_init_out`; with `locks` the host keeps the locks.
    pub(crate) fn init(minor: u32, readahead: u32, flags: u64, locks: bool) -> Self {
        let flags = flags & if locks { FLAGS | LOCK_FLAGS } else { FLAGS };
        // The older of the two minor versions counts.
        let body = Self::new().u32(7).u32(minor.min(41)).u32(readahead).u32(flags as u32);
        // At most 64 background requests, congested at 48; times in nanoseconds.
        let body = body.u16(64).u16(48).u32(MAX_WRITE).u32(1).u16(MAX_PAGES).u16(0).u32((flags >> 32) as u32);
        // The depth of stacked file systems, for passing files through, and fields of later versions.
        body.u32(0).u32(0).u64(0).u64(0).u32(0)
    }

    /// `struct fuse_entry_out`.
    pub(crate) fn entry(node: u64, attributes: &Attributes) -> Self {
        Self::new().raw_entry(node, attributes)
    }

    fn raw_entry(self, node: u64, attributes: &Attributes) -> Self {
        // Node ids are never used again, so their generation is always 0.
        self.u64(node).u64(0).u64(VALID).u64(attributes.valid()).u32(0).u32(0).attributes(attributes)
    }

    /// `struct fuse_attr_out`.
    pub(crate) fn attribute(attributes: &Attributes) -> Self {
        Self::new().u64(attributes.valid()).u32(0).u32(0).attributes(attributes)
    }

    /// `struct fuse_open_out`; continues an entry for CREATE.
    pub(crate) fn open(self, handle: u64, flags: u32) -> Self {
        self.u64(handle).u32(flags).u32(0)
    }

    /// `struct fuse_write_out`, and `struct fuse_getxattr_out`.
    pub(crate) fn size(size: u32) -> Self {
        Self::new().u32(size).u32(0)
    }

    /// `struct fuse_lseek_out`.
    pub(crate) fn position(offset: u64) -> Self {
        Self::new().u64(offset)
    }

    /// `struct fuse_lk_out`: first and last byte, kind and process of a lock.
    pub(crate) fn lock((start, end): (u64, u64), kind: u32, pid: u32) -> Self {
        Self::new().u64(start).u64(end).u32(kind).u32(pid)
    }

    /// `struct fuse_statfs_out`.
    pub(crate) fn statistics(of: &Statistics) -> Self {
        let body = Self::new().u64(of.blocks).u64(of.free).u64(of.available).u64(of.files).u64(of.free_files);
        body.u32(of.block_size).u32(of.name_length).u32(of.fragment_size).u32(0).u64(0).u64(0).u64(0)
    }

    /// Length of a directory's entry in bytes.
    pub(crate) fn directory_entry_len(name: &CStr, plus: bool) -> usize {
        let entry = if plus { 128 } else { 0 };
        entry + (24 + name.to_bytes().len()).next_multiple_of(8)
    }

    /// Appends a `struct fuse_dirent`. `next` is the position behind it.
    pub(crate) fn directory_entry(&mut self, number: u64, next: u64, kind: u32, name: &CStr) {
        let name = name.to_bytes();
        *self = std::mem::take(self).u64(number).u64(next).u32(name.len() as u32).u32(kind);
        self.0.extend(name);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    /// Appends the `struct fuse_entry_out` of a `struct fuse_direntplus`; node 0 means that only the name is known.
    pub(crate) fn directory_entry_plus(&mut self, node: u64, attributes: &Attributes) {
        *self = std::mem::take(self).raw_entry(node, attributes);
    }
}

/// `struct fuse_out_header` of a reply with `len` bytes behind it.
pub(crate) fn header(unique: u64, error: i32, len: usize) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&((HEADER + len) as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&(-error).to_ne_bytes());
    bytes[8..].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_the_lengths_of_the_kernels_structures() {
        let any = Attributes::default();
        let lengths = [
            Body::init(41, 0, u64::MAX, false),
            Body::entry(2, &any),
            Body::attribute(&any),
            Body::default().open(1, 0),
            Body::size(1),
            Body::position(1),
            Body::lock((0, 1), 2, 3),
            Body::statistics(&Statistics::default()),
            Body::entry(2, &any).open(1, 0),
        ]
        .map(|body| body.0.len());
        assert_eq!(lengths, [64, 128, 104, 16, 8, 8, 24, 80, LONGEST]);
    }

    #[test]
    fn a_header_has_the_length_of_all_a_negative_error_and_the_requests_id() {
        let words = header(0x0102_0304_0506_0708, libc::ENOENT, 5).as_chunks::<4>().0.to_vec();
        let words: Vec<_> = words.into_iter().map(i32::from_ne_bytes).collect();
        assert_eq!(words, [HEADER as i32 + 5, -libc::ENOENT, 0x0506_0708, 0x0102_0304]);
    }

    #[test]
    fn entries_of_directories_are_aligned_and_as_long_as_announced() {
        for name in [c"a", c"12345678", c"123456789"] {
            let mut body = Body::default();
            body.directory_entry(1, 2, 4, name);
            assert_eq!((body.0.len(), body.0.len() % 8), (Body::directory_entry_len(name, false), 0));
            body.directory_entry_plus(1, &Attributes::default());
            let before = body.0.len();
            body.directory_entry(1, 2, 4, name);
            assert_eq!(body.0.len() - before + 128, Body::directory_entry_len(name, true));
        }
    }

    #[test]
    fn id_mapped_mounts_are_allowed_and_the_guest_keeps_locks_and_submounts_to_itself() {
        let Body(bytes) = Body::init(41, 0, u64::MAX, false);
        let (low, high) = (&bytes[12..16], &bytes[32..36]);
        let flags = u64::from(u32::from_ne_bytes(low.try_into().unwrap()))
            | u64::from(u32::from_ne_bytes(high.try_into().unwrap())) << 32;
        assert_eq!(flags, FLAGS);
        // POSIX_LOCKS, FLOCK_LOCKS, WRITEBACK_CACHE, POSIX_ACL, SUBMOUNTS, SECURITY_CTX, CREATE_SUPP_GROUP.
        for refused in [1, 10, 16, 20, 27, 32, 34] {
            assert_eq!(flags & 1 << refused, 0, "bit {refused}");
        }
    }
}
