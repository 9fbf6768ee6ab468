//! The data disk: a raw, sparse file that grows and never shrinks.
//!
//! Two steps: [`DiskPlan::new`] checks and changes nothing, so that `start` and `doctor` can report a problem early;
//! [`DiskPlan::apply`] makes or grows the file just before the VM starts. The guest formats the disk and grows its file
//! system.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::sys::statvfs::statvfs;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use super::api::DiskUsage;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Default size of a new disk in GiB.
const DEFAULT_GIB: u64 = 64;

/// Largest size in GiB: just below 16 TiB, the largest file of ext4 with 4 KiB blocks.
const MAX_GIB: u64 = 16 * 1024 - 1;

/// Free bytes that a new disk requires; with fewer the engine could not pull an image.
const MIN_FREE_NEW: u64 = GIB;

/// Free bytes that an existing disk requires; with fewer its first writes would fail.
const MIN_FREE_EXISTING: u64 = 64 * MIB;

/// Reason that the data disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It would have to shrink.
    #[error(
        "the data disk {path} has {present} GiB and never shrinks, but the size is set to {asked} GiB; raise the size \
         (`bulkhead settings set diskGiB {present}`), or remove the file, which deletes all images, containers and \
         volumes"
    )]
    Shrink {
        /// The disk.
        path: PathBuf,
        /// Present size in GiB.
        present: u64,
        /// Requested size in GiB.
        asked: u64,
    },
    /// Its file system is full.
    #[error(
        "not enough space for the data disk {path}: {free} MiB free, {needed} MiB required; free some space in its \
         file system"
    )]
    Full {
        /// The disk.
        path: PathBuf,
        /// Free MiB.
        free: u64,
        /// Required MiB.
        needed: u64,
    },
    /// The size is out of range.
    #[error("data disk size {0} GiB is out of range (1-{MAX_GIB})")]
    Size(u64),
    /// It is not a regular file.
    #[error("the data disk {0} is not a regular file; move it away")]
    NotAFile(PathBuf),
    /// The system refused an operation.
    #[error("cannot use the data disk {path}")]
    Io {
        /// The disk.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A data disk that can be made, grown or used as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    path: PathBuf,
    bytes: u64,
    exists: bool,
}

impl DiskPlan {
    /// Decides the size and checks that there is room; changes nothing.
    pub fn new(path: PathBuf, asked_gib: Option<u64>) -> Result<Self, DiskError> {
        // The link itself is looked at: a data disk behind a link could be a device or another profile's disk.
        let present = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => Some(metadata.len()),
            Ok(_) => return Err(DiskError::NotAFile(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(DiskError::Io { path, source }),
        };
        let needed = if present.is_some() { MIN_FREE_EXISTING } else { MIN_FREE_NEW };
        let free = free_bytes(&path)?;
        if free < needed {
            return Err(DiskError::Full { path, free: free / MIB, needed: needed / MIB });
        }
        if let Some(gib) = asked_gib.filter(|gib| !(1..=MAX_GIB).contains(gib)) {
            return Err(DiskError::Size(gib));
        }
        let asked = asked_gib.map(|gib| gib * GIB);
        // The file system inside would lose its end, so a smaller size is an error and is not ignored.
        let bytes = match (asked, present) {
            (Some(asked), Some(present)) if asked < present => {
                return Err(DiskError::Shrink { path, present: present.div_ceil(GIB), asked: asked / GIB });
            }
            (Some(asked), _) => asked,
            (None, Some(present)) => present,
            (None, None) => DEFAULT_GIB * GIB,
        };
        Ok(Self { path, bytes, exists: present.is_some() })
    }

    /// The disk's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk's size in GiB.
    pub fn gib(&self) -> u64 {
        self.bytes.div_ceil(GIB)
    }

    /// Makes or grows the file.
    pub fn apply(&self) -> Result<(), DiskError> {
        let io_error = |source| DiskError::Io { path: self.path.clone(), source };
        // Time has passed since the plan: `create_new` and O_NOFOLLOW refuse a file or link that appeared meanwhile.
        let file = OpenOptions::new()
            .write(true)
            .create_new(!self.exists)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.path)
            .map_err(io_error)?;
        if !self.exists {
            avoid_copies(&file);
        }
        if file.metadata().map_err(io_error)?.len() < self.bytes {
            // Sparse: the new end takes no space until the guest writes to it. A file system may still refuse the size
            // (FAT).
            let grown = file.set_len(self.bytes).map_err(io_error);
            if grown.is_err() && !self.exists {
                let _ = fs::remove_file(&self.path);
            }
            grown?;
        }
        Ok(())
    }
}

