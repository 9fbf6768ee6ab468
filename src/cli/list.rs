//! `bulkhead list`.

use schemars::JsonSchema;
use serde::Serialize;
use tokio::task::JoinSet;

use super::{CliError, Format, in_bytes, print, print_json, status, table};
use crate::{
    backend::{
        api::{StateName, Status},
        disk,
    },
    settings::{Base, Paths, Policy, ProfileName, Settings},
};
use bulkhead_ipc::report::chain;

/// List the profiles with the state and the size of each.
///
/// CPUs, memory and isolation are those of the running VM, or else those that the next start would take; `auto` follows
/// the host. DISK is the limit of the data disk, USED the space that it takes on this machine.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead list
  bulkhead list --format json | jq -r '.profiles[] | select(.state == \"running\").name'")]
pub(super) struct Arguments {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Output of `bulkhead list --format json`.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(super) struct Profiles {
    /// The profiles that have files, by name.
    profiles: Vec<Profile>,
}

/// A profile.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Profile {
    /// Its name, as for `--profile`.
    name: ProfileName,
    /// The state of its engine; missing if its backend does not respond.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<StateName>,
    /// It belongs to a `bulkhead run` and is removed with it.
    temporary: bool,
    /// vCPUs of the running VM or of the settings; missing if the next start chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<u64>,
    /// Memory in MiB, likewise.
    #[serde(rename = "memoryMiB", skip_serializing_if = "Option::is_none")]
    memory_mib: Option<u64>,
    /// Limit of the data disk in bytes; missing if there is none yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_bytes: Option<u64>,
    /// Space that the data disk takes on this machine, in bytes.
    disk_used_bytes: u64,
    /// Enhanced Container Isolation of the running VM or of the next start; missing if the settings cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    enhanced_container_isolation: Option<bool>,
    /// Value for `DOCKER_HOST`.
    docker_host: String,
    /// Reason that something is missing above.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

pub(super) async fn run(base: &Base, arguments: Arguments) -> Result<(), CliError> {
    let profiles = read(base).await;
    match arguments.format {
        Format::Json => print_json(&profiles),
        Format::Pretty if profiles.profiles.is_empty() => print("no profiles; `bulkhead start` creates the first"),
        Format::Pretty => print(&pretty(&profiles.profiles)),
    }
}

async fn read(base: &Base) -> Profiles {
    let policy = Policy::system();
    // All at once: one that does not respond costs its time limit once.
    let mut answers = JoinSet::new();
    for paths in base.profiles().iter().filter_map(|name| base.profile(name).ok()) {
        answers.spawn(async move {
            let status = status::read(&paths).await;
            (paths, status)
        });
    }
    let mut profiles: Vec<Profile> =
        answers.join_all().await.into_iter().map(|(paths, status)| profile(&paths, &policy, status)).collect();
    profiles.sort_by(|one, other| one.name.as_str().cmp(other.name.as_str()));
    Profiles { profiles }
}

fn profile(paths: &Paths, policy: &Policy, status: Result<Status, CliError>) -> Profile {
    let settings = Settings::load(&paths.settings()).map(|settings| settings.under(policy.clone()));
    let problem = [status.as_ref().err().map(|error| chain(error)), settings.as_ref().err().map(|error| chain(error))];
    let problem = problem.into_iter().flatten().collect::<Vec<_>>().join("; ");
    let (status, settings) = (status.ok(), settings.ok());
    let vm = status.as_ref().and_then(|status| status.vm.as_ref());
    let disk = disk::usage(&paths.data_disk());
    Profile {
        name: paths.name().clone(),
        state: status.as_ref().map(|status| status.state),
        temporary: paths.throw_away_marker().exists(),
        cpus: vm.map(|vm| u64::from(vm.cpus)).or_else(|| settings.as_ref()?.cpus().map(u64::from)),
        memory_mib: vm.map(|vm| vm.memory_mib).or_else(|| settings.as_ref()?.memory_mib()),
        disk_bytes: disk.map(|disk| disk.size_bytes),
        disk_used_bytes: disk.map_or(0, |disk| disk.allocated_bytes),
        enhanced_container_isolation: vm
            .map(|vm| vm.enhanced_container_isolation)
            .or_else(|| settings.as_ref().map(Settings::isolation)),
        docker_host: paths.docker_host(),
        problem: Some(problem).filter(|problem| !problem.is_empty()),
    }
}

fn pretty(profiles: &[Profile]) -> String {
    let mut rows =
        vec![["PROFILE", "STATE", "CPUS", "MEMORY", "DISK", "USED", "ISOLATION"].map(ToOwned::to_owned).to_vec()];
    let auto = |text: Option<String>| text.unwrap_or_else(|| "auto".to_owned());
    rows.extend(profiles.iter().map(|profile| {
        vec![
            profile.name.to_string(),
            profile.state.map_or_else(|| "unknown".to_owned(), status::state_word),
            auto(profile.cpus.map(|cpus| cpus.to_string())),
            auto(profile.memory_mib.map(|mib| in_bytes(mib.saturating_mul(1 << 20)))),
            profile.disk_bytes.map_or_else(|| "-".to_owned(), in_bytes),
            profile.disk_bytes.map_or_else(|| "-".to_owned(), |_| in_bytes(profile.disk_used_bytes)),
            match profile.enhanced_container_isolation {
                Some(true) => "on".to_owned(),
                Some(false) => "off".to_owned(),
                None => "unknown".to_owned(),
            },
        ]
    }));
    let mut text = table(&rows);
    for (profile, problem) in profiles.iter().filter_map(|profile| Some((profile, profile.problem.as_ref()?))) {
        text.extend(["\n", profile.name.as_str(), ": ", problem]);
    }
    text
}
