//! `bulkhead env`.

use std::process::ExitCode;

use super::{CliError, print};
use crate::settings::Paths;

/// Print the shell command that points docker to the engine.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Example:
  eval \"$(bulkhead env)\" && docker ps")]
pub(super) struct Arguments {}

pub(super) fn run(paths: &Paths, _arguments: Arguments) -> Result<ExitCode, CliError> {
    // A context named in the environment would win over DOCKER_HOST for some clients.
    print(&format!("export DOCKER_HOST={}\nunset DOCKER_CONTEXT", quote(&paths.docker_host())))?;
    Ok(ExitCode::SUCCESS)
}

/// Quotes a word for a POSIX shell.
fn quote(word: &str) -> String {
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
