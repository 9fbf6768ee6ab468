//! The command line: one file per verb.

mod backend;
mod client;
mod doctor;
mod env;
mod follow;
mod logs;
mod policy;
mod ports;
mod restart;
mod run;
mod settings;
mod start;
mod status;
mod stop;
mod unisolated;
mod version;

use std::{io, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};

use self::client::ClientError;
use crate::{
    backend::{BackendError, launch::LaunchError, plan::PlanError},
    report::chain,
    settings::{Base, PathError, Paths, Policy, ProfileName, SettingsError},
};

/// Exit status of every verb but `run`.
const EXIT_CODES: &str = "\
Exit status:
  0  done, or nothing to do
  1  it failed; standard error has one line that begins with `error:`
  2  the command line is wrong
`bulkhead run` ends with the status of its command (see `bulkhead run --help`).";

const EXAMPLES: &str = "\
Examples:
  bulkhead start                              start the engine; a docker context `bulkhead` then exists
  docker --context bulkhead run --rm alpine   use it
  eval \"$(bulkhead env)\"                      use it in this shell without a context
  bulkhead run -- docker compose up           a throw-away engine around one command
  bulkhead --profile ci start --cpus 4        a second engine beside the first
  bulkhead stop                               stop it; images and volumes are kept

";

/// A Docker engine in a lightweight VM of its own, with every container in its own user namespace.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, after_help = format!("{EXAMPLES}{EXIT_CODES}"), arg_required_else_help = true)]
struct Cli {
    /// Engine to work on; each has its own VM, data disk, settings and sockets.
    #[arg(long, global = true, default_value = "default", value_name = "NAME")]
    profile: ProfileName,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start the engine and wait until it answers.
    Start(start::Arguments),
    /// Stop the engine and its backend.
    Stop(stop::Arguments),
    /// Boot the VM afresh; settings are read again.
    Restart(restart::Arguments),
    /// Show what runs.
    Status(status::Arguments),
    /// Show which ports of this machine lead to containers.
    Ports(ports::Arguments),
    /// Show the guest's console and the backend's log.
    Logs(logs::Arguments),
    /// Run one command with a throw-away engine.
    Run(run::Arguments),
    /// Print the shell command that points docker to the engine.
    Env(env::Arguments),
    /// Show and change settings.
    #[command(subcommand)]
    Settings(settings::Verb),
    /// Show what the administrator of this machine decides, and check a policy file.
    #[command(subcommand)]
    Policy(policy::Verb),
    /// Check whether this machine can run the engine.
    Doctor(doctor::Arguments),
    /// Show versions.
    Version(version::Arguments),
    /// Run the backend in the foreground, for process supervisors.
    #[command(hide = true)]
    Backend(backend::Arguments),
}

/// Text for people or JSON for programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    #[default]
    Pretty,
    /// For programs.
    Json,
}

/// Why a verb failed.
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
    /// A whole sentence.
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

/// Does what the command line says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // What `run` itself cannot do is told from what its command returns, as `docker run` and `env` do.
    let failure = if matches!(cli.verb, Verb::Run(_)) { ExitCode::from(run::OWN_FAILURE) } else { ExitCode::FAILURE };
    match dispatch(cli) {
        Ok(code) => code,
        // Who closed the pipe has seen enough.
        Err(CliError::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            failure
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, CliError> {
    let base = Base::from_environment()?;
    let name = &cli.profile;
    match cli.verb {
        Verb::Start(arguments) => wait(start::run(&base.profile(name)?, arguments)),
        Verb::Stop(arguments) => wait(stop::run(&base.known_profile(name)?, arguments)),
        Verb::Restart(arguments) => wait(restart::run(&base.known_profile(name)?, arguments)),
        Verb::Status(arguments) => wait(status::run(&base.known_profile(name)?, arguments)),
        Verb::Ports(arguments) => wait(ports::run(&base.known_profile(name)?, arguments)),
        Verb::Logs(arguments) => logs::run(&base.known_profile(name)?, arguments),
        Verb::Run(arguments) => run::run(&base, arguments),
        Verb::Env(arguments) => env::run(&base.profile(name)?, arguments),
        Verb::Settings(verb) => settings::run(&base, name, Policy::system(), verb),
        Verb::Policy(verb) => policy::run(&base.known_profile(name)?, verb),
        Verb::Doctor(arguments) => doctor::run(&base.profile(name)?, arguments),
        Verb::Version(arguments) => version::run(&base, arguments),
        Verb::Backend(arguments) => backend::run(&base.profile(name)?, arguments),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::io("cannot start"))
}

/// Runs a verb that talks to the backend.
fn wait(verb: impl Future<Output = Result<(), CliError>>) -> Result<ExitCode, CliError> {
    let runtime = runtime()?;
    let result = runtime.block_on(verb);
    // A thread that waits for a lock must not keep the command from ending.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// Writes to standard output; unlike `println!` it does not panic when nobody reads.
fn print(text: &str) -> Result<(), CliError> {
    use io::Write;
    let mut output = io::stdout().lock();
    writeln!(output, "{text}").and_then(|()| output.flush()).map_err(CliError::io("cannot write the output"))
}

/// The command a person would type for this profile.
fn command(paths: &Paths, verb: &str) -> String {
    let name = paths.name();
    if name.is_default() { format!("bulkhead {verb}") } else { format!("bulkhead --profile {name} {verb}") }
}

/// A duration as people read it.
fn seconds(ms: u64) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

/// Columns padded to the widest cell.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

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
    fn times_are_in_seconds_with_two_digits() {
        assert_eq!([seconds(0), seconds(1230), seconds(61_009)], ["0.00 s", "1.23 s", "61.00 s"]);
    }
}
