//! The errors of PID 1.

use std::{io, path::PathBuf, process::ExitStatus};

pub(crate) use bulkhead_guest_common::error::chain;
use bulkhead_protocol::LineError;

/// An error of the guest's init. The text names the step, the source the cause; [`chain`] joins them for the backend,
/// which shows them to the user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file system could not be mounted.
    #[error("cannot mount {what} on {target}")]
    Mount {
        what: String,
        target: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file, directory or link could not be created, read or written.
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A system call without a path failed.
    #[error("cannot {action}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// The backend's agent port does not answer.
    #[error(
        "cannot connect to the backend (vsock CID 2, port {port}); check that it listens for this VM's vsock device"
    )]
    NoBackend {
        port: u32,
        #[source]
        source: io::Error,
    },
    /// The agent connection failed before the configuration arrived.
    #[error("the backend sent no configuration")]
    NoConfiguration(#[source] LineError),
    /// The backend closed the agent connection before the configuration arrived.
    #[error("the backend closed the agent connection before it sent a configuration")]
    BackendClosed,
    /// The certificates are longer than the protocol allows.
    #[error("the backend's certificates exceed {} MiB", bulkhead_protocol::MAX_CERTIFICATES >> 20)]
    Certificates,
    /// No block device has the serial that the configuration names.
    #[error("no data disk: none of the virtio disks has the serial {serial:?} (found: {seen})")]
    NoDisk {
        /// The serial of the data disk.
        serial: String,
        /// `name=serial` of each disk, with spaces between.
        seen: String,
    },
    /// The disk has a content that must not be overwritten.
    #[error(
        "the data disk {device} is neither blank nor an ext4 file system and was not changed: \
         restore it from a backup, or remove the disk image to start with an empty one"
    )]
    ForeignDisk { device: PathBuf },
    /// A tool for the data disk failed.
    #[error("{tool} on the data disk failed ({status}): {output}")]
    Tool {
        tool: &'static str,
        status: ExitStatus,
        /// The end of its output, shortened.
        output: String,
    },
    /// The engine's jail cannot be made, or a service not be started in it.
    #[error("the engine's jail: {0}")]
    Jail(String),
    /// A program of the root file system is missing.
    #[error("the guest image has no {name}; rebuild it with `scripts/image`")]
    MissingProgram { name: &'static str },
}

impl Error {
    /// Returns the argument of `map_err` for work on `path`; `action` completes "cannot … PATH".
    pub(crate) fn file<E: Into<io::Error>>(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source: source.into() }
    }

    /// Returns the argument of `map_err` for a system call; `action` completes "cannot …".
    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action, source: source.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_step_and_cause_once_each() {
        let error = Error::file("open", "/x")(io::Error::other("no such thing"));
        assert_eq!(chain(&error), "cannot open /x: no such thing");
    }
}
