//! The directory of a row, and short forms of the calls in it.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, Uid, chmodat, chownat,
        linkat, lstat, mkdir, mknodat, open, renameat_with, rmdir, symlink, unlink, utimensat,
    },
    io::Errno,
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

/// The result of a call that only matters for its error.
pub(crate) type Outcome = Result<(), Errno>;

/// Users without privileges.
pub(crate) const ONE: u32 = 1001;
pub(crate) const OTHER: u32 = 1002;

/// An empty directory.
pub(crate) struct Place(PathBuf);

/// Fails if a value is not what it should be; `EINTR` is none of the errors that a row expects.
pub(crate) fn check(holds: bool) -> Outcome {
    if holds { Ok(()) } else { Err(Errno::INTR) }
}

impl Place {
    pub(crate) fn new(directory: &Path, number: usize) -> io::Result<Self> {
        let place = Self(directory.join(format!("row-{number}")));
        fs::create_dir(&place.0)?;
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o777))?;
        Ok(place)
    }

    pub(crate) fn remove(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.0)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Runs on a thread of a user without privileges, whose groups are its own and `groups`.
    pub(crate) fn as_user_in<T: Send>(
        &self,
        user: u32,
        groups: &[u32],
        run: impl FnOnce(&Self) -> Result<T, Errno> + Send,
    ) -> Result<T, Errno> {
        let body = || {
            let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
            let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
            run(self)
        };
        thread::scope(|scope| scope.spawn(body).join()).unwrap_or(Err(Errno::INTR))
    }

    pub(crate) fn as_user<T: Send>(
        &self,
        user: u32,
        run: impl FnOnce(&Self) -> Result<T, Errno> + Send,
    ) -> Result<T, Errno> {
        self.as_user_in(user, &[], run)
    }

    pub(crate) fn open(&self, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        open(self.path(name), flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::from_raw_mode(0o644))
    }

    /// Creates an empty file with a mode.
    pub(crate) fn file(&self, name: &str, mode: u32) -> Outcome {
        open(
            self.path(name),
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )?;
        self.chmod(name, mode)
    }

    /// Creates a directory with a mode.
    pub(crate) fn directory(&self, name: &str, mode: u32) -> Outcome {
        mkdir(self.path(name), Mode::from_raw_mode(0o700))?;
        self.chmod(name, mode)
    }

    pub(crate) fn mkdir(&self, name: &str) -> Outcome {
        mkdir(self.path(name), Mode::from_raw_mode(0o755))
    }

    pub(crate) fn rmdir(&self, name: &str) -> Outcome {
        rmdir(self.path(name))
    }

    pub(crate) fn unlink(&self, name: &str) -> Outcome {
        unlink(self.path(name))
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> Outcome {
        self.rename_with(from, to, RenameFlags::empty())
    }

    pub(crate) fn rename_with(&self, from: &str, to: &str, flags: RenameFlags) -> Outcome {
        renameat_with(CWD, self.path(from), CWD, self.path(to), flags)
    }

    pub(crate) fn link(&self, from: &str, to: &str) -> Outcome {
        linkat(CWD, self.path(from), CWD, self.path(to), AtFlags::empty())
    }

    /// Makes a link with this very target.
    pub(crate) fn symlink(&self, target: &str, name: &str) -> Outcome {
        symlink(target, self.path(name))
    }

    pub(crate) fn mkfifo(&self, name: &str) -> Outcome {
        mknodat(CWD, self.path(name), FileType::Fifo, Mode::from_raw_mode(0o644), 0)
    }

    pub(crate) fn chmod(&self, name: &str, mode: u32) -> Outcome {
        chmodat(CWD, self.path(name), Mode::from_raw_mode(mode), AtFlags::empty())
    }

    pub(crate) fn chown(&self, name: &str, user: Option<u32>, group: Option<u32>) -> Outcome {
        let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
        chownat(CWD, self.path(name), user, group, AtFlags::SYMLINK_NOFOLLOW)
    }

    pub(crate) fn truncate(&self, name: &str, size: u64) -> Outcome {
        // rustix has only that of an open file; the path's own checks matter here.
        truncate_path(&self.path(name), size)
    }

    /// Sets both times; `None` for now.
    pub(crate) fn utimens(&self, name: &str, seconds: Option<i64>) -> Outcome {
        let time = match seconds {
            Some(seconds) => Timespec { tv_sec: seconds, tv_nsec: 7 },
            None => Timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
        };
        utimensat(CWD, self.path(name), &Timestamps { last_access: time, last_modification: time }, AtFlags::empty())
    }

    pub(crate) fn stat(&self, name: &str) -> Result<Stat, Errno> {
        lstat(self.path(name))
    }

    pub(crate) fn mode(&self, name: &str) -> Result<u32, Errno> {
        Ok(self.stat(name)?.st_mode & 0o7777)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Outcome {
        fs::write(self.path(name), bytes).map_err(errno)
    }

    pub(crate) fn read(&self, name: &str) -> Result<Vec<u8>, Errno> {
        fs::read(self.path(name)).map_err(errno)
    }
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::INTR, Errno::from_raw_os_error)
}

fn truncate_path(path: &Path, size: u64) -> Outcome {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Errno::INVAL)?;
    // SAFETY: a string that ends with a zero and lives throughout the call.
    match unsafe { libc::truncate(path.as_ptr(), size.cast_signed()) } {
        0 => Ok(()),
        _ => Err(errno(io::Error::last_os_error())),
    }
}
