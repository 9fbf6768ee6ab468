//! `bulkhead env`.

use std::{path::PathBuf, process::ExitCode};

use super::{CliError, environment, print};
use crate::settings::Paths;

/// Print shell commands that point docker to the engine.
///
/// They set DOCKER_HOST and unset DOCKER_CONTEXT. The engine need not be running.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  eval \"$(bulkhead env)\" && docker ps
  bulkhead env --publish-env \"$GITHUB_ENV\"")]
pub(super) struct Arguments {
    /// Append `DOCKER_HOST=…` and `BULKHEAD_PROFILE=…` to a file instead, such as $GITHUB_ENV or a dotenv file.
    #[arg(long, value_name = "FILE")]
    publish_env: Option<PathBuf>,
}

pub(super) fn run(paths: &Paths, arguments: Arguments) -> Result<ExitCode, CliError> {
    match arguments.publish_env {
        Some(file) => environment::publish(paths, &file)?,
        // Some clients prefer a context in the environment to DOCKER_HOST.
        None => print(&format!("export DOCKER_HOST={}\nunset DOCKER_CONTEXT", quote(&paths.docker_host())))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Quotes a word for a POSIX shell.
fn quote(word: &str) -> String {
    // Nothing is special between single quotes but the quote itself, which ends them, is escaped and starts them again.
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_word_back() {
        for word in ["unix:///run/x", "it's", "$(x) `y` \"z\" \\ *"] {
            let command = format!("printf %s {}", quote(word));
            let output = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
