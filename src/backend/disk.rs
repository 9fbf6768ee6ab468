//! The data disk: a raw, sparse file that grows and never shrinks.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::sys::statvfs::statvfs;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Size of a new disk in GiB when nobody asked for another.
const DEFAULT_GIB: u64 = 64;

/// Largest size in GiB: what ext4 with 4 KiB blocks makes of one file.
const MAX_GIB: u64 = 16 * 1024 - 1;

/// Free bytes below which no new disk is made: the engine could not pull one image.
const ROOM_FOR_NEW: u64 = GIB;

/// Free bytes below which an existing disk is not started: its first writes would fail.
const ROOM_FOR_OLD: u64 = 64 * MIB;

/// Why the data disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It would have to shrink.
    #[error(
        "the data disk {path} has {present} GiB and never shrinks, but {asked} GiB are asked for; raise the size \
         (`bulkhead settings set diskGiB {present}`), or remove the file to lose all images, containers and volumes"
    )]
    Shrink {
        /// The disk.
        path: PathBuf,
        /// GiB it has.
        present: u64,
        /// GiB asked for.
        asked: u64,
    },
    /// No room.
    #[error("only {free} MiB are free where the data disk {path} lies, {needed} MiB are needed; make room there")]
    Full {
        /// The disk.
        path: PathBuf,
        /// MiB free.
        free: u64,
        /// MiB needed.
        needed: u64,
    },
    /// A size that no disk has.
    #[error("{0} GiB are asked for the data disk; it has 1 to {MAX_GIB} GiB")]
    Size(u64),
    /// It is no plain file.
    #[error("the data disk {0} is not a plain file; move it away")]
    NotAFile(PathBuf),
    /// It cannot be used.
    #[error("cannot use the data disk {path}")]
    Io {
        /// The disk.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What is to become of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    path: PathBuf,
    bytes: u64,
    exists: bool,
}

impl DiskPlan {
    /// Decides the size and checks that there is room; changes nothing.
    pub fn new(path: PathBuf, asked_gib: Option<u64>) -> Result<Self, DiskError> {
        let present = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => Some(metadata.len()),
            Ok(_) => return Err(DiskError::NotAFile(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(DiskError::Io { path, source }),
        };
        let needed = if present.is_some() { ROOM_FOR_OLD } else { ROOM_FOR_NEW };
        let free = free_bytes(&path)?;
        if free < needed {
            return Err(DiskError::Full { path, free: free / MIB, needed: needed / MIB });
        }
        if let Some(gib) = asked_gib.filter(|gib| !(1..=MAX_GIB).contains(gib)) {
            return Err(DiskError::Size(gib));
        }
        let asked = asked_gib.map(|gib| gib * GIB);
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

    /// The disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in GiB.
    pub fn gib(&self) -> u64 {
        self.bytes.div_ceil(GIB)
    }

    /// Makes or grows the file.
    pub fn apply(&self) -> Result<(), DiskError> {
        let io_error = |source| DiskError::Io { path: self.path.clone(), source };
        let file = OpenOptions::new()
            .write(true)
            .create_new(!self.exists)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.path)
            .map_err(io_error)?;
        if file.metadata().map_err(io_error)?.len() < self.bytes {
            let grown = file.set_len(self.bytes).map_err(io_error);
            if grown.is_err() && !self.exists {
                let _ = fs::remove_file(&self.path);
            }
            grown?;
        }
        Ok(())
    }
}

/// Free bytes of the file system on which `path` lies or would lie.
fn free_bytes(path: &Path) -> Result<u64, DiskError> {
    let folder = path.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let numbers = statvfs(folder).map_err(|errno| DiskError::Io { path: path.to_owned(), source: errno.into() })?;
    Ok(numbers.blocks_available().saturating_mul(numbers.fragment_size()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_new_disk_is_sparse_private_and_64_gib() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.img");
        let plan = DiskPlan::new(path.clone(), None).unwrap();
        assert!(!path.exists());
        plan.apply().unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.blocks(), metadata.mode() & 0o777), (64 * GIB, 0, 0o600));
    }

    #[test]
    fn a_disk_grows_when_asked_and_keeps_its_size_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.img");
        DiskPlan::new(path.clone(), Some(2)).unwrap().apply().unwrap();
        DiskPlan::new(path.clone(), Some(3)).unwrap().apply().unwrap();
        DiskPlan::new(path.clone(), None).unwrap().apply().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 3 * GIB);
    }

    #[test]
    fn a_disk_never_shrinks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.img");
        DiskPlan::new(path.clone(), Some(3)).unwrap().apply().unwrap();
        let error = DiskPlan::new(path.clone(), Some(2)).unwrap_err();
        assert!(matches!(error, DiskError::Shrink { present: 3, asked: 2, .. }), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().len(), 3 * GIB);
    }

    #[test]
    fn a_size_that_no_disk_has_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for gib in [0, MAX_GIB + 1, u64::MAX] {
            let plan = DiskPlan::new(folder.path().join("data.img"), Some(gib));
            assert!(matches!(plan, Err(DiskError::Size(_))), "{gib}");
        }
    }

    #[test]
    fn a_symbolic_link_is_no_data_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.img");
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(matches!(DiskPlan::new(path, None), Err(DiskError::NotAFile(_))));
    }
}
