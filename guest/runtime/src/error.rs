//! What can go wrong, in the words that the engine passes on to the person.

use std::{io, path::PathBuf};

use crate::{cli::CliError, id_ranges::RangeError, rootfs::RootError, spec::SpecError};

/// Everything this program fails with; the causes are chained, not repeated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The command line is not one of an OCI runtime.
    #[error(transparent)]
    Cli(#[from] CliError),
    /// The bundle asks for what isolation can't allow, or is no bundle.
    #[error("error in the container spec")]
    Spec(#[from] SpecError),
    /// No range of ids, or the table of ranges can't be used.
    #[error(transparent)]
    Ranges(#[from] RangeError),
    /// The root file system can't be id-mapped.
    #[error("can't prepare the container's root file system")]
    Root(#[from] RootError),
    /// A system call failed that only fails on a machine that is not fit for containers.
    #[error("can't {what}")]
    System {
        /// The purpose, to stand after "can't".
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What crun has failed with already, in the words that callers know.
    #[error("{0}")]
    Told(String),
    /// The program that does the container set-up could not be started.
    #[error("can't run {}; install crun", path.display())]
    Crun {
        /// Where it was expected.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: names the purpose of a failed system call, to stand after "can't".
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}
