//! `bulkhead-gate`: serves the Docker API on vsock and on a unix socket, in front of dockerd.

use std::{net::IpAddr, os::fd::OwnedFd, path::Path, process::ExitCode, sync::Arc};

use bulkhead_gate::{
    Caller, Directories, Gate, Isolation, ListenError, ShareList, Sockets, UnixAcceptor, VsockAcceptor,
};
use bulkhead_guest_common::error::chain;
use bulkhead_policy::networks::{Subnet, VmNetwork};
use bulkhead_protocol::{
    ENGINE_SOCKET, GRANTS_SOCKET, PORTS_SOCKET,
    gate::{Configuration, VmSubnet},
};
use tokio::{net::UnixStream, sync::Semaphore};

/// Maximum HTTP connections of the host and the guest at a time; more wait in the listeners' queues. Upgraded
/// connections (attach, exec) do not count.
const MAX_CONNECTIONS: usize = 4096;

/// Name in init's descriptor store of the socket at [`ENGINE_SOCKET`] while isolation is off.
const SHARED_SOCKET: &str = "engine";

/// Reports to init that the gate serves (sd_notify(3)).
fn notify_ready() {
    if let Err(error) = bulkhead_guest_common::notify::ready() {
        eprintln!("cannot report readiness to init: {error}");
    }
}

/// Serves a connection in a task of its own, as soon as there is room for one.
async fn admit(gate: &Arc<Gate>, slots: &Arc<Semaphore>, stream: UnixStream) {
    // Waits here and not in the task, so that a flood of connections stays in the kernel's queue and costs no memory.
    let Ok(slot) = Arc::clone(slots).acquire_owned().await else { return };
    let gate = Arc::clone(gate);
    tokio::spawn(async move {
        bulkhead_gate::serve_connection(gate, stream, Caller::Host).await;
        drop(slot);
    });
}

/// Serves the clients of a unix socket.
async fn serve(gate: Arc<Gate>, slots: Arc<Semaphore>, acceptor: UnixAcceptor) {
    loop {
        let stream = acceptor.accept().await;
        admit(&gate, &slots, stream).await;
    }
}

/// Serves the sockets in containers: one each with isolation, without it one for all containers that mount it.
fn serve_containers(
    gate: &Arc<Gate>,
    isolation: Isolation,
    slots: &Arc<Semaphore>,
    inherited: Vec<(String, OwnedFd)>,
) -> Result<(), ListenError> {
    let mut shared = None;
    // Sockets of an earlier gate come first: clients are already waiting in their queues.
    for (name, fd) in inherited {
        match isolation {
            Isolation::On => bulkhead_gate::adopt_socket(gate, &name, fd.into()),
            Isolation::Off if name == SHARED_SOCKET => shared = Some(UnixAcceptor::adopt(fd)?),
            // A container's own socket cannot outlive a boot, and isolation changes at boot only.
            Isolation::Off => {}
        }
    }
    if isolation == Isolation::Off {
        let acceptor = match shared {
            Some(acceptor) => acceptor,
            None => UnixAcceptor::bind_stored(Path::new(ENGINE_SOCKET), SHARED_SOCKET)?,
        };
        tokio::spawn(serve(Arc::clone(gate), Arc::clone(slots), acceptor));
        return Ok(());
    }
    // Only a marker: a bind of this path makes the runtime ask for the container's own socket.
    if let Err(error) = bulkhead_gate::create_placeholder(Path::new(ENGINE_SOCKET)) {
        eprintln!("cannot create {ENGINE_SOCKET}, so no container can mount the Docker socket: {error}");
    }
    // The runtime has a socket of its own, which does not share the slots above: a start must not wait for clients.
    let runtime = UnixAcceptor::bind(Path::new(GRANTS_SOCKET))?;
    let gate = Arc::clone(gate);
    tokio::spawn(async move {
        loop {
            let stream = runtime.accept().await;
            tokio::spawn(bulkhead_gate::answer_runtime(Arc::clone(&gate), stream));
        }
    });
    Ok(())
}

/// The networks that those of containers must leave alone.
fn vm_network(networks: &[VmSubnet]) -> VmNetwork {
    // A prefix that is too long for its address cannot come from init, and no network is judged by it.
    VmNetwork::new(networks.iter().filter_map(|network| Subnet::new(network.address, network.prefix)))
}

async fn run(configuration: Configuration, inherited: Vec<(String, OwnedFd)>) -> Result<(), ListenError> {
    let isolation = Isolation::from(configuration.isolation);
    let gate = Gate::new(configuration.dockerd_socket, isolation)
        .with_environment(configuration.container_environment)
        .with_sockets(Sockets::new(configuration.socket_exceptions, Directories::default()))
        .with_load_blocked(configuration.block_load)
        .with_vm_network(vm_network(&configuration.vm_networks))
        .with_shares(ShareList::File(configuration.shares_file))
        .with_host_sockets(&configuration.host_sockets, &configuration.engine_sockets);
    let gate = Arc::new(gate);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // All listeners exist before readiness is reported, so that init's first ping and early clients find them.
    let unix = UnixAcceptor::bind(&configuration.unix_socket)?;
    serve_containers(&gate, isolation, &slots, inherited)?;
    if let Some(port) = configuration.vsock_port {
        let vsock = VsockAcceptor::bind(port)?;
        let (gate, slots) = (Arc::clone(&gate), Arc::clone(&slots));
        tokio::spawn(async move {
            loop {
                let stream = vsock.accept().await;
                admit(&gate, &slots, stream).await;
            }
        });
    }
    notify_ready();
    let own = configuration.vm_networks.iter().find_map(|network| match network.address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    });
    if let Some(address) = own {
        let gate = Arc::clone(&gate);
        tokio::spawn(async move {
            bulkhead_gate::publish_ingress_ports(gate, address, Path::new(PORTS_SOCKET)).await;
        });
    }
    serve(gate, slots, unix).await;
    Ok(())
}

fn main() -> ExitCode {
    // First of all: init names descriptors by number, which must not have been reused.
    let inherited = bulkhead_gate::inherited();
    let configuration = match bulkhead_gate::read_configuration() {
        Ok(configuration) => configuration,
        Err(error) => {
            eprintln!("{}", chain(&error));
            return ExitCode::from(2);
        }
    };
    // Bytes are copied and little else is done, so a few threads and small stacks are enough.
    let threads = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_stack_size(512 * 1024)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(configuration, inherited)),
        Err(source) => {
            eprintln!("cannot start the worker threads: {source}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = ended {
        eprintln!("{}", chain(&error));
    }
    ExitCode::FAILURE
}
