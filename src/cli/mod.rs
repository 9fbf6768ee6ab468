//! The command line: one file for each verb.
//!
//! `client.rs` talks to the backend, `follow.rs` shows the progress of a start, in a group of lines of CI systems by
//! `log_group.rs`, `colour.rs` and `progress.rs` have the colours and the spinner of a terminal, `environment.rs` reads
//! and writes files of variables, `unisolated.rs` finds containers from before isolation. A verb's help is the doc
//! comment of its `Arguments`.

mod api;
mod backend;
mod client;
mod colour;
mod dashboard;
mod delete;
mod doctor;
mod env;
mod environment;
mod follow;
mod list;
mod log_group;
mod logs;
mod policy;
mod ports;
mod progress;
mod restart;
mod run;
mod schema;
mod settings;
mod share;
mod start;
mod status;
mod stop;
mod support;
mod unisolated;
mod version;
mod vsock;

use std::{io, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use self::{client::ClientError, environment::EnvironmentError};
use crate::{
    backend::{BackendError, VmPortsError, launch::LaunchError, lock::LockError, plan::PlanError},
    settings::{Base, PathError, Paths, Policy, ProfileName, SettingsError},
};
use bulkhead_ipc::report::chain;

/// Exit status of every verb but `run`.
const EXIT_CODES: &str = "\
Exit status:
  0  success, or nothing to do
  1  failure; standard error has one line that starts with `error:`
  2  invalid command line
`bulkhead run` exits with the status of its command (see `bulkhead run --help`).";

const EXAMPLES: &str = "\
Examples:
  bulkhead start                              start the engine; creates docker context `bulkhead`
  docker --context bulkhead run --rm alpine   use the engine
  eval \"$(bulkhead env)\"                      use the engine in this shell, without a context
  bulkhead run -- docker compose up           run one command with a temporary engine
  bulkhead --profile ci start --cpus 4        start a second engine beside the first
  bulkhead stop                               stop the engine; images and volumes are kept

";

/// Run a Docker engine in a lightweight VM, with each container in its own user namespace.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, after_help = format!("{EXAMPLES}{EXIT_CODES}"), arg_required_else_help = true)]
struct Cli {
    /// Engine to use; each has its own VM, data disk, settings and sockets.
    #[arg(long, global = true, default_value = "default", value_name = "NAME")]
    profile: ProfileName,
    #[command(subcommand)]
    verb: Verb,
}

// A doc comment here would take the place of the whole help text of the verb, which is at its arguments.
#[derive(Debug, Subcommand)]
enum Verb {
    Start(start::Arguments),
    Stop(stop::Arguments),
    Restart(restart::Arguments),
    Status(status::Arguments),
    List(list::Arguments),
    Delete(delete::Arguments),
    Ports(ports::Arguments),
    Logs(logs::Arguments),
    Dashboard(dashboard::Arguments),
    Run(run::Arguments),
    Env(env::Arguments),
    #[command(subcommand)]
    Settings(settings::Verb),
    #[command(subcommand)]
    Share(share::Verb),
    #[command(subcommand)]
    Policy(policy::Verb),
    Doctor(doctor::Arguments),
    #[command(subcommand)]
    Vsock(vsock::Verb),
    Support(support::Arguments),
    Api(api::Arguments),
    Version(version::Arguments),
    Schema(schema::Arguments),
    #[command(hide = true)]
    Backend(backend::Arguments),
}

/// Output format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Text for people.
    #[default]
    Pretty,
    /// JSON for programs.
    Json,
}

