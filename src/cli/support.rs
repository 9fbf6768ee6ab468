//! `bulkhead support`: a bundle of facts for a report of a fault.
//!
//! It is made to be sent to strangers: everything in it is on a list of what may leave the machine. There is no
//! environment, no proxy, no daemon option, no name of an image or container that Bulkhead knows as such, and no
//! container's output.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use flate2::{Compression, write::GzEncoder};
use nix::{
    libc,
    sys::utsname::{UtsName, uname},
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{CliError, Format, doctor, in_bytes, print, print_json, runtime, status, table, version};
use crate::{
    backend::{host, logs},
    settings::{DEFINITIONS, Definition, Paths, Policy, Settings},
};
use bulkhead_ipc::report::chain;

/// Longest end of a log that is taken, in bytes.
const MAX_LOG: u64 = 1 << 20;

/// Settings whose values are in a bundle: numbers, choices, ports and paths. Of the others it has only that they are set:
/// they may hold passwords and the names of images and hosts.
const SHOWN: [&str; 17] = [
    "enhancedContainerIsolation",
    "blockDockerLoad",
    "cpus",
    "memoryMiB",
    "diskGiB",
    "network",
    "vpnkitCIDR",
    "portBindingBehavior",
    "vmPorts",
    "hostLoopback",
    "filesharingDirectories",
    "filesharingHostLocks",
    "filesharingSockets",
    "sshAgent",
    "timeZone",
    "proxyHttpMode",
    "containersProxy",
];

/// Collect facts for a bug report in a file.
///
/// The bundle is a tar.gz file that only you can read. It has the results of `bulkhead doctor`, the state, the settings
/// that are numbers, choices, ports or paths, the policy's keys without values, versions, and the last MiB of each log.
/// It has no environment variables, passwords, proxies, daemon options, names of images or output of containers. The
/// lines of dockerd and containerd, which name images and containers, are left out of the console's log unless
/// --engine-log is given. Look at the bundle before you send it: paths contain your user name.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead support
  bulkhead support --output /tmp/bundle.tar.gz && tar -tzf /tmp/bundle.tar.gz")]
pub(super) struct Arguments {
    /// File to create; it must not exist [default: bulkhead-support-PROFILE-TIME.tar.gz in this directory].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Include the lines of dockerd and containerd in the console's log.
    #[arg(long)]
    engine_log: bool,
    /// Output format of the list of contents.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Output of `bulkhead support --format json`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Bundle {
    /// The bundle.
    file: PathBuf,
    /// The files in it.
    entries: Vec<Entry>,
}

/// A file in the bundle.
#[derive(Debug, Serialize, JsonSchema)]
struct Entry {
    /// Its name.
    name: &'static str,
    /// Its length in bytes.
    bytes: u64,
    /// Its contents in words.
    description: &'static str,
    #[serde(skip)]
    text: String,
}

impl Entry {
    fn new(name: &'static str, description: &'static str, text: &str) -> Self {
        let text = without_credentials(text);
        Self { name, bytes: text.len() as u64, description, text }
    }

    /// An entry with JSON, or with the reason why there is none.
    fn json<T: Serialize>(name: &'static str, description: &'static str, value: Result<T, CliError>) -> Self {
        let value = match value {
            Ok(value) => serde_json::to_value(value).unwrap_or_else(|error| json!({ "error": error.to_string() })),
            Err(error) => json!({ "error": chain(&error) }),
        };
        Self::new(name, description, &format!("{value:#}\n"))
    }
}

pub(super) fn run(paths: &Paths, arguments: Arguments) -> Result<ExitCode, CliError> {
    // Created first: a place that cannot be written to is an error before the slow checks.
    let file = arguments.output.unwrap_or_else(|| default_name(paths).into());
    let output = create(&file)?;
    let entries = collect(paths, arguments.engine_log)?;
    write(output, &entries).map_err(CliError::io("cannot write the bundle"))?;
    let bundle = Bundle { file, entries };
    match arguments.format {
        Format::Json => print_json(&bundle)?,
        Format::Pretty => print(&pretty(&bundle))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn default_name(paths: &Paths) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    format!("bulkhead-support-{}-{seconds}.tar.gz", paths.name())
}

/// Creates a file that did not exist, for its owner only.
fn create(path: &Path) -> Result<File, CliError> {
    // `create_new` follows no link, so nothing of the user's can be overwritten through one in a shared directory.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
        let remedy = if error.kind() == io::ErrorKind::AlreadyExists { "; choose another with --output" } else { "" };
        CliError::Failed(format!("cannot create {}: {error}{remedy}", path.display()))
    })
}

