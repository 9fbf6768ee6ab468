//! A file system without room.

use std::{path::Path, process::Command};

use tempfile::TempDir;

/// A file system of 64 KiB, unmounted when dropped.
pub struct SmallFileSystem(TempDir);

impl SmallFileSystem {
    /// Mounts it; `None` where mounts are not allowed.
    pub fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "small"]).arg(dir.path()).status();
        mount.is_ok_and(|status| status.success()).then_some(Self(dir))
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes room for 4 MiB.
    pub fn grow(&self) {
        let grow = Command::new("mount").args(["-o", "remount,size=4m"]).arg(self.path()).status();
        assert!(grow.unwrap().success());
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
