//! The messages of the agent connection.
//!
//! The names of types, fields and variants are the JSON's names, unless serde renames them: a renamed field is another
//! wire format.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::SocketExceptions;

/// A stage of the start, as the guest reports it. The order of the variants is the order in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The kernel has started PID 1.
    Kernel,
    /// PID 1 has applied its configuration.
    Agent,
    /// The data disk is mounted.
    Disk,
    /// dockerd answers `GET /_ping` through the gate.
    Engine,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The names of the JSON as well.
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
    /// The agent's [`crate::PROTOCOL_VERSION`]; the backend refuses any other than its own.
    pub protocol: u32,
    /// `uname -r` of the guest.
    pub kernel: String,
    /// Microseconds since the guest kernel started (`CLOCK_BOOTTIME`).
    pub uptime_us: u64,
}

/// The configuration of the guest's only network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Address of the guest.
    pub address: Ipv4Addr,
    /// Length of the network's prefix in bits (0 to 32).
    pub prefix: u8,
    /// Default router.
    pub gateway: Ipv4Addr,
    /// Name server.
    pub nameserver: Ipv4Addr,
    /// Address behind which the host's loopback is: `host.docker.internal`, and the engine's `host-gateway`.
    pub host: Ipv4Addr,
    /// Put the host's names into the guest's `/etc/hosts`, because the name server does not know them.
    #[serde(default)]
    pub hosts_file: bool,
    /// The interface's IPv6 configuration; `None` for a network without IPv6.
    #[serde(default)]
    pub ipv6: Option<Network6>,
    /// Largest IP packet in bytes.
    pub mtu: u16,
}

/// The IPv6 configuration of the guest's network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network6 {
    /// Address of the guest.
    pub address: Ipv6Addr,
    /// Length of the network's prefix in bits (0 to 128).
    pub prefix: u8,
    /// Default router.
    pub gateway: Ipv6Addr,
    /// Address behind which the host's loopback is.
    pub host: Ipv6Addr,
}

/// The transport protocol of a published port.
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
        // As in the engine's messages (`listen tcp4 …`) and in `docker port`.
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A published port, as the engine requests it (`docker run --publish`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Transport protocol.
    pub transport: Transport,
    /// Address of the host to listen on; unspecified (`0.0.0.0` or `::`) for all of its addresses.
    pub host_ip: IpAddr,
    /// Port of the host, never 0: the engine has chosen one by now.
    pub host_port: u16,
    /// Address of the container in the guest; may be of the other family than `host_ip`.
    pub container_ip: IpAddr,
    /// Port of the container.
    pub container_port: u16,
}

/// A directory of the host that containers may mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its absolute path on the host, without `.`, `..`, doubled or trailing slashes, as the user named it. The guest
    /// finds the directory under this path in the shares' file system.
    pub path: String,
    /// The host refuses to change anything in it.
    #[serde(default)]
    pub read_only: bool,
}

/// A socket of the host that containers may mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSocket {
    /// Its path below the guest's directory for such sockets.
    pub name: String,
    /// Its absolute path on the host, without `.`, `..` and doubled slashes: the other name by which containers mount it.
    pub path: String,
}

/// The configuration of the guest: everything that it needs to start the engine.
///
/// The backend derives it from settings and policy, and sends it once for each start, as the answer to [`Hello`]
/// ([`HostMessage::Configure`]). Nothing of it but `shares` ([`HostMessage::Shares`]) can change while the guest runs: a
/// changed setting takes a restart of the VM. The encoded message must fit into one line ([`crate::MAX_LINE`]), of
/// which `daemon_options`, `container_environment`, `socket_exceptions` and `shares` can be the largest parts;
/// [`crate::encode`] fails otherwise.
///
/// A new field needs `#[serde(default)]` if an older peer may leave it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The guest's host name, as `docker info` shows it: at most 63 letters, digits, `-` and `.`. The guest replaces an
    /// invalid one by `bulkhead`.
    pub hostname: String,
    /// The host's wall clock at the moment of sending, in nanoseconds since the Unix epoch. The guest sets its clock by
    /// it, so a configuration that was made earlier has to get the current time first.
    pub time_unix_ns: u64,
    /// Enhanced Container Isolation is on.
    pub isolation: bool,
    /// The data disk's virtio-blk serial (`/sys/block/*/serial`). Only the first 20 bytes count.
    pub data_disk_serial: String,
    /// The network interface; `None` for a VM without a network.
    #[serde(default)]
    pub network: Option<Network>,
    /// Options for dockerd's `daemon.json`, by their names there. The agent drops options that would weaken the
    /// isolation or contradict its own, whatever the spelling.
    #[serde(default)]
    pub daemon_options: serde_json::Map<String, serde_json::Value>,
    /// Environment of new containers, each as `NAME=VALUE`; a name that the container sets itself is left alone.
    #[serde(default)]
    pub container_environment: Vec<String>,
    /// The images whose containers may have the engine's socket while isolation is on. Boxed to keep [`HostMessage`]
    /// small.
    #[serde(default)]
    pub socket_exceptions: Box<SocketExceptions>,
    /// Refuse `docker load`.
    #[serde(default)]
    pub block_load: bool,
    /// The directories of the host that containers may mount, at most [`crate::MAX_SHARES`]; empty for a VM without the
    /// device that has them.
    #[serde(default)]
    pub shares: Vec<Share>,
    /// The sockets of the host that containers may mount, at most [`crate::MAX_HOST_SOCKETS`].
    #[serde(default)]
    pub host_sockets: Vec<HostSocket>,
    /// Absolute paths on the host of the engine's own socket. A container that mounts one of them gets
    /// [`crate::ENGINE_SOCKET`], under the same rules. Boxed as the exceptions are.
    #[serde(default)]
    pub engine_sockets: Box<[String]>,
}

