//! Messages of the control API: JSON with camelCase keys. [`super::api_routes`] has the routes, and
//! `docs/control-api.md` what a client may rely on.
//!
//! A request that cannot be carried out is answered with an HTTP error and a [`Problem`]. An unknown option is refused, so
//! that a misspelt one is not ignored.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use bulkhead_protocol::{Description, PortMapping, Stage, Transport};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use bulkhead_vmm::api::VcpuView;

use crate::settings::{NetworkKind, Origin, Paths, PolicyFacts, ProfileName, ProxyEnvironment};

/// Longest request body in bytes.
pub const MAX_BODY: usize = 64 * 1024;

/// Longest [`Status`] line in bytes that a client accepts.
pub const MAX_STATUS: usize = 256 * 1024;

/// Longest other answer in bytes that a client accepts: the list of some thousand ports.
pub const MAX_ANSWER: usize = 1 << 20;

/// State of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StateName {
    /// There is no VM.
    Stopped,
    /// A VM runs; its engine does not answer yet.
    Starting,
    /// The engine answers.
    Running,
    /// The VM is going down.
    Stopping,
    /// There is no VM, because the last one failed.
    Failed,
}

impl std::fmt::Display for StateName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        })
    }
}

/// A stage of the start, with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StageTime {
    /// The stage.
    #[schemars(schema_with = "stage")]
    pub stage: Stage,
    /// Milliseconds from the start of the boot, on the host's clock.
    pub ms: u64,
}

/// Status of a profile.
// Most keys have defaults: after an upgrade the command line may talk to a backend of an older version, which goes on
// running and does not know the newest of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The profile.
    #[schemars(with = "String")]
    pub profile: ProfileName,
    /// The state.
    pub state: StateName,
    /// Number of VMs that this backend has started; stages belong to the last one.
    #[serde(default)]
    pub boot: u64,
    /// The backend exits when the VM is down.
    #[serde(default)]
    pub ending: bool,
    /// Stages reached.
    #[serde(default)]
    pub stages: Vec<StageTime>,
    /// The next stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "stage")]
    pub waiting_for: Option<Stage>,
    /// The reason that the start failed, or that the engine is being started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The console's last lines, when the VM failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console: Vec<String>,
    /// Value for `DOCKER_HOST`.
    pub docker_host: String,
    /// Name of the docker context, if it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// Non-fatal problems to show the user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// The administrator's policy, as this backend read it when it started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyFacts>,
    /// Process id of the backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_pid: Option<u32>,
    /// Process id of the vmm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// The running VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmFacts>,
}

impl Status {
    /// The status of a profile without a backend.
    pub fn stopped(paths: &Paths) -> Self {
        Self {
            profile: paths.name().clone(),
            state: StateName::Stopped,
            boot: 0,
            ending: false,
            stages: Vec::new(),
            waiting_for: None,
            reason: None,
            console: Vec::new(),
            docker_host: paths.docker_host(),
            context: None,
            warning: None,
            policy: None,
            backend_pid: None,
            vmm_pid: None,
            vm: None,
        }
    }
}

/// Facts about a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmFacts {
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    #[serde(rename = "memoryMiB")]
    pub memory_mib: u64,
    /// Size of the data disk in GiB.
    #[serde(rename = "diskGiB")]
    pub disk_gib: u64,
    /// Enhanced Container Isolation.
    pub enhanced_container_isolation: bool,
    /// `uname -r` of the guest, once init has reported it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Start of the VM in seconds since the Unix epoch.
    pub started_unix: u64,
}

/// The published ports of a profile, by host port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ports {
    /// The ports that listen now.
    pub ports: Vec<PublishedPort>,
}

/// A port of the host on which a container, or the VM itself, is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PublishedPort {
    /// TCP or UDP.
    #[schemars(schema_with = "transport")]
    pub protocol: Transport,
    /// The host's address.
    pub host_ip: IpAddr,
    /// The host's port.
    pub host_port: u16,
    /// The container's address in the VM, or the VM's.
    pub container_ip: IpAddr,
    /// The container's port, or the VM's.
    pub container_port: u16,
    /// The port leads to the VM itself, not to a container.
    #[serde(default)]
    pub of_vm: bool,
}

impl PublishedPort {
    /// A port of a container or, with `of_vm`, of the VM itself.
    pub fn new(port: PortMapping, of_vm: bool) -> Self {
        // The keys of this API are independent of the agent's protocol, which may change with the guest image.
        let PortMapping { transport: protocol, host_ip, host_port, container_ip, container_port } = port;
        Self { protocol, host_ip, host_port, container_ip, container_port, of_vm }
    }
}

/// Answer to a request to publish the ports of the setting `vmPorts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortsAnswer {
    /// The outcome.
    pub outcome: PortsOutcome,
    /// The ports for which the host refuses to listen.
    pub problems: Vec<PortProblem>,
}

impl From<PortsOutcome> for PortsAnswer {
    fn from(outcome: PortsOutcome) -> Self {
        Self { outcome, problems: Vec::new() }
    }
}

