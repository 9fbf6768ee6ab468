//! The rows of shared directories: the same guest on `bulkhead share-server`, on Debian's virtiofsd under QEMU, and on
//! a disk of its own, over one directory of the host.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Command as Process,
    thread,
    time::{Duration, Instant, SystemTime},
};

use bulkhead_share::api::{Command as ShareCommand, Share};
use bulkhead_vmm::api::Command;
use support::control;

use crate::{
    Environment, Result,
    comparison::{Peer, Report, Row, Sample, Setup},
    guest::{Processes, Running},
    launch, process,
};

/// The server that QEMU of Debian 12 comes with; later releases have a package of that name.
const VIRTIOFSD: [&str; 2] = ["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

/// Size of the guest's own disk in bytes.
const DISK: u64 = 1 << 30;
/// Time for virtiofsd to listen.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the guest to boot and to end its rows of names.
const TIMEOUT: Duration = Duration::from_secs(1200);

/// The least ratio in rows of names.
const NAMES: f64 = 2.0;

/// The quantities by the keys that the guest prints; in the last of those CPU time is measured.
const ROWS: [Row; 25] = [
    Row::new("sequential_read_1", "reads of 1 MiB in order", "MiB/s", 1, true),
    Row::new("sequential_read_4", "the same, 4 threads", "MiB/s", 1, true),
    Row::new("sequential_write_1", "writes of 1 MiB in order", "MiB/s", 1, true),
    Row::new("sequential_write_4", "the same, 4 threads", "MiB/s", 1, true),
    Row::new("random_read_1", "4 KiB random reads", "/s", 0, true),
    Row::new("random_read_4", "the same, 4 threads", "/s", 0, true),
    Row::new("random_write_1", "4 KiB random writes", "/s", 0, true),
    Row::new("random_write_4", "the same, 4 threads", "/s", 0, true),
    Row::new("create_1", "create a file", "/s", 0, true).goal(NAMES),
    Row::new("create_4", "the same, 4 threads", "/s", 0, true).goal(NAMES),
    Row::new("stat_1", "stat", "/s", 0, true).goal(NAMES),
    Row::new("stat_4", "the same, 4 threads", "/s", 0, true).goal(NAMES),
    Row::new("read_1", "open, read, close", "/s", 0, true).goal(NAMES),
    Row::new("read_4", "the same, 4 threads", "/s", 0, true).goal(NAMES),
    Row::new("unlink_1", "unlink", "/s", 0, true).goal(NAMES),
    Row::new("unlink_4", "the same, 4 threads", "/s", 0, true).goal(NAMES),
    Row::new("unpack", "unpack files of 4 KiB", "/s", 0, true).goal(NAMES),
    Row::new("walk", "list and stat a tree", "/s", 0, true).goal(NAMES),
    Row::new("remove", "remove a tree", "/s", 0, true).goal(NAMES),
    Row::new("cpu", "CPU for a created file", "µs", 0, false),
    Row::new("calls_create", "system calls of the server for it", "", 2, false),
    Row::new("calls_stat", "the same for a stat", "", 2, false),
    Row::new("calls_read", "the same for open, read, close", "", 2, false),
    Row::new("calls_unlink", "the same for an unlink", "", 2, false),
    Row::new("calls_random_read", "the same for a 4 KiB read", "", 2, false),
];

/// The row that is derived from what happened outside of the guest, and the row of the guest in which it happened.
const CPU: (usize, &str) = (19, "create_1");
/// The rows of system calls, and those of the guest. They have a run of their own, which strace(1) makes slow.
const CALLS: [(usize, &str); 5] =
    [(20, "create_1"), (21, "stat_1"), (22, "read_1"), (23, "unlink_1"), (24, "random_read_1")];

/// A file system for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    /// `bulkhead vmm` and `bulkhead share-server`.
    Bulkhead,
    /// QEMU and virtiofsd.
    Virtiofsd,
    /// `bulkhead vmm` and ext4 on a disk.
    Disk,
}

impl Contender {
    const ALL: [Self; 3] = [Self::Bulkhead, Self::Virtiofsd, Self::Disk];

    fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead",
            Self::Virtiofsd => "virtiofsd",
            Self::Disk => "guest's disk",
        }
    }
}

/// The directories and files of a run.
struct Place {
    /// The shared directory.
    shared: PathBuf,
    disk: PathBuf,
    virtiofsd: Option<&'static str>,
}

