//! The machine's files, opened before the process confines itself.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};

use super::{api::VmConfig, error::VmmError};

/// Time for the writer before us to be gone. The kernel closes the descriptors of a process that was killed only when
/// its threads have left their system calls, which a slow disk delays.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two attempts to lock a disk.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The open files.
pub(super) struct Files {
    /// File, whether it is read-only, and serial number.
    pub(super) disks: Vec<(File, bool, String)>,
    pub(super) console: Option<File>,
    pub(super) serial: Option<File>,
    /// Files that hold the locks of disks and have no other use.
    pub(super) locks: Vec<File>,
}

impl Files {
    pub(super) fn open(config: &VmConfig) -> Result<Self, VmmError> {
        let mut locks = Vec::new();
        let disks = config
            .disks
            .iter()
            .map(|disk| {
                // A read-only disk is opened read-only: then not even a taken-over vmm can write to it.
                let file = OpenOptions::new().read(true).write(!disk.readonly).open(&disk.path);
                let file = file.map_err(|source| open_failed("the disk", &disk.path, source))?;
                if !disk.readonly {
                    locks.push(lock(&file, &disk.path, LOCK_TIMEOUT)?);
                }
                Ok((file, disk.readonly, disk.serial.clone()))
            })
            .collect::<Result<_, VmmError>>()?;
        // Appended to, so that a guest that resets does not erase what it logged before.
        let log = |what, path: &Option<std::path::PathBuf>| {
            path.as_deref()
                .map(|path| {
                    let file = OpenOptions::new().append(true).create(true).open(path);
                    file.map_err(|source| open_failed(what, path, source))
                })
                .transpose()
        };
        Ok(Self {
            disks,
            console: log("the console log", &config.console)?,
            serial: log("the serial log", &config.serial)?,
            locks,
        })
    }
}

/// Locks a disk for as long as the returned file is open, so that it has one writer. The lock is on the open file
/// (`F_OFD_SETLK`, fcntl(2)) and held by the process that writes: that of a backend ends with the backend, whose vmm
/// may outlive it in the middle of a write.
///
/// It is another open file than the one that is written. An io_uring that has that one registered is taken down some
/// 20 ms after its process ended, for which the next machine would wait. The ring's requests end with the process.
fn lock(disk: &File, path: &Path, timeout: Duration) -> Result<File, VmmError> {
    // By its descriptor: the path may lead to another file by now.
    let file = OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", disk.as_raw_fd()));
    let file = file.map_err(|source| VmmError::LockDisk { path: path.to_path_buf(), source })?;
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let deadline = Instant::now() + timeout;
    loop {
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => return Ok(file),
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < deadline => thread::sleep(LOCK_INTERVAL),
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(VmmError::DiskInUse { path: path.to_path_buf() }),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(VmmError::LockDisk { path: path.to_path_buf(), source: errno.into() }),
        }
    }
}

pub(super) fn open_failed(what: &'static str, path: &Path, source: io::Error) -> VmmError {
    VmmError::OpenFile { what, path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    fn disk() -> (tempfile::NamedTempFile, impl Fn() -> File) {
        let disk = tempfile::NamedTempFile::new().unwrap();
        let path = disk.path().to_owned();
        (disk, move || OpenOptions::new().read(true).write(true).open(&path).unwrap())
    }

    #[test]
    fn a_disk_has_one_writer_until_that_one_closes_it() {
        let (disk, open) = disk();
        let first = lock(&open(), disk.path(), SHORT).unwrap();
        let error = lock(&open(), disk.path(), SHORT).unwrap_err();
        assert!(matches!(error, VmmError::DiskInUse { .. }), "{error}");
        drop(first);
        lock(&open(), disk.path(), SHORT).unwrap();
    }

    #[test]
    fn a_writer_that_is_about_to_end_is_waited_for() {
        let (disk, open) = disk();
        let first = lock(&open(), disk.path(), SHORT).unwrap();
        let ending = thread::spawn(move || {
            thread::sleep(SHORT);
            drop(first);
        });
        lock(&open(), disk.path(), LOCK_TIMEOUT).unwrap();
        ending.join().unwrap();
    }
}
