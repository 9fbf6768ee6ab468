//! `bulkhead backend`, which `start` runs in the background, and a process supervisor in the foreground.

use std::process::ExitCode;

use super::CliError;
use crate::{
    backend::{self, Options},
    settings::Paths,
};

/// Run the backend in the foreground, for process supervisors such as systemd.
///
/// It starts without a VM; `bulkhead start` boots one. Once its sockets are listening, it writes one line of JSON to
/// standard output: `{"ready": …}`, or `{"error": …}` if it fails. SIGTERM and SIGINT shut the engine down; a second
/// one kills the VM. The log goes to standard error and to `backend.log` in the state directory; `BULKHEAD_LOG` sets
/// its level.
///
/// A listening `docker.sock` that the supervisor passes (sd_listen_fds(3)) is used; its first client starts the engine.
/// The state is reported by sd_notify(3).
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Standard error is the log file.
    #[arg(long, hide = true)]
    launched: bool,
    /// Exit at the end of standard input, and remove the profile's files.
    #[arg(long, hide = true)]
    throw_away: bool,
}

pub(super) fn run(paths: &Paths, arguments: Arguments) -> Result<ExitCode, CliError> {
    crate::log::abort_on_panic();
    // Returns when the backend has been asked to stop and its VM is down.
    backend::run(paths, Options { launched: arguments.launched, throw_away: arguments.throw_away })?;
    Ok(ExitCode::SUCCESS)
}
