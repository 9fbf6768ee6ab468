//! Owners, modes and device numbers that the host's file cannot have, kept beside it in an extended attribute.
//!
//! Ids are the same on both sides: user N of the host is user N of a container. A process without privileges can give
//! its files to no other user. So a record, which only this server reads, keeps what a container does with chown, its
//! files of other users, bits for changed identity on execution, devices, pipes and sockets. The host's file stays the
//! user's own and never gets a set-user-id bit from the guest.
//!
//! The record stays with the file when it is renamed or copied with its attributes. It counts only on files that are
//! the user's own: on others somebody else could have written it. A mode counts as long as the host's mode is the one
//! that was set with it, so that a chmod of the host is seen.

use std::ffi::CStr;

use rustix::fs::Statx;

/// Name of the extended attribute.
pub(crate) const NAME: &CStr = c"user.bulkhead.owner";
/// Length of a record in bytes.
pub(crate) const LENGTH: usize = 24;

/// Version of the format, its first byte.
const VERSION: u8 = 1;
/// Flags, in the second byte: the record has an owner; it has a mode.
const HAS_OWNER: u8 = 1;
const HAS_MODE: u8 = 2;

/// Largest id that a container with a range of its own has.
const MAX_ID: u32 = 65_535;
/// Id that is shown for the user's own if that is larger: the first user's of most images.
const OWN_ID: u32 = 1000;
/// Id that is shown for all others that are larger: nobody's.
const OTHER_ID: u32 = 65_534;

/// Bits of a mode that are not the type.
pub(crate) const MODE_BITS: u32 = 0o7777;
/// Bits for changed identity on execution.
const PRIVILEGES: u32 = 0o6000;

/// The owner and mode that are kept beside a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// User and group.
    pub(crate) owner: Option<(u32, u32)>,
    pub(crate) mode: Option<VirtualMode>,
}

/// The mode of a file in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VirtualMode {
    /// Type and permissions for the guest.
    pub(crate) mode: u32,
    /// Permissions of the file on the host when this was set.
    pub(crate) host: u32,
    /// Number of a device, as `struct fuse_attr` has it.
    pub(crate) device: u32,
}

/// Owner and mode that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
    pub(crate) device: u32,
}

impl Record {
    /// Decodes the attribute's value. One of another length or version is as good as none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LENGTH] = bytes.try_into().ok()?;
        if bytes[0] != VERSION {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mode = VirtualMode { mode: word(12), host: word(16), device: word(20) };
        let kind = mode.mode & libc::S_IFMT;
        let known = [libc::S_IFREG, libc::S_IFDIR, libc::S_IFCHR, libc::S_IFBLK, libc::S_IFIFO, libc::S_IFSOCK];
        Some(Self {
            owner: (bytes[1] & HAS_OWNER != 0).then(|| (word(4), word(8))),
            mode: (bytes[1] & HAS_MODE != 0 && known.contains(&kind)).then_some(mode),
        })
    }

