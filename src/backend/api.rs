//! What the control API says: JSON with camelCase keys.
//!
//! | request            | body             | answer                                                          |
//! |--------------------|------------------|-----------------------------------------------------------------|
//! | `GET /v1/status`   |                  | [`Status`]                                                      |
//! | `GET /v1/events`   |                  | a line with a [`Status`] now and after each change, until the end |
//! | `GET /v1/ports`    |                  | [`Ports`]                                                       |
//! | `GET /v1/examination` |               | [`Examination`], some seconds later                             |
//! | `POST /v1/start`   | [`StartOptions`] | [`Answer`]                                                      |
//! | `POST /v1/stop`    | [`StopOptions`]  | [`Answer`]                                                      |
//! | `POST /v1/restart` | [`StopOptions`]  | [`Answer`]                                                      |
//!
//! Everything else is answered with an HTTP error and a [`Problem`].

use std::{net::IpAddr, path::PathBuf};

use bulkhead_protocol::{Description, PortMapping, Stage, Transport};
use serde::{Deserialize, Serialize};

use bulkhead_vmm::api::VcpuView;

use crate::settings::{NetworkKind, Paths, PolicyFacts, ProfileName, ProxyEnvironment};

/// Longest request body in bytes.
pub const MAX_BODY: usize = 64 * 1024;

/// Longest [`Status`] line in bytes that a client accepts.
pub const MAX_STATUS: usize = 256 * 1024;

/// Longest answer in bytes that a client accepts: that of some thousand ports.
pub const MAX_ANSWER: usize = 1 << 20;

/// Where the VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateName {
    /// No VM.
    Stopped,
    /// A VM runs, its engine does not answer yet.
    Starting,
    /// The engine answers.
    Running,
    /// The VM is going down.
    Stopping,
    /// No VM, for a reason.
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

/// A stage and when it was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// Milliseconds since the boot began, on the host's clock.
    pub ms: u64,
}

/// Everything there is to know about a profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The profile.
    pub profile: ProfileName,
    /// The state.
    pub state: StateName,
    /// Counts the VMs that this backend began; stages belong to the last one.
    #[serde(default)]
    pub boot: u64,
    /// The backend ends when the VM is down.
    #[serde(default)]
    pub ending: bool,
    /// Stages reached.
    #[serde(default)]
    pub stages: Vec<StageTime>,
    /// The stage that is being waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<Stage>,
    /// Why it failed, or why the engine is being started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The console's last lines, when the VM failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console: Vec<String>,
    /// What `DOCKER_HOST` has to be.
    pub docker_host: String,
    /// Name of the docker context, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// What does not keep the engine from running but a person should know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// The administrator's policy that this backend began with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyFacts>,
    /// Process id of the backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_pid: Option<u32>,
    /// Process id of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// What the running VM was made with.
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

/// What a VM was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The guest's kernel, once it said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Seconds since the Unix epoch at which the VM was begun.
    pub started_unix: u64,
}

/// The published ports of a profile, by host port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// Those that listen now.
    pub ports: Vec<PublishedPort>,
}

/// A port of the host that leads to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublishedPort {
    /// TCP or UDP.
    pub protocol: Transport,
    /// The host's address.
    pub host_ip: IpAddr,
    /// The host's port.
    pub host_port: u16,
    /// The container's address in the VM.
    pub container_ip: IpAddr,
    /// The container's port.
    pub container_port: u16,
}

impl From<PortMapping> for PublishedPort {
    fn from(port: PortMapping) -> Self {
        let PortMapping { transport: protocol, host_ip, host_port, container_ip, container_port } = port;
        Self { protocol, host_ip, host_port, container_ip, container_port }
    }
}

/// What a running VM does at the moment; what does not answer is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examination {
    /// The vCPUs as they were seen some times in a row, each time all of them in order.
    pub vcpus: Vec<Vec<Option<VcpuView>>>,
    /// What the guest says of itself.
    pub guest: Option<Description>,
}

impl Examination {
    /// The vCPUs that would take an interrupt but did not get it from one look to the last: one that is above all that
    /// they serve waits while they let interrupts in, or a program runs in the middle of one. No guest does that to
    /// itself; the KVM below it, or the machine that emulates it, has lost something.
    pub fn starved(&self) -> Vec<usize> {
        let count = self.vcpus.iter().map(Vec::len).max().unwrap_or_default();
        let starves = |vcpu: &usize| {
            let seen: Vec<_> = self.vcpus.iter().map(|look| look.get(*vcpu)?.as_ref()?.withheld()).collect();
            seen.len() > 1 && seen[0].is_some() && seen.iter().all(|one| *one == seen[0])
        };
        (0..count).filter(starves).collect()
    }
}

/// What `start` may ask for; what is left out follows the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Kernel, absolute.
    pub kernel: Option<PathBuf>,
    /// Root file system, absolute.
    pub rootfs: Option<PathBuf>,
    /// With a serial port that logs the kernel's messages.
    pub serial: bool,
    /// What the VM is connected to.
    pub network: Option<NetworkKind>,
    /// The proxy that the environment of the command names.
    pub proxy: ProxyEnvironment,
    /// The certificates that it trusts (`SSL_CERT_FILE`), absolute.
    pub certificates: Option<PathBuf>,
}

/// How to stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct StopOptions {
    /// Without asking the guest.
    pub force: bool,
    /// Seconds after which the VM is killed.
    pub timeout_seconds: Option<u64>,
}

/// The outcome of a request that changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What became of it.
    pub outcome: Outcome,
    /// The [`Status::boot`] to wait for: of the VM that runs, or of the one that follows.
    pub boot: u64,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// For a person.
    pub message: String,
}

/// First line on the standard output of `bulkhead backend`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Readiness {
    /// The sockets are listening.
    Ready {
        /// What `DOCKER_HOST` has to be.
        #[serde(rename = "dockerHost")]
        docker_host: String,
    },
    /// The backend ended.
    Error {
        /// Cause and remedy.
        message: String,
    },
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
            Examination { vcpus, guest: None }.starved()
        };
        assert_eq!(starved(&[&waits, &waits, &waits]), [1]);
        // One look is none, and what changes is on its way.
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