fn collect(paths: &Paths, engine_log: bool) -> Result<Vec<Entry>, CliError> {
    let policy = Policy::system();
    let mut entries = vec![
        Entry::json("version.json", "versions of program, protocol and image", Ok(version::read(paths.base()))),
        Entry::json("host.json", "kernel, CPU and memory of this machine", Ok(this_machine())),
        Entry::json("doctor.json", "results of `bulkhead doctor`", doctor::examine(paths).map(doctor::outcomes)),
        Entry::json("status.json", "state of the engine", runtime()?.block_on(status::read(paths))),
        Entry::json(
            "settings.json",
            "settings that are numbers, choices, ports or paths",
            Settings::load(&paths.settings())
                .map(|settings| shown(&settings.under(policy.clone())))
                .map_err(Into::into),
        ),
        Entry::json("policy.json", "keys of the administrator's policy, without values", Ok(keys(&policy))),
    ];
    let backend = paths.backend_log();
    let (console, serial) = (paths.console_log(), paths.serial_log());
    // Of the console only the lines of the kernel and of Bulkhead's programs; serial.log has the kernel's alone.
    let chosen: Filter = if engine_log { is_any } else { is_of_the_system };
    let logs: [(_, _, _, Filter); 3] = [
        ("backend.log", "end of the backend's log", backend, is_any),
        ("console.log", "end of the guest's console", console, chosen),
        ("serial.log", "end of the guest's serial port", serial, is_any),
    ];
    for (name, description, path, chosen) in logs {
        if let Some(text) = end_of(&path).map_err(CliError::io("cannot read the log"))? {
            // Cleaned of escape sequences: the guest writes most of it, and somebody reads it on a terminal.
            let lines = text.lines().filter(|line| chosen(line)).map(logs::clean);
            let text: String = lines.flat_map(|line| [line, "\n".to_owned()]).collect();
            entries.push(Entry::new(name, description, &text));
        }
    }
    Ok(entries)
}

/// A choice of lines.
type Filter = fn(&str) -> bool;

fn is_any(_line: &str) -> bool {
    true
}

/// Returns whether a line of the console is the kernel's or of one of Bulkhead's programs.
fn is_of_the_system(line: &str) -> bool {
    // The kernel's lines begin with their time; init gives those of services a prefix.
    ["[", "bulkhead-init: ", "gate: ", "procfs: "].iter().any(|prefix| line.starts_with(prefix))
}

/// The last MiB of a log, from the beginning of a line on; `None` without the file.
fn end_of(path: &Path) -> io::Result<Option<String>> {
    let mut file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let start = file.metadata()?.len().saturating_sub(MAX_LOG);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(MAX_LOG).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(Some(match text.split_once('\n') {
        Some((_, rest)) if start > 0 => rest.to_owned(),
        _ => text,
    }))
}

/// The values in effect of the settings that may be shown; of the others, whether they are set.
fn shown(settings: &Settings) -> Value {
    let value = |definition: &Definition| {
        if SHOWN.contains(&definition.key) {
            definition.concealed(&settings.get(definition))
        } else if settings.is_set(definition) {
            "(set)".into()
        } else {
            "(not set)".into()
        }
    };
    DEFINITIONS.iter().map(|definition| (definition.key.to_owned(), value(definition))).collect::<Map<_, _>>().into()
}

/// The keys of the policy, with lock and effect.
fn keys(policy: &Policy) -> Value {
    let line = |line: crate::settings::policy::Line| {
        json!({
            "key": line.key,
            "locked": line.locked,
            "enforced": line.enforced,
            "missing": line.missing,
            "overruled": line.overruled,
        })
    };
    // Unknown keys are not listed: their names may be anything.
    json!({ "policy": policy.facts(), "keys": policy.lines().into_iter().map(line).collect::<Vec<_>>() })
}

