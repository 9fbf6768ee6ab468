//! `bulkhead env`.

use std::process::ExitCode;

use super::{CliError, print};
use crate::settings::Paths;

/// Print shell commands that point docker to the engine.
///
/// They set DOCKER_HOST and unset DOCKER_CONTEXT. The engine need not be running.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Example:
  eval \"$(bulkhead env)\" && docker ps")]
pub(super) struct Arguments {}

pub(super) fn run(paths: &Paths, _arguments: Arguments) -> Result<ExitCode, CliError> {
    // Some clients prefer a context in the environment to DOCKER_HOST.
    print(&format!("export DOCKER_HOST={}\nunset DOCKER_CONTEXT", quote(&paths.docker_host())))?;
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
