//! A swarm of two engines, each with a network namespace as its machine, without isolation.

use std::collections::BTreeSet;

use support::{
    engine::{START, STOP},
    home::{Home, OwnHome},
};

use super::{ports::get, *};

/// The wire between the machines, a bridge of this one.
const WIRE: &str = "bh-swarm";

/// The ports on which the engines of a swarm talk to each other.
const SWARM_PORTS: [&str; 4] = ["2377", "7946", "7946/udp", "4789/udp"];

/// The address of a machine; 254 is this one.
fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, number)
}

/// The wire, taken away at the end.
struct Wire;

impl Wire {
    fn lay() -> Self {
        ip(&format!("link add {WIRE} type bridge")).ok();
        let wire = Self;
        ip(&format!("addr add {}/24 dev {WIRE}", address(254))).ok();
        ip(&format!("link set {WIRE} up")).ok();
        wire
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        ip(&format!("link del {WIRE}"));
    }
}

/// A network namespace with one card.
struct Machine {
    name: String,
}

impl Machine {
    fn new(number: u8) -> Self {
        let name = format!("{WIRE}{number}");
        ip(&format!("netns add {name}")).ok();
        let machine = Self { name };
        let name = &machine.name;
        ip(&format!("link add {name} type veth peer name eth0 netns {name}")).ok();
        ip(&format!("link set {name} master {WIRE} up")).ok();
        ip(&format!("-n {name} addr add {}/24 dev eth0", address(number))).ok();
        ip(&format!("-n {name} link set eth0 up")).ok();
        ip(&format!("-n {name} link set lo up")).ok();
        machine
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.name));
    }
}

/// An engine without isolation on a machine of its own.
struct Node {
    // First, since it is dropped first: it stops the engine.
    home: OwnHome,
    machine: Machine,
    address: Ipv4Addr,
}

impl Node {
    fn start(number: u8) -> Self {
        let node = Self { home: OwnHome(Home::new()), machine: Machine::new(number), address: address(number) };
        node.bulkhead(&["settings", "set", ISOLATION, "false"]);
        node.bulkhead(&[&["ports", "publish"], &SWARM_PORTS[..]].concat());
        node.bulkhead(&["start", "--timeout", "220", "--memory", "1G"]);
        node.load("alpine.tar");
        node
    }

    fn load(&self, file: &str) {
        let image = support::engine::images().join(file);
        self.docker(&["load", "--quiet", "--input", image.to_str().unwrap()]);
    }

    /// Runs a program on the machine.
    #[track_caller]
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = self.home.command("ip");
        command.args(["netns", "exec", &self.machine.name, program]).args(arguments);
        run(command, START).ok()
    }

    #[track_caller]
    fn bulkhead(&self, arguments: &[&str]) -> String {
        self.run(support::program(), arguments)
    }

    #[track_caller]
    fn docker(&self, arguments: &[&str]) -> String {
        run(self.home.docker_command(arguments), LONG).ok()
    }
}

/// A port of the VM is asked from another machine, by TCP and UDP, for the address of who asks.
fn a_port_of_the_vm_sees_the_address_of_the_other_machine(asked: &Node, asking: &Node) {
    let port = free(1).to_string();
    asked.load("debian.tar");
    asked.bulkhead(&["ports", "publish", &port, &format!("{port}/udp")]);
    let line = format!(
        "socat TCP-LISTEN:{port},fork,reuseaddr SYSTEM:'echo $SOCAT_PEERADDR' &
         exec socat UDP-RECVFROM:{port},fork SYSTEM:'echo $SOCAT_PEERADDR'"
    );
    asked.docker(&["run", "--detach", "--init", "--network=host", "debian", "sh", "-c", &line]);
    let own = asking.address.to_string();
    for transport in ["TCP", "UDP"] {
        let ask = format!("echo | socat -t 20 - {transport}:{}:{port} | head -1", asked.address);
        let seen = poll("the container listens", LONG, || {
            Some(asking.run("sh", &["-c", &ask])).filter(|answer| !answer.is_empty())
        });
        assert_eq!(seen.trim(), own, "{transport}");
    }
    asked.bulkhead(&["ports", "unpublish", &port, &format!("{port}/udp")]);
}

/// The names of tasks among some answers.
fn tasks(answers: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    answers.into_iter().collect()
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_service_of_a_swarm_answers_on_two_engines() {
    if !takes_network_devices() {
        return;
    }
    // The shared engine makes room for these two.
    let shared = turn();
    shared.home.bulkhead(&["stop"], STOP).ok();
    let _wire = Wire::lay();
    let nodes = [Node::start(1), Node::start(2)];
    let [manager, worker] = &nodes;
    let own = manager.address.to_string();
    manager.docker(&["swarm", "init", "--advertise-addr", &own]);
    let token = manager.docker(&["swarm", "join-token", "--quiet", "worker"]);
    let join = ["swarm", "join", "--advertise-addr", &worker.address.to_string(), "--token", token.trim()];
    worker.docker(&[&join[..], &[&format!("{own}:2377")]].concat());
    // The address from which the worker has come.
    let name = worker.docker(&["info", "--format={{.Swarm.NodeID}}"]);
    let seen = poll("the worker is there", LONG, || {
        let seen = manager.docker(&["node", "inspect", "--format={{.Status.Addr}}", name.trim()]);
        Some(seen).filter(|seen| !seen.trim().is_empty())
    });
    assert_eq!(seen.trim(), worker.address.to_string());
    a_port_of_the_vm_sees_the_address_of_the_other_machine(manager, worker);
    manager.docker(&["network", "create", "--driver=overlay", "--attachable", "over"]);
    let port = free(1);
    let publish = format!("--publish=published={port},target=80");
    let service =
        ["service", "create", "--quiet", "--no-resolve-image", "--name=web", "--replicas=2", "--network=over"];
    let server = ["alpine", "sh", "-c", "hostname >/tmp/name; exec httpd -f -p 80 -h /tmp"];
    manager.docker(&[&service[..], &[&publish], &server].concat());
    // A task on each: the scheduler spreads them.
    let running = |node: &Node| node.docker(&["ps", "--filter=name=web", "--format={{.ID}}"]);
    let placed: Vec<String> = nodes.iter().map(|node| running(node).trim().to_owned()).collect();
    assert!(placed.iter().all(|ids| ids.len() == 12), "{placed:?}");
    let expected = tasks(placed);
    // By the overlay network, whose packets go from VM to VM.
    for node in &nodes {
        let ask = "for i in 1 2 3 4; do wget -T 30 -qO- http://web/name; done";
        let answers = node.docker(&["run", "--rm", "--network=over", "alpine", "sh", "-c", ask]);
        assert_eq!(tasks(answers.lines().map(ToOwned::to_owned)), expected);
    }
    // By the routing mesh, which a manager publishes by itself and a worker does not.
    worker.bulkhead(&["ports", "publish", &port.to_string()]);
    for node in &nodes {
        let address = IpAddr::V4(node.address);
        assert_eq!(tasks((0..4).map(|_| get(address, port, "/name"))), expected, "{address}");
    }
}
