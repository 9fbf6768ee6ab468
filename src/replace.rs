//! Files that are replaced whole.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Replaces a file by rename, so that a reader or a crash finds either the old or the new contents. Only the user may
/// read it. Writers must hold a lock.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    // One fixed name is enough, as writers hold the lock; a leftover of a crashed one is truncated.
    let name = path.file_name().unwrap_or_default().display();
    let new = path.with_file_name(format!(".{name}.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    // Before the rename: otherwise a power cut could leave the new name with no contents.
    file.sync_all()?;
    fs::rename(&new, path)
}
