//! Writes the manual pages and the shells' completions of `bulkhead` to the directory that is its argument, for
//! `scripts/package`. Both are made of the definition of the command line, so they say what `--help` says.

use std::{env, error::Error, fs, path::PathBuf};

use clap_complete::{Shell, generate_to};

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::args_os().nth(1).ok_or("usage: pages DIRECTORY")?);
    let (pages, completions) = (out.join("man"), out.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    let mut command = bulkhead::cli::definition();
    clap_mangen::generate_to(command.clone(), pages)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, "bulkhead", &completions)?;
    }
    Ok(())
}
