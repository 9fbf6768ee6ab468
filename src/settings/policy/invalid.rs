//! Errors in the contents of a policy file.

/// The bytes are not a policy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Invalid {
    /// Not JSON.
    #[error("{0}")]
    Syntax(String),
    /// A key with a value that it cannot have.
    #[error("{key}: {problem}")]
    Key {
        /// Its path, such as `linuxVM.vpnkitCIDR.value`.
        key: String,
        /// The problem and its remedy.
        problem: String,
    },
}

impl Invalid {
    pub(super) fn key(path: &str, problem: impl ToString) -> Self {
        Self::Key { key: path.to_owned(), problem: problem.to_string() }
    }
}
