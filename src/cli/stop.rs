//! `bulkhead stop`.

use std::time::Duration;

use super::{CliError, client::Client, command, print, progress::Progress, start::until_gone};
use crate::{
    backend::{api::StopOptions, lock},
    settings::Paths,
};

/// Time after which the backend kills the VM by default.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for the backend to exit after that.
const EXIT_TIMEOUT: Duration = Duration::from_secs(30);

/// Time between the end of its stream of events and the release of its lock.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// Stop the engine and its backend.
///
/// Stops the containers, syncs the file systems and powers off the VM. The docker context is removed unless it is the
/// current one. Images, containers and volumes are kept. It is not an error if the engine is not running.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Kill the VM immediately, as in a power failure.
    #[arg(long)]
    force: bool,
    /// Kill the VM if it is not down after this many seconds; containers get two thirds of this time to exit
    /// [default: 60, and 10 for containers].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    let options = StopOptions { force: arguments.force, timeout_seconds: arguments.timeout };
    print(if stop(paths, &options).await? { "stopped" } else { "the engine is not running" })
}

/// Stops the engine and waits until its backend has exited; returns whether there was one.
pub(super) async fn stop(paths: &Paths, options: &StopOptions) -> Result<bool, CliError> {
    let limit = options.timeout_seconds.map_or(DEFAULT_TIMEOUT, Duration::from_secs) + EXIT_TIMEOUT;
    let _progress = Progress::show("stopping the engine");
    let Some(client) = Client::connect(paths).await? else {
        // A backend that no longer listens is on its way out already.
        let ending = lock::holder(paths).is_some();
        if ending {
            until_gone(paths, limit).await?;
        }
        return Ok(ending);
    };
    // Before the request, so that the end of the stream cannot be missed: the backend closes it when it exits.
    let mut events = client.events().await?;
    client.stop(options).await?;
    let ended = tokio::time::timeout(limit, async { while let Ok(Some(_)) = events.next().await {} }).await;
    if ended.is_err() {
        return Err(CliError::Failed(format!(
            "the engine is still shutting down after {} s; `{}` kills it",
            limit.as_secs(),
            command(paths, "stop --force")
        )));
    }
    // The lock is released last. Only then does a `start` that follows find the profile free.
    until_gone(paths, RELEASE_TIMEOUT).await?;
    Ok(true)
}