/// Measures all contenders, in turns, with so many files in each row of names.
pub fn run(setup: &Setup, files: usize, environment: Environment) -> Result<Report> {
    let place = Place {
        shared: setup.machine.directory.join("shared"),
        disk: setup.machine.directory.join("disk.img"),
        virtiofsd: VIRTIOFSD.into_iter().find(|path| Path::new(path).exists()),
    };
    let mut samples = Vec::new();
    for round in 1..=setup.rounds {
        let mut contenders = Contender::ALL;
        // Another contender is the first in each round.
        contenders.rotate_left(round as usize % Contender::ALL.len());
        for contender in contenders {
            if contender == Contender::Virtiofsd && place.virtiofsd.is_none() {
                continue;
            }
            let values =
                measure(setup, &place, contender, files).map_err(|error| format!("{}: {error}", contender.name()))?;
            let sample = Sample { round, contender: contender.name().to_owned(), values };
            sample.print(&ROWS);
            samples.push(sample);
        }
    }
    let mut left_out = Vec::new();
    match place.virtiofsd {
        // The ratio is one of the same round.
        Some(_) if Process::new("strace").arg("-V").output().is_ok() => {
            for contender in [Contender::Bulkhead, Contender::Virtiofsd] {
                let values = traced(setup, &place, contender, files)?;
                samples.push(Sample { round: setup.rounds + 1, contender: contender.name().to_owned(), values });
            }
        }
        _ => left_out.push("system calls left out: they need strace and virtiofsd".to_owned()),
    }
    fs::remove_dir_all(&place.shared)?;
    fs::remove_file(&place.disk)?;
    let machine = format!("{} vCPUs, {} MiB, {files} files", setup.machine.cpus, setup.machine.memory_mib);
    let mut peers = vec![Peer { name: Contender::Disk.name().to_owned(), goal: 0.0 }];
    match place.virtiofsd {
        Some(_) => peers.insert(0, Peer { name: Contender::Virtiofsd.name().to_owned(), goal: 1.0 }),
        None => left_out.push("virtiofsd left out: it is not installed".to_owned()),
    }
    let ours = Contender::Bulkhead.name().to_owned();
    Ok(Report { environment, machine, rows: &ROWS, ours, peers, left_out, samples })
}

impl Place {
    /// Makes an empty directory and an empty file system: a guest is ended with its last row, and may leave files.
    fn empty(&self) -> Result<()> {
        if self.shared.exists() {
            fs::remove_dir_all(&self.shared)?;
        }
        fs::create_dir_all(&self.shared)?;
        make_disk(&self.disk)
    }
}

fn make_disk(path: &Path) -> Result<()> {
    fs::File::create(path)?.set_len(DISK)?;
    // Written at once, so that the guest's kernel does not do it during the rows.
    let made = Process::new("/sbin/mkfs.ext4")
        .args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg(path)
        .status()?;
    if made.success() { Ok(()) } else { Err("mkfs.ext4 failed".into()) }
}

fn start(setup: &Setup, place: &Place, contender: Contender, console: &Path, files: usize) -> Result<Processes> {
    match contender {
        Contender::Bulkhead => bulkhead(setup, place, console, files),
        Contender::Virtiofsd => virtiofsd(setup, place, console, files),
        Contender::Disk => disk(setup, place, console, files),
    }
}

fn measure(setup: &Setup, place: &Place, contender: Contender, files: usize) -> Result<Vec<Option<f64>>> {
    place.empty()?;
    let start = |console: &Path| start(setup, place, contender, console, files);
    let mut values = vec![None; ROWS.len()];
    Running::measure(&setup.machine.directory, TIMEOUT + setup.duration * 8, start, |measured| {
        let row = ROWS.iter().position(|row| row.key == measured.key).ok_or("the guest prints an unknown row")?;
        values[row] = Some(measured.count / measured.seconds);
        if measured.key == CPU.1 {
            values[CPU.0] = Some((measured.cpu.total - measured.cpu.guest) * 1e6 / measured.count);
        }
        Ok(values.iter().take(CPU.0).any(Option::is_none))
    })?;
    Ok(values)
}