/// A port of the setting `vmPorts` for which the host refuses to listen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortProblem {
    /// The port, as it is in the setting.
    pub port: String,
    /// The reason.
    pub reason: String,
}

/// The outcome of a request to publish the ports of the setting `vmPorts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum PortsOutcome {
    /// Exactly these ports of the running VM are published, but for those with problems.
    Changed,
    /// The next start will publish them: the running VM has isolation, which the settings have turned off.
    NextStart,
    /// The next start will publish them: no VM is running.
    NotRunning,
}

/// State of a running VM; each part that did not answer is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Examination {
    /// Samples of the vCPUs in the order of time, each with all vCPUs in order.
    #[schemars(with = "Vec<Vec<Value>>")]
    pub vcpus: Vec<Vec<Option<VcpuView>>>,
    /// Growth of KVM's counters in a second, by their names in Linux: one number for those of the VM, one for each
    /// vCPU for those of vCPUs. Empty where KVM has no counters for programs, before Linux 5.15.
    #[serde(default)]
    pub kvm: BTreeMap<String, Vec<u64>>,
    /// The guest's description of itself.
    #[schemars(with = "Value")]
    pub guest: Option<Description>,
    /// The file of the guest's kernel, whose symbols name the places of the vCPUs.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
}

impl Examination {
    /// The number of vCPUs, 0 if no sample was taken.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.iter().map(Vec::len).max().unwrap_or_default()
    }

    /// Returns the vCPUs from which the same interrupt was withheld in every sample ([`VcpuView::withheld`]): it is
    /// pending with a higher priority than any in service while `RFLAGS.IF` is set, or it is in service while a program
    /// runs.
    ///
    /// A guest cannot do that to itself. The KVM below it, or the machine that emulates it, has lost an interrupt.
    pub fn starved(&self) -> Vec<usize> {
        let count = self.vcpu_count();
        let starves = |vcpu: &usize| {
            let withheld: Vec<_> = self.vcpus.iter().map(|sample| sample.get(*vcpu)?.as_ref()?.withheld()).collect();
            // In a single sample, or with another interrupt each time, it may just have been on its way.
            withheld.len() > 1 && withheld[0].is_some() && withheld.iter().all(|one| *one == withheld[0])
        };
        (0..count).filter(starves).collect()
    }
}

/// The outcome of a request to share the directories of the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum SharesOutcome {
    /// The running engine shares them.
    Changed,
    /// The next start will: the running VM has no shared directories, or its engine does not answer yet.
    NextStart,
    /// The next start will: no VM is running.
    NotRunning,
}

/// Options of a start; what is left out follows the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct StartOptions {
    /// vCPUs.
    pub cpus: Option<u8>,
    /// Guest memory in MiB.
    #[serde(rename = "memoryMiB")]
    pub memory_mib: Option<u64>,
    /// Size of the data disk in GiB.
    #[serde(rename = "diskGiB")]
    pub disk_gib: Option<u64>,
    /// Path of the kernel, absolute.
    pub kernel: Option<PathBuf>,
    /// Path of the root file system, absolute.
    pub rootfs: Option<PathBuf>,
    /// Give the VM a serial port that logs the kernel's messages.
    pub serial: bool,
    /// The VM's network.
    #[schemars(with = "Option<String>", regex(pattern = NetworkKind::PATTERN))]
    pub network: Option<NetworkKind>,
    /// The proxy in the environment of the command.
    pub proxy: ProxyEnvironment,
    /// Path of the certificates that the command's environment trusts (`SSL_CERT_FILE`), absolute.
    pub certificates: Option<PathBuf>,
    /// Path of the ssh-agent's socket in the command's environment (`SSH_AUTH_SOCK`), absolute.
    pub ssh_agent: Option<PathBuf>,
    /// Directory to share besides those of the settings, absolute: the one where the command was called.
    pub working_directory: Option<PathBuf>,
    /// Share no directory, and no socket.
    pub no_shares: bool,
}

/// Options of a stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct StopOptions {
    /// End the VM at once, without asking the guest.
    pub force: bool,
    /// Seconds after which the VM is killed.
    pub timeout_seconds: Option<u64>,
}

/// The outcome of a request that changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// The request is being carried out.
    Begun,
    /// Nothing had to be done.
    Already,
    /// Refused: the backend is ending.
    Ending,
}

/// Answer to a request that changes the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Answer {
    /// The outcome.
    pub outcome: Outcome,
    /// The [`Status::boot`] to wait for: that of the VM that runs, or of the one that follows it.
    pub boot: u64,
}

/// Numbers for plots. A part that cannot be read is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// The data disk, once it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskUsage>,
    /// The running VM's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryUsage>,
}

/// Use of the data disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskUsage {
    /// Size of the disk as the guest sees it.
    pub size_bytes: u64,
    /// Space that it takes on the host.
    pub allocated_bytes: u64,
    /// Space that is left for it on the host.
    pub free_bytes: u64,
}

