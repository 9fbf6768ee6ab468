//! `bulkhead doctor`.

mod running;

use std::process::ExitCode;

use serde_json::json;

use super::{CliError, Format, print};
use crate::{
    backend::{disk::DiskPlan, host},
    image::Image,
    report::chain,
    settings::{Paths, Policy, Settings, Size},
};

/// Check whether this machine can run the engine; says what is wrong and what to do.
///
/// The guest image is read whole and compared with its digests. Where the engine runs, its VM is asked, too: when guest
/// or engine do not answer, what they do at the moment is told. Exit status 1 when a check fails.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Arguments {
    /// Text for people or JSON for programs.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

struct Check {
    name: &'static str,
    result: Result<String, String>,
}

/// What went well in words, or the whole chain of what did not.
fn check<E: std::error::Error>(name: &'static str, result: Result<String, E>) -> Check {
    Check { name, result: result.map_err(|error| chain(&error)) }
}

pub(super) fn run(paths: &Paths, arguments: Arguments) -> Result<ExitCode, CliError> {
    let mut checks = checks(paths);
    checks.extend(super::runtime()?.block_on(running::checks(paths)));
    let failed = checks.iter().filter(|check| check.result.is_err()).count();
    match arguments.format {
        Format::Json => {
            let checks: Vec<_> = checks
                .iter()
                .map(|check| {
                    let message = check.result.as_ref().unwrap_or_else(|problem| problem);
                    json!({ "check": check.name, "pass": check.result.is_ok(), "message": message })
                })
                .collect();
            print(&format!("{:#}", json!(checks)))?;
        }
        Format::Pretty => {
            for (number, check) in checks.iter().enumerate() {
                let (word, message) = match &check.result {
                    Ok(message) => ("PASS", message),
                    Err(problem) => ("FAIL", problem),
                };
                print(&format!("{} {word} {}: {message}", number + 1, check.name))?;
            }
        }
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn checks(paths: &Paths) -> Vec<Check> {
    let settings = Settings::load(&paths.settings());
    let system = Policy::system();
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
        check("folders", paths.create().map(|()| paths.docker_host())),
    ]
}

fn policy(policy: &Policy) -> Result<String, String> {
    match policy.facts() {
        None => Ok("none".into()),
        Some(facts) => facts.warning().map_or_else(|| Ok(facts.file.display().to_string()), Err),
    }
}

fn image(paths: &Paths, policy: &Policy) -> Result<String, crate::image::ImageError> {
    let image = Image::find(paths.base(), None, None, policy.isolation_lock())?;
    image.verify()?;
    let version =
        image.version().map_or("without manifest, contents not checked".into(), |version| format!("version {version}"));
    Ok(format!("{} ({version})", image.rootfs.display()))
}
