//! The lock that allows one backend per profile: flock(2) on a file in the runtime directory, and on the data
//! directory.
//!
//! The kernel releases both with the process, so a backend that was killed blocks nothing. The file contains the
//! process id for `status`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg, OFlag};

use crate::settings::{PathError, Paths};

/// Attempts to lock the profile past its readers, and the data directory.
const MAX_ATTEMPTS: u32 = 100;
/// Pause between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Reason that the profile could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A directory of the profile.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Another backend holds it.
    #[error("a backend for this profile is already running{}; `bulkhead status` shows it", pid(*.0))]
    Held(Option<u32>),
    /// Another backend, with another runtime directory, uses the same data directory.
    #[error(
        "another backend uses the data in {0}, started with a different XDG_RUNTIME_DIR; \
         stop it from the session that started it"
    )]
    DataInUse(PathBuf),
    /// The file or directory cannot be used.
    #[error("cannot lock {path}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

fn pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// A locked profile; dropping the value releases it.
#[derive(Debug)]
pub struct ProfileLock {
    path: PathBuf,
    data: Option<Flock<File>>,
    /// Released last, because others wait for it and then expect everything to be free.
    lock: Flock<File>,
}

impl ProfileLock {
    /// Locks the profile; makes its directories where they are missing.
    pub fn acquire(paths: &Paths) -> Result<Self, LockError> {
        let path = paths.lock();
        let io_error = |source| LockError::Io { path: path.clone(), source };
        let mut attempts = 0;
        let mut lock = loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(OFlag::O_NOFOLLOW.bits())
                .open(&path);
            let file = match file {
                // A backend that exits removes the directory after it has released the lock.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    paths.create()?;
                    continue;
                }
                file => file.map_err(io_error)?,
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // A backend that exits removes the file. If it did so between our open and our lock, we hold a lock on
                // a file that no other backend will ever find: start over.
                Ok(lock) if is_at(&lock, &path) => break lock,
                Ok(_) => {}
                // A backend's lock is exclusive. That of a command which looks for one is shared and gone in a moment.
                Err((file, nix::Error::EWOULDBLOCK)) => {
                    match Flock::lock(file, FlockArg::LockSharedNonblock) {
                        Ok(reader) => drop(reader),
                        Err((mut file, _)) => return Err(LockError::Held(read_pid(&mut file))),
                    }
                    if attempts == MAX_ATTEMPTS {
                        return Err(LockError::Held(None));
                    }
                    attempts += 1;
                    std::thread::sleep(RETRY_INTERVAL);
                }
                Err((_, errno)) => return Err(io_error(errno.into())),
            }
        };
        // The same data is reached with another XDG_RUNTIME_DIR (another session, cron), where the lock above is
        // another file. A data disk with two writers is lost, so its directory is locked, too.
        let directory = paths.data_disk().parent().map(Path::to_owned).unwrap_or_default();
        let data = lock_data(&directory)?;
        lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(io_error)?;
        Ok(Self { path, data: Some(data), lock })
    }
}

impl Drop for ProfileLock {
    fn drop(&mut self) {
        drop(self.data.take());
        // While the lock is still held: afterwards the file may be another backend's. So it may be already, if the
        // profile's files were removed.
        if is_at(&self.lock, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn lock_data(directory: &Path) -> Result<Flock<File>, LockError> {
    let io_error = |source| LockError::Io { path: directory.to_owned(), source };
    let mut file = File::open(directory).map_err(io_error)?;
    // The kernel closes the descriptors of a backend that was killed one after the other, perhaps the profile's lock
    // before this one.
    for _ in 0..MAX_ATTEMPTS {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(data) => return Ok(data),
            Err((file, nix::Error::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(io_error(errno.into())),
        };
        std::thread::sleep(RETRY_INTERVAL);
    }
    Err(LockError::DataInUse(directory.to_owned()))
}

/// Returns the process id of the backend that holds the profile, or `None` if it is free.
pub fn holder(paths: &Paths) -> Option<u32> {
    let file = File::open(paths.lock()).ok()?;
    // Shared, so that two commands that ask at the same time do not take each other for a backend.
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => None,
        Err((mut file, _)) => read_pid(&mut file),
    }
}

/// Blocks until the profile is free.
pub fn wait_until_free(paths: &Paths) {
    if let Ok(file) = File::open(paths.lock()) {
        let _ = Flock::lock(file, FlockArg::LockShared);
    }
}

/// Returns whether `path` still leads to the open file.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
