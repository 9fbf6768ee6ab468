//! What a system call asks for, and whether it concerns the files of the warden.
//!
//! Number and arguments are the container's and so is the memory that they point into: everything is read with a bound,
//! once, and whatever is odd is left to the kernel, which answers as it would without the warden.

use std::os::raw::c_ulong;

use serde::{Deserialize, Serialize};

/// `linux/audit.h`.
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

/// The bit that makes a number one of the x32 ABI, which has these calls under the same numbers.
const X32: u32 = 0x4000_0000;

/// `PATH_MAX`, with the byte that ends a path.
const MAX_PATH: usize = 4096;

/// Options of mount(2): a page.
const MAX_OPTIONS: usize = 4096;

/// Longest name of a source that is taken over.
const MAX_SOURCE: usize = 256;

/// The type's name: what is longer is not one of ours.
const MAX_KIND: usize = 8;

/// `MS_MGC_VAL` and its mask: a number that old programs put into the flags.
const MAGIC: u64 = 0xc0ed_0000;
const MAGIC_MASK: u64 = 0xffff_0000;

/// Not a new mount, or one with an attribute that only the kernel's own call knows how to give.
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
    /// Fills `buffer` from an address on, as far as there is memory, and returns how far.
    fn read(&self, address: u64, buffer: &mut [u8]) -> usize;
}

/// A system call as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawCall {
    /// `AUDIT_ARCH_…`
    pub(crate) architecture: u32,
    /// The number in that ABI.
    pub(crate) number: u32,
    /// The arguments; unused ones may be anything.
    pub(crate) arguments: [u64; 6],
}

/// A file system that has files of the warden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// procfs
    Proc,
    /// sysfs
    Sys,
}

impl Kind {
    /// The name for the kernel.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Proc => "proc",
            Self::Sys => "sysfs",
        }
    }

    /// What paths of files in it begin with in the list of nodes.
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

/// What is to be done in the caller's place. Bytes are what the caller gave, without a zero in them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// mount(2) of a new procfs or sysfs.
    Mount {
        /// What.
        kind: Kind,
        /// The name that the table of mounts shows.
        source: Option<Vec<u8>>,
        /// Where.
        target: Vec<u8>,
        /// `MS_…`
        flags: u64,
        /// Separated by commas.
        options: Vec<u8>,
    },
    /// mount(2) of a part of the tree of files at a second place, without what is mounted on it.
    Bind {
        /// What.
        source: Vec<u8>,
        /// Where.
        target: Vec<u8>,
    },
    /// umount2(2) of something that is mounted over nothing that would stay.
    Unmount {
        /// What.
        target: Vec<u8>,
        /// `MNT_FORCE` or `UMOUNT_NOFOLLOW`.
        flags: u64,
    },
}

/// What comes of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The kernel goes on with it.
    Continue,
    /// It fails with this error.
    Refuse(i32),
    /// This is done instead.
    Do(Order),
}

/// A call that is looked at.
enum Call {
    Mount,
    Unmount,
    OldUnmount,
    OpenFileSystem,
}

impl Call {
    fn of(call: &RawCall) -> Option<Self> {
        match (call.architecture, call.number) {
            (X86_64, number) => match number & !X32 {
                165 => Some(Self::Mount),
                166 => Some(Self::Unmount),
                430 => Some(Self::OpenFileSystem),
                _ => None,
            },
            (I386, 21) => Some(Self::Mount),
            (I386, 22) => Some(Self::OldUnmount),
            (I386, 52) => Some(Self::Unmount),
            (I386, 430) => Some(Self::OpenFileSystem),
            _ => None,
        }
    }
}

/// Judges a call of a process that may mount.
pub(crate) fn judge(call: &RawCall, memory: &impl Memory) -> Verdict {
    let [first, second, third, fourth, fifth, _] = call.arguments;
    let order = match Call::of(call) {
        Some(Call::Mount) => mount([first, second, third, fourth, fifth], memory),
        Some(Call::Unmount) => unmount(first, second & u64::from(u32::MAX), memory),
        Some(Call::OldUnmount) => unmount(first, 0, memory),
        // Programs go back to mount(2), whose arguments say everything at once.
        Some(Call::OpenFileSystem) => {
            let ours = text(memory, first, MAX_KIND).and_then(|name| Kind::of(&name)).is_some();
            return if ours { Verdict::Refuse(libc::ENOSYS) } else { Verdict::Continue };
        }
        None => None,
    };
    order.map_or(Verdict::Continue, Verdict::Do)
}

