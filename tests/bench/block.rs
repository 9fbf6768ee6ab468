//! The disk's rows: the same guest on Bulkhead's block device and on QEMU's, over one image in the page cache.
//!
//! The guest's only process makes the requests and prints a line at the begin and at the end of each row, where this
//! side reads the exits and the CPU time of the VMM.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::{Child, Command as Process},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::mkfifo,
};
use support::control;

use crate::{
    Environment, Result,
    comparison::{Peer, Report, Row, Sample, Setup},
    launch,
    process::{self, Cpu},
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
    let console = setup.machine.directory.join("console");
    mkfifo(&console, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let result = Running::start(setup, contender, image, &console).and_then(|mut running| running.values(setup));
    std::fs::remove_file(&console)?;
    result
}

/// A running guest; killed when dropped.
struct Running {
    child: Child,
    /// The vmm process ends with it.
    _control: Option<OwnedFd>,
    console: File,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(setup: &Setup, contender: Contender, image: &Path, path: &Path) -> Result<Self> {
        // Open at both ends, so that neither side waits for the other.
        let console = OpenOptions::new().read(true).write(true).open(path)?;
        let cmdline = format!("{} bench.disk={}", launch::endpoint_command_line(), setup.duration.as_millis());
        let (child, control) = match contender {
            Contender::Bulkhead => bulkhead(setup, image, path, cmdline)?,
            Contender::Threads => (launch::spawn(qemu(setup, image, path, &cmdline, "threads"), None)?, None),
            Contender::IoUring => (launch::spawn(qemu(setup, image, path, &cmdline, "io_uring"), None)?, None),
        };
        Ok(Self { child, _control: control, console })
    }

    /// Reads the guest's lines until all rows are there.
    fn values(&mut self, setup: &Setup) -> Result<Vec<Option<f64>>> {
        let deadline = Instant::now() + BOOT_TIMEOUT + setup.duration * 2 * ROWS.len() as u32;
        let (mut values, mut seen) = (vec![None; ROWS.len()], Vec::new());
        let (mut exits_before, mut cpu_before) = (None, Cpu::default());
        while values.iter().take(EXITS.0).any(Option::is_none) {
            let words = self.words(&mut seen, deadline)?;
            let (exits, cpu) = (process::exits(self.child.id()), Cpu::read(self.child.id())?);
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            match words[..] {
                ["begin", _] => (exits_before, cpu_before) = (exits, cpu),
                [key, count, microseconds] => {
                    let (count, seconds) = (count.parse::<f64>()?, microseconds.parse::<f64>()? / 1e6);
                    let row = ROWS.iter().position(|row| row.key == key).ok_or("the guest prints an unknown row")?;
                    values[row] = Some(count / seconds);
                    if key == EXITS.1 {
                        let both = exits.zip(exits_before.take());
                        values[EXITS.0] = both.map(|(now, before)| (now.total - before.total) as f64 / count);
                    } else if key == CPU.1 {
                        let spent = cpu - cpu_before;
                        values[CPU.0] = Some((spent.total - spent.guest) * 1e6 / count);
                    }
                }
                _ => return Err(format!("the guest prints {words:?}").into()),
            }
        }
        Ok(values)
    }

    /// The words of the guest's next line that begins with `bench`, without that.
    fn words(&mut self, seen: &mut Vec<u8>, deadline: Instant) -> Result<Vec<String>> {
        loop {
            while let Some(end) = seen.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = seen.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if let Some(rest) = line.trim().strip_prefix("bench ") {
                    return Ok(rest.split(' ').map(str::to_owned).collect());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now()).as_millis().min(1000) as u16;
            if left == 0 {
                return Err(format!("the guest is too slow; it printed {:?}", String::from_utf8_lossy(seen)).into());
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the VMM ended early: {status}").into());
            }
            let mut fds = [PollFd::new(self.console.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(left))? > 0 {
                let mut bytes = [0; 4096];
                let length = self.console.read(&mut bytes)?;
                seen.extend_from_slice(&bytes[..length]);
            }
        }
    }
}

fn bulkhead(setup: &Setup, image: &Path, console: &Path, cmdline: String) -> Result<(Child, Option<OwnedFd>)> {
    let disks = vec![launch::disk(&setup.machine.rootfs, true, "root"), launch::disk(image, false, "data")];
    let config = setup.machine.config(cmdline, disks, console);
    let (child, control) = setup.machine.boot(config, control::pair()?, None)?;
    Ok((child, Some(control)))
}

fn qemu(setup: &Setup, image: &Path, console: &Path, cmdline: &str, aio: &str) -> Process {
    let mut qemu = setup.machine.endpoint_qemu(cmdline, console);
    let drive = format!("if=none,id=data,file={},format=raw,discard=unmap,aio={aio}", image.display());
    qemu.args(["-object", "iothread,id=io", "-drive", &drive, "-device", "virtio-blk-pci,drive=data,iothread=io"]);
    qemu
}
