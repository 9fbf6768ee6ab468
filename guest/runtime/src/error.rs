//! The errors of this program. The engine passes their texts on to the user, so those that Docker documents are kept to
//! the letter.

use std::{io, path::PathBuf};

use crate::{cli::CliError, id_ranges::RangeError, network::NetworkError, rootfs::RootfsError, spec::SpecError};

/// Any error of this program; a text does not repeat that of its source.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The command line is not that of an OCI runtime.
    #[error(transparent)]
    Cli(#[from] CliError),
    /// The bundle asks for something that isolation cannot allow, or is not a bundle.
    #[error("error in the container spec")]
    Spec(#[from] SpecError),
    /// All id ranges are in use, or the table of ranges cannot be used.
    #[error(transparent)]
    Ranges(#[from] RangeError),
    /// The root file system cannot be id-mapped.
    #[error("cannot prepare the container's root file system")]
    Rootfs(#[from] RootfsError),
    /// The engine has given the container a device of the VM.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A system call failed that only fails on a machine that is not fit for containers.
    #[error("cannot {what}")]
    System {
        /// The purpose, to stand after "cannot".
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// crun's own error, in the words of runc that callers look for.
    #[error("{0}")]
    Translated(String),
    /// The program that sets up the container cannot be started.
    #[error("cannot run {}; install crun", path.display())]
    Crun {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: names the purpose of a failed system call, to stand after "cannot".
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}
