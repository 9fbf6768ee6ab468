//! Errors of reading and changing settings.

use std::{io, path::PathBuf};

use super::paths::PathError;

/// Why settings could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No such setting.
    #[error("there is no setting `{0}`; `bulkhead settings list` shows all")]
    UnknownKey(String),
    /// The value does not fit the setting.
    #[error("`{value}` is no value for {key}: {expected}")]
    InvalidValue {
        /// The setting.
        key: &'static str,
        /// What was given.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// The administrator decided it.
    #[error("{key} is locked by {file}; only the administrator of this machine can change it")]
    Locked {
        /// The setting.
        key: &'static str,
        /// The policy.
        file: PathBuf,
    },
    /// The file is not a JSON object.
    #[error("{path} is not a JSON object; correct or remove it")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said, if it is no JSON at all.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The folder cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
}
