//! Errors of reading and changing settings.

use std::{io, path::PathBuf};

use super::paths::PathError;

/// Settings that cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Not a setting.
    #[error("unknown setting `{0}`; `bulkhead settings list` shows all settings")]
    UnknownKey(String),
    /// A value that the setting does not accept.
    #[error("invalid value `{value}` for {key}: {expected}")]
    InvalidValue {
        /// The setting.
        key: &'static str,
        /// The value, with passwords concealed.
        value: String,
        /// The accepted values, as in "must be true or false".
        expected: String,
    },
    /// A setting that the administrator locked.
    #[error("{key} is locked by {file}; only the administrator of this machine can change it")]
    Locked {
        /// The setting.
        key: &'static str,
        /// The policy file.
        file: PathBuf,
    },
    /// The file is not a JSON object.
    #[error("{path} is not a JSON object; correct or remove it")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's error; `None` for JSON of another kind.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// A directory of the profile cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
}
