//! Attributes as the guest sees them: the host's, with ids in the guest's range, unique inode numbers, and the record
//! that a file may have.

use std::sync::{Arc, PoisonError, RwLock};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{Statx, StatxFlags},
    io::Errno,
};

use super::{
    nodes::Key,
    owners::{Ids, Record},
    state::State,
};
use crate::fuse::reply::Attributes;

/// Fields of statx(2) that each node needs.
pub(crate) const STAT: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// Time of a file's last change, in seconds and nanoseconds: a change of its records is one.
pub(crate) type Stamp = (i64, u32);

/// Bits of an inode number that are the host's; above them is the number of the device.
const INODE_BITS: u32 = 48;
/// Number instead of a device's for inode numbers that are longer, as a few file systems have.
const LONG: u64 = 0x7fff;
/// Bit of the inode numbers of directories on the way to a share.
const WAY: u64 = 1 << 63;

/// File systems whose files are the kernel's, not the user's, as `linux/magic.h` numbers them. A share may contain
/// places where they are mounted. Through some of them the guest could reach into processes of the user.
const KERNEL_FILE_SYSTEMS: [i64; 16] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
    0x6165_676c, // pstore
    0xde5e_81e4, // efivarfs
    0x6265_6570, // configfs
    0x1cd1,      // devpts
    0x1980_0202, // mqueue
    0x4249_4e4d, // binfmt_misc
    0x6573_5543, // fusectl
    0xf97c_ff8c, // selinuxfs
];

/// The device number of a file, in one word.
pub(crate) fn device(stat: &Statx) -> u64 {
    u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor)
}

/// The identity of a file in a share.
pub(crate) fn key(share: usize, stat: &Statx) -> Key {
    let born = if stat.stx_mask & StatxFlags::BTIME.bits() == 0 {
        (0, 0)
    } else {
        (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)
    };
    Key { share, device: device(stat), inode: stat.stx_ino, born, kind: kind(stat) }
}

/// The time of a file's last change.
pub(crate) fn stamp(stat: &Statx) -> Stamp {
    (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec)
}

/// The file type of a file on the host.
pub(crate) fn kind(stat: &Statx) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}

#[derive(Clone, Copy)]
struct Device {
    id: u64,
    refused: bool,
}

/// The devices of the host that files were found on, by the order in which they were found: this process, or an earlier
/// one, so that inode numbers stay.
pub(crate) struct Devices {
    known: RwLock<Vec<Device>>,
    state: Arc<State>,
}

impl Devices {
    /// The devices that earlier processes found.
    pub(crate) fn new(state: &Arc<State>) -> Self {
        let known = state.devices().into_iter().map(|(id, refused)| Device { id, refused }).collect();
        Self { known: RwLock::new(known), state: Arc::clone(state) }
    }

    /// The number of a file's device. `open` opens the file as a place, which is needed once for each device.
    ///
    /// # Errors
    /// `EACCES` on a file system of the kernel's.
    pub(crate) fn number(&self, stat: &Statx, open: impl FnOnce() -> Result<OwnedFd, Errno>) -> Result<u64, Errno> {
        let id = device(stat);
        if let Some(found) = self.find(id) {
            return found;
        }
        let kind = rustix::fs::fstatfs(open()?.as_fd())?.f_type;
        let refused = KERNEL_FILE_SYSTEMS.contains(&kind);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // As many file systems as there are numbers are not mounted at a time.
        if known.len() as u64 >= LONG {
            return Err(Errno::OVERFLOW);
        }
        if !known.iter().any(|device| device.id == id) {
            self.state.add_device(known.len(), id, refused);
            known.push(Device { id, refused });
        }
        drop(known);
        self.find(id).unwrap_or(Err(Errno::STALE))
    }

    fn find(&self, id: u64) -> Option<Result<u64, Errno>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let at = known.iter().position(|device| device.id == id)?;
        Some(if known[at].refused { Err(Errno::ACCESS) } else { Ok(at as u64) })
    }
}

/// The inode number for the guest, which is unique over all devices and the same each time.
pub(crate) fn number(device: u64, inode: u64) -> u64 {
    let mask = (1 << INODE_BITS) - 1;
    if inode & !mask == 0 {
        return device << INODE_BITS | inode;
    }
    // Cannot be unique then, only nearly so. The multiplier is that of Fibonacci hashing.
    let mixed = (inode ^ device.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    LONG << INODE_BITS | mixed >> (64 - INODE_BITS)
}

/// The inode number of a directory on the way to a share.
pub(crate) fn number_of_way(entry: usize) -> u64 {
    WAY | entry as u64
}

/// Attributes of a file with this record.
pub(crate) fn attributes(number: u64, stat: &Statx, record: Option<&Record>, ids: Ids) -> Attributes {
    let shown = ids.shown(stat, record);
    Attributes {
        number,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        accessed: (stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
        modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
        changed: stamp(stat),
        mode: shown.mode,
        links: stat.stx_nlink,
        uid: shown.uid,
        gid: shown.gid,
        device: shown.device,
        block_size: stat.stx_blksize,
        brief: false,
    }
}

/// Attributes of a directory on the way to a share: root's, and nobody may write to it.
pub(crate) fn of_way(entry: usize, started: (i64, u32)) -> Attributes {
    Attributes {
        number: number_of_way(entry),
        accessed: started,
        modified: started,
        changed: started,
        mode: libc::S_IFDIR | 0o555,
        links: 2,
        block_size: 4096,
        ..Attributes::default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn inode_numbers_are_unique_over_devices_and_lengths() {
        let inodes = [1, 2, (1 << 48) - 1, 1 << 48, (1 << 48) + 1, u64::MAX];
        let numbers: HashSet<u64> = (0..3).flat_map(|device| inodes.map(|inode| number(device, inode))).collect();
        assert_eq!(numbers.len(), 3 * inodes.len());
        assert!(numbers.iter().all(|number| number & WAY == 0));
    }

    #[test]
    fn files_of_the_kernel_are_refused_wherever_they_are_mounted() {
        let devices = Devices::new(&State::own().unwrap());
        for (path, expected) in [("/proc", Err(Errno::ACCESS)), ("/sys", Err(Errno::ACCESS)), ("/tmp", Ok(2))] {
            let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
            let open = || rustix::fs::open(path, flags, rustix::fs::Mode::empty());
            let stat = rustix::fs::statx(open().unwrap(), c"", rustix::fs::AtFlags::EMPTY_PATH, STAT).unwrap();
            for _ in 0..2 {
                assert_eq!(devices.number(&stat, open), expected, "{path}");
            }
        }
    }
}
