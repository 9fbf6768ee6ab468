//! The log of the processes of a profile: `bulkhead backend` and its children.
//!
//! All of them have the same lines and the same limits. The backend writes to `backend.log` and, in the foreground, to
//! its standard error as well. The others write to standard error, a pipe to the backend, which puts their lines
//! into the same file: they open no file, and the backend is the only one that writes to it and renames it.
//!
//! A guest can provoke most lines, so each kind of line has a limit of its own ([`limit`]), and a panic ends the
//! process ([`abort_on_panic`]): a thread or task that is missing would leave a VM that hangs without a reason.

pub mod limit;

use std::io::{self, Write};

use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{self, MakeWriter, format},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use bulkhead_ipc::report;
use limit::Limited;

/// Environment variable with the level of the log, for all three processes.
const LEVEL: &str = "BULKHEAD_LOG";

/// Longest line in bytes. A pipe takes a write of up to 4096 bytes as a whole (pipe(7), `PIPE_BUF`), so that lines of
/// several threads never mix.
pub const MAX_LINE: usize = 2048;

/// A layer of the log: what one writer gets.
type Sink = Box<dyn Layer<Registry> + Send + Sync>;

/// Starts the log of a process whose standard error leads to the backend.
pub fn to_standard_error() {
    start(vec![plain(WholeLines).boxed()]);
}

/// Starts the log of the backend: `file`, and standard error on request.
pub fn to_file<W>(file: W, terminal: bool)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let mut sinks: Vec<Sink> = vec![plain(file).boxed()];
    if terminal {
        let lines = Limited::new(format().with_target(false));
        sinks.push(fmt::layer().event_format(lines).with_writer(io::stderr).log_internal_errors(false).boxed());
    }
    start(sinks);
}

/// Makes a panic of any thread or task end the process, after a message in the log.
///
/// Unwinding would end one thread or task, and tokio keeps the panic of a task for somebody who may never ask.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let message = report::panic(panic);
        if tracing::dispatcher::has_been_set() {
            tracing::error!("{message}");
        } else {
            let _ = writeln!(io::stderr(), "error: {message}");
        }
        std::process::abort();
    }));
}

fn start(sinks: Vec<Sink>) {
    let level = EnvFilter::try_from_env(LEVEL).unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails for a second backend in one process, as tests have it.
    let _ = tracing_subscriber::registry().with(sinks).with(level).try_init();
}

/// Returns a layer that writes each line within its limit to `writer`, without colours.
fn plain<W>(writer: W) -> fmt::Layer<Registry, format::DefaultFields, Limited<format::Format>, W>
where
    W: for<'a> MakeWriter<'a> + 'static,
{
    let layer = fmt::layer().event_format(Limited::new(format())).with_writer(writer).with_ansi(false);
    // It would print a failed write to standard error, which may be the same full disk or pipe, and that panics.
    layer.log_internal_errors(false)
}

/// Standard error, written to by whole lines.
struct WholeLines;

impl<'a> MakeWriter<'a> for WholeLines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for WholeLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Lost when the pipe is full: neither a vCPU nor a device may wait for the backend.
        let _ = io::stderr().write(cut(line).as_ref());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns a line of at most [`MAX_LINE`] bytes with its line feed.
pub fn cut(line: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    if line.len() <= MAX_LINE {
        return line.into();
    }
    let mut line = line[..MAX_LINE - 1].to_vec();
    line.push(b'\n');
    line.into()
}

#[cfg(test)]
mod tests;
