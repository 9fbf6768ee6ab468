//! JSON files that outlive the gate.

use std::{fs, path::Path};

use bulkhead_guest_common::{bounded, registry};
use serde::Serialize;

/// Maximum length of a file that is read, in bytes.
const MAX_JSON_FILE: u64 = 4 * 1024 * 1024;

/// Reads a JSON file; `None` if it is missing, too long or invalid.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    // A file that is too long is cut off, and so is not valid JSON.
    serde_json::from_slice(&bounded::read_file(path, MAX_JSON_FILE).ok()?).ok()
}

/// Replaces a JSON file; a crash leaves the old or the new one.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> std::io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    registry::replace(path, &serde_json::to_vec(value)?)
}