/// Makes btrfs write to the blocks of a new file in place. By default it writes each changed block elsewhere, and a
/// disk with random writes ends up in pieces. Other file systems refuse the flag or do not know it.
fn avoid_copies(file: &File) {
    if let Ok(flags) = ioctl_getflags(file) {
        // Without the flag the disk is slower and nothing else.
        let _ = ioctl_setflags(file, flags | IFlags::NOCOW);
    }
}

/// Returns the free bytes of the file system on which `path` lies or would lie.
fn free_bytes(path: &Path) -> Result<u64, DiskError> {
    // At the first start the profile's directory may be missing; its parent is on the same file system.
    let directory = path.ancestors().skip(1).find(|directory| directory.is_dir()).unwrap_or(Path::new("/"));
    let numbers = statvfs(directory).map_err(|errno| DiskError::Io { path: path.to_owned(), source: errno.into() })?;
    // Without the blocks that are reserved for root.
    Ok(numbers.blocks_available().saturating_mul(numbers.fragment_size()))
}

/// Returns the use of a data disk; `None` if there is none.
pub fn usage(path: &Path) -> Option<DiskUsage> {
    let metadata = fs::metadata(path).ok()?;
    Some(DiskUsage {
        size_bytes: metadata.len(),
        // In units of 512 bytes, whatever the file system's blocks are (stat(3type)).
        allocated_bytes: metadata.blocks().saturating_mul(512),
        free_bytes: free_bytes(path).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_disk_is_sparse_private_and_64_gib() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.img");
        let plan = DiskPlan::new(path.clone(), None).unwrap();
        assert!(!path.exists());
        plan.apply().unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.blocks(), metadata.mode() & 0o777), (64 * GIB, 0, 0o600));
    }

    #[test]
    fn a_disk_grows_when_asked_and_keeps_its_size_otherwise() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.img");
        DiskPlan::new(path.clone(), Some(2)).unwrap().apply().unwrap();
        DiskPlan::new(path.clone(), Some(3)).unwrap().apply().unwrap();
        DiskPlan::new(path.clone(), None).unwrap().apply().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 3 * GIB);
    }

    #[test]
    fn a_disk_never_shrinks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.img");
        DiskPlan::new(path.clone(), Some(3)).unwrap().apply().unwrap();
        let error = DiskPlan::new(path.clone(), Some(2)).unwrap_err();
        assert!(matches!(error, DiskError::Shrink { present: 3, asked: 2, .. }), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().len(), 3 * GIB);
    }

    #[test]
    fn a_size_that_no_disk_has_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for gib in [0, MAX_GIB + 1, u64::MAX] {
            let plan = DiskPlan::new(directory.path().join("data.img"), Some(gib));
            assert!(matches!(plan, Err(DiskError::Size(_))), "{gib}");
        }
    }

    #[test]
    fn a_symbolic_link_is_no_data_disk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data.img");
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(matches!(DiskPlan::new(path, None), Err(DiskError::NotAFile(_))));
    }

    #[test]
    fn a_disk_counts_what_it_takes_and_not_its_holes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 30).unwrap();
        let found = usage(file.path()).unwrap();
        assert_eq!(found.size_bytes, 1 << 30);
        assert!(found.allocated_bytes < 1 << 20 && found.free_bytes > 0, "{found:?}");
        assert_eq!(usage(Path::new("/nowhere/at/all")), None);
    }
}
