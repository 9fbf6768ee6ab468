//! Finds the policy file and checks that only its owner could have written it.
//!
//! Its place and its owner, root, are compiled in. No variable or option overrides them: the policy restricts the same
//! user who starts the program.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::libc;

/// Largest policy file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Mode bits that let users other than the owner write: group and other.
const WRITABLE: u32 = 0o022;

/// A policy file that is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// It cannot be opened or read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// A link. The permissions of the directories on the way to its target would have to be checked as well.
    #[error("it is a symbolic link; replace it with the file itself")]
    Link,
    /// A directory, a device, a pipe.
    #[error("it is not a regular file")]
    NotAFile,
    /// The file or its directory has another owner.
    #[error("{0} belongs to user {1}, not to root; run `chown root` on it")]
    Owner(&'static str, u32),
    /// Other users may write to the file or its directory.
    #[error("{0} is writable by users other than its owner; run `chmod go-w` on it")]
    Writable(&'static str),
    /// More than a policy can have.
    #[error("it is larger than 1 MiB")]
    TooLarge,
}

/// The places of the policy file, and the user who must own it.
#[derive(Clone, Debug)]
pub struct PolicySource {
    files: Vec<PathBuf>,
    owner: u32,
}

impl PolicySource {
    /// The places of this machine: Bulkhead's own, then Docker Desktop's, whose file works here unchanged.
    pub fn system() -> Self {
        let files = ["/etc/bulkhead/admin-settings.json", "/usr/share/docker-desktop/admin-settings.json"];
        Self::new(files.map(PathBuf::from).to_vec(), 0)
    }

    /// Other places and another owner, for tests.
    pub fn new(files: Vec<PathBuf>, owner: u32) -> Self {
        Self { files, owner }
    }

    /// Finds the first file that exists, and returns its contents or the reason not to trust them.
    pub(super) fn find(&self) -> Option<(&Path, Result<Vec<u8>, Untrusted>)> {
        // A file that is not trusted ends the search. Going on to the next one would make spoiling the first a way to
        // change the policy.
        self.files.iter().find_map(|file| match self.read(file) {
            Ok(None) => None,
            Ok(Some(text)) => Some((file.as_path(), Ok(text))),
            Err(problem) => Some((file.as_path(), Err(problem))),
        })
    }

    /// Reads one file; `None` if it does not exist.
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, Untrusted> {
        // A user who can write to the directory can replace or remove the file. Its parents are the system's.
        if let Some(directory) = path.parent() {
            match fs::metadata(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error.into()),
                Ok(metadata) => self.check("its directory", &metadata)?,
            }
        }
        // O_NONBLOCK: opening a pipe must not wait for a writer, nor a device for its hardware. O_NOCTTY: a terminal
        // must not become the backend's.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(Untrusted::Link),
            Err(error) => return Err(error.into()),
        };
        // From here on only the descriptor is used: the name may stand for another file by now.
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Untrusted::NotAFile);
        }
        self.check("it", &metadata)?;
        read_bounded(file).map(Some)
    }

    /// Checks owner and mode of the file or its directory.
    fn check(&self, what: &'static str, metadata: &fs::Metadata) -> Result<(), Untrusted> {
        // Owner and mode are enough: write permission by an ACL shows in the group bits, which are its mask (acl(5)).
        if metadata.uid() != self.owner {
            return Err(Untrusted::Owner(what, metadata.uid()));
        }
        if metadata.mode() & WRITABLE != 0 {
            return Err(Untrusted::Writable(what));
        }
        Ok(())
    }
}

/// Reads a whole file that is not too large, also one that grows meanwhile.
fn read_bounded(file: File) -> Result<Vec<u8>, Untrusted> {
    let mut text = Vec::new();
    // One byte more than allowed tells a file that is too long from one that just fits.
    file.take(MAX_FILE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE { Err(Untrusted::TooLarge) } else { Ok(text) }
}

/// Reads a file of any owner, also through a link, for `bulkhead policy validate`.
pub(super) fn read_any(path: &Path) -> Result<Vec<u8>, Untrusted> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(Untrusted::NotAFile);
    }
    read_bounded(file)
}
