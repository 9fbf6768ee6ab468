//! Where a policy file is, and whether it may be believed.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::libc;

/// Largest policy file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Bundles of permission that let others than the owner write.
const WRITABLE: u32 = 0o022;

/// Why a file is no policy to believe.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// It cannot be opened or read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// A link; what it leads to could be anybody's.
    #[error("it is a symbolic link; put the file itself there")]
    Link,
    /// A folder, a device, a pipe.
    #[error("it is no regular file")]
    NotAFile,
    /// Another owner.
    #[error("{0} belongs to user {1} and not to root; run `chown root` on it")]
    Owner(&'static str, u32),
    /// Others may write.
    #[error("{0} can be written by others than its owner; run `chmod go-w` on it")]
    Writable(&'static str),
    /// Nobody writes so long a policy.
    #[error("it is larger than 1 MiB")]
    TooLarge,
}

/// Where a policy is looked for, and whose it must be. Made from nothing that a person could set.
#[derive(Clone, Debug)]
pub struct PolicySource {
    files: Vec<PathBuf>,
    owner: u32,
}

impl PolicySource {
    /// This machine's.
    pub fn system() -> Self {
        let files = ["/etc/bulkhead/admin-settings.json", "/usr/share/docker-desktop/admin-settings.json"];
        Self::new(files.map(PathBuf::from).to_vec(), 0)
    }

    /// The first of these files that is there, if it belongs to the user `owner`.
    pub fn new(files: Vec<PathBuf>, owner: u32) -> Self {
        Self { files, owner }
    }

    /// The first file that is there, and its contents or why they are not to be believed.
    pub(super) fn find(&self) -> Option<(&Path, Result<Vec<u8>, Untrusted>)> {
        self.files.iter().find_map(|file| match self.read(file) {
            Ok(None) => None,
            Ok(Some(text)) => Some((file.as_path(), Ok(text))),
            Err(problem) => Some((file.as_path(), Err(problem))),
        })
    }

    /// Never waits for a writer of a pipe or a device, and looks at what was opened and not at its name.
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, Untrusted> {
        // Who can write to the folder can take the file away.
        if let Some(folder) = path.parent() {
            match fs::metadata(folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error.into()),
                Ok(metadata) => self.check("its folder", &metadata)?,
            }
        }
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(Untrusted::Link),
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Untrusted::NotAFile);
        }
        self.check("it", &metadata)?;
        read_bounded(file).map(Some)
    }

    fn check(&self, what: &'static str, metadata: &fs::Metadata) -> Result<(), Untrusted> {
        if metadata.uid() != self.owner {
            return Err(Untrusted::Owner(what, metadata.uid()));
        }
        if metadata.mode() & WRITABLE != 0 {
            return Err(Untrusted::Writable(what));
        }
        Ok(())
    }
}

/// The whole of a file that is not too large.
fn read_bounded(file: File) -> Result<Vec<u8>, Untrusted> {
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE { Err(Untrusted::TooLarge) } else { Ok(text) }
}

/// A file of anybody, to be validated.
pub(super) fn read_any(path: &Path) -> Result<Vec<u8>, Untrusted> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(Untrusted::NotAFile);
    }
    read_bounded(file)
}
