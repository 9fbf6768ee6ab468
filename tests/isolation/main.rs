//! Every documented behaviour of isolation as the command that a user types, and everything else as with runc.
//!
//! `rows` holds a row for each line of the tables in docs/isolation.md and prints a table of their outcomes at the end.
//! `as_with_runc` runs the same commands with isolation on and off and expects the same output.
//!
//! `scripts/test isolation` runs this suite where KVM runs Linux guests, or inside the emulated machine, with
//! `BULKHEAD_TEST_IMAGES` naming the directory of `tests/images/build`. `BULKHEAD_TEST_ROWS=WORD[,WORD…]` leaves only
//! the rows and cases whose names contain one of the words.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod as_with_runc;
mod builds;
mod cases;
mod cost;
mod nested;
mod nodes;
mod policy;
mod rows;
mod situation;
mod sockets;
mod table;

use std::{fs, path::Path, time::Duration};

use support::{
    engine::{Engine, images},
    home::Home,
    process::{Ran, run},
};

/// The ID map of the first container.
const FIRST: &str = "         0     100000      65536\n";

/// Time for a case of several commands.
const CASE: Duration = Duration::from_secs(300);

/// Runs lines of a shell with the engine as docker's context; standard error is where standard output is.
#[track_caller]
fn shell(engine: &Engine, lines: &str) -> Ran {
    let program = Path::new(support::program());
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = engine.home.command("bash");
    command
        .env("DOCKER_CONTEXT", "bulkhead")
        .env("SOCKET", engine.home.docker_socket())
        .env("PATH", format!("{}:{path}", program.parent().unwrap().display()))
        .env("IMAGES", images())
        .env("R", situation::images().map(|images| images.registry.clone()).unwrap_or_default())
        .env("S", sockets::MOUNT)
        .env("INSIDE", "docker exec inside")
        .current_dir(directory(engine.home))
        .args(["-c", &format!("exec 2>&1\n{lines}")]);
    run(command, CASE)
}

/// The working directory of the commands.
fn directory(home: &Home) -> std::path::PathBuf {
    let directory = home.path("work");
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// Returns whether `BULKHEAD_TEST_ROWS` selects a row or case.
fn wanted(name: &str) -> bool {
    std::env::var("BULKHEAD_TEST_ROWS")
        .map_or(true, |words| words.split(',').any(|word| name.to_lowercase().contains(&word.to_lowercase())))
}
