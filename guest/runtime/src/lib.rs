//! The isolating OCI runtime: a policy layer over crun, named `sysbox-runc` after what it behaves like.
//!
//! The engine calls it in the place of runc. For `create` and `run` it checks the bundle, gives the container a user
//! namespace with ids that no other container has, id-maps its root and its binds, and leaves the rest to crun.
//! Everything else is crun's straight away.

mod bind_mounts;
mod cli;
mod create;
mod crun;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod id_ranges;
mod log;
mod mountinfo;
mod refresh;
mod rootfs;
mod runc_errors;
mod seccomp;
mod spec;
mod staging;
mod sys;
mod warden;

use std::{convert::Infallible, path::Path, process::ExitCode};

use cli::{Command, Globals};
use error::Error;

const HELP: &str = "\
sysbox-runc, an isolating OCI runtime

Usage: sysbox-runc [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup] [--debug] COMMAND …

Commands: create, run, start, exec, state, kill, delete, pause, resume, update, ps, list, spec, features

sysbox-runc refresh ID makes the engine's and the container's view of its files the same again.";

/// The whole program.
pub fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let mut args = args.into_iter();
    let (globals, first) = cli::globals(&mut args);
    let command = first.and_then(|name| cli::command(&name, args.collect()));
    // A builder shows a step's output and not the log, so that is where the person looks.
    let is_run = matches!(&command, Ok(Command::Create(create)) if create.verb == "run");
    match command.map_err(Error::from).and_then(|command| run(&globals, command)) {
        Ok(code) => code,
        Err(error) => {
            globals.log.error(&error);
            if is_run && globals.log.file.is_some() {
                eprintln!("{}", log::chain(&error));
            }
            ExitCode::FAILURE
        }
    }
}

fn run(globals: &Globals, command: Command) -> Result<ExitCode, Error> {
    let never: Infallible = match command {
        Command::Version => {
            // dockerd reads the first line and those that begin with "spec".
            println!("sysbox-runc version {}\nspec: 1.2.0", env!("CARGO_PKG_VERSION"));
            return Ok(ExitCode::SUCCESS);
        }
        Command::Help => {
            println!("{HELP}");
            return Ok(ExitCode::SUCCESS);
        }
        Command::Create(request) => return create::create(globals, &request),
        Command::Refresh(id) => {
            refresh::container(&id_ranges::Table::open(Path::new(create::STATE))?, &id);
            return Ok(ExitCode::SUCCESS);
        }
        Command::Exec(id, args) => {
            if let Some(start) = id.and_then(|id| range_of(globals, &id)) {
                crun::own_pipes(start);
            }
            crun::shield_null().map_err(Error::system("make a null device"))?;
            seccomp::confine().map_err(Error::system("close vsock to the container"))?;
            hand_over(globals, args)?
        }
        Command::Pass(args) => hand_over(globals, args)?,
    };
    match never {}
}

/// The first id of a container's range.
fn range_of(globals: &Globals, id: &str) -> Option<u32> {
    let state_root = std::path::absolute(globals.state_root()).ok()?;
    let records = id_ranges::Table::open(Path::new(create::STATE)).ok()?.named(id);
    records.iter().find(|record| record.state_root == state_root).map(|record| record.range.start)
}

fn hand_over(globals: &Globals, args: Vec<std::ffi::OsString>) -> Result<Infallible, Error> {
    let mut all = globals.for_crun.clone();
    all.extend(args);
    crun::exec(&all)
}
