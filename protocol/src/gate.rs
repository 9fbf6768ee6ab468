//! The configuration that init passes to the gate.

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{HostSocket, SocketExceptions};

/// Environment variable that holds a [`Configuration`] as JSON.
///
/// The text can contain the passwords of proxies, so it is not a command-line argument, which every process of the VM
/// can read. The environment needs the credentials of the VM's root (`PTRACE_MODE_READ`, proc(5)), which a container
/// in a user namespace of its own does not have, and there is no file to protect. The text fits: it comes from one line
/// of at most [`crate::MAX_LINE`] bytes, and the kernel accepts 128 KiB (`MAX_ARG_STRLEN`).
pub const CONFIGURATION: &str = "BULKHEAD_GATE_CONFIGURATION";

/// Everything that the gate is started with.
///
/// Nothing that protects has a default: a field that is missing or misspelt stops the gate, it does not open it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// Enhanced Container Isolation is on.
    pub isolation: bool,
    /// dockerd's own unix socket.
    pub dockerd_socket: PathBuf,
    /// Unix socket to listen on, for processes of the guest.
    pub unix_socket: PathBuf,
    /// vsock port to listen on, for the host; without it the gate serves unix sockets only.
    pub vsock_port: Option<u32>,
    /// Refuse `docker load`.
    pub block_load: bool,
    /// Environment of new containers, `NAME=VALUE`, where they do not set the same name themselves.
    pub container_environment: Vec<String>,
    /// Containers that may have the engine's socket while isolation is on.
    pub socket_exceptions: SocketExceptions,
    /// The VM's own networks, which networks of containers must not overlap; empty for a VM without a network.
    pub vm_networks: Vec<VmSubnet>,
    /// File with the directories of the host that containers may mount: a JSON list of their paths there. It is replaced
    /// when the list changes, and read for each request that names a directory. Nothing is shared while it is missing.
    pub shares_file: PathBuf,
    /// The sockets of the host that containers may mount.
    pub host_sockets: Vec<HostSocket>,
    /// Absolute paths on the host of the engine's own socket.
    pub engine_sockets: Box<[String]>,
}

/// An IP network of the VM's only device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSubnet {
    /// The VM's address.
    pub address: IpAddr,
    /// Length of the network's prefix in bits.
    pub prefix: u8,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn complete() -> Value {
        json!({"isolation": true, "dockerd_socket": "/d", "unix_socket": "/g", "vsock_port": 1023, "block_load": false,
            "container_environment": [], "socket_exceptions": {"images": [], "derived": false, "commands": null},
            "vm_networks": [{"address": "10.0.0.2", "prefix": 24}, {"address": "fd00::2", "prefix": 64}],
            "shares_file": "/s", "host_sockets": [{"name": "s", "path": "/s"}], "engine_sockets": ["/e"]})
    }

    #[test]
    fn nothing_that_protects_has_a_default() {
        let configuration: Configuration = serde_json::from_value(complete()).unwrap();
        assert_eq!(serde_json::to_value(&configuration).unwrap(), complete());
        for key in [
            "isolation",
            "dockerd_socket",
            "unix_socket",
            "block_load",
            "socket_exceptions",
            "vm_networks",
            "shares_file",
            "host_sockets",
        ] {
            let mut text = complete();
            text.as_object_mut().unwrap().remove(key);
            assert!(serde_json::from_value::<Configuration>(text).is_err(), "{key}");
        }
        let mut text = complete();
        text["isolation"] = json!("maybe");
        assert!(serde_json::from_value::<Configuration>(text).is_err());
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        let mut text = complete();
        text["tcp"] = json!(2375);
        assert!(serde_json::from_value::<Configuration>(text).is_err());
    }
}