/// Counts the server's system calls in the rows of [`CALLS`].
fn traced(setup: &Setup, place: &Place, contender: Contender, files: usize) -> Result<Vec<Option<f64>>> {
    place.empty()?;
    let log = setup.machine.directory.join("strace");
    let start = |console: &Path| {
        let mut processes = start(setup, place, contender, console, files)?;
        // Threads that it starts later are followed, too. It is a helper, so that it ends with the others.
        let mut strace = Process::new("strace");
        strace.args(["-f", "-qq", "-ttt", "-s", "0", "-e", "signal=none", "-o"]).arg(&log);
        let server = processes.helpers.first().ok_or("the disk of a guest has no server to trace")?.id();
        strace.args(process::family(server).iter().flat_map(|process| ["-p".to_owned(), process.to_string()]));
        processes.helpers.push(launch::spawn(strace, None)?);
        Ok(processes)
    };
    let mut spans = Vec::new();
    Running::measure(&setup.machine.directory, TIMEOUT * 2 + setup.duration * 8, start, |measured| {
        if let Some((row, _)) = CALLS.iter().find(|(_, key)| *key == measured.key) {
            spans.push((*row, measured.count, measured.span));
        }
        Ok(spans.len() < CALLS.len())
    })?;
    let log = fs::read_to_string(log)?;
    // A call during which another thread makes one has a second line, without its begin.
    let begun = log.lines().filter(|line| !line.contains(" resumed>"));
    let times: Vec<Duration> = begun.filter_map(time_of).collect();
    let mut values = vec![None; ROWS.len()];
    for (row, count, span) in spans {
        let [begin, end] = span.map(|time| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let calls = times.iter().filter(|time| (begin..end).contains(*time)).count();
        values[row] = Some(calls as f64 / count);
    }
    Ok(values)
}

/// The time in a line of strace: `THREAD SECONDS.MICROSECONDS CALL`.
fn time_of(line: &str) -> Option<Duration> {
    let seconds: f64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// The kernel's command line for a file system of this type, and a directory in it.
fn cmdline(setup: &Setup, kind: &str, directory: &Path, files: usize) -> String {
    format!(
        "{} bench.files={files} bench.milliseconds={} bench.type={kind} bench.place={}",
        launch::endpoint_command_line(),
        setup.duration.as_millis(),
        directory.display()
    )
}

fn bulkhead(setup: &Setup, place: &Place, console: &Path, files: usize) -> Result<Processes> {
    let (share, vmm) = (control::pair()?, control::pair()?);
    let (front, back) = UnixStream::pair()?;
    let shares = vec![Share { path: place.shared.clone(), read_only: false }];
    let state = OwnedFd::from(bulkhead_share::api::new_state()?);
    control::send(&share.0, &serde_json::to_vec(&ShareCommand::State)?, Some(&state))?;
    let setup_command = ShareCommand::Setup { shares, hidden: Vec::new(), locks: false };
    control::send(&share.0, &serde_json::to_vec(&setup_command)?, Some(&OwnedFd::from(back)))?;
    let mut server = Process::new(&setup.machine.bulkhead);
    server.arg("share-server");
    let server = launch::spawn(server, Some(&share.1))?;
    // The packet waits in the socket until the process reads it, before its boot.
    control::send(&vmm.0, &serde_json::to_vec(&Command::Shares)?, Some(&OwnedFd::from(front)))?;
    let disks = vec![launch::disk(&setup.machine.rootfs, true, "root")];
    // The guest has the host's paths.
    let cmdline = cmdline(setup, "virtiofs", &place.shared, files);
    let (vmm, control) = setup.machine.boot(setup.machine.config(cmdline, disks, console), vmm, None)?;
    Ok(Processes { vmm, helpers: vec![server], _controls: vec![control, share.0] })
}

/// virtiofsd with what it is fastest with at the same coherence: no threads beside that of the queue, no extended
/// attributes, caches for a second.
fn virtiofsd(setup: &Setup, place: &Place, console: &Path, files: usize) -> Result<Processes> {
    let program = place.virtiofsd.ok_or("virtiofsd is missing")?;
    let socket = setup.machine.directory.join("virtiofsd.sock");
    let _ = fs::remove_file(&socket);
    let mut server = Process::new(program);
    server.arg(format!("--socket-path={}", socket.display()));
    if program.contains("/qemu/") {
        let options = format!("source={},cache=auto,no_xattr,no_posix_lock,no_flock", place.shared.display());
        server.args(["--thread-pool-size=0", "-o", &options]);
    } else {
        server.arg(format!("--shared-dir={}", place.shared.display())).args(["--thread-pool-size=0", "--cache=auto"]);
    }
    let server = launch::spawn(server, None)?;
    let deadline = Instant::now() + HELPER_TIMEOUT;
    // It forks once it listens.
    while !socket.exists() || process::family(server.id()).len() < 2 {
        if Instant::now() > deadline {
            return Err("virtiofsd does not listen".into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    let mut qemu = setup.machine.endpoint_qemu(&cmdline(setup, "virtiofs", Path::new("/"), files), console);
    qemu.args(["-chardev", &format!("socket,id=fs,path={}", socket.display())]);
    qemu.args(["-device", "vhost-user-fs-pci,chardev=fs,tag=bulkhead,queue-size=1024"]);
    Ok(Processes { vmm: launch::spawn(qemu, None)?, helpers: vec![server], _controls: Vec::new() })
}

fn disk(setup: &Setup, place: &Place, console: &Path, files: usize) -> Result<Processes> {
    let disks = vec![launch::disk(&setup.machine.rootfs, true, "root"), launch::disk(&place.disk, false, "data")];
    let cmdline = cmdline(setup, "ext4", Path::new("/"), files);
    let (vmm, control) = setup.machine.boot(setup.machine.config(cmdline, disks, console), control::pair()?, None)?;
    Ok(Processes { vmm, helpers: Vec::new(), _controls: vec![control] })
}
