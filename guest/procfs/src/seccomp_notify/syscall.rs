//! Decodes system calls, and picks those that concern the container's own files.
//!
//! The number, the arguments and the memory that they point into are the container's. Everything is read once and with
//! a bound; anything odd continues in the kernel, which answers as it would without this service.

use std::os::raw::c_ulong;

use serde::{Deserialize, Serialize};

/// `AUDIT_ARCH_…` of `linux/audit.h`.
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

/// The bit that makes a number one of the x32 ABI, which has these calls under the same numbers.
const X32: u32 = 0x4000_0000;

/// `PATH_MAX`, in bytes, with the final zero.
const MAX_PATH: usize = 4096;

/// Maximum length of mount(2)'s options in bytes. The kernel copies one page.
const MAX_OPTIONS: usize = 4096;

/// Maximum length of a source's name, in bytes with the final zero. A procfs has no source; the name only shows in
/// tables.
const MAX_SOURCE: usize = 256;

/// Maximum length of a file system type, in bytes with the final zero; a longer name is neither `proc` nor `sysfs`.
const MAX_KIND: usize = 8;

/// `MS_MGC_VAL` and its mask. Programs from before Linux 2.4 set it in the upper half of the flags; the kernel drops
/// it.
const MAGIC: u64 = 0xc0ed_0000;
const MAGIC_MASK: u64 = 0xffff_0000;

/// Flags of a call that is not a plain new mount, or that fsmount(2) cannot express as an attribute.
const NOT_PLAIN: c_ulong = libc::MS_REMOUNT
    | libc::MS_BIND
    | libc::MS_MOVE
    | libc::MS_SHARED
    | libc::MS_PRIVATE
    | libc::MS_SLAVE
    | libc::MS_UNBINDABLE
    | libc::MS_SYNCHRONOUS
    | libc::MS_MANDLOCK
    | libc::MS_DIRSYNC
    | libc::MS_LAZYTIME
    | libc::MS_NOUSER;

/// The memory of a process.
pub(crate) trait Memory {
    /// Reads from an address up to the end of `buffer` or of the mapped memory, and returns the number of bytes.
    fn read(&self, address: u64, buffer: &mut [u8]) -> usize;
}

/// A system call as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RawCall {
    /// `AUDIT_ARCH_…`
    pub(crate) architecture: u32,
    /// System call number in that ABI.
    pub(crate) number: u32,
    /// Raw registers. Unused arguments, and unused upper halves, hold anything.
    pub(crate) arguments: [u64; 6],
}

/// A file system in which a container has files of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    Proc,
    Sys,
}

impl Kind {
    /// File system type, for fsopen(2) and in tables of mounts.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Proc => "proc",
            Self::Sys => "sysfs",
        }
    }

    /// Prefix of its nodes' paths.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Proc => "/proc/",
            Self::Sys => "/sys/",
        }
    }

    fn of(name: &[u8]) -> Option<Self> {
        [Self::Proc, Self::Sys].into_iter().find(|kind| kind.name().as_bytes() == name)
    }
}

/// A call to perform in the caller's place. Byte strings are the caller's, without a zero in them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MountRequest {
    /// mount(2) of a new procfs or sysfs.
    Mount {
        kind: Kind,
        /// Source name in the table of mounts.
        source: Option<Vec<u8>>,
        target: Vec<u8>,
        /// `MS_…`, without the magic number.
        flags: u64,
        /// File system options, separated by commas.
        options: Vec<u8>,
    },
    /// mount(2) with `MS_BIND` but without `MS_REC`, which would leave the mounts on the source behind.
    Bind { source: Vec<u8>, target: Vec<u8> },
    /// umount2(2) without `MNT_DETACH`, which the kernel refuses while something is mounted on the target.
    Unmount {
        target: Vec<u8>,
        /// `MNT_FORCE` or `UMOUNT_NOFOLLOW`.
        flags: u64,
    },
}

