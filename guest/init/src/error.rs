//! What can go wrong in PID 1.

use std::{io, path::PathBuf, process::ExitStatus};

pub(crate) use bulkhead_guest_common::error::chain;
use bulkhead_protocol::LineError;

/// An error of the guest's init; the text names the step, the source the cause.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file system could not be mounted.
    #[error("can't mount {what} on {target}")]
    Mount {
        /// Source or type.
        what: String,
        /// Mount point.
        target: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file, directory or link could not be made, read or written.
    #[error("can't {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A system call without a path failed.
    #[error("can't {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The backend's agent port does not answer.
    #[error("no connection to the backend (vsock CID 2 port {port}); is the VM's vsock device attached to a backend?")]
    NoBackend {
        /// The port tried.
        port: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The agent connection broke before the configuration came.
    #[error("the backend sent no configuration")]
    NoConfiguration(#[source] LineError),
    /// The backend closed the agent connection before the configuration came.
    #[error("the backend closed the agent connection before it sent a configuration")]
    BackendClosed,
    /// More certificates than the protocol allows.
    #[error("the backend sent more certificates than {} MiB", bulkhead_protocol::MAX_CERTIFICATES >> 20)]
    Certificates,
    /// No block device has the serial that the configuration names.
    #[error("no data disk: no virtio block device has the serial {serial:?} (there are: {seen})")]
    NoDisk {
        /// The serial looked for.
        serial: String,
        /// `name=serial` of what is there.
        seen: String,
    },
    /// The disk holds something that is not ours to overwrite.
    #[error(
        "the data disk {device} is neither blank nor an ext4 file system; it was left as it is: \
         restore it from a copy, or remove the disk image to start with an empty one"
    )]
    ForeignDisk {
        /// The device node.
        device: PathBuf,
    },
    /// A tool for the data disk ended badly.
    #[error("{tool} on the data disk failed ({status}): {output}")]
    Tool {
        /// The program.
        tool: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed.
        output: String,
    },
    /// A program of the root file system is missing.
    #[error("the guest image has no {name}; rebuild the image")]
    MissingProgram {
        /// The program.
        name: &'static str,
    },
}

impl Error {
    /// Builds the `map_err` argument for work on `path`.
    pub(crate) fn file<E: Into<io::Error>>(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source: source.into() }
    }

    /// Builds the `map_err` argument for a system call.
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
        assert_eq!(chain(&error), "can't open /x: no such thing");
    }
}
