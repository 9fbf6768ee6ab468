//! Follows a start to its end and shows the stages as they come.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, timeout_at};

use super::{
    CliError,
    client::{Events, ping},
    command, seconds,
};
use crate::{
    backend::{
        api::{StateName, Status},
        logs,
    },
    settings::Paths,
};

/// Time for the first request through the whole way, once the guest says that its engine answers.
const PING: Duration = Duration::from_secs(60);

/// Where the stages are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Stdout,
    /// Standard output belongs to somebody else.
    Stderr,
    /// Nobody wants to see them.
    Nowhere,
}

/// Shows each stage once.
struct Reporter {
    output: Output,
    spinner: ProgressBar,
    boot: u64,
    shown: usize,
    note: Option<String>,
}

impl Reporter {
    fn new(output: Output) -> Self {
        let spinner = if output != Output::Nowhere && io::stderr().is_terminal() {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            spinner.set_style(style);
        }
        spinner.enable_steady_tick(Duration::from_millis(100));
        Self { output, spinner, boot: 0, shown: 0, note: None }
    }

    fn line(&self, text: &str) {
        self.spinner.suspend(|| match self.output {
            // Who stopped reading still wants the engine.
            Output::Stdout => drop(super::print(text)),
            Output::Stderr => eprintln!("{text}"),
            Output::Nowhere => {}
        });
    }

    fn show(&mut self, status: &Status) {
        if self.boot != status.boot {
            if self.boot != 0 {
                self.line("the guest boots again");
            }
            (self.boot, self.shown) = (status.boot, 0);
        }
        for reached in status.stages.iter().skip(self.shown) {
            self.line(&format!("{:<8}{:>10}", reached.stage.to_string(), seconds(reached.ms)));
        }
        self.shown = status.stages.len();
        if status.reason.is_some() && status.state == StateName::Starting && status.reason != self.note {
            self.line(&format!("the engine is being started again: {}", status.reason.as_deref().unwrap_or_default()));
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
    }
}

/// Waits until boot number `boot` or a later one has an engine that answers; `limit` is the longest time.
pub(super) async fn until_ready(
    paths: &Paths,
    events: &mut Events,
    boot: u64,
    limit: Option<Duration>,
    output: Output,
) -> Result<(), CliError> {
    let begun = Instant::now();
    let far = begun + Duration::from_secs(10 * 365 * 24 * 3600);
    let deadline = limit.map_or(far, |limit| begun + limit);
    let mut reporter = Reporter::new(output);
    let mut last = None;
    loop {
        let Ok(next) = timeout_at(deadline, events.next()).await else {
            drop(reporter);
            let stage =
                last.and_then(|status: Status| status.waiting_for).map_or("vm".into(), |stage| stage.to_string());
            return Err(stuck(paths, limit.unwrap_or_default(), &stage, output));
        };
        let Some(status) = next? else {
            return Err(CliError::Failed(format!(
                "the backend ended while the engine was starting; its log is {}",
                paths.backend_log().display()
            )));
        };
        if status.boot >= boot {
            reporter.show(&status);
            match status.state {
                StateName::Running => break,
                StateName::Failed => {
                    drop(reporter);
                    return Err(failed(&status));
                }
                StateName::Stopped => return Err(CliError::Failed("the engine was stopped while it started".into())),
                StateName::Starting | StateName::Stopping => {}
            }
        }
        last = Some(status);
    }
    let deadline = deadline.min(Instant::now() + PING);
    match timeout_at(deadline, ping(&paths.docker_socket())).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(CliError::Failed(format!(
            "the guest says that its engine answers, but {} does not: {}",
            paths.docker_socket().display(),
            bulkhead_ipc::report::chain(&error)
        ))),
        Err(_) => Err(CliError::Failed(format!(
            "the guest says that its engine answers, but {} gave no answer in time; see `{}`",
            paths.docker_socket().display(),
            command(paths, "logs")
        ))),
    }
}

fn stuck(paths: &Paths, limit: Duration, stage: &str, output: Output) -> CliError {
    let seconds = limit.as_secs();
    let message = format!("the engine did not answer within {seconds} s: the start is stuck in stage `{stage}`");
    if output == Output::Stdout {
        let (logs, stop) = (command(paths, "logs"), command(paths, "stop --force"));
        return CliError::Failed(format!(
            "{message}; it goes on in the background, see `{logs}`, or end it with `{stop}`"
        ));
    }
    // A throw-away engine's logs are about to be removed.
    last_words(&logs::tail(&paths.console_log(), logs::CONSOLE_LINES).unwrap_or_default());
    CliError::Failed(message)
}

/// Shows the console's end, which often has the cause, and returns the reason.
fn failed(status: &Status) -> CliError {
    last_words(&status.console);
    CliError::Failed(status.reason.clone().unwrap_or_else(|| "the start failed".into()))
}

fn last_words(console: &[String]) {
    if !console.is_empty() {
        eprintln!("the guest's last words:\n  | {}", console.join("\n  | "));
    }
}

/// `0` means for ever.
pub(super) fn limit(seconds: u64) -> Option<Duration> {
    // A year is for ever, and far from what a clock cannot add.
    (seconds > 0).then(|| Duration::from_secs(seconds.min(365 * 24 * 3600)))
}
