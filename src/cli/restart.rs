//! `bulkhead restart`.

use super::{
    CliError,
    client::Client,
    follow::{self, Output},
    print, start,
};
use crate::{
    backend::api::{Outcome, StopOptions},
    settings::Paths,
};

/// Reboot the VM with the current settings.
///
/// The running backend shuts the VM down and boots it again, so that changed settings such as
/// enhancedContainerIsolation take effect. A stopped engine is started. A change of the administrator's policy takes
/// effect only after `bulkhead stop` and `bulkhead start`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Fail if the engine is not ready within this many seconds; 0 waits forever.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    timeout: u64,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    if let Some(client) = Client::connect(paths).await? {
        let mut events = client.events().await?;
        // The options are for the shutdown that comes first. The VM that follows gets the options of the present one
        // again.
        let answer = client.restart(&StopOptions::default()).await?;
        if answer.outcome != Outcome::Ending {
            let limit = follow::limit(arguments.timeout);
            start::warn_of_policy(paths, &client).await;
            follow::until_ready(paths, &mut events, answer.boot, limit, Output::Stdout).await?;
            start::note_unisolated(paths, &client).await;
            return print("the engine is ready again");
        }
    }
    // No backend, or one that is about to end: the options of the VM that it had are not kept anywhere.
    let machine = start::Machine::default();
    start::run(paths, start::Arguments { timeout: arguments.timeout, detach: false, machine }).await
}
