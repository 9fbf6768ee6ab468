//! The version of the files of a profile: the number in the file `format` beside the data disk.
//!
//! A program refuses the profile of a newer one, whose disk or settings it could misread. The number rises only with a
//! change that an older program must not meet; a guest that formats or mounts the disk in another way is such a change.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use crate::replace::replace;

/// The version that this program writes, and the newest that it reads.
const VERSION: u32 = 1;

/// Most bytes of the file that are read: more than any number has.
const MAX_LENGTH: u64 = 32;

/// Reason that the files of a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataFormatError {
    /// A newer program wrote them.
    #[error(
        "the profile's data was written by a newer version of Bulkhead (format {found} in {path}; this program reads \
         up to {VERSION}); install that version again, or use another profile with --profile"
    )]
    Newer {
        /// The file with the version.
        path: PathBuf,
        /// The version.
        found: u32,
    },
    /// The file has no number.
    #[error(
        "{0} is damaged: it must contain the number of the data's format; restore it, or remove it if no newer \
             version of Bulkhead has used the profile"
    )]
    Damaged(PathBuf),
    /// The file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Checks that this program can use the profile whose version is in `path`; changes nothing. Without the file it can:
/// the profile is new, or older than the mark.
pub fn check(path: &Path) -> Result<(), DataFormatError> {
    read(path).map(drop)
}

/// Checks the profile and marks one that has no version. The caller holds the profile's lock.
pub(super) fn claim(path: &Path) -> Result<(), DataFormatError> {
    if read(path)?.is_some() {
        return Ok(());
    }
    // Whole or not at all: a program that is killed meanwhile leaves no file that the next one refuses.
    replace(path, &format!("{VERSION}\n")).map_err(|source| DataFormatError::Io { path: path.to_owned(), source })
}

/// Reads the version; `None` without the file.
fn read(path: &Path) -> Result<Option<u32>, DataFormatError> {
    let io_error = |source| DataFormatError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io_error)?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_LENGTH).read_to_end(&mut bytes).map_err(io_error)?;
    let number = std::str::from_utf8(&bytes).ok().and_then(|text| text.trim().parse().ok());
    match number.ok_or_else(|| DataFormatError::Damaged(path.to_owned()))? {
        found if found > VERSION => Err(DataFormatError::Newer { path: path.to_owned(), found }),
        found => Ok(Some(found)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_profile_without_a_version_gets_this_ones() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("format");
        check(&path).unwrap();
        assert!(!path.exists());
        claim(&path).unwrap();
        claim(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{VERSION}\n"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_newer_version_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("format");
        fs::write(&path, format!("{}\n", VERSION + 1)).unwrap();
        for result in [check(&path), claim(&path)] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("newer version of Bulkhead (format 2 in"), "{message}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", VERSION + 1));
    }

    #[test]
    fn a_file_without_a_number_is_not_taken_for_an_old_version() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("format");
        for text in ["", "one", "-1", "1.5", "99999999999", "1\u{0}"] {
            fs::write(&path, text).unwrap();
            assert!(matches!(claim(&path), Err(DataFormatError::Damaged(_))), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_check_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("format");
            fs::write(&path, &bytes).unwrap();
            let _ = claim(&path);
            // Whatever it was, the user finds it again.
            prop_assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }
}
