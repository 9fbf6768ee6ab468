//! The messages themselves.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::SocketExceptions;

/// A step of the start that the guest can report; the order is the order in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The kernel runs and has started PID 1.
    Kernel,
    /// PID 1 has its configuration.
    Agent,
    /// The data disk is formatted, grown and mounted.
    Disk,
    /// dockerd answers `_ping` through the gate.
    Engine,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Agent => "agent",
            Self::Disk => "disk",
            Self::Engine => "engine",
        })
    }
}

/// The agent's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Must equal [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
    /// `uname -r` of the guest.
    pub kernel: String,
    /// Microseconds since the guest kernel started (`CLOCK_BOOTTIME`).
    pub uptime_us: u64,
}

/// The guest's one network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix in bits.
    pub prefix: u8,
    /// Default router.
    pub gateway: Ipv4Addr,
    /// Name server.
    pub nameserver: Ipv4Addr,
    /// The host's loopback services.
    pub host: Ipv4Addr,
    /// Whether the guest has to know the host's names itself: its name server does not.
    #[serde(default)]
    pub hosts_file: bool,
    /// The same network in IPv6, if it has that.
    #[serde(default)]
    pub ipv6: Option<Network6>,
    /// Largest IP packet in bytes.
    pub mtu: u16,
}

/// The interface's IPv6 side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network6 {
    /// Its address.
    pub address: Ipv6Addr,
    /// Length of the network's prefix in bits.
    pub prefix: u8,
    /// Default router.
    pub gateway: Ipv6Addr,
    /// The host's loopback services.
    pub host: Ipv6Addr,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A published port as the engine asks for it (`docker run --publish`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Its protocol.
    pub transport: Transport,
    /// The host's address to listen on.
    pub host_ip: IpAddr,
    /// The host's port.
    pub host_port: u16,
    /// The container's address in the guest.
    pub container_ip: IpAddr,
    /// The container's port.
    pub container_port: u16,
}

/// Everything the guest needs to know to start the engine; sent once, after [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The guest's host name, as `docker info` shows it.
    pub hostname: String,
    /// Host wall clock at the time of sending, in nanoseconds since the Unix epoch.
    pub time_unix_ns: u64,
    /// Enhanced Container Isolation on.
    pub isolation: bool,
    /// The data disk's virtio-blk serial (`/sys/block/*/serial`).
    pub data_disk_serial: String,
    /// The network, if the VM has one.
    #[serde(default)]
    pub network: Option<Network>,
    /// Extra keys for dockerd's `daemon.json`; the agent's own keys win.
    #[serde(default)]
    pub daemon_options: serde_json::Map<String, serde_json::Value>,
    /// Environment of new containers, `NAME=VALUE`, where they do not set the same name themselves.
    #[serde(default)]
    pub container_environment: Vec<String>,
    /// Which containers may have the engine's socket while isolation is on.
    #[serde(default)]
    pub socket_exceptions: Box<SocketExceptions>,
    /// Refuse `docker load`.
    #[serde(default)]
    pub block_load: bool,
}

/// How the guest shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShutdownMode {
    /// Stop containers and daemons, sync, power off.
    PowerOff,
    /// The same, then reset.
    Reboot,
}

/// Backend to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HostMessage {
    /// Certificates that the host trusts, in PEM; any number of these come before [`HostMessage::Configure`], together
    /// at most [`crate::MAX_CERTIFICATES`] bytes.
    Certificates {
        /// Whole certificates, one after the other.
        pem: String,
    },
    /// Answer to [`GuestMessage::Hello`].
    Configure(Configuration),
    /// Answer to [`GuestMessage::Publish`] with the same id.
    Published {
        /// The request's id.
        id: u64,
        /// Why the host does not listen, in the engine's own words (`listen tcp4 0.0.0.0:80: bind: …`).
        error: Option<String>,
    },
    /// Ask for [`GuestMessage::Described`].
    Describe,
    /// End the guest.
    Shutdown {
        /// Power off or reboot.
        mode: ShutdownMode,
        /// Milliseconds that containers get between SIGTERM and SIGKILL.
        grace_ms: u64,
    },
}

/// Why a stage could not be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The stage that failed.
    pub stage: Stage,
    /// One sentence for a person: the cause and what to do.
    pub reason: String,
}

/// A thread of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestThread {
    /// Its process.
    pub process: u32,
    /// Its name.
    pub name: String,
    /// Its state as `/proc/PID/stat` has it, such as `R` or `D`.
    pub state: char,
    /// Share of one CPU in per cent.
    pub busy: u16,
    /// The kernel's function in which it waits, or nothing.
    pub waits: String,
}

/// What the guest does, for a person who wonders why it does not answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// `/proc/loadavg`.
    pub load: String,
    /// Memory in KiB.
    pub memory_kib: u64,
    /// Memory in KiB that programs could still have (`MemAvailable`).
    pub available_kib: u64,
    /// Threads, of all.
    pub threads: u64,
    /// The threads that used most of a moment, and those that wait without being interruptible; the busiest first.
    pub busiest: Vec<GuestThread>,
}

/// Agent to backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GuestMessage {
    /// First message on the connection; stands for [`Stage::Kernel`].
    Hello(Hello),
    /// A stage was reached.
    Reached {
        /// Which.
        stage: Stage,
        /// Microseconds since the guest kernel started.
        uptime_us: u64,
    },
    /// The start failed for good; the guest waits for a shutdown.
    Failed(Failure),
    /// The engine ended by itself and is being started again; [`Stage::Engine`] follows when it is back.
    EngineDown {
        /// What ended and how, for a person.
        reason: String,
    },
    /// The host shall listen for a container; [`HostMessage::Published`] answers.
    Publish {
        /// Names the mapping from now on; never used again while the guest runs.
        id: u64,
        /// What to listen on, and for whom.
        port: PortMapping,
    },
    /// The mapping with this id is over.
    Unpublish {
        /// Which.
        id: u64,
    },
    /// Answer to [`HostMessage::Describe`], a moment later.
    Described(Description),
    /// The guest is going down now; the last message.
    Goodbye,
}
