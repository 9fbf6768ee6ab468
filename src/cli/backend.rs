//! `bulkhead backend`, which `start` runs in the background and a process supervisor in the foreground.

use std::process::ExitCode;

use super::CliError;
use crate::{
    backend::{self, Options},
    settings::Paths,
};

/// Run the backend in the foreground, for process supervisors such as systemd.
///
/// It begins without a VM; `bulkhead start` boots one. When its sockets listen it writes one line of JSON,
/// `{"ready": …}`, to standard output; when it cannot, `{"error": …}`. SIGTERM and SIGINT stop the engine in order, a
/// second one kills the VM. The log goes to standard error and to `backend.log` in the state folder; `BULKHEAD_LOG` sets
/// its level.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Standard error is the log already.
    #[arg(long, hide = true)]
    launched: bool,
    /// End with standard input, and remove the profile's files.
    #[arg(long, hide = true)]
    throw_away: bool,
}

pub(super) fn run(paths: &Paths, arguments: Arguments) -> Result<ExitCode, CliError> {
    backend::run(paths, Options { launched: arguments.launched, throw_away: arguments.throw_away })?;
    Ok(ExitCode::SUCCESS)
}