    /// Encodes the attribute's value: version, flags, two zeros, then little-endian words: user, group, mode, mode on
    /// the host, device.
    pub(crate) fn encode(&self) -> [u8; LENGTH] {
        let (uid, gid) = self.owner.unwrap_or_default();
        let mode = self.mode.unwrap_or(VirtualMode { mode: 0, host: 0, device: 0 });
        let flags = if self.owner.is_some() { HAS_OWNER } else { 0 } | if self.mode.is_some() { HAS_MODE } else { 0 };
        let mut bytes = [0; LENGTH];
        bytes[..2].copy_from_slice(&[VERSION, flags]);
        for (at, word) in [uid, gid, mode.mode, mode.host, mode.device].into_iter().enumerate() {
            bytes[4 + 4 * at..8 + 4 * at].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Ids of this process, by which the host judges what it does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Ids {
    /// The effective ids of this process.
    pub(crate) fn own() -> Self {
        Self { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    /// True if a file may have a record: it is the user's own, and of a kind that can have extended attributes.
    pub(crate) fn records(self, stat: &Statx) -> bool {
        let kind = u32::from(stat.stx_mode) & libc::S_IFMT;
        (self.uid == 0 || stat.stx_uid == self.uid) && matches!(kind, libc::S_IFREG | libc::S_IFDIR)
    }

    fn map(id: u32, own: u32) -> u32 {
        match id {
            0..=MAX_ID => id,
            _ if id == own => OWN_ID,
            _ => OTHER_ID,
        }
    }

    /// The owner of a file without a record.
    pub(crate) fn plain_owner(self, stat: &Statx) -> (u32, u32) {
        (Self::map(stat.stx_uid, self.uid), Self::map(stat.stx_gid, self.gid))
    }

    /// The owner of new files of this process that have no record.
    pub(crate) fn shown_own(self) -> (u32, u32) {
        (Self::map(self.uid, self.uid), Self::map(self.gid, self.gid))
    }

    /// Owner and mode of a file with this record.
    pub(crate) fn shown(self, stat: &Statx, record: Option<&Record>) -> Shown {
        let host = u32::from(stat.stx_mode);
        let (uid, gid) = self.plain_owner(stat);
        let device = device_number(stat.stx_rdev_major, stat.stx_rdev_minor);
        let mut shown = Shown { uid, gid, mode: host, device };
        let Some(record) = record.filter(|_| self.records(stat)) else { return shown };
        if let Some((uid, gid)) = record.owner {
            (shown.uid, shown.gid) = (uid, gid);
        }
        if let Some(mode) = record.mode {
            if mode.host == host & MODE_BITS {
                shown.mode = host & libc::S_IFMT | mode.mode & MODE_BITS;
            }
            let kind = mode.mode & libc::S_IFMT;
            // Devices, pipes and sockets stand in empty files. A directory is never anything else.
            if host & libc::S_IFMT == libc::S_IFREG && kind != libc::S_IFDIR && stat.stx_size == 0 {
                shown.mode = kind | shown.mode & MODE_BITS;
                shown.device = mode.device;
            }
        }
        shown
    }
}

/// The host's permissions for a file that has `mode` in the guest and `current` on the host.
///
/// The guest never adds a bit for changed identity, and never takes the user's own access away: this process could not
/// open the file any more, nor its record.
pub(crate) fn host_mode(mode: u32, current: u32, directory: bool) -> u32 {
    let own = if directory { 0o500 } else { 0o400 };
    mode & 0o1777 | mode & current & PRIVILEGES | own
}

/// The mode after a write by a process that may not keep privileges (chmod(2), write(2)).
pub(crate) fn without_privileges(mode: u32) -> u32 {
    // A set-group-id bit without execution by the group once meant mandatory locking, and stays.
    if mode & 0o010 == 0 { mode & !0o4000 } else { mode & !PRIVILEGES }
}

/// A device number as the FUSE protocol has it: `new_encode_dev` of Linux.
pub(crate) fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_record_survives_its_encoding(
            owner: Option<(u32, u32)>,
            mode in proptest::option::of((0_u32..0o10000, 0_u32..0o10000, any::<u32>())),
        ) {
            let mode = mode.map(|(mode, host, device)| VirtualMode { mode: libc::S_IFCHR | mode, host, device });
            let record = Record { owner, mode };
            prop_assert_eq!(Record::decode(&record.encode()), Some(record));
        }

        #[test]
        fn no_value_of_the_attribute_panics(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Record::decode(&bytes);
        }

        #[test]
        fn the_host_never_gets_privileges_and_keeps_its_own_access(
            mode in 0_u32..0o10000, current in 0_u32..0o10000, directory: bool
        ) {
            let host = host_mode(mode, current, directory);
            prop_assert_eq!(host & PRIVILEGES & !current, 0);
            prop_assert_eq!(host & 0o400, 0o400);
        }
    }

    #[test]
    fn a_record_of_another_version_or_length_does_not_count() {
        let mut bytes = Record { owner: Some((1, 2)), mode: None }.encode();
        assert!(Record::decode(&bytes).is_some());
        assert_eq!(Record::decode(&bytes[1..]), None);
        bytes[0] = 2;
        assert_eq!(Record::decode(&bytes), None);
    }

    #[test]
    fn ids_beyond_a_containers_range_are_shown_within_it() {
        let own = Ids { uid: 100_000, gid: 200_000 };
        assert_eq!(own.shown_own(), (1000, 1000));
        assert_eq!([Ids::map(65_535, 100_000), Ids::map(65_536, 100_000), Ids::map(0, 0)], [65_535, 65_534, 0]);
    }

    #[test]
    fn a_write_clears_privileges_but_not_the_bit_of_mandatory_locking() {
        assert_eq!([0o4755, 0o6755, 0o2644, 0o6644].map(without_privileges), [0o755, 0o755, 0o2644, 0o2644]);
    }
}
