//! Follows the start of an engine to its end and shows its stages.

use std::time::Duration;

use indicatif::ProgressBar;
use tokio::time::{Instant, timeout_at};

use super::{
    CliError,
    client::{Events, ping},
    command,
    log_group::LogGroups,
    progress::spinner,
    seconds,
};
use crate::{
    backend::{
        api::{StateName, Status},
        logs,
    },
    settings::Paths,
};

/// Time for the first request to pass through all processes, once the guest reports that its engine is ready.
const PING_TIMEOUT: Duration = Duration::from_secs(60);

/// The place where stages are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Stdout,
    /// For `run`, where standard output is the command's.
    Stderr,
    /// For `run --quiet`.
    Nowhere,
}

/// Name of the group of stages in the log of a CI system.
const GROUP: &str = "bulkhead_start";

/// Shows each stage once, and a spinner on a terminal.
struct Reporter {
    output: Output,
    groups: Option<LogGroups>,
    spinner: ProgressBar,
    boot: u64,
    shown: usize,
    note: Option<String>,
}

impl Reporter {
    fn new(output: Output) -> Self {
        let spinner = spinner(output != Output::Nowhere);
        let groups = LogGroups::from_environment();
        let reporter = Self { output, groups, spinner, boot: 0, shown: 0, note: None };
        if let Some(groups) = groups {
            reporter.line(&groups.begin(GROUP, "Start of Bulkhead's engine"));
        }
        reporter
    }

    fn line(&self, text: &str) {
        // Without this the spinner and the line would end up on one line of the terminal.
        self.spinner.suspend(|| match self.output {
            // A reader that is gone, such as `head`, still wants the engine to start.
            Output::Stdout => drop(super::print(text)),
            Output::Stderr => eprintln!("{text}"),
            Output::Nowhere => {}
        });
    }

    fn show(&mut self, status: &Status) {
        // A guest that resets boots again under the same request; its stages start over.
        if self.boot != status.boot {
            if self.boot != 0 {
                self.line("the guest is booting again");
            }
            (self.boot, self.shown) = (status.boot, 0);
        }
        for reached in status.stages.iter().skip(self.shown) {
            self.line(&format!("{:<8}{:>10}", reached.stage.to_string(), seconds(reached.ms)));
        }
        self.shown = status.stages.len();
        // The same reason comes with each status until the engine is ready.
        if status.reason.is_some() && status.state == StateName::Starting && status.reason != self.note {
            self.line(&format!("the engine is not ready: {}", status.reason.as_deref().unwrap_or_default()));
        }
        self.note.clone_from(&status.reason);
        match status.waiting_for {
            Some(stage) => self.spinner.set_message(format!("waiting for {stage}")),
            None => self.spinner.set_message(status.state.to_string()),
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.spinner.finish_and_clear();
        // Before an error is printed, which must not be folded away.
        if let Some(groups) = self.groups {
            self.line(&groups.end(GROUP));
        }
    }
}

/// Waits until the engine of boot number `boot`, or of a later one, is ready, for `limit` at most.
pub(super) async fn until_ready(
    paths: &Paths,
    events: &mut Events,
    boot: u64,
    limit: Option<Duration>,
    output: Output,
) -> Result<(), CliError> {
    let started = Instant::now();
    // An `Instant` cannot be infinite.
    let far = started + Duration::from_secs(10 * 365 * 24 * 3600);
    let deadline = limit.map_or(far, |limit| started + limit);
    let mut reporter = Reporter::new(output);
    let mut last = None;
    loop {
        let Ok(next) = timeout_at(deadline, events.next()).await else {
            drop(reporter);
            let stage =
                last.and_then(|status: Status| status.waiting_for).map_or("vm".into(), |stage| stage.to_string());
            return Err(stuck(paths, limit.unwrap_or_default(), &stage, output));
        };
        // The backend never closes the stream while it lives.
        let Some(status) = next? else {
            drop(reporter);
            return Err(CliError::Failed(format!(
                "the backend exited while the engine was starting; see its log {}",
                paths.backend_log().display()
            )));
        };
        // The stream starts with the status from before the request, which may be of an older boot: a failure of that
        // one must not be taken for one of ours.
        if status.boot >= boot {
            reporter.show(&status);
            match status.state {
                StateName::Running => break,
                StateName::Failed => {
                    drop(reporter);
                    return Err(failed(&status));
                }
                StateName::Stopped => {
                    return Err(CliError::Failed("the engine was stopped while it was starting".into()));
                }
                // A restart shuts the old VM down first.
                StateName::Starting | StateName::Stopping => {}
            }
        }
        last = Some(status);
    }
    // The guest has seen its engine respond; this is the first request on the path that the user's requests take.
    let deadline = deadline.min(Instant::now() + PING_TIMEOUT);
    match timeout_at(deadline, ping(&paths.docker_socket())).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(CliError::Failed(format!(
            "the guest reports that its engine is ready, but {} does not respond: {}",
            paths.docker_socket().display(),
            bulkhead_ipc::report::chain(&error)
        ))),
        Err(_) => Err(CliError::Failed(format!(
            "the guest reports that its engine is ready, but {} did not respond in time; see `{}`",
            paths.docker_socket().display(),
            command(paths, "logs")
        ))),
    }
}

fn stuck(paths: &Paths, limit: Duration, stage: &str, output: Output) -> CliError {
    let seconds = limit.as_secs();
    let message = format!("the engine was not ready after {seconds} s: the start is stuck at stage `{stage}`");
    // `start` leaves the VM running, so its user can look at it; `run` ends it.
    if output == Output::Stdout {
        let (logs, stop) = (command(paths, "logs"), command(paths, "stop --force"));
        return CliError::Failed(format!(
            "{message}; it continues in the background: see `{logs}`, or end it with `{stop}`"
        ));
    }
    // The logs of a temporary engine are removed with it, so their end is shown now.
    last_words(&logs::tail(&paths.console_log(), logs::CONSOLE_LINES).unwrap_or_default());
    CliError::Failed(message)
}

/// Shows the end of the console, which often has the cause, and returns the reason.
fn failed(status: &Status) -> CliError {
    last_words(&status.console);
    CliError::Failed(status.reason.clone().unwrap_or_else(|| "the start failed".into()))
}

fn last_words(console: &[String]) {
    if !console.is_empty() {
        eprintln!("last lines of the guest's console:\n  | {}", console.join("\n  | "));
    }
}

/// The limit that a command line gives; 0 is none.
pub(super) fn limit(seconds: u64) -> Option<Duration> {
    // A year is long enough, and far below the durations that overflow a clock.
    (seconds > 0).then(|| Duration::from_secs(seconds.min(365 * 24 * 3600)))
}