/// The kind of shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShutdownMode {
    /// Stop containers and daemons, sync, power off.
    PowerOff,
    /// The same, then reset.
    Reboot,
}

/// A time zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeZone {
    /// Its name in the tz database, such as `Europe/Berlin`, if it is known.
    pub name: Option<String>,
    /// Its rules: a file in the format TZif (RFC 9636) of at most [`crate::MAX_TIME_ZONE`] bytes.
    pub rules: Vec<u8>,
}

/// A message of the backend to the agent.
// An unknown `type` makes the line a `LineError::Syntax`, which the agent logs and skips; unknown fields are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HostMessage {
    /// Certificates that the host trusts. Any number of these messages come before [`HostMessage::Configure`]; together
    /// they have at most [`crate::MAX_CERTIFICATES`] bytes. Without any, the guest trusts those of its image.
    Certificates {
        /// Whole certificates in PEM, one after the other.
        pem: String,
    },
    /// The host's time zone. Comes before [`HostMessage::Configure`], or not at all.
    TimeZone(TimeZone),
    /// The answer to [`GuestMessage::Hello`].
    Configure(Configuration),
    /// The answer to [`GuestMessage::Publish`] with the same id.
    Published {
        /// The id of the request.
        id: u64,
        /// The reason for which the host does not listen, in the engine's own words
        /// (`listen tcp4 0.0.0.0:80: bind: …`); `None` when it listens.
        error: Option<String>,
    },
    /// The host's wall clock, sent when it jumped or the host slept, and now and then. The guest compares its clock
    /// with the host's at once.
    Time {
        /// Nanoseconds since the Unix epoch at the moment of sending, for a guest that cannot read the host's clock.
        unix_ns: u64,
    },
    /// Replaces the list of directories that containers may mount; [`GuestMessage::SharesTaken`] is the answer. Comes
    /// only to a guest that was configured with some, and when the device has the new ones.
    Shares {
        /// At most [`crate::MAX_SHARES`]; perhaps none.
        shares: Vec<Share>,
    },
    /// The answer to [`GuestMessage::ConnectSocket`] if the host's socket cannot be reached.
    SocketRefused {
        /// The number in the request.
        socket: u32,
        /// The cause and the remedy in one line, for the guest's log.
        reason: String,
    },
    /// Requests [`GuestMessage::Described`].
    Describe,
    /// Takes the guest down; [`GuestMessage::Goodbye`] follows at once.
    Shutdown {
        /// Power off or reboot.
        mode: ShutdownMode,
        /// Time for containers between SIGTERM and SIGKILL, in milliseconds. The guest limits it to ten minutes.
        grace_ms: u64,
    },
}

/// A failed stage of the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The stage that failed.
    pub stage: Stage,
    /// The cause and the remedy in one line, for the user.
    pub reason: String,
}

/// A thread of the guest, as seen during a moment of half a second.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestThread {
    /// Process id in the guest.
    pub process: u32,
    /// The thread's name, which its program chooses.
    pub name: String,
    /// State as in `/proc/PID/stat`: `R` running, `S` sleeping, `D` uninterruptible, and others.
    pub state: char,
    /// Share of one CPU, in per cent.
    pub busy: u16,
    /// The function of the guest's kernel in which the thread waits; empty when it does not wait.
    pub waits: String,
}

/// Diagnostics of a guest: the load, the memory and the busiest threads, for a user whose engine does not respond.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The line in `/proc/loadavg`.
    pub load: String,
    /// The guest's memory in KiB (`MemTotal`).
    pub memory_kib: u64,
    /// Memory in KiB that programs can still allocate (`MemAvailable`).
    pub available_kib: u64,
    /// Number of all threads.
    pub threads: u64,
    /// The threads that used the CPU during the moment, and those in uninterruptible sleep; the busiest first.
    pub busiest: Vec<GuestThread>,
}

/// A message of the agent to the backend.
// An unknown `type` is an error of the guest, at which the backend ends the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum GuestMessage {
    /// The first message of the connection. It stands for [`Stage::Kernel`], which is not reported otherwise.
    Hello(Hello),
    /// A stage was reached.
    Reached {
        /// The stage.
        stage: Stage,
        /// Microseconds since the guest kernel started (`CLOCK_BOOTTIME`).
        uptime_us: u64,
    },
    /// The start failed for good. The guest waits for a shutdown, or, before stage `agent`, powers off.
    Failed(Failure),
    /// A service of the engine ended and is started again; [`Stage::Engine`] follows when the engine answers again.
    EngineDown {
        /// The service, its exit status or signal, and perhaps its last line of output, for the user.
        reason: String,
    },
    /// Requests that the host listens for a container; [`HostMessage::Published`] is the answer.
    Publish {
        /// Identifies the mapping; never reused while the guest runs.
        id: u64,
        /// The port of the host and the port of the container.
        port: PortMapping,
    },
    /// Ends a mapping, whether or not it was answered.
    Unpublish {
        /// The id of the mapping.
        id: u64,
    },
    /// Requests a connection to a socket of the host: a vsock connection to the guest is the answer, or
    /// [`HostMessage::SocketRefused`].
    ConnectSocket {
        /// The socket's place in [`Configuration::host_sockets`], from 0.
        socket: u32,
    },
    /// The answer to [`HostMessage::Describe`], about half a second later.
    Described(Description),
    /// The answer to [`HostMessage::Shares`], in their order: the next request to the engine is judged by the list.
    SharesTaken {
        /// The reason for which the guest keeps the old list; `None` if it has the new one.
        error: Option<String>,
    },
    /// The guest is going down.
    Goodbye,
}
