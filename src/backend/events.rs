//! Events in the life of a VM, from the tasks that watch it to the supervisor: plain data at the bottom of the backend.
//!
//! The agent's connection ([`super::agent`]), the processes of devices ([`super::device_process`]) and the vmm process
//! ([`super::vm`]) report here and do not depend on each other or on their reader.

use bulkhead_protocol::{Description, Stage};

/// Something that happened to a VM.
///
/// Every text in it that comes from the guest is already bounded and free of control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum VmEvent {
    /// The agent introduced itself and now receives its configuration.
    AgentConnected {
        /// `uname -r` of the guest.
        kernel: String,
        /// Microseconds since the guest kernel started.
        uptime_us: u64,
    },
    /// The agent's connection ended.
    AgentLost,
    /// The guest reached a stage of its start.
    Reached(Stage),
    /// The guest gave up, for this reason.
    GuestFailed(String),
    /// The engine ended, for this reason, and init is starting it again.
    EngineDown(String),
    /// The guest's answer to [`bulkhead_protocol::HostMessage::Describe`].
    Described(Description),
    /// The guest's answer to [`bulkhead_protocol::HostMessage::Shares`].
    SharesTaken(Option<String>),
    /// The process that serves a device is gone for good, for this reason; a new VM gets a new one.
    DeviceDown(String),
    /// The host has no room for what the guest writes to its data disk, or has some again (false).
    NoRoom(bool),
    /// The vmm process is gone. No event follows.
    Ended(VmEnd),
}

/// The end of a VM, as far as the state machine distinguishes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum VmEnd {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// Any other end, with its cause.
    Broken(String),
}