/// The judgement about a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Decision {
    /// The call continues in the kernel.
    Continue,
    /// The call fails with this error number.
    Refuse(i32),
    /// The request is performed instead.
    Perform(MountRequest),
}

/// The calls that the runtime's profile reports.
enum Syscall {
    Mount,
    Unmount,
    OldUnmount,
    OpenFileSystem,
}

impl Syscall {
    fn of(call: &RawCall) -> Option<Self> {
        // A container may use any ABI of the CPU, so each one's number is known. x32 has the numbers of x86-64 here.
        match (call.architecture, call.number) {
            (X86_64, number) => match number & !X32 {
                165 => Some(Self::Mount),
                166 => Some(Self::Unmount),
                430 => Some(Self::OpenFileSystem),
                _ => None,
            },
            (I386, 21) => Some(Self::Mount),
            // umount(2) without flags exists on i386 only.
            (I386, 22) => Some(Self::OldUnmount),
            (I386, 52) => Some(Self::Unmount),
            (I386, 430) => Some(Self::OpenFileSystem),
            _ => None,
        }
    }
}

/// Returns whether a call may be one for this service, by its registers alone. The others need no look into memory.
pub(crate) fn may_concern(call: &RawCall) -> bool {
    match Syscall::of(call) {
        Some(Syscall::Mount) => is_plain_bind(call.arguments[3]) || is_plain_mount(call.arguments[3]),
        Some(Syscall::Unmount) => is_plain_unmount(call.arguments[1]),
        Some(Syscall::OldUnmount | Syscall::OpenFileSystem) => true,
        None => false,
    }
}

/// Returns whether a call is an unmount.
pub(crate) fn is_unmount(call: &RawCall) -> bool {
    matches!(Syscall::of(call), Some(Syscall::Unmount | Syscall::OldUnmount))
}

/// mount(2)'s flags without the magic number.
fn without_magic(flags: u64) -> u64 {
    if flags & MAGIC_MASK == MAGIC { flags & !MAGIC_MASK } else { flags }
}

/// A bind that leaves the mounts on its source behind.
fn is_plain_bind(flags: u64) -> bool {
    let flags = without_magic(flags);
    flags & NOT_PLAIN == libc::MS_BIND && flags & libc::MS_REC == 0
}

/// A remount, a move or a change of propagation makes no new mount.
fn is_plain_mount(flags: u64) -> bool {
    without_magic(flags) & NOT_PLAIN == 0
}

/// `MNT_DETACH` takes the mounts on the target along by itself; `MNT_EXPIRE` and unknown flags are the kernel's.
fn is_plain_unmount(flags: u64) -> bool {
    let known = (libc::MNT_FORCE | libc::UMOUNT_NOFOLLOW).unsigned_abs();
    // The kernel's argument is an int; the upper half of the register is undefined.
    flags & u64::from(u32::MAX) & !u64::from(known) == 0
}

/// Judges a call; the caller's privilege is not looked at.
pub(crate) fn judge(call: &RawCall, memory: &impl Memory) -> Decision {
    let [first, second, third, fourth, fifth, _] = call.arguments;
    let request = match Syscall::of(call) {
        Some(Syscall::Mount) => mount([first, second, third, fourth, fifth], memory),
        Some(Syscall::Unmount) => unmount(first, second, memory),
        Some(Syscall::OldUnmount) => unmount(first, 0, memory),
        // A mount made by fsopen, fsconfig and fsmount would be judged in three calls with state in between. With
        // ENOSYS libmount and other callers fall back to mount(2), as on a kernel before Linux 5.2.
        Some(Syscall::OpenFileSystem) => {
            let ours = text(memory, first, MAX_KIND).and_then(|name| Kind::of(&name)).is_some();
            return if ours { Decision::Refuse(libc::ENOSYS) } else { Decision::Continue };
        }
        None => None,
    };
    request.map_or(Decision::Continue, Decision::Perform)
}

