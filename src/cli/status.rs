//! `bulkhead status`.

use super::{
    CliError, Format,
    client::Client,
    colour::{self, Tone},
    command, print, print_json, seconds, start, table, unisolated,
};
use crate::{
    backend::{
        api::{StateName, Status},
        lock,
    },
    settings::{Paths, Policy},
};

/// Show the state of the engine: stopped, starting, running, stopping or failed.
///
/// The exit status is 0 in every state; programs should read `.state` of the JSON output.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead status
  test \"$(bulkhead status --format json | jq -r .state)\" = running")]
pub(super) struct Arguments {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    let status = read(paths).await?;
    match arguments.format {
        Format::Pretty => {
            // For people only: the names are read from the engine, container by container.
            let running = status.state == StateName::Running;
            let isolated = status.vm.as_ref().is_some_and(|vm| vm.enhanced_container_isolation);
            let client = if running && isolated { Client::connect(paths).await? } else { None };
            let older = match &client {
                Some(client) => unisolated::note(paths, client).await,
                None => None,
            };
            print(&pretty(paths, &status, older))
        }
        Format::Json => print_json(&status),
    }
}

/// The backend's status, or that of a profile without a backend.
pub(super) async fn read(paths: &Paths) -> Result<Status, CliError> {
    if let Some(client) = Client::connect(paths).await? {
        return Ok(client.status().await?);
    }
    let mut status = Status::stopped(paths);
    // The policy that a backend would have if it started now.
    status.policy = Policy::system().facts().cloned();
    // A backend that holds the lock but no longer listens is on its way out.
    if let Some(pid) = lock::holder(paths) {
        (status.state, status.ending, status.backend_pid) = (StateName::Stopping, true, Some(pid));
    }
    Ok(status)
}

/// The warning that a running backend has an older policy.
fn policy_changed(paths: &Paths, status: &Status) -> Option<String> {
    // Without a backend no policy is in use, so none can be out of date.
    status.backend_pid?;
    start::policy_change(paths, status.policy.as_ref())
}

/// The word for a state, in its colour.
pub(super) fn state_word(state: StateName) -> String {
    let word = state.to_string();
    match state {
        StateName::Running => colour::output(&word, Tone::Good),
        StateName::Failed => colour::output(&word, Tone::Bad),
        StateName::Starting | StateName::Stopping => colour::output(&word, Tone::Warning),
        StateName::Stopped => word,
    }
}

fn pretty(paths: &Paths, status: &Status, older: Option<String>) -> String {
    let mut rows = Vec::new();
    let mut row = |name: &str, text: String| rows.push(vec![name.to_owned(), text]);
    row("profile", status.profile.to_string());
    let state = state_word(status.state);
    row(
        "state",
        match status.waiting_for {
            Some(stage) => format!("{state}, waiting for {stage}"),
            None => state,
        },
    );
    // Of a failure, or of a restart of the engine that is under way.
    if let Some(reason) = &status.reason {
        row("reason", reason.clone());
    }
    if !status.stages.is_empty() {
        let stages = status.stages.iter().map(|reached| format!("{} {}", reached.stage, seconds(reached.ms)));
        row("stages", stages.collect::<Vec<_>>().join(", "));
    }
    if let Some(vm) = &status.vm {
        row("machine", format!("{} CPUs, {} MiB memory, {} GiB disk", vm.cpus, vm.memory_mib, vm.disk_gib));
        row("isolation", if vm.enhanced_container_isolation { "on".into() } else { "off".into() });
        if let Some(kernel) = &vm.kernel {
            row("kernel", kernel.clone());
        }
    }
    if let Some(older) = older {
        row("containers", older);
    }
    if let Some(context) = &status.context {
        row("context", context.clone());
    }
    if let Some(facts) = &status.policy {
        row("policy", facts.warning().unwrap_or_else(|| facts.file.display().to_string()));
    }
    // A second row of that name: the policy in force, and the news that the file is another one by now.
    if let Some(changed) = policy_changed(paths, status) {
        row("policy", changed);
    }
    if let Some(warning) = &status.warning {
        row("warning", warning.clone());
    }
    // The most useful thing to do next: start the engine, or use it.
    if status.state == StateName::Stopped && status.backend_pid.is_none() {
        row("start", command(paths, "start"));
    } else {
        row("endpoint", status.docker_host.clone());
    }
    let pids = [("backend", status.backend_pid), ("vm", status.vmm_pid)];
    for (name, pid) in pids.into_iter().filter_map(|(name, pid)| Some((name, pid?))) {
        row(name, format!("process {pid}"));
    }
    let mut text = table(&rows);
    if !status.console.is_empty() {
        text.push_str("\nlast lines of the guest's console:\n  | ");
        text.push_str(&status.console.join("\n  | "));
    }
    text
}