fn this_machine() -> Value {
    let uname = uname().ok();
    let text = |part: Option<&std::ffi::OsStr>| part.map(|text| text.to_string_lossy().into_owned());
    json!({
        // Not the node's name.
        "kernel": text(uname.as_ref().map(UtsName::release)),
        "version": text(uname.as_ref().map(UtsName::version)),
        "cpus": host::cpus(),
        "cpu": cpu_name(),
        "memoryMiB": host::memory_mib().ok(),
    })
}

/// The processor's name of proc_cpuinfo(5).
fn cpu_name() -> Option<String> {
    let mut text = String::new();
    File::open("/proc/cpuinfo").and_then(|file| file.take(1 << 16).read_to_string(&mut text)).ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned()))
}

/// The text with the user information of all URLs replaced: of proxies and registries in messages, for example.
fn without_credentials(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        clean.push_str(before);
        // RFC 3986, 3.2: the authority ends with one of these, and the user information with its last @.
        let ends = |character: char| character.is_whitespace() || "/?#\"'<>\\".contains(character);
        let authority = &after[..after.find(ends).unwrap_or(after.len())];
        match authority.rfind('@') {
            Some(mark) => {
                clean.push_str("***");
                rest = &after[mark..];
            }
            None => rest = after,
        }
    }
    clean.push_str(rest);
    clean
}

fn write(output: File, entries: &[Entry]) -> io::Result<()> {
    let mut archive = tar::Builder::new(GzEncoder::new(output, Compression::default()));
    for Entry { name, text, .. } in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, format!("bulkhead-support/{name}"), text.as_bytes())?;
    }
    let mut file = archive.into_inner()?.finish()?;
    file.flush()
}

fn pretty(bundle: &Bundle) -> String {
    let row = |entry: &Entry| vec![entry.name.to_owned(), in_bytes(entry.bytes), entry.description.to_owned()];
    let rows: Vec<_> = bundle.entries.iter().map(row).collect();
    format!("{}\n\nwrote {}; look at it before you send it", table(&rows), bundle.file.display())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The settings that a bundle does not show. A new setting belongs here or in [`SHOWN`].
    const HIDDEN: [&str; 5] =
        ["dockerSocketMount", "overrideProxyHttp", "overrideProxyHttps", "overrideProxyExclude", "dockerDaemonOptions"];

    #[test]
    fn it_is_decided_for_each_setting_whether_its_value_leaves_the_machine() {
        let decided: BTreeSet<_> = SHOWN.iter().chain(&HIDDEN).collect();
        assert_eq!(decided, DEFINITIONS.iter().map(|definition| &definition.key).collect());
        assert_eq!(decided.len(), SHOWN.len() + HIDDEN.len());
    }

    #[test]
    fn users_and_passwords_of_urls_are_replaced_and_nothing_else() {
        for (text, expected) in [
            ("proxy http://me:s3cret@proxy:1/x and ftp://a@b", "proxy http://***@proxy:1/x and ftp://***@b"),
            ("\"https://a:b@c@d\"", "\"https://***@d\""),
            ("unix:///run/x@y http://host/@path me@there", "unix:///run/x@y http://host/@path me@there"),
            ("http://", "http://"),
            ("http://a:http://b:c@d", "http://a:http://***@d"),
        ] {
            assert_eq!(without_credentials(text), expected);
        }
    }

    #[test]
    fn a_long_log_is_cut_at_the_beginning_of_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        assert_eq!(end_of(&path).unwrap(), None);
        std::fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(end_of(&path).unwrap().unwrap(), "one\ntwo\n");
        let line = format!("{}\n", "x".repeat(99));
        std::fs::write(&path, line.repeat(30_000)).unwrap();
        let text = end_of(&path).unwrap().unwrap();
        assert!(text.len() as u64 <= MAX_LOG && text.len() as u64 > MAX_LOG - 100);
        assert!(text.lines().all(|line| line.len() == 99));
    }

    #[test]
    fn only_the_kernel_and_our_own_programs_are_quoted_from_the_console() {
        for line in ["[    0.1] x", "bulkhead-init: x", "gate: x"] {
            assert!(is_of_the_system(line), "{line}");
        }
        for line in ["dockerd: x", "containerd: [", "", "x bulkhead-init: y"] {
            assert!(!is_of_the_system(line), "{line}");
        }
    }

    proptest! {
        #[test]
        fn no_user_information_is_left(text in "[a:/@ ]{0,40}") {
            let clean = without_credentials(&text);
            prop_assert_eq!(without_credentials(&clean), clean);
        }
    }
}
