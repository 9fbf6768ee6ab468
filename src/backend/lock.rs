//! One backend per profile.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg, OFlag};

use crate::settings::{PathError, Paths};

/// Why the profile could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A folder.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Another backend has it.
    #[error("a backend for this profile is already running{}; `bulkhead status` shows it", pid(*.0))]
    Held(Option<u32>),
    /// Another backend uses the data folder under another runtime folder.
    #[error(
        "another backend uses the data in {0}, started with a different XDG_RUNTIME_DIR; \
         stop it from the session that started it"
    )]
    DataInUse(PathBuf),
    /// The lock cannot be used.
    #[error("cannot lock {path}")]
    Io {
        /// The lock.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// The profile is this process's until the value is dropped.
#[derive(Debug)]
pub struct ProfileLock {
    path: PathBuf,
    data: Option<Flock<File>>,
    /// Held until all else is free, because others wait for it.
    _lock: Flock<File>,
}

impl ProfileLock {
    /// Takes the profile; makes its folders where they are missing.
    pub fn acquire(paths: &Paths) -> Result<Self, LockError> {
        let path = paths.lock();
        let io_error = |source| LockError::Io { path: path.clone(), source };
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
                // An ending backend removes the folder after it gave the profile up.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    paths.create()?;
                    continue;
                }
                file => file.map_err(io_error)?,
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // An ending backend removes the file: what was locked must still be what others will find.
                Ok(lock) if is_at(&lock, &path) => break lock,
                Ok(_) => {}
                Err((mut file, nix::Error::EWOULDBLOCK)) => return Err(LockError::Held(read_pid(&mut file))),
                Err((_, errno)) => return Err(io_error(errno.into())),
            }
        };
        let folder = paths.data_disk().parent().map(Path::to_owned).unwrap_or_default();
        // The same data can be reached with another runtime folder, and a disk with two writers is lost.
        let data = lock_data(&folder)?;
        lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(io_error)?;
        Ok(Self { path, data: Some(data), _lock: lock })
    }
}

impl Drop for ProfileLock {
    fn drop(&mut self) {
        drop(self.data.take());
        let _ = fs::remove_file(&self.path);
    }
}

fn lock_data(folder: &Path) -> Result<Flock<File>, LockError> {
    let io_error = |source| LockError::Io { path: folder.to_owned(), source };
    let mut file = File::open(folder).map_err(io_error)?;
    // The descriptors of a backend that was killed are closed one after the other, the profile's lock perhaps first.
    for _ in 0..100 {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(data) => return Ok(data),
            Err((file, nix::Error::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(io_error(errno.into())),
        };
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(LockError::DataInUse(folder.to_owned()))
}

/// The process id of the backend that holds the profile, or `None` when nobody does.
pub fn holder(paths: &Paths) -> Option<u32> {
    let file = File::open(paths.lock()).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => None,
        Err((mut file, _)) => read_pid(&mut file),
    }
}

/// Blocks until nobody holds the profile.
pub fn wait_until_free(paths: &Paths) {
    if let Ok(file) = File::open(paths.lock()) {
        let _ = Flock::lock(file, FlockArg::LockShared);
    }
}

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