fn mount([source, target, kind, flags, options]: [u64; 5], memory: &impl Memory) -> Option<MountRequest> {
    // The kernel ignores the type and the options of a bind, so they are not looked at.
    if is_plain_bind(flags) {
        return Some(MountRequest::Bind { source: path(memory, source)?, target: path(memory, target)? });
    }
    is_plain_mount(flags).then_some(())?;
    let flags = without_magic(flags);
    let kind = Kind::of(&text(memory, kind, MAX_KIND)?)?;
    // A null source and null options are valid, a null target is not.
    let source = if source == 0 { None } else { Some(text(memory, source, MAX_SOURCE)?) };
    let options = if options == 0 { Vec::new() } else { page(memory, options)? };
    Some(MountRequest::Mount { kind, source, target: path(memory, target)?, flags, options })
}

fn unmount(target: u64, flags: u64, memory: &impl Memory) -> Option<MountRequest> {
    is_plain_unmount(flags).then_some(())?;
    Some(MountRequest::Unmount { target: path(memory, target)?, flags: flags & u64::from(u32::MAX) })
}

fn path(memory: &impl Memory, address: u64) -> Option<Vec<u8>> {
    // The kernel has ENOENT for an empty path and ENAMETOOLONG for one without an end.
    text(memory, address, MAX_PATH).filter(|path| !path.is_empty())
}

/// A string of at most `max` bytes, the final zero included; `None` when it does not end by then.
fn text(memory: &impl Memory, address: u64, max: usize) -> Option<Vec<u8>> {
    let mut buffer = vec![0; max];
    let length = read(memory, address, &mut buffer);
    buffer.truncate(length);
    let end = buffer.iter().position(|byte| *byte == 0)?;
    buffer.truncate(end);
    Some(buffer)
}

/// mount(2)'s options, which end with a zero, with the page or with the mapped memory (`copy_mount_options`).
fn page(memory: &impl Memory, address: u64) -> Option<Vec<u8>> {
    let mut buffer = vec![0; MAX_OPTIONS];
    let length = read(memory, address, &mut buffer);
    buffer.truncate(length);
    // An address outside of any mapping is EFAULT, for the kernel to return.
    if buffer.is_empty() {
        return None;
    }
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    buffer.truncate(end);
    Some(buffer)
}

/// Reads page by page until a zero is found. One read across an unmapped page would fail as a whole.
fn read(memory: &impl Memory, address: u64, buffer: &mut [u8]) -> usize {
    const PAGE: u64 = 4096;
    let mut done = 0;
    while done < buffer.len() {
        // The address is any number of 64 bits.
        let Some(from) = address.checked_add(done as u64) else { break };
        let piece = ((PAGE - from % PAGE) as usize).min(buffer.len() - done);
        let read = memory.read(from, &mut buffer[done..done + piece]).min(piece);
        done += read;
        // A short read ends at an unmapped page. After a zero nothing else is wanted, and the next page may be a file
        // on a slow disk.
        if read < piece || buffer[done - read..done].contains(&0) {
            break;
        }
    }
    done
}