fn mount([source, target, kind, flags, options]: [u64; 5], memory: &impl Memory) -> Option<Order> {
    let flags = if flags & MAGIC_MASK == MAGIC { flags & !MAGIC_MASK } else { flags };
    if flags & NOT_PLAIN == libc::MS_BIND && flags & libc::MS_REC == 0 {
        return Some(Order::Bind { source: path(memory, source)?, target: path(memory, target)? });
    }
    if flags & NOT_PLAIN != 0 {
        return None;
    }
    let kind = Kind::of(&text(memory, kind, MAX_KIND)?)?;
    let source = if source == 0 { None } else { Some(text(memory, source, MAX_SOURCE)?) };
    let options = if options == 0 { Vec::new() } else { page(memory, options)? };
    Some(Order::Mount { kind, source, target: path(memory, target)?, flags, options })
}

fn unmount(target: u64, flags: u64, memory: &impl Memory) -> Option<Order> {
    let known = (libc::MNT_FORCE | libc::UMOUNT_NOFOLLOW).unsigned_abs();
    // With MNT_DETACH what is mounted on it goes along.
    (flags & !u64::from(known) == 0).then_some(())?;
    Some(Order::Unmount { target: path(memory, target)?, flags })
}

fn path(memory: &impl Memory, address: u64) -> Option<Vec<u8>> {
    text(memory, address, MAX_PATH).filter(|path| !path.is_empty())
}

/// A string that ends within `most` bytes, the zero included.
fn text(memory: &impl Memory, address: u64, most: usize) -> Option<Vec<u8>> {
    let mut buffer = vec![0; most];
    let length = read(memory, address, &mut buffer);
    buffer.truncate(length);
    let end = buffer.iter().position(|byte| *byte == 0)?;
    buffer.truncate(end);
    Some(buffer)
}

/// Options end with a zero or with the memory.
fn page(memory: &impl Memory, address: u64) -> Option<Vec<u8>> {
    let mut buffer = vec![0; MAX_OPTIONS];
    let length = read(memory, address, &mut buffer);
    buffer.truncate(length);
    if buffer.is_empty() {
        return None;
    }
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    buffer.truncate(end);
    Some(buffer)
}

/// Reads up to the end of each page, so that a page that is not there hides nothing in front of it.
fn read(memory: &impl Memory, address: u64, buffer: &mut [u8]) -> usize {
    const PAGE: u64 = 4096;
    let mut done = 0;
    while done < buffer.len() {
        let Some(from) = address.checked_add(done as u64) else { break };
        let piece = ((PAGE - from % PAGE) as usize).min(buffer.len() - done);
        let read = memory.read(from, &mut buffer[done..done + piece]).min(piece);
        done += read;
        if read < piece || buffer[done - read..done].contains(&0) {
            break;
        }
    }
    done
}

