//! A spinner on a terminal for what may take longer than a second.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two steps of a spinner.
const TICK: Duration = Duration::from_millis(100);

/// A spinner on standard error while this value lives; nothing where standard error is not a terminal.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Shows what is going on, and for how long.
    pub(super) fn show(message: &'static str) -> Self {
        let spinner = spinner(true);
        spinner.set_message(message);
        Self(spinner)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A spinner without a message; hidden unless it is `wanted` and standard error is a terminal.
pub(super) fn spinner(wanted: bool) -> ProgressBar {
    let spinner = if wanted && io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(TICK);
    spinner
}