/// Made-up memory for tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Memory from an address on.
    pub(crate) struct Piece {
        pub(crate) start: u64,
        pub(crate) bytes: Vec<u8>,
    }

    impl Memory for Piece {
        fn read(&self, address: u64, buffer: &mut [u8]) -> usize {
            let Some(from) = address.checked_sub(self.start).and_then(|from| usize::try_from(from).ok()) else {
                return 0;
            };
            let rest = self.bytes.get(from..).unwrap_or_default();
            let length = rest.len().min(buffer.len());
            buffer[..length].copy_from_slice(&rest[..length]);
            length
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{testing::Piece, *};

    const START: u64 = 0x1000;

    /// Strings one after the other, and their addresses.
    fn memory(texts: &[&[u8]]) -> (Piece, Vec<u64>) {
        let mut bytes = Vec::new();
        let mut places = Vec::new();
        for text in texts {
            places.push(START + bytes.len() as u64);
            bytes.extend_from_slice(text);
            bytes.push(0);
        }
        (Piece { start: START, bytes }, places)
    }

    fn call(number: u32, arguments: [u64; 6]) -> RawCall {
        RawCall { architecture: X86_64, number, arguments }
    }

    fn mounting(kind: &[u8], flags: u64) -> Decision {
        let (memory, at) = memory(&[b"source", b"/p", kind, b"hidepid=2"]);
        judge(&call(165, [at[0], at[1], at[2], flags, at[3], 0]), &memory)
    }

    #[test]
    fn only_a_new_procfs_or_sysfs_is_mounted_here() {
        let expected = |kind, flags| {
            let (source, target, options) = (Some(b"source".to_vec()), b"/p".to_vec(), b"hidepid=2".to_vec());
            Decision::Perform(MountRequest::Mount { kind, source, target, flags, options })
        };
        assert_eq!(mounting(b"proc", 0), expected(Kind::Proc, 0));
        assert_eq!(mounting(b"sysfs", 14), expected(Kind::Sys, 14));
        assert_eq!(mounting(b"proc", MAGIC | 0x2), expected(Kind::Proc, 2));
        for other in [&b""[..], b"tmpfs", b"procfs", b"pro", b"sysfs2", b"sysfs-and-more"] {
            assert_eq!(mounting(other, 0), Decision::Continue, "{other:?}");
        }
    }

    #[test]
    fn moves_remounts_propagation_and_binds_of_all_that_is_mounted_are_the_kernels() {
        use libc::{MS_BIND, MS_MOVE, MS_PRIVATE, MS_REC, MS_REMOUNT, MS_SHARED, MS_SLAVE};
        for flags in [MS_MOVE, MS_REMOUNT, MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_BIND | MS_REC, MS_BIND | MS_REMOUNT] {
            assert_eq!(mounting(b"proc", flags), Decision::Continue);
        }
    }

    #[test]
    fn a_bind_that_is_not_recursive_is_a_request() {
        let expected = MountRequest::Bind { source: b"source".to_vec(), target: b"/p".to_vec() };
        for kind in [&b"none"[..], b"proc"] {
            assert_eq!(mounting(kind, libc::MS_BIND | libc::MS_RDONLY), Decision::Perform(expected.clone()));
        }
    }

    #[test]
    fn every_abi_has_its_numbers() {
        let (memory, at) = memory(&[b"/p", b"proc"]);
        let arguments = [0, at[0], at[1], 0, 0, 0];
        for (architecture, number) in [(X86_64, 165), (X86_64, 165 + X32), (I386, 21)] {
            let decision = judge(&RawCall { architecture, number, arguments }, &memory);
            assert!(matches!(decision, Decision::Perform(MountRequest::Mount { .. })), "{architecture:#x} {number}");
        }
        for (architecture, number) in [(X86_64, 166), (X86_64, 166 + X32), (I386, 22), (I386, 52)] {
            let decision = judge(&RawCall { architecture, number, arguments: [at[0], 0, 0, 0, 0, 0] }, &memory);
            assert!(matches!(decision, Decision::Perform(MountRequest::Unmount { .. })), "{architecture:#x} {number}");
        }
        let fs_open = |architecture| RawCall { architecture, number: 430, arguments: [at[1], 0, 0, 0, 0, 0] };
        assert_eq!(judge(&fs_open(X86_64), &memory), Decision::Refuse(libc::ENOSYS));
        assert_eq!(judge(&fs_open(I386), &memory), Decision::Refuse(libc::ENOSYS));
        assert_eq!(
            judge(&RawCall { arguments: [at[0], 0, 0, 0, 0, 0], ..fs_open(X86_64) }, &memory),
            Decision::Continue
        );
        assert_eq!(judge(&RawCall { number: 165, architecture: 0xc000_00b7, arguments }, &memory), Decision::Continue);
    }

    #[test]
    fn a_lazy_unmount_takes_everything_along_by_itself() {
        let (memory, at) = memory(&[b"/p"]);
        for flags in [0x2_u64, 0x4, 0x3, 0x10] {
            assert_eq!(judge(&call(166, [at[0], flags, 0, 0, 0, 0]), &memory), Decision::Continue);
        }
        // The upper half of the register is not part of the argument.
        let decision = judge(&call(166, [at[0], (1 << 32) | 0x8, 0, 0, 0, 0]), &memory);
        assert_eq!(decision, Decision::Perform(MountRequest::Unmount { target: b"/p".to_vec(), flags: 8 }));
    }

    #[test]
    fn what_does_not_end_or_is_not_there_is_the_kernels() {
        let (memory, at) = memory(&[&[b'a'; MAX_PATH], b"proc"]);
        assert_eq!(judge(&call(165, [0, at[0], at[1], 0, 0, 0]), &memory), Decision::Continue);
        assert_eq!(judge(&call(165, [0, 0, at[1], 0, 0, 0]), &memory), Decision::Continue);
        assert_eq!(judge(&call(165, [0, at[1], u64::MAX, 0, 0, 0]), &memory), Decision::Continue);
        assert_eq!(judge(&call(165, [0, at[1], at[1], 0, u64::MAX - 5, 0]), &memory), Decision::Continue);
    }

    #[test]
    fn options_may_end_where_the_memory_does() {
        let mut bytes = b"proc\0".to_vec();
        bytes.extend(b"gid=5");
        let memory = Piece { start: START, bytes };
        let decision = judge(&call(165, [0, START, START, 0, START + 5, 0]), &memory);
        assert!(matches!(decision, Decision::Perform(MountRequest::Mount { options, .. }) if options == b"gid=5"));
    }

    proptest! {
        #[test]
        fn no_call_panics_and_what_is_done_is_short_and_of_the_callers_bytes(
            architecture in prop_oneof![Just(X86_64), Just(I386), any::<u32>()],
            number in prop_oneof![Just(165_u32), Just(166), Just(430), Just(21), Just(52), any::<u32>()],
            places in proptest::array::uniform6(prop_oneof![START..START + 64, Just(0_u64), any::<u64>()]),
            flags in prop_oneof![Just(0_u64), any::<u64>()],
            bytes in proptest::collection::vec(prop_oneof![Just(0_u8), Just(b'/'), any::<u8>()], 0..64),
            words in proptest::collection::vec(prop_oneof![Just("proc\0"), Just("sysfs\0"), Just("/a\0")], 0..8),
        ) {
            let bytes: Vec<u8> = words.concat().into_bytes().into_iter().chain(bytes).collect();
            let memory = Piece { start: START, bytes };
            let mut arguments = places;
            arguments[3] = flags;
            let call = RawCall { architecture, number, arguments };
            let decision = judge(&call, &memory);
            prop_assert!(may_concern(&call) || decision == Decision::Continue);
            match decision {
                Decision::Perform(MountRequest::Mount { source, target, options, flags, .. }) => {
                    prop_assert_eq!(flags & NOT_PLAIN, 0);
                    prop_assert!(!target.is_empty() && target.len() < MAX_PATH && options.len() <= MAX_OPTIONS);
                    let all = [target, options, source.unwrap_or_default()].concat();
                    prop_assert!(!all.contains(&0));
                }
                Decision::Perform(MountRequest::Bind { source, target }) => {
                    prop_assert!(!source.is_empty() && !target.is_empty() && ![source, target].concat().contains(&0));
                }
                Decision::Perform(MountRequest::Unmount { target, flags }) => {
                    prop_assert!(!target.is_empty() && !target.contains(&0) && flags & !0x9 == 0);
                }
                Decision::Refuse(errno) => prop_assert_eq!(errno, libc::ENOSYS),
                Decision::Continue => {}
            }
        }
    }
}
