//! Ports that services publish in the routing mesh of a swarm.
//!
//! For a container's port dockerd starts a process that has the host listen. For a port of the mesh it makes netfilter rules
//! at the VM's own addresses and starts nothing, so the gate takes that part: it holds a mapping to the VM's address for each
//! such port, for as long as a service has it. The engine must be a manager, which alone knows the services. On a worker, which
//! only an engine without isolation can be, the user publishes them as ports of the VM (`bulkhead ports publish`).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bulkhead_guest_common::{
    error::chain,
    port_mapping::{ANSWER_TIMEOUT, InitError, Mapping},
};
use bulkhead_protocol::{PortMapping, Transport};
use serde::Deserialize;
use tokio::task::spawn_blocking;

use crate::{
    dockerd::{Dockerd, DockerdError},
    gate::Gate,
};

/// Time until an engine is asked again that could not be asked at all.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The events after which a service may have other ports: the engine assigns those that the user left open later.
const EVENTS: &str = "/events?filters=%7B%22type%22%3A%5B%22service%22%5D%7D";

/// The engine's part in a swarm (Docker Engine API, SystemInfo).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    swarm: SwarmInfo,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct SwarmInfo {
    /// The engine is a manager.
    control_available: bool,
}

/// A service, as `GET /services` describes it (Docker Engine API, ServiceList).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service {
    #[serde(default)]
    endpoint: Endpoint,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Endpoint {
    ports: Option<Vec<ServicePort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ServicePort {
    protocol: String,
    #[serde(default)]
    published_port: u16,
    publish_mode: String,
}

impl ServicePort {
    /// The transport and number of a port of the mesh; `None` for a port of single tasks (`mode=host`), which has a process
    /// of dockerd's, and for SCTP, which does not leave the VM.
    fn in_mesh(&self) -> Option<(Transport, u16)> {
        let transport = match self.protocol.as_str() {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => return None,
        };
        (self.publish_mode == "ingress" && self.published_port != 0).then_some((transport, self.published_port))
    }
}

fn ports_of(services: &[Service]) -> BTreeSet<(Transport, u16)> {
    services
        .iter()
        .flat_map(|service| service.endpoint.ports.iter().flatten())
        .filter_map(ServicePort::in_mesh)
        .collect()
}

/// The mappings that are held.
struct IngressPorts {
    /// The VM's address, where the rules of the mesh are.
    vm: Ipv4Addr,
    /// init's socket for ports.
    init: PathBuf,
    /// `None` for a port that the host refused. It is asked again when the service has been removed and made again.
    held: BTreeMap<(Transport, u16), Option<Mapping>>,
}

impl IngressPorts {
    /// Holds mappings for exactly these ports.
    async fn set(&mut self, wanted: &BTreeSet<(Transport, u16)>) {
        self.held.retain(|port, _| wanted.contains(port));
        for port in wanted {
            if self.held.contains_key(port) {
                continue;
            }
            let mapping = self.publish(*port).await;
            if let Err(error) = &mapping {
                // Nobody waits for the answer: the engine has created the service already.
                eprintln!("port {}/{} of a service is not published: {}", port.1, port.0, chain(error));
            }
            self.held.insert(*port, mapping.ok());
        }
    }

    async fn publish(&self, (transport, number): (Transport, u16)) -> Result<Mapping, InitError> {
        let port = PortMapping {
            transport,
            host_ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            host_port: number,
            container_ip: self.vm.into(),
            container_port: number,
        };
        let init = self.init.clone();
        // The host may take seconds, and the socket blocks.
        let published = spawn_blocking(move || Mapping::publish(&init, &port, ANSWER_TIMEOUT)).await;
        published.unwrap_or_else(|error| Err(InitError::Connection(error.into())))
    }
}

/// Publishes the ports of services for as long as the gate runs.
///
/// Outside of a swarm it asks the engine once and sleeps until a request about the swarm comes by.
pub async fn publish_ingress_ports(gate: Arc<Gate>, vm: Ipv4Addr, init: &Path) {
    let mut ports = IngressPorts { vm, init: init.to_owned(), held: BTreeMap::new() };
    loop {
        match follow(&gate, &mut ports).await {
            // dockerd has ended, or the swarm has changed. Whatever it is, the answer to the next question tells.
            Ok(true) => {}
            // Not a manager of a swarm.
            Ok(false) => {
                ports.held.clear();
                gate.swarm_changed.notified().await;
            }
            // dockerd restarts; its services keep their ports meanwhile.
            Err(_) => tokio::time::sleep(RETRY_INTERVAL).await,
        }
    }
}

/// Holds the ports of all services until dockerd ends or a request about the swarm comes by. Returns false at once if the
/// engine is not a manager.
async fn follow(gate: &Gate, ports: &mut IngressPorts) -> Result<bool, DockerdError> {
    let dockerd = Dockerd::new(&gate.upstream);
    // Not by the services themselves: the engine would log an error for each start outside of a swarm.
    if !dockerd.get::<Info>("/info").await?.swarm.control_available {
        return Ok(false);
    }
    // Before the services are read, so that no change is missed.
    let mut events = dockerd.stream(EVENTS).await?;
    loop {
        let services: Vec<Service> = dockerd.get("/services").await?;
        ports.set(&ports_of(&services)).await;
        tokio::select! {
            more = events.next() => if !more { return Ok(true) },
            () = gate.swarm_changed.notified() => return Ok(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_the_mesh_are_those_of_ingress_mode() {
        let services: Vec<Service> = serde_json::from_str(
            r#"[{"ID": "a", "Endpoint": {"Spec": {}, "Ports": [
                    {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"},
                    {"Protocol": "udp", "TargetPort": 53, "PublishedPort": 53, "PublishMode": "ingress"},
                    {"Protocol": "tcp", "TargetPort": 81, "PublishedPort": 8081, "PublishMode": "host"},
                    {"Protocol": "sctp", "TargetPort": 82, "PublishedPort": 8082, "PublishMode": "ingress"},
                    {"Protocol": "tcp", "TargetPort": 83, "PublishMode": "ingress"}]}},
                {"ID": "b", "Endpoint": {}}, {"ID": "c"}, {"ID": "d", "Endpoint": {"Ports": null}}]"#,
        )
        .unwrap();
        assert_eq!(ports_of(&services), BTreeSet::from([(Transport::Tcp, 8080), (Transport::Udp, 53)]));
    }
}