/// Runs the judgement on what a test makes up.
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

    fn mounting(kind: &[u8], flags: u64) -> Verdict {
        let (memory, at) = memory(&[b"source", b"/p", kind, b"hidepid=2"]);
        judge(&call(165, [at[0], at[1], at[2], flags, at[3], 0]), &memory)
    }

    #[test]
    fn new_procfs_and_sysfs_are_mounted_by_the_warden_and_nothing_else() {
        let expected = |kind, flags| {
            let (source, target, options) = (Some(b"source".to_vec()), b"/p".to_vec(), b"hidepid=2".to_vec());
            Verdict::Do(Order::Mount { kind, source, target, flags, options })
        };
        assert_eq!(mounting(b"proc", 0), expected(Kind::Proc, 0));
        assert_eq!(mounting(b"sysfs", 14), expected(Kind::Sys, 14));
        assert_eq!(mounting(b"proc", MAGIC | 0x2), expected(Kind::Proc, 2));
        for other in [&b""[..], b"tmpfs", b"procfs", b"pro", b"sysfs2", b"sysfs-and-more"] {
            assert_eq!(mounting(other, 0), Verdict::Continue, "{other:?}");
        }
    }

    #[test]
    fn moves_remounts_propagation_and_binds_of_all_that_is_mounted_are_the_kernels() {
        use libc::{MS_BIND, MS_MOVE, MS_PRIVATE, MS_REC, MS_REMOUNT, MS_SHARED, MS_SLAVE};
        for flags in [MS_MOVE, MS_REMOUNT, MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_BIND | MS_REC, MS_BIND | MS_REMOUNT] {
            assert_eq!(mounting(b"proc", flags), Verdict::Continue);
        }
    }

    #[test]
    fn a_bind_without_what_is_mounted_on_its_source_is_looked_at() {
        let expected = Order::Bind { source: b"source".to_vec(), target: b"/p".to_vec() };
        for kind in [&b"none"[..], b"proc"] {
            assert_eq!(mounting(kind, libc::MS_BIND | libc::MS_RDONLY), Verdict::Do(expected.clone()));
        }
    }

    #[test]
    fn every_abi_has_its_numbers() {
        let (memory, at) = memory(&[b"/p", b"proc"]);
        let arguments = [0, at[0], at[1], 0, 0, 0];
        for (architecture, number) in [(X86_64, 165), (X86_64, 165 + X32), (I386, 21)] {
            let verdict = judge(&RawCall { architecture, number, arguments }, &memory);
            assert!(matches!(verdict, Verdict::Do(Order::Mount { .. })), "{architecture:#x} {number}");
        }
        for (architecture, number) in [(X86_64, 166), (X86_64, 166 + X32), (I386, 22), (I386, 52)] {
            let verdict = judge(&RawCall { architecture, number, arguments: [at[0], 0, 0, 0, 0, 0] }, &memory);
            assert!(matches!(verdict, Verdict::Do(Order::Unmount { .. })), "{architecture:#x} {number}");
        }
        let fs_open = |architecture| RawCall { architecture, number: 430, arguments: [at[1], 0, 0, 0, 0, 0] };
        assert_eq!(judge(&fs_open(X86_64), &memory), Verdict::Refuse(libc::ENOSYS));
        assert_eq!(judge(&fs_open(I386), &memory), Verdict::Refuse(libc::ENOSYS));
        assert_eq!(
            judge(&RawCall { arguments: [at[0], 0, 0, 0, 0, 0], ..fs_open(X86_64) }, &memory),
            Verdict::Continue
        );
        assert_eq!(judge(&RawCall { number: 165, architecture: 0xc000_00b7, arguments }, &memory), Verdict::Continue);
    }

    #[test]
    fn a_lazy_unmount_takes_everything_along_by_itself() {
        let (memory, at) = memory(&[b"/p"]);
        for flags in [0x2_u64, 0x4, 0x3, 0x10] {
            assert_eq!(judge(&call(166, [at[0], flags, 0, 0, 0, 0]), &memory), Verdict::Continue);
        }
        // The upper half is none of the kernel's argument.
        let verdict = judge(&call(166, [at[0], (1 << 32) | 0x8, 0, 0, 0, 0]), &memory);
        assert_eq!(verdict, Verdict::Do(Order::Unmount { target: b"/p".to_vec(), flags: 8 }));
    }

    #[test]
    fn what_does_not_end_or_is_not_there_is_the_kernels() {
        let (memory, at) = memory(&[&[b'a'; MAX_PATH], b"proc"]);
        assert_eq!(judge(&call(165, [0, at[0], at[1], 0, 0, 0]), &memory), Verdict::Continue);
        assert_eq!(judge(&call(165, [0, 0, at[1], 0, 0, 0]), &memory), Verdict::Continue);
        assert_eq!(judge(&call(165, [0, at[1], u64::MAX, 0, 0, 0]), &memory), Verdict::Continue);
        assert_eq!(judge(&call(165, [0, at[1], at[1], 0, u64::MAX - 5, 0]), &memory), Verdict::Continue);
    }

    #[test]
    fn options_may_end_where_the_memory_does() {
        let mut bytes = b"proc\0".to_vec();
        bytes.extend(b"gid=5");
        let memory = Piece { start: START, bytes };
        let verdict = judge(&call(165, [0, START, START, 0, START + 5, 0]), &memory);
        assert!(matches!(verdict, Verdict::Do(Order::Mount { options, .. }) if options == b"gid=5"));
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
            match judge(&RawCall { architecture, number, arguments }, &memory) {
                Verdict::Do(Order::Mount { source, target, options, flags, .. }) => {
                    prop_assert_eq!(flags & NOT_PLAIN, 0);
                    prop_assert!(!target.is_empty() && target.len() < MAX_PATH && options.len() <= MAX_OPTIONS);
                    let all = [target, options, source.unwrap_or_default()].concat();
                    prop_assert!(!all.contains(&0));
                }
                Verdict::Do(Order::Bind { source, target }) => {
                    prop_assert!(!source.is_empty() && !target.is_empty() && ![source, target].concat().contains(&0));
                }
                Verdict::Do(Order::Unmount { target, flags }) => {
                    prop_assert!(!target.is_empty() && !target.contains(&0) && flags & !0x9 == 0);
                }
                Verdict::Refuse(errno) => prop_assert_eq!(errno, libc::ENOSYS),
                Verdict::Continue => {}
            }
        }
    }
}
