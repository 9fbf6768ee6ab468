//! Trees of files, to compare them before and after.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    path::{Path, PathBuf},
};

/// The files of a directory and below it, itself included: what `look` finds in the metadata of each, and its bytes.
/// Links are not followed.
pub fn files<T>(directory: &Path, look: impl Fn(&Metadata) -> T) -> BTreeMap<PathBuf, (T, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let bytes = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        found.insert(path, (look(&metadata), bytes));
    }
    found
}
