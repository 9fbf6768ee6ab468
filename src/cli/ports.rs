//! `bulkhead ports`.

use std::net::SocketAddr;

use super::{
    CliError, Format,
    client::{Client, containers},
    colour, command, print, print_json, table,
};
use crate::{
    backend::{
        VmPortsError,
        api::{PortProblem, Ports, PortsAnswer, PortsOutcome, PublishedPort},
    },
    settings::{Base, Paths, Policy, ProfileName, Settings, VmPort},
};

/// The name in the place of a container's for a port of the VM itself.
const OF_VM: &str = "(the VM)";

/// List the ports of this machine that lead to containers, and publish ports of the VM itself.
///
/// Containers publish their ports with `docker run --publish`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  docker run --detach --publish 8080:80 nginx && bulkhead ports
  bulkhead ports --format json | jq '.ports[].hostPort'
  bulkhead ports publish 8080:80"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Verb {
    /// Publish ports of the VM itself, where isolation is off.
    ///
    /// They lead to what listens in the VM's own network: containers with `--network=host` and the engine's part of a
    /// swarm. This is the setting vmPorts. A running VM takes a change at once.
    #[command(after_help = "\
Examples:
  docker run --detach --network=host nginx && bulkhead ports publish 8080:80
  bulkhead ports publish 2377 7946 7946/udp 4789/udp")]
    Publish {
        /// Ports to publish, as for `docker run --publish`; without an address they listen where ports of containers do.
        #[arg(required = true, value_name = "[ADDRESS:]PORT[:VM_PORT][/PROTOCOL]")]
        ports: Vec<VmPort>,
    },
    /// Stop publishing ports of the VM itself.
    Unpublish {
        /// Ports as they were published.
        #[arg(required = true, value_name = "[ADDRESS:]PORT[:VM_PORT][/PROTOCOL]")]
        ports: Vec<VmPort>,
    },
}

/// Runs the verb under `policy`, this machine's.
pub(super) async fn run(base: &Base, name: &ProfileName, policy: Policy, arguments: Arguments) -> Result<(), CliError> {
    match arguments.verb {
        None => list(&base.known_profile(name)?, arguments.format).await,
        Some(Verb::Publish { ports }) => publish(&base.profile(name)?, policy, &ports).await,
        Some(Verb::Unpublish { ports }) => {
            let paths = base.known_profile(name)?;
            Settings::update_vm_ports(&paths, &policy, |list| without(list, &ports))?;
            warn(&apply(&paths).await?);
            Ok(())
        }
    }
}

async fn publish(paths: &Paths, policy: Policy, ports: &[VmPort]) -> Result<(), CliError> {
    let settings = Settings::load(&paths.settings())?.under(policy.clone());
    if settings.isolation() {
        return Err(VmPortsError::Isolated.into());
    }
    let mut new = Vec::new();
    Settings::update_vm_ports(paths, &policy, |mut list| {
        for port in ports {
            if !list.contains(port) {
                list.push(*port);
                new.push(*port);
            }
        }
        Ok::<_, CliError>(list)
    })?;
    let problems = apply(paths).await?;
    let named = |port: &VmPort| problems.iter().find(|problem| problem.port.parse() == Ok(*port));
    let Some(problem) = new.iter().find_map(named) else {
        // Of ports that were on the list before.
        warn(&problems);
        return Ok(());
    };
    // One that the host refuses would be refused at each start, too.
    let refused: Vec<_> = new.iter().copied().filter(|port| named(port).is_some()).collect();
    Settings::update_vm_ports(paths, &policy, |list| without(list, &refused))?;
    // One of a port's two addresses may listen.
    apply(paths).await?;
    Err(CliError::Failed(format!("cannot publish {}: {}", problem.port, problem.reason)))
}

/// Makes a running VM publish what the settings say now; returns the ports that the host refuses.
async fn apply(paths: &Paths) -> Result<Vec<PortProblem>, CliError> {
    let Some(client) = Client::connect(paths).await? else { return Ok(Vec::new()) };
    let PortsAnswer { outcome, problems } = client.publish_vm_ports().await?;
    match outcome {
        PortsOutcome::Changed | PortsOutcome::NotRunning => {}
        PortsOutcome::NextStart => {
            let restart = command(paths, "restart");
            eprintln!("note: the running VM has isolation; its next restart publishes the ports: {restart}");
        }
    }
    Ok(problems)
}

/// Shows problems of ports that the command is not about.
fn warn(problems: &[PortProblem]) {
    for PortProblem { port, reason } in problems {
        colour::warn(format_args!("{port} is not published: {reason}"));
    }
}

/// Takes ports off a list.
fn without(mut list: Vec<VmPort>, gone: &[VmPort]) -> Result<Vec<VmPort>, CliError> {
    for port in gone {
        let at = list.iter().position(|one| one == port).ok_or_else(|| {
            let published = list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let published = if published.is_empty() { "none is".to_owned() } else { format!("published: {published}") };
            CliError::Failed(format!("{port} is not a published port of the VM; {published}"))
        })?;
        list.remove(at);
    }
    Ok(list)
}

async fn list(paths: &Paths, format: Format) -> Result<(), CliError> {
    let ports = match Client::connect(paths).await? {
        Some(client) => client.ports().await?,
        None => Ports::default(),
    };
    match format {
        Format::Json => print_json(&ports),
        Format::Pretty if ports.ports.is_empty() => print("no published ports"),
        Format::Pretty => {
            // The backend knows the ports; only the engine knows the names. An engine that does not answer costs no
            // more than that column.
            let names = containers(&paths.docker_socket()).await.unwrap_or_default();
            // By address: the backend knows where a port leads, not which container asked for it.
            let name = |port: &PublishedPort| {
                if port.of_vm {
                    return OF_VM.to_owned();
                }
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
            of_vm: false,
        };
        let expected = "HOST       CONTAINER ADDRESS  PROTOCOL  CONTAINER\n\
                        [::]:5353  172.17.0.2:53      udp       dns";
        assert_eq!(pretty(&[port], |_| "dns".to_owned()), expected);
    }

    #[test]
    fn a_port_is_taken_off_the_list_however_it_is_written() {
        let ports = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<VmPort>>();
        let list = || ports(&["80", "8080:80/udp"]);
        assert_eq!(without(list(), &ports(&["80:80/tcp"])).unwrap(), ports(&["8080:80/udp"]));
        let error = |list, gone: &str| without(list, &ports(&[gone])).unwrap_err().to_string();
        assert_eq!(
            error(list(), "8080"),
            "8080:8080/tcp is not a published port of the VM; published: 80:80/tcp, 8080:80/udp"
        );
        assert_eq!(error(Vec::new(), "80"), "80:80/tcp is not a published port of the VM; none is");
    }
}
