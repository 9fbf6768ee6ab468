//! Ports of the VM itself, which the setting `vmPorts` publishes: where they listen, and whether they may.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use bulkhead_protocol::PortMapping;
use tokio::sync::Mutex;

use super::{Ports, error::PublishError};
use crate::{
    backend::api::{PortProblem, PortsAnswer, PortsOutcome},
    settings::{Paths, Policy, PortBinding, Settings, SettingsError, VmPort},
};

/// Most reasons in a warning, which is a part of each status.
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
    /// The VM has no network.
    #[error("this VM has no network, so none of its ports (vmPorts) can be published")]
    NoNetwork,
}

/// The ports of the VM itself that the settings name, and what decides about them.
#[derive(Clone, Debug)]
pub struct VmPortsPlan {
    ports: Vec<VmPort>,
    binding: PortBinding,
    isolation: bool,
}

impl VmPortsPlan {
    /// Takes what these settings say.
    pub(in crate::backend) fn new(settings: &Settings) -> Self {
        Self { ports: settings.vm_ports(), binding: settings.port_binding(), isolation: settings.isolation() }
    }

    /// Returns the mappings for a VM with this address, with the port behind each.
    fn mappings(&self, vm: Ipv4Addr) -> BTreeMap<PortMapping, VmPort> {
        let everywhere: &[IpAddr] = match self.binding {
            PortBinding::All => &[IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
            PortBinding::Loopback | PortBinding::OnlyLoopback => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
        };
        let of = |port: VmPort| {
            let VmPort { address, host_port, vm_port: container_port, transport } = port;
            let addresses = address.map_or_else(|| everywhere.to_vec(), |address| vec![address]);
            addresses.into_iter().map(move |host_ip| {
                (PortMapping { transport, host_ip, host_port, container_ip: vm.into(), container_port }, port)
            })
        };
        self.ports.iter().copied().flat_map(of).collect()
    }
}

/// The published ports of a VM itself.
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
    pub(in crate::backend) async fn follow(self, paths: Paths, policy: Policy) -> Result<PortsAnswer, VmPortsError> {
        // The settings are read in turn, so that the last to change them sets the list that remains.
        let _turn = self.turn.lock().await;
        let settings = Settings::load(&paths.settings())?.under(policy);
        self.publish(&VmPortsPlan::new(&settings)).await
    }

    /// Publishes the planned ports, and no others of the VM.
    pub(in crate::backend) async fn publish(&self, plan: &VmPortsPlan) -> Result<PortsAnswer, VmPortsError> {
        let named = !plan.ports.is_empty();
        if named && self.isolation {
            return if plan.isolation { Err(VmPortsError::Isolated) } else { Ok(PortsOutcome::NextStart.into()) };
        }
        let wanted = match self.address {
            Some(address) => plan.mappings(address),
            None if named => return Err(VmPortsError::NoNetwork),
            None => BTreeMap::new(),
        };
        let refused = self.ports.publish_vm(&wanted.keys().copied().collect()).await;
        let problem = |(mapping, error): (PortMapping, PublishError)| {
            Some(PortProblem { port: wanted.get(&mapping)?.to_string(), reason: error.to_string() })
        };
        let problems = refused.into_iter().filter_map(problem).collect();
        Ok(PortsAnswer { outcome: PortsOutcome::Changed, problems })
    }
}

/// A line about ports that the host refuses; `None` without one.
pub(in crate::backend) fn warning(problems: &[PortProblem]) -> Option<String> {
    let mut reasons: Vec<_> = problems.iter().map(|problem| problem.reason.as_str()).collect();
    // A VM that cannot publish any has one reason for all.
    reasons.dedup();
    let more = reasons.len().saturating_sub(MAX_REASONS);
    reasons.truncate(MAX_REASONS);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    (!reasons.is_empty()).then(|| format!("cannot publish ports of the VM: {}{more}", reasons.join("; ")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::settings::{Base, ProfileName};

    fn listens(values: serde_json::Value) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), values.to_string()).unwrap();
        let plan = VmPortsPlan::new(&Settings::load(file.path()).unwrap());
        let mappings = plan.mappings(Ipv4Addr::new(192, 168, 65, 3));
        mappings.into_keys().map(|port| port.host_ip.to_string()).collect()
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
            own.follow(paths.clone(), Policy::default()).await.map_err(|error| error.to_string())
        };
        let off = json!({"enhancedContainerIsolation": false, "vmPorts": ["127.0.0.1:1:80"]});
        let on = json!({"vmPorts": ["127.0.0.1:1:80"]});
        assert!(publish(true, address, on).await.unwrap_err().contains("only while isolation is off"));
        assert_eq!(publish(true, address, off.clone()).await, Ok(PortsOutcome::NextStart.into()));
        assert!(publish(false, None, off).await.unwrap_err().contains("has no network"));
        let many: Vec<_> = (1..=20).map(|number| format!("224.0.0.1:{number}")).collect();
        let many = json!({"enhancedContainerIsolation": false, "vmPorts": many});
        let problems = publish(false, address, many).await.unwrap().problems;
        assert_eq!((problems.len(), problems[0].port.as_str()), (20, "224.0.0.1:1:1/tcp"));
        let warning = warning(&problems).unwrap();
        assert!(warning.contains("224.0.0.1:4: ") && warning.ends_with("; and 16 more"), "{warning}");
        // Without a port there is nothing to refuse.
        assert_eq!(publish(true, None, json!({})).await, Ok(PortsOutcome::Changed.into()));
        assert!(ports.list().is_empty());
    }
}