/// Use of the VM's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryUsage {
    /// Memory of the guest.
    pub size_bytes: u64,
    /// The part of it that takes memory of the host.
    pub resident_bytes: u64,
}

/// A log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// The guest's console.
    #[default]
    Console,
    /// The backend and the VM's processes.
    Backend,
}

/// The last lines of a log, without control characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LogLines {
    /// The log.
    pub source: LogSource,
    /// The lines, in their order.
    pub lines: Vec<String>,
}

/// All settings with their values in effect at the next start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SettingsView {
    /// The settings, in the order in which they are shown.
    pub settings: Vec<SettingView>,
    /// The administrator's policy as it is now. The backend keeps the one in its [`Status`] until it exits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyFacts>,
}

/// A setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SettingView {
    /// Its name.
    pub key: String,
    /// Its meaning, in a line.
    pub description: String,
    /// The values that it accepts.
    pub accepts: Accepts,
    /// The value in effect, with secrets concealed as `***`; null for one that follows the host.
    pub value: Value,
    /// The value that it has if nobody sets it.
    pub default: Value,
    /// The origin of the value.
    pub origin: Origin,
    /// The policy file that locks it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locked_by: Option<PathBuf>,
}

/// The values that a setting accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Accepts {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Integer {
        /// The smallest.
        min: u64,
        /// The largest.
        max: u64,
    },
    /// One of some words.
    Choice {
        /// The words.
        values: Vec<String>,
    },
    /// Text of a form that the error describes.
    Text,
    /// A list of texts.
    List,
    /// Any JSON of a form that the error describes.
    Json,
}

/// A new value of a setting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingChange {
    /// The value.
    pub value: Value,
}

/// The outcome of the check of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyCheck {
    /// The text can be used as `admin-settings.json`.
    pub valid: bool,
    /// The first thing that is wrong, with its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Keys that are ignored.
    pub unknown: Vec<String>,
}

/// Reason that a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// Text for the user.
    pub message: String,
}

/// First line on the standard output of `bulkhead backend`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Readiness {
    /// The sockets are listening.
    Ready {
        /// Value for `DOCKER_HOST`.
        #[serde(rename = "dockerHost")]
        docker_host: String,
    },
    /// The backend exited.
    Error {
        /// Cause and remedy.
        message: String,
    },
}

/// The schema of [`Stage`], whose crate is the guest's as well and knows nothing of schemas.
fn stage(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": [Stage::Kernel, Stage::Agent, Stage::Disk, Stage::Engine] })
}

/// The schema of [`Transport`].
fn transport(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": [Transport::Tcp, Transport::Udp] })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_object_asks_for_the_settings() {
        assert_eq!(serde_json::from_str::<StartOptions>("{}").unwrap(), StartOptions::default());
    }

    #[test]
    fn a_misspelt_option_is_refused_and_not_ignored() {
        assert!(serde_json::from_str::<StartOptions>(r#"{"memory": 1}"#).is_err());
        assert!(serde_json::from_str::<StopOptions>(r#"{"forced": true}"#).is_err());
    }

    #[test]
    fn the_keys_are_those_of_the_settings() {
        let options = StartOptions { cpus: Some(2), memory_mib: Some(1024), disk_gib: Some(8), ..Default::default() };
        let json = serde_json::to_value(options).unwrap();
        assert_eq!((&json["cpus"], &json["memoryMiB"], &json["diskGiB"]), (&2.into(), &1024.into(), &8.into()));
    }

    #[test]
    fn a_vcpu_that_takes_interrupts_and_gets_none_starves() {
        let open = VcpuView { rflags: 0x202, ..VcpuView::default() };
        let waits = VcpuView { pending: vec![33, 236], ..open.clone() };
        let starved = |looks: &[&VcpuView]| {
            let vcpus = looks.iter().map(|view| vec![None, Some((*view).clone())]).collect();
            Examination { vcpus, ..Examination::default() }.starved()
        };
        assert_eq!(starved(&[&waits, &waits, &waits]), [1]);
        // A single sample proves nothing, and an interrupt that changes is on its way.
        assert!(starved(&[&waits]).is_empty());
        assert!(starved(&[&waits, &waits, &open]).is_empty());
        assert!(starved(&[&waits, &VcpuView { pending: vec![33], ..open.clone() }]).is_empty());
        // Closed, asleep, or busy with one of the same class.
        for other in [
            VcpuView { rflags: 2, ..waits.clone() },
            VcpuView { halted: true, ..waits.clone() },
            VcpuView { in_service: vec![0xe0], ..waits.clone() },
        ] {
            assert!(starved(&[&other, &other]).is_empty(), "{other:?}");
        }
        let left = VcpuView { user: true, in_service: vec![236], ..open };
        assert_eq!(starved(&[&left, &left]), [1]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_request_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let _ = serde_json::from_slice::<StartOptions>(&bytes);
            let _ = serde_json::from_slice::<StopOptions>(&bytes);
        }
    }
}
