//! `bulkhead ports`.

use std::net::SocketAddr;

use super::{
    CliError, Format,
    client::{Client, containers},
    print, print_json, table,
};
use crate::{
    backend::api::{Ports, PublishedPort},
    settings::Paths,
};

/// List the ports that containers publish on this machine (`docker run --publish`).
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  docker run --detach --publish 8080:80 nginx && bulkhead ports
  bulkhead ports --format json | jq '.ports[].hostPort'")]
pub(super) struct Arguments {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    let ports = match Client::connect(paths).await? {
        Some(client) => client.ports().await?,
        None => Ports::default(),
    };
    match arguments.format {
        Format::Json => print_json(&ports),
        Format::Pretty if ports.ports.is_empty() => print("no published ports"),
        Format::Pretty => {
            // The backend knows the ports; only the engine knows the names. An engine that does not answer costs no
            // more than that column.
            let names = containers(&paths.docker_socket()).await.unwrap_or_default();
            // By address: the backend knows where a port leads, not which container asked for it.
            let name = |port: &PublishedPort| {
                let found = names.iter().find(|container| container.addresses.contains(&port.container_ip));
                found.map_or_else(|| "-".to_owned(), |container| container.name.clone())
            };
            print(&pretty(&ports.ports, name))
        }
    }
}

fn pretty(ports: &[PublishedPort], name: impl Fn(&PublishedPort) -> String) -> String {
    let mut rows = vec![["HOST", "CONTAINER ADDRESS", "PROTOCOL", "CONTAINER"].map(ToOwned::to_owned).to_vec()];
    rows.extend(ports.iter().map(|port| {
        vec![
            SocketAddr::new(port.host_ip, port.host_port).to_string(),
            SocketAddr::new(port.container_ip, port.container_port).to_string(),
            port.protocol.to_string(),
            name(port),
        ]
    }));
    table(&rows)
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::Transport;

    use super::*;

    #[test]
    fn a_row_has_both_ends_the_protocol_and_the_name() {
        let port = PublishedPort {
            protocol: Transport::Udp,
            host_ip: "::".parse().unwrap(),
            host_port: 5353,
            container_ip: "172.17.0.2".parse().unwrap(),
            container_port: 53,
        };
        let expected = "HOST       CONTAINER ADDRESS  PROTOCOL  CONTAINER\n\
                        [::]:5353  172.17.0.2:53      udp       dns";
        assert_eq!(pretty(&[port], |_| "dns".to_owned()), expected);
    }
}
