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

/// Boot the VM afresh inside the running backend; settings such as enhancedContainerIsolation are read again.
///
/// An engine that does not run is started. A changed policy of this machine's administrator takes effect after `stop`
/// and `start` only.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Fail when the engine does not answer within this many seconds; 0 waits for ever.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    timeout: u64,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    if let Some(client) = Client::connect(paths).await? {
        let mut events = client.events().await?;
        let answer = client.restart(&StopOptions::default()).await?;
        if answer.outcome != Outcome::Ending {
            let limit = follow::limit(arguments.timeout);
            start::tell_policy(paths, &client).await;
            follow::until_ready(paths, &mut events, answer.boot, limit, Output::Stdout).await?;
            start::tell_older(paths, &client).await;
            return print("the engine is ready again");
        }
    }
    let machine = start::Machine::default();
    start::run(paths, start::Arguments { timeout: arguments.timeout, detach: false, machine }).await
}
