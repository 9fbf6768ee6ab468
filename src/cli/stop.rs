//! `bulkhead stop`.

use std::time::Duration;

use super::{CliError, client::Client, command, print, start::until_gone};
use crate::{
    backend::{api::StopOptions, lock},
    settings::Paths,
};

/// Seconds that the backend waits when nobody says otherwise, and some for itself.
const LIMIT: u64 = 60 + 30;

/// Stop the engine and its backend.
///
/// Containers are stopped, file systems synced, the VM powered off; the docker context is removed unless it is the
/// current one. Images, containers and volumes are kept. Stopping what does not run is no error.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// End the VM at once, as if its power failed.
    #[arg(long)]
    force: bool,
    /// Kill the VM when it is not down after this many seconds; containers get two thirds of them to end
    /// [default: 60, of which containers get 10].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    let limit = Duration::from_secs(arguments.timeout.map_or(LIMIT, |seconds| seconds + 30));
    let Some(client) = Client::connect(paths).await? else {
        if lock::holder(paths).is_some() {
            until_gone(paths, limit).await?;
            return print("stopped");
        }
        return print("the engine is not running");
    };
    let mut events = client.events().await?;
    client.stop(&StopOptions { force: arguments.force, timeout_seconds: arguments.timeout }).await?;
    let ended = tokio::time::timeout(limit, async { while let Ok(Some(_)) = events.next().await {} }).await;
    if ended.is_err() {
        return Err(CliError::Failed(format!(
            "the engine is still going down after {} s; `{}` ends it at once",
            limit.as_secs(),
            command(paths, "stop --force")
        )));
    }
    until_gone(paths, Duration::from_secs(10)).await?;
    print("stopped")
}
