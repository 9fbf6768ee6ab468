//! Ports of the VM itself, which the setting `vmPorts` publishes: where they listen, and whether they may.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use bulkhead_protocol::PortMapping;
use tokio::sync::Mutex;

use super::Ports;
use crate::{
    backend::api::PortsOutcome,
    settings::{Paths, Policy, PortBinding, Settings, SettingsError},
};

/// Most reasons in an error.
const MAX_REASONS: usize = 4;

/// Error of publishing ports of the VM.
#[derive(Debug, thiserror::Error)]
pub enum VmPortsError {
    /// The settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The VM has isolation.
    ///
    /// Its own services know nothing of that. A manager of a swarm, for one, gives an engine's daemon work that never passes
    /// the gate.
    #[error(
        "ports of the VM itself (vmPorts) are published only while isolation is off (bulkhead settings set \
         enhancedContainerIsolation false), because no rule of isolation stands before the VM's own services; \
         `docker run --publish` publishes ports of containers"
    )]
    Isolated,
    /// There is no network.
    #[error("this VM has no network, so none of its ports (vmPorts) can be published")]
    NoNetwork,
    /// The host refuses to listen, for these reasons.
    #[error("cannot publish ports of the VM: {0}")]
    Refused(String),
}

/// The ports of a VM that the settings publish.
#[derive(Clone, Debug)]
pub(in crate::backend) struct VmPorts {
    ports: Arc<Ports>,
    /// The VM's address, if it has a network.
    address: Option<Ipv4Addr>,
    isolation: bool,
    /// Held during a change.
    turn: Arc<Mutex<()>>,
}

impl VmPorts {
    /// Those of a VM with this address and with or without isolation.
    pub(in crate::backend) fn new(ports: &Arc<Ports>, address: Option<Ipv4Addr>, isolation: bool) -> Self {
        Self { ports: Arc::clone(ports), address, isolation, turn: Arc::default() }
    }

    /// Publishes the ports that the settings name now, and no others of the VM.
    pub(in crate::backend) async fn publish(self, paths: Paths, policy: Policy) -> Result<PortsOutcome, VmPortsError> {
        // The settings are read in turn, so that the last to change them sets the list that remains.
        let _turn = self.turn.lock().await;
        let settings = Settings::load(&paths.settings())?.under(policy);
        let wanted = mappings(&settings, self.address.unwrap_or(Ipv4Addr::UNSPECIFIED));
        if !wanted.is_empty() && self.isolation {
            return if settings.isolation() { Err(VmPortsError::Isolated) } else { Ok(PortsOutcome::NextStart) };
        }
        if !wanted.is_empty() && self.address.is_none() {
            return Err(VmPortsError::NoNetwork);
        }
        let refused = self.ports.publish_vm(&wanted).await;
        if refused.is_empty() {
            return Ok(PortsOutcome::Changed);
        }
        let mut reasons: Vec<_> = refused.iter().map(ToString::to_string).collect();
        // A VM that cannot publish any has one reason for all.
        reasons.dedup();
        // The text is a part of each status.
        if reasons.len() > MAX_REASONS {
            let more = reasons.split_off(MAX_REASONS).len();
            reasons.push(format!("and {more} more"));
        }
        Err(VmPortsError::Refused(reasons.join("; ")))
    }
}

/// Returns the mappings that the settings ask for, for a VM with this address.
fn mappings(settings: &Settings, vm: Ipv4Addr) -> BTreeSet<PortMapping> {
    let everywhere: &[IpAddr] = match settings.port_binding() {
        PortBinding::All => &[IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
        PortBinding::Loopback | PortBinding::OnlyLoopback => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
    };
    let mut mappings = BTreeSet::new();
    for port in settings.vm_ports() {
        let addresses = port.address.as_ref().map_or(everywhere, std::slice::from_ref);
        mappings.extend(addresses.iter().map(|address| PortMapping {
            transport: port.transport,
            host_ip: *address,
            host_port: port.host_port,
            container_ip: vm.into(),
            container_port: port.vm_port,
        }));
    }
    mappings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::settings::{Base, ProfileName};

    fn listens(values: serde_json::Value) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), values.to_string()).unwrap();
        mappings(&Settings::load(file.path()).unwrap(), Ipv4Addr::new(192, 168, 65, 3))
            .into_iter()
            .map(|port| port.host_ip.to_string())
            .collect()
    }

    #[test]
    fn without_an_address_a_port_listens_where_ports_of_containers_do() {
        for (binding, addresses) in [
            ("default-port-binding", &["0.0.0.0", "::"][..]),
            ("default-local-port-binding", &["127.0.0.1"]),
            ("local-only-port-binding", &["127.0.0.1"]),
        ] {
            assert_eq!(listens(json!({"vmPorts": ["80"], "portBindingBehavior": binding})), addresses, "{binding}");
        }
        assert_eq!(listens(json!({"vmPorts": ["10.0.0.1:80", "10.0.0.1:80:80/tcp"]})), ["10.0.0.1"]);
    }

    #[tokio::test]
    async fn a_vm_that_may_publish_none_of_its_ports_has_a_short_reason() {
        let directory = tempfile::tempdir().unwrap();
        let base = Base::from_variables(|_| Some(directory.path().to_owned()), 0).unwrap();
        let paths = base.profile(&ProfileName::default()).unwrap();
        paths.create_config().unwrap();
        let ports = Arc::new(Ports::open(false));
        let address = Some(Ipv4Addr::new(192, 168, 65, 3));
        let publish = async |isolated: bool, address, values: serde_json::Value| {
            std::fs::write(paths.settings(), values.to_string()).unwrap();
            let own = VmPorts::new(&ports, address, isolated);
            own.publish(paths.clone(), Policy::default()).await.map_err(|error| error.to_string())
        };
        let off = json!({"enhancedContainerIsolation": false, "vmPorts": ["127.0.0.1:1:80"]});
        let on = json!({"vmPorts": ["127.0.0.1:1:80"]});
        assert!(publish(true, address, on).await.unwrap_err().contains("only while isolation is off"));
        assert_eq!(publish(true, address, off.clone()).await, Ok(PortsOutcome::NextStart));
        assert!(publish(false, None, off).await.unwrap_err().contains("has no network"));
        let many: Vec<_> = (1..=20).map(|number| format!("224.0.0.1:{number}")).collect();
        let many = json!({"enhancedContainerIsolation": false, "vmPorts": many});
        let error = publish(false, address, many).await.unwrap_err();
        assert!(error.contains("224.0.0.1:4: ") && error.ends_with("; and 16 more"), "{error}");
        // Without a port there is nothing to refuse.
        assert_eq!(publish(true, None, json!({})).await, Ok(PortsOutcome::Changed));
        assert!(ports.list().is_empty());
    }
}
