//! JSON files that outlive the gate.

use std::{fs, path::Path};

use serde::Serialize;

/// Longest file that is read, in bytes.
const MAX_JSON_FILE: u64 = 4 * 1024 * 1024;

/// Reads a JSON file that is not too long.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    use std::io::Read;

    let mut text = Vec::new();
    fs::File::open(path).ok()?.take(MAX_JSON_FILE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Replaces a JSON file; a crash leaves the old or the new one.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> std::io::Result<()> {
    let new = path.with_extension("new");
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&new, serde_json::to_vec(value)?)?;
    fs::rename(&new, path)
}