/// The failure of a verb.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    #[error(transparent)]
    VmPorts(#[from] VmPortsError),
    /// A complete message.
    #[error("{0}")]
    Failed(String),
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

impl CliError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// The definition of the command line, of which the manual pages and the shells' completions are made.
pub fn definition() -> clap::Command {
    Cli::command()
}

/// Runs the verb on the command line; returns its exit status.
pub fn main() -> ExitCode {
    // Exits with status 2 for an invalid command line, and with 0 for `--help` and `--version`.
    let cli = Cli::parse();
    // `run` has a status for its own failures, so that they can be told from its command's; `docker run` and env(1) use
    // the same number.
    let failure = if matches!(cli.verb, Verb::Run(_)) { ExitCode::from(run::OWN_FAILURE) } else { ExitCode::FAILURE };
    match dispatch(cli) {
        Ok(code) => code,
        // EPIPE, as from `bulkhead logs | head`, is not an error.
        Err(CliError::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            colour::fail(chain(&error));
            failure
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, CliError> {
    let base = Base::from_environment()?;
    let name = &cli.profile;
    // `known_profile` refuses a mistyped name. Verbs that create a profile, or make sense before it exists, take any.
    match cli.verb {
        Verb::Start(arguments) => wait(start::run(&base.profile(name)?, arguments)),
        Verb::Stop(arguments) => wait(stop::run(&base.known_profile(name)?, arguments)),
        Verb::Restart(arguments) => wait(restart::run(&base.known_profile(name)?, arguments)),
        Verb::Status(arguments) => wait(status::run(&base.known_profile(name)?, arguments)),
        Verb::List(arguments) => wait(list::run(&base, arguments)),
        Verb::Delete(arguments) => wait(delete::run(&base.known_profile(name)?, arguments)),
        Verb::Ports(arguments) => wait(ports::run(&base, name, Policy::system(), arguments)),
        Verb::Logs(arguments) => logs::run(&base.known_profile(name)?, arguments),
        Verb::Dashboard(arguments) => wait(dashboard::run(&base.known_profile(name)?, arguments)),
        Verb::Run(arguments) => run::run(&base, arguments),
        Verb::Env(arguments) => env::run(&base.profile(name)?, arguments),
        Verb::Settings(verb) => settings::run(&base, name, Policy::system(), verb),
        Verb::Share(verb) => share::run(&base, name, Policy::system(), verb),
        Verb::Policy(verb) => policy::run(&base.known_profile(name)?, verb),
        Verb::Doctor(arguments) => doctor::run(&base.profile(name)?, arguments),
        Verb::Vsock(verb) => wait(vsock::run(&base.known_profile(name)?, verb)),
        Verb::Support(arguments) => support::run(&base.known_profile(name)?, arguments),
        Verb::Api(arguments) => api::run(arguments),
        Verb::Version(arguments) => version::run(&base, arguments),
        Verb::Schema(arguments) => schema::run(arguments),
        Verb::Backend(arguments) => backend::run(&base.profile(name)?, arguments),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    // One thread is enough: verbs mostly wait.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("cannot start the async runtime"))
}

/// Runs a verb that talks to the backend.
fn wait(verb: impl Future<Output = Result<(), CliError>>) -> Result<ExitCode, CliError> {
    let runtime = runtime()?;
    let result = runtime.block_on(verb);
    // `until_gone` may have left a thread that waits for a lock. A blocking shutdown would wait for it, and so forever.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// Writes a line to standard output. Unlike `println!` it does not panic when the reader is gone.
fn print(text: &str) -> Result<(), CliError> {
    use io::Write;
    let mut output = io::stdout().lock();
    // Flushed, so that errors show here, and stages of a start as they are reached.
    writeln!(output, "{text}").and_then(|()| output.flush()).map_err(CliError::io("cannot write the output"))
}

/// Writes a value as JSON, in the form of all verbs with `--format json`.
fn print_json<T: Serialize>(value: &T) -> Result<(), CliError> {
    print(&serde_json::to_string_pretty(value).map_err(|error| CliError::io("cannot write the output")(error.into()))?)
}

/// The command line for `verb` on this profile, for messages.
fn command(paths: &Paths, verb: &str) -> String {
    let name = paths.name();
    if name.is_default() { format!("bulkhead {verb}") } else { format!("bulkhead --profile {name} {verb}") }
}

/// Milliseconds as seconds with two decimals.
fn seconds(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

/// A number of bytes in the unit in which it has one to three digits before the point.
fn in_bytes(bytes: u64) -> String {
    // Rounded down: 1023.99 must not become 1024.0.
    let unit = ["KiB", "MiB", "GiB", "TiB"].iter().zip([10, 20, 30, 40]).rfind(|(_, shift)| bytes >> shift > 0);
    match unit {
        Some((unit, shift)) => format!("{}.{} {unit}", bytes >> shift, ((bytes >> (shift - 10)) % 1024) * 10 / 1024),
        None => format!("{bytes} bytes"),
    }
}

/// Formats rows in columns, each as wide as its widest cell.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| colour::width(cell)).max();
    // Characters are counted, not columns of a terminal: all cells but paths and names of containers are ASCII.
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let padded = |cell: &String, width: usize| format!("{cell}{:1$}", "", width - colour::width(cell));
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| padded(cell, *width)).collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_profile_can_be_named_before_and_after_the_verb() {
        for line in [["bulkhead", "--profile", "ci", "status"], ["bulkhead", "status", "--profile", "ci"]] {
            assert_eq!(Cli::try_parse_from(line).unwrap().profile.as_str(), "ci");
        }
        assert!(Cli::try_parse_from(["bulkhead", "--profile", "../x", "status"]).is_err());
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: &[&str]| cells.iter().map(ToString::to_string).collect();
        assert_eq!(table(&[row(&["a", "b"]), row(&["long", "c"])]), "a     b\nlong  c");
    }

    #[test]
    fn sizes_are_in_a_unit_of_their_own_and_never_rounded_up() {
        let sizes = [0, 1023, 1024, 1536, (1 << 30) - 1, 3 << 29, u64::MAX];
        let expected = ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "1023.9 MiB", "1.5 GiB", "16777215.9 TiB"];
        assert_eq!(sizes.map(in_bytes), expected);
    }

    #[test]
    fn times_are_in_seconds_with_two_digits() {
        assert_eq!([seconds(0), seconds(1230), seconds(61_009)], ["0.00 s", "1.23 s", "61.00 s"]);
    }
}
