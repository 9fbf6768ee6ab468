//! A text file of the host that is read again when it has changed.

use std::{fs::File, io::Read, os::unix::fs::MetadataExt, path::PathBuf};

/// A file that others replace or rewrite.
pub(super) struct HostFile {
    path: PathBuf,
    /// Largest part of the file that is read, in bytes.
    most: u64,
    /// Identity of the file that was read: device, inode, seconds and nanoseconds of its last change, and its length,
    /// which tells two changes apart that come in one tick of the clock.
    seen: Option<(u64, u64, i64, i64, u64)>,
}

impl HostFile {
    pub(super) fn new(path: impl Into<PathBuf>, most: u64) -> Self {
        Self { path: path.into(), most, seen: None }
    }

    /// Returns the text if it is another one than at the last call. A file that is missing for a moment, or cannot be
    /// read, counts as unchanged.
    pub(super) fn changed(&mut self) -> Option<String> {
        // Some programs replace the file, others rewrite the target of a symbolic link: both show here.
        let metadata = std::fs::metadata(&self.path).ok()?;
        let now = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.len());
        if self.seen == Some(now) {
            return None;
        }
        let text = self.read().ok()?;
        self.seen = Some(now);
        Some(text)
    }

    /// Reads the file, up to the last whole line of the part that is read.
    pub(super) fn read(&self) -> std::io::Result<String> {
        let mut text = Vec::new();
        File::open(&self.path)?.take(self.most).read_to_end(&mut text)?;
        if text.len() as u64 == self.most {
            text.truncate(text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1));
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_too_long_is_read_up_to_a_whole_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        std::fs::write(&path, "10.0.0.1 one\n10.0.0.23 two\n").unwrap();
        let mut file = HostFile::new(&path, 22);
        assert_eq!(file.changed().unwrap(), "10.0.0.1 one\n");
        assert_eq!(file.changed(), None);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.changed(), None);
        std::fs::write(&path, "10.0.0.1 one").unwrap();
        assert_eq!(file.changed().unwrap(), "10.0.0.1 one");
    }
}
