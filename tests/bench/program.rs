//! The measuring program of `scripts/bench`: boots the same guest in Bulkhead's VMM and in QEMU, in turns, and prints
//! how long each took, how often the guest left the CPU to them and how much memory they hold. See `--help`.

mod agent;
mod block;
mod comparison;
mod console;
mod guest;
mod launch;
mod network;
mod process;
mod report;
mod round;
mod share;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};
use launch::{Contender, Machine, Setup};
use report::{Environment, Report};
use round::Sample;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// Output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A table for the terminal.
    Table,
    /// JSON for programs.
    Json,
}

/// A table of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rows {
    /// The start of a guest.
    Boot,
    /// Its network.
    Network,
    /// Its disk.
    Block,
    /// Directories of the host.
    Share,
}

/// Measure Bulkhead's VMM beside QEMU; scripts/bench prepares what this needs.
#[derive(Debug, Parser)]
struct Arguments {
    /// The built program.
    #[arg(long)]
    bulkhead: PathBuf,
    /// The guest's vmlinux.
    #[arg(long)]
    kernel: PathBuf,
    /// The guest's root file system.
    #[arg(long)]
    rootfs: PathBuf,
    /// Empty directory for sockets, disks and copies, which are removed at the end.
    #[arg(long)]
    directory: PathBuf,
    /// Rounds that count.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// vCPUs of each guest.
    #[arg(long, default_value_t = 2)]
    cpus: u8,
    /// Memory of each guest in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u64,
    /// End each run when init has started.
    #[arg(long)]
    init_only: bool,
    /// The rows to measure; for all but those of the boot the root file system is the endpoint's.
    #[arg(long, value_enum, default_value_t = Rows::Boot)]
    rows: Rows,
    /// Time for which each row of the network, the disk or the data of files is measured, in milliseconds.
    #[arg(long, default_value_t = 2000)]
    milliseconds: u64,
    /// Files of each row about shared directories that is about names.
    #[arg(long, default_value_t = 10_000)]
    files: usize,
    /// Say in the report that the machine is emulated.
    #[arg(long)]
    emulated: bool,
    /// Table or JSON.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<String> {
    // Copies on a local file system: each contender starts from the page cache, none from a network share.
    let copy = |from: &PathBuf, name: &str| -> Result<PathBuf> {
        let to = arguments.directory.join(name);
        std::fs::copy(from, &to).map_err(|error| format!("cannot copy {}: {error}", from.display()))?;
        Ok(to)
    };
    let machine = Machine {
        bulkhead: copy(&arguments.bulkhead, "bulkhead")?,
        kernel: copy(&arguments.kernel, "vmlinux")?,
        rootfs: copy(&arguments.rootfs, "rootfs.erofs")?,
        directory: arguments.directory.clone(),
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
    };
    if arguments.rows != Rows::Boot {
        return compare(arguments, machine);
    }
    let setup = Setup { machine, vhost_vsock: launch::vhost_vsock() };
    let environment = Environment::read(arguments.emulated)?;
    if !setup.vhost_vsock {
        eprintln!("/dev/vhost-vsock cannot be used: QEMU's engine cannot be reached and its `_ping` is left out");
    }
    let mut samples = Vec::new();
    let mut failures = BTreeMap::new();
    for number in 0..=arguments.rounds {
        for contender in Contender::ALL {
            let init_only = arguments.init_only || number == 0;
            let sample = persist(&setup, contender, init_only, &mut failures)
                .map_err(|error| format!("{contender}, round {number}: {error}"))?;
            if number == 0 {
                eprintln!("warm-up, not counted: {contender}: init after {:.0} ms", sample.init_ms);
            } else {
                eprintln!("round {number}: {contender}: init after {:.0} ms", sample.init_ms);
                samples.push((number, contender, sample));
            }
        }
    }
    for name in ["bulkhead", "vmlinux", "rootfs.erofs"] {
        std::fs::remove_file(arguments.directory.join(name))?;
    }
    let report = Report::new(environment, &setup, samples, failures);
    Ok(match arguments.format {
        Format::Table => report.table(),
        Format::Json => format!("{:#}", report.json()),
    })
}

/// Measures the rows of the network, the disk or shared directories.
fn compare(arguments: &Arguments, machine: Machine) -> Result<String> {
    let (duration, rounds) = (Duration::from_millis(arguments.milliseconds), arguments.rounds);
    let environment = Environment::read(arguments.emulated)?;
    let setup = comparison::Setup { machine, duration, rounds };
    let report = match arguments.rows {
        Rows::Block => block::run(&setup, environment)?,
        Rows::Share => share::run(&setup, arguments.files, environment)?,
        _ => network::run(&setup, environment)?,
    };
    Ok(match arguments.format {
        Format::Table => report.table(),
        Format::Json => format!("{:#}", report.json()),
    })
}

/// Runs the contender, again if that fails, and counts the failures.
fn persist(
    setup: &Setup,
    contender: Contender,
    init_only: bool,
    failures: &mut BTreeMap<Contender, u32>,
) -> Result<Sample> {
    const ATTEMPTS: u32 = 3;
    let mut attempt = 1;
    loop {
        match round::run(setup, contender, init_only) {
            Err(error) if attempt < ATTEMPTS => {
                eprintln!("{contender} failed and runs again: {error}");
                *failures.entry(contender).or_default() += 1;
                attempt += 1;
            }
            result => return result,
        }
    }
}
