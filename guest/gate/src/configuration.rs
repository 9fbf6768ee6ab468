//! The gate's configuration, as init passes it.

use std::ffi::OsString;

use bulkhead_protocol::gate::{CONFIGURATION, Configuration};

/// Reasons for which the gate does not start.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// The command line is not empty.
    #[error("unexpected argument {0:?}; the configuration is JSON in the environment variable {CONFIGURATION}")]
    Argument(OsString),
    /// The variable is missing or is not UTF-8.
    #[error("no configuration in the environment variable {CONFIGURATION}; bulkhead-gate is started by bulkhead-init")]
    Missing(#[source] std::env::VarError),
    /// The variable does not hold a complete configuration.
    #[error("invalid configuration in the environment variable {CONFIGURATION}")]
    Invalid(#[source] serde_json::Error),
}

/// Reads the configuration from the environment.
pub fn read_configuration() -> Result<Configuration, ConfigurationError> {
    if let Some(argument) = std::env::args_os().nth(1) {
        return Err(ConfigurationError::Argument(argument));
    }
    let text = std::env::var(CONFIGURATION).map_err(ConfigurationError::Missing)?;
    serde_json::from_str(&text).map_err(ConfigurationError::Invalid)
}
