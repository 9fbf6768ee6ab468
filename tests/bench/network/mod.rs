//! The network's rows: the same guest behind Bulkhead's network process and behind QEMU's ways to an unprivileged one.

mod contender;
mod report;
mod rows;
mod traffic;

use std::{
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    time::Duration,
};

use crate::{Environment, Result};
use contender::{Running, Way};
pub use report::Report;
use traffic::Guest;

/// What all runs have in common.
#[derive(Debug)]
pub struct Setup {
    /// Our program.
    pub bulkhead: PathBuf,
    /// vmlinux.
    pub kernel: PathBuf,
    /// The root file system that holds nothing but the endpoint.
    pub rootfs: PathBuf,
    /// Where sockets are made.
    pub folder: PathBuf,
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// How long each row is measured.
    pub duration: Duration,
    /// Rounds.
    pub rounds: u32,
}

impl Setup {
    /// The file that a contender writes the guest's console to.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console")
    }
}

/// What one run of one contender showed.
#[derive(Debug)]
pub struct Sample {
    /// The round.
    pub round: u32,
    /// Whose.
    pub way: Way,
    /// By row.
    pub values: [Option<f64>; rows::ROWS.len()],
}

/// Measures all that can be run, in turns.
pub fn run(setup: &Setup, environment: Environment) -> Result<Report> {
    let (mut ways, mut left_out) = (Vec::new(), Vec::new());
    for way in Way::ALL {
        match way.missing() {
            None => ways.push(way),
            Some(reason) => left_out.push(format!("{way} is left out: {reason}")),
        }
    }
    for reason in &left_out {
        eprintln!("{reason}");
    }
    let mut samples = Vec::new();
    for round in 1..=setup.rounds {
        for way in &ways {
            let sample = persist(setup, *way, round).map_err(|error| format!("{way}, round {round}: {error}"))?;
            let values: Vec<_> = rows::ROWS
                .iter()
                .zip(&sample.values)
                .map(|(row, value)| format!("{} {}", row.key, value.map_or("–".to_owned(), |value| row.show(value))))
                .collect();
            eprintln!("round {round}: {way}: {}", values.join(", "));
            samples.push(sample);
        }
    }
    Ok(Report {
        environment,
        machine: format!("{} vCPUs, {} MiB", setup.cpus, setup.memory_mib),
        ways,
        left_out,
        samples,
    })
}

/// Runs the contender, once more if that fails.
fn persist(setup: &Setup, way: Way, round: u32) -> Result<Sample> {
    one(setup, way, round).or_else(|error| {
        eprintln!("{way} failed and runs again: {error}");
        one(setup, way, round)
    })
}

fn one(setup: &Setup, way: Way, round: u32) -> Result<Sample> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let running = Running::start(setup, way, listener.local_addr()?.port())?;
    let measured: Result<_> = Guest::meet(&listener, &running)
        .and_then(|mut guest| rows::measure(&mut guest, setup.duration))
        .map_err(|error| {
            let console = std::fs::read(setup.console()).unwrap_or_default();
            let from = console.len().saturating_sub(2000);
            format!("{error}\nthe guest's last words:\n{}", String::from_utf8_lossy(&console[from..])).into()
        });
    drop(running);
    let _ = std::fs::remove_file(setup.console());
    Ok(Sample { round, way, values: measured? })
}
