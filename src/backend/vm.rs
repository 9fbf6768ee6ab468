//! One VM from its boot to its end: the process, its packets, its agent.

use std::{fs, io, os::fd::AsFd, path::PathBuf, sync::Arc};

use bulkhead_protocol::{Description, HostMessage, PortMapping, ShutdownMode};
use tokio::{
    net::UnixListener,
    process::Child,
    sync::{Notify, mpsc},
    task::AbortHandle,
};
use tracing::{info, warn};

use super::{
    agent::AgentServer,
    api::{Examination, StartOptions},
    certificates,
    child::ChildError,
    diagnose::{self, Desks},
    disk::DiskError,
    events::VmEvent,
    logs,
    network::{self, NetSupervisor},
    plan::{Plan, PlanError},
    ports::Ports,
    vmm::{self, VmmChannel},
};
use bulkhead_vmm::api::{Command, Event};

use crate::settings::{Paths, Policy};

/// Why a VM could not be begun.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A check failed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The data disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The vmm process.
    #[error(transparent)]
    Vmm(#[from] ChildError),
    /// The network process.
    #[error(transparent)]
    Network(#[from] network::StartError),
    /// A file or socket beside it.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A VM that was begun.
#[derive(Debug)]
pub struct Vm {
    /// What it was made from.
    pub plan: Plan,
    /// Process id.
    pub pid: u32,
    channel: Arc<VmmChannel>,
    kill: Arc<Notify>,
    orders: mpsc::Sender<HostMessage>,
    events: mpsc::Receiver<VmEvent>,
    agent: AbortHandle,
    ports: Arc<Ports>,
    desks: Arc<Desks>,
}

impl Vm {
    /// Makes the disk, the sockets and the process, and orders the boot.
    pub async fn boot(paths: &Paths, options: &StartOptions, policy: &Policy) -> Result<Self, BootError> {
        let mut plan = Plan::new(paths, options, policy)?;
        plan.disk.apply()?;
        let io_error = |path: PathBuf| move |source| BootError::Io { path, source };
        logs::rotate(&paths.console_log()).map_err(io_error(paths.console_log()))?;
        if plan.serial {
            logs::rotate(&paths.serial_log()).map_err(io_error(paths.serial_log()))?;
        }
        remove_sockets(paths);
        let listener = UnixListener::bind(paths.agent_socket()).map_err(io_error(paths.agent_socket()))?;
        let (channel, theirs) = vmm::channel()?;
        let log = logs::append(&paths.backend_log()).map_err(io_error(paths.backend_log()))?;
        let network = match &plan.network {
            Some(network) => {
                let log = log.try_clone().map_err(io_error(paths.backend_log()))?;
                Some(network::start(network.clone(), log).await?)
            }
            None => None,
        };
        let child = vmm::spawn(&theirs, log)?;
        drop(theirs);
        let pid = child.id().unwrap_or_default();
        info!(pid, cpus = plan.cpus, memory_mib = plan.memory_mib, "began a VM");
        let channel = Arc::new(channel);
        let (sender, events) = mpsc::channel(64);
        let (orders, outbox) = mpsc::channel(4);
        let certificates = certificates::load(plan.certificates.as_deref()).unwrap_or_else(|error| {
            plan.warn(bulkhead_ipc::report::chain(&error));
            Vec::new()
        });
        // The guest knows that it has no network, and says so itself.
        let no_ports = match &plan.network {
            Some(network) => network.no_ports(),
            None => Some("this VM has no network, so no port can be published".to_owned()),
        };
        let ports = Arc::new(no_ports.map_or_else(|| Ports::open(plan.ports_on_loopback), Ports::closed));
        let agent = AgentServer {
            vmm: pid,
            certificates,
            configuration: plan.configuration.clone(),
            ports: Arc::clone(&ports),
            events: sender.clone(),
        };
        let agent = tokio::spawn(agent.serve(listener, outbox)).abort_handle();
        let kill = Arc::new(Notify::new());
        let (process, stream) = network.unzip();
        let keeper = process
            .map(|process| NetSupervisor::new(process, Arc::clone(&ports), Arc::clone(&channel), sender.clone()));
        let desks = Arc::<Desks>::default();
        let watched = Watched { channel: Arc::clone(&channel), kill: Arc::clone(&kill), desks: Arc::clone(&desks) };
        tokio::spawn(watch(child, keeper, watched, sender));
        let boot = Command::Boot(Box::new(plan.machine(paths)));
        if let Err(error) = channel.send(&boot, stream.as_ref().map(AsFd::as_fd)).await {
            // The process is already gone; why is known once it has been waited for.
            warn!("{}", bulkhead_ipc::report::chain(&error));
        }
        Ok(Self { plan, pid, channel, kill, orders, events, agent, ports, desks })
    }

    /// Where packets to the process go.
    pub fn channel(&self) -> Arc<VmmChannel> {
        Arc::clone(&self.channel)
    }

    /// What listens on the host for containers.
    pub fn ports(&self) -> Vec<PortMapping> {
        self.ports.list()
    }

    /// What the VM does at the moment.
    pub fn examine(&self) -> impl Future<Output = Examination> + Send + use<> {
        diagnose::examine(Arc::clone(&self.channel), self.orders.clone(), Arc::clone(&self.desks))
    }

    /// The answer to whoever examines the VM.
    pub fn described(&self, description: &Description) {
        self.desks.guest.answer(description);
    }

    /// The next event; pending for ever after [`VmEvent::Ended`].
    pub async fn next(&mut self) -> VmEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    /// Asks the agent to power the guest off.
    pub fn shut_down(&self, grace_ms: u64) {
        if self.orders.try_send(HostMessage::Shutdown { mode: ShutdownMode::PowerOff, grace_ms }).is_err() {
            warn!("the agent does not take orders");
        }
    }

    /// Ends the VM at once; [`VmEvent::Ended`] follows.
    pub fn kill(&self) {
        self.kill.notify_one();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.agent.abort();
        self.ports.clear();
    }
}

/// Removes the sockets of a VM that is gone.
pub fn remove_sockets(paths: &Paths) {
    for path in [paths.vsock_socket(), paths.agent_socket()] {
        let _ = fs::remove_file(path);
    }
}

/// What [`watch`] shares with its VM.
struct Watched {
    channel: Arc<VmmChannel>,
    kill: Arc<Notify>,
    desks: Arc<Desks>,
}

/// Reads the child's packets until it is gone, then says how it ended; nothing of the VM is left then.
async fn watch(mut child: Child, network: Option<NetSupervisor>, watched: Watched, events: mpsc::Sender<VmEvent>) {
    let Watched { channel, kill, desks } = watched;
    let mut said = None;
    loop {
        let packet = tokio::select! {
            packet = channel.receive() => packet,
            // A signal, not a packet: it works when the process does not read its socket.
            () = kill.notified() => {
                let _ = child.start_kill();
                break;
            }
        };
        match packet {
            Ok(Some(Event::Exited(reason))) => {
                said = Some(reason);
                break;
            }
            Ok(Some(Event::Started { since_exec_us })) => info!(since_exec_us, "the guest runs"),
            Ok(Some(Event::Statistics(statistics))) => info!(?statistics),
            Ok(Some(Event::Vcpus { views })) => desks.vcpus.answer(&views),
            Ok(None) => break,
            Err(error) => {
                warn!("{}", bulkhead_ipc::report::chain(&error));
                let _ = child.start_kill();
                break;
            }
        }
    }
    let end = vmm::reap(&mut child, said).await;
    if let Some(network) = network {
        network.end().await;
    }
    info!(?end, "the VM ended");
    let _ = events.send(VmEvent::Ended(end)).await;
}
