//! Errors of the process that makes the jail.

use std::io;

/// The reason why the jail cannot be made or a service cannot be started in it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// A file system of the jail could not be mounted, or a file in it made.
    #[error("cannot {action} {path} in the engine's jail")]
    Root {
        action: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    /// A step without a path failed.
    #[error("cannot {action} for the engine's jail")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel cannot make a Landlock domain with scopes.
    #[error("cannot keep the engine away from other processes: the kernel has no Landlock scopes (ABI 6)")]
    Landlock(#[source] landlock::RulesetError),
    /// The program of a service could not be executed.
    #[error("cannot start {program}")]
    Start {
        program: String,
        #[source]
        source: io::Error,
    },
    /// init sent something else than a request.
    #[error("unexpected request")]
    Request,
}

impl JailError {
    /// Returns the argument of `map_err` for a step without a path.
    pub(super) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action, source: source.into() }
    }
}
