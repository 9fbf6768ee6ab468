//! `bulkhead doctor`.

mod features;
mod kvm;
mod running;
mod symbols;

use std::process::ExitCode;

use schemars::JsonSchema;
use serde::Serialize;

use super::{
    CliError, Format,
    colour::{self, Tone},
    print, print_json,
};
use crate::{
    backend::{disk::DiskPlan, host, shares::Judged},
    image::Image,
    settings::{Paths, Policy, Settings, Size},
};
use bulkhead_ipc::report::chain;

/// Check whether this machine can run the engine.
///
/// Each failed check comes with its remedy. The whole guest image is read to verify its digests. If the engine is
/// running, its VM is checked too, with KVM's counters where they can be read; if it does not respond, doctor reports
/// what it is doing.
///
/// Exit status 1 if a check fails.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

pub(super) struct Check {
    name: &'static str,
    result: Result<String, String>,
}

/// A check in the output of `bulkhead doctor --format json`, which is a list of them.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Outcome {
    /// Name of the check.
    check: &'static str,
    /// It passed.
    pass: bool,
    /// The finding; for a check that failed, with the remedy.
    message: String,
}

/// A check with its result, or the error with its causes.
fn check<E: std::error::Error>(name: &'static str, result: Result<String, E>) -> Check {
    Check { name, result: result.map_err(|error| chain(&error)) }
}

pub(super) fn run(paths: &Paths, arguments: Arguments) -> Result<ExitCode, CliError> {
    let checks = examine(paths)?;
    let failed = checks.iter().filter(|check| check.result.is_err()).count();
    match arguments.format {
        Format::Json => print_json(&outcomes(checks))?,
        Format::Pretty => {
            for (number, check) in checks.iter().enumerate() {
                let (word, message) = match &check.result {
                    Ok(message) => (colour::output("PASS", Tone::Good), message),
                    Err(problem) => (colour::output("FAIL", Tone::Bad), problem),
                };
                print(&format!("{} {word} {}: {message}", number + 1, check.name))?;
            }
        }
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Makes all checks, the slow ones included, before the first is printed: the JSON is one list.
pub(super) fn examine(paths: &Paths) -> Result<Vec<Check>, CliError> {
    let mut checks = checks(paths);
    checks.extend(features::checks());
    checks.extend(super::runtime()?.block_on(running::checks(paths)));
    Ok(checks)
}

pub(super) fn outcomes(checks: Vec<Check>) -> Vec<Outcome> {
    let outcome = |Check { name, result }| {
        let pass = result.is_ok();
        Outcome { check: name, pass, message: result.unwrap_or_else(|problem| problem) }
    };
    checks.into_iter().map(outcome).collect()
}

/// The checks that need no running engine. They are the ones of `backend/plan.rs`, except that none stops at the first
/// failure.
fn checks(paths: &Paths) -> Vec<Check> {
    let settings = Settings::load(&paths.settings());
    let system = Policy::system();
    // With a settings file that cannot be read, the other checks go by the defaults.
    let wanted = settings.as_ref().map(|settings| (settings.cpus(), settings.memory_mib(), settings.disk_gib()));
    let (cpus, memory, disk) = wanted.unwrap_or_default();
    vec![
        check("/dev/kvm", host::check_kvm().map(|()| "can be opened".into())),
        check("virtualization", host::check_virtualization().map(|()| "this KVM can run the guest kernel".into())),
        check("settings", settings.map(|_| paths.settings().display().to_string())),
        Check { name: "policy", result: policy(&system) },
        check("image", image(paths, &system)),
        check(
            "cpus",
            host::choose_cpus(cpus, host::cpus()).map(|cpus| format!("the VM gets {cpus} of {}", host::cpus())),
        ),
        check(
            "memory",
            host::memory_mib().and_then(|present| {
                let chosen = host::choose_memory(memory, present)?;
                Ok(format!("the VM gets {chosen} of {present} MiB"))
            }),
        ),
        check(
            "data disk",
            DiskPlan::new(paths.data_disk(), disk)
                .map(|plan| format!("{} with up to {}", plan.path().display(), Size::from_bytes(plan.gib() << 30))),
        ),
        Check { name: "shares", result: shares(paths, &system) },
        // Creates them, as `start` would: nothing else shows whether that works.
        check("folders", paths.create().map(|()| paths.docker_host())),
    ]
}

fn policy(policy: &Policy) -> Result<String, String> {
    match policy.facts() {
        None => Ok("none".into()),
        // A policy that cannot be used fails the check, although the engine runs under its strictest form.
        Some(facts) => facts.warning().map_or_else(|| Ok(facts.file.display().to_string()), Err),
    }
}

fn shares(paths: &Paths, policy: &Policy) -> Result<String, String> {
    // A settings file that cannot be read is a problem of its own.
    let settings = Settings::load(&paths.settings()).unwrap_or_default().under(policy.clone());
    let judged = Judged::all(&settings);
    match judged.iter().find_map(Judged::warning) {
        Some(warning) => Err(warning),
        None if judged.is_empty() => Ok("none".into()),
        None => Ok(judged.into_iter().map(|one| one.directory.path).collect::<Vec<_>>().join(", ")),
    }
}

fn image(paths: &Paths, policy: &Policy) -> Result<String, crate::image::ImageError> {
    // The image that `start` without options would use, with the environment of this command and under the same policy.
    let image = Image::find(paths.base(), None, None, policy.isolation_lock())?;
    image.verify()?;
    let version =
        image.version().map_or("no manifest, contents not verified".into(), |version| format!("version {version}"));
    Ok(format!("{} ({version})", image.rootfs.display()))
}
