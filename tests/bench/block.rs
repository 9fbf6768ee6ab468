//! The disk's rows: the same guest on Bulkhead's block device and on QEMU's, over one image in the page cache.
//!
//! The guest's only process makes the requests and prints a line at the begin and at the end of each row.

use std::{fs::File, io::Write, path::Path, time::Duration};

use support::control;

use crate::{
    Environment, Result,
    comparison::{Peer, Report, Row, Sample, Setup},
    guest::{Processes, Running},
    launch,
};

/// Size of the image in bytes: written once, so that no row measures the host's allocation of blocks.
const IMAGE: usize = 256 << 20;

/// Time for the guest to boot and to end its rows, beside the rows themselves.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// The quantities. The first are those of the guest by the key that it prints.
const ROWS: [Row; 10] = [
    Row::new("random_read", "4 KiB random reads", "/s", 0, true),
    Row::new("random_read_16", "the same, 16 at a time", "/s", 0, true),
    Row::new("random_write", "4 KiB random writes", "/s", 0, true),
    Row::new("random_write_16", "the same, 16 at a time", "/s", 0, true),
    Row::new("write_sync", "4 KiB write and fdatasync", "/s", 0, true),
    Row::new("read_beside_sync", "reads beside the last", "/s", 0, true),
    Row::new("sequential_read", "reads of 1 MiB in order", "MiB/s", 1, true),
    Row::new("sequential_write", "writes of 1 MiB in order", "MiB/s", 1, true),
    Row::new("exits", "exits for a read", "", 2, false),
    Row::new("cpu", "CPU for a read, 16 at a time", "µs", 1, false),
];

/// Rows that are derived from what happened outside of the guest, and the row of the guest in which it happened.
const EXITS: (usize, &str) = (8, "random_read");
const CPU: (usize, &str) = (9, "random_read_16");

/// A block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    /// `bulkhead vmm`.
    Bulkhead,
    /// QEMU's, in a thread of its own, with threads for the requests, which is its default.
    Threads,
    /// The same with io_uring.
    IoUring,
}

impl Contender {
    const ALL: [Self; 3] = [Self::Bulkhead, Self::Threads, Self::IoUring];

    fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead",
            Self::Threads => "qemu threads",
            Self::IoUring => "qemu io_uring",
        }
    }
}

/// Measures all contenders, in turns.
pub fn run(setup: &Setup, environment: Environment) -> Result<Report> {
    let image = setup.machine.directory.join("disk.img");
    write_image(&image)?;
    let mut samples = Vec::new();
    for round in 1..=setup.rounds {
        let mut contenders = Contender::ALL;
        // Another contender is the first in each round.
        contenders.rotate_left(round as usize % Contender::ALL.len());
        for contender in contenders {
            let one = || measure(setup, contender, &image).map_err(|error| format!("{}: {error}", contender.name()));
            let values = one().or_else(|error| {
                eprintln!("a run failed and is repeated: {error}");
                one()
            })?;
            let sample = Sample { round, contender: contender.name().to_owned(), values };
            sample.print(&ROWS);
            samples.push(sample);
        }
    }
    std::fs::remove_file(&image)?;
    let machine = format!("{} vCPUs, {} MiB", setup.machine.cpus, setup.machine.memory_mib);
    let peers = [Contender::Threads, Contender::IoUring].map(|peer| Peer { name: peer.name().to_owned(), goal: 1.0 });
    let ours = Contender::Bulkhead.name().to_owned();
    Ok(Report { environment, machine, rows: &ROWS, ours, peers: peers.into(), left_out: Vec::new(), samples })
}

fn write_image(path: &Path) -> Result<()> {
    let mut image = File::create(path)?;
    // Not zeroes, which a block device may treat in a way of their own.
    let block: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251) as u8).collect();
    for _ in 0..IMAGE / block.len() {
        image.write_all(&block)?;
    }
    // Dirty pages would be written back in the first runs.
    Ok(image.sync_all()?)
}

/// Boots the guest, and returns the values when it has printed all of its rows.
fn measure(setup: &Setup, contender: Contender, image: &Path) -> Result<Vec<Option<f64>>> {
    let cmdline = format!("{} bench.disk={}", launch::endpoint_command_line(), setup.duration.as_millis());
    let start = |console: &Path| match contender {
        Contender::Bulkhead => bulkhead(setup, image, console, cmdline),
        Contender::Threads => qemu(setup, image, console, &cmdline, "threads"),
        Contender::IoUring => qemu(setup, image, console, &cmdline, "io_uring"),
    };
    let mut values = vec![None; ROWS.len()];
    let timeout = BOOT_TIMEOUT + setup.duration * 2 * ROWS.len() as u32;
    Running::measure(&setup.machine.directory, timeout, start, |measured| {
        let row = ROWS.iter().position(|row| row.key == measured.key).ok_or("the guest prints an unknown row")?;
        values[row] = Some(measured.count / measured.seconds);
        if measured.key == EXITS.1 {
            values[EXITS.0] = measured.exits.map(|exits| exits / measured.count);
        } else if measured.key == CPU.1 {
            values[CPU.0] = Some((measured.cpu.total - measured.cpu.guest) * 1e6 / measured.count);
        }
        Ok(values.iter().take(EXITS.0).any(Option::is_none))
    })?;
    Ok(values)
}

fn bulkhead(setup: &Setup, image: &Path, console: &Path, cmdline: String) -> Result<Processes> {
    let disks = vec![launch::disk(&setup.machine.rootfs, true, "root"), launch::disk(image, false, "data")];
    let config = setup.machine.config(cmdline, disks, console);
    let (vmm, control) = setup.machine.boot(config, control::pair()?, None)?;
    Ok(Processes { vmm, helpers: Vec::new(), _controls: vec![control] })
}

fn qemu(setup: &Setup, image: &Path, console: &Path, cmdline: &str, aio: &str) -> Result<Processes> {
    let mut qemu = setup.machine.endpoint_qemu(cmdline, console);
    let drive = format!("if=none,id=data,file={},format=raw,discard=unmap,aio={aio}", image.display());
    qemu.args(["-object", "iothread,id=io", "-drive", &drive, "-device", "virtio-blk-pci,drive=data,iothread=io"]);
    Ok(Processes { vmm: launch::spawn(qemu, None)?, helpers: Vec::new(), _controls: Vec::new() })
}
