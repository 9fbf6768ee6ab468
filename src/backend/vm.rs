//! One VM from its boot to its end: the vmm process, its packets, the processes of its devices and its agent.
//!
//! The start, from here on: the backend makes or grows the data disk and starts the network process and the share
//! process, then the vmm with the control socket as descriptor 3. The vmm gets a stream for the agent's connection, the
//! other end of the share process's stream, and the boot command, which carries that of the network process. The vmm
//! opens files, sets up memory and devices, loads the kernel, confines itself and lets the vCPUs run. The guest's init
//! connects back ([`super::agent`]) and reports four stages: `kernel` with its Hello, `agent` when it has its
//! configuration, `disk` when the data disk is mounted, and `engine` when `/_ping` through the gate answers. Nothing
//! polls: each step is a message, a notification or a closed socket.
//!
//! [`VmEvent::Ended`] is the last event of a VM, and none of its processes is left by then. A backend that is killed
//! takes them with it ([`super::child`]); ext4's journal keeps what the guest had synced.

use std::{fs, io, os::fd::AsFd, path::PathBuf, sync::Arc, time::Duration};

use bulkhead_protocol::{Description, HostMessage, Share, ShutdownMode};
use tokio::{
    process::Child,
    sync::{Mutex, Notify, mpsc, oneshot, watch},
    task::AbortHandle,
    time::timeout,
};
use tracing::{info, warn};

use super::{
    agent::{self, AgentServer},
    api::{Examination, PortsAnswer, StartOptions},
    certificates,
    child::ChildError,
    device_process::{self, DeviceSupervisor},
    diagnose::{self, VmWaiters},
    disk::DiskError,
    events::VmEvent,
    host_sockets::HostSockets,
    log_file::LogFile,
    logs,
    network::{self, NetServer},
    plan::{Plan, PlanError},
    ports::{
        Listening, Ports,
        vm::{VmPorts, VmPortsError, warning},
    },
    shares::{Change, ShareServer, SharesPlan},
    vmm::{self, VmmChannel},
};
use bulkhead_ipc::report::chain;
use bulkhead_vmm::api::{Command, Event};

use crate::settings::{Paths, Policy, Settings, SettingsError};

/// Time for the guest to take a new list of shared directories.
const SHARES_TIMEOUT: Duration = Duration::from_secs(10);

/// Reason that a VM could not be started.
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
    /// The process that serves the shared directories.
    #[error(transparent)]
    Shares(ChildError),
    /// A log or a socket of the VM.
    #[error("cannot use {path}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Reason that the shared directories of a running VM could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The process that serves them, or the VM.
    #[error("the process that serves them is gone")]
    Gone,
    /// The guest.
    #[error("the guest did not take the list: {0}")]
    Guest(String),
}

/// The directories that a running VM shares, where they can change.
#[derive(Clone, Debug)]
struct Sharing {
    server: mpsc::Sender<Change>,
    guest: watch::Sender<Vec<Share>>,
    waiters: Arc<VmWaiters>,
    /// Held during a change.
    turn: Arc<Mutex<()>>,
}

impl Sharing {
    fn new(server: mpsc::Sender<Change>, guest: watch::Sender<Vec<Share>>, waiters: &Arc<VmWaiters>) -> Self {
        Self { server, guest, waiters: Arc::clone(waiters), turn: Arc::default() }
    }

    /// Makes the server, and then the guest, share what the settings say now.
    async fn change(self, paths: Paths, options: StartOptions, policy: Policy) -> Result<(), ShareError> {
        // The settings are read in turn, so that the last to change them sets the list that remains.
        let _turn = self.turn.lock().await;
        let settings = Settings::load(&paths.settings())?.under(policy);
        let plan = SharesPlan::new(&settings, &options).0.unwrap_or_default();
        let shares = plan.guest();
        let (done, connected) = oneshot::channel();
        self.server.send(Change { plan, done }).await.map_err(|_| ShareError::Gone)?;
        connected.await.map_err(|_| ShareError::Gone)?;
        // Now the guest's requests find the new directories.
        let taken = self.waiters.shares.wait();
        self.guest.send_replace(shares);
        match timeout(SHARES_TIMEOUT, taken).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(error))) => Err(ShareError::Guest(error)),
            Ok(Err(_)) => Err(ShareError::Gone),
            Err(_) => Err(ShareError::Guest(format!("no answer within {} s", SHARES_TIMEOUT.as_secs()))),
        }
    }
}

/// A VM that was started.
#[derive(Debug)]
pub struct Vm {
    /// The plan that it was made from, with the warnings of its start.
    pub plan: Plan,
    /// Process id of the vmm.
    pub pid: u32,
    channel: Arc<VmmChannel>,
    kill: Arc<Notify>,
    agent_outbox: mpsc::Sender<HostMessage>,
    events: mpsc::Receiver<VmEvent>,
    agent: AbortHandle,
    ports: Arc<Ports>,
    own_ports: VmPorts,
    waiters: Arc<VmWaiters>,
    sharing: Option<Sharing>,
}

impl Vm {
    /// Makes the disk, the sockets and the processes, and commands the boot.
    pub async fn boot(
        paths: &Paths,
        options: &StartOptions,
        policy: &Policy,
        log: &LogFile,
    ) -> Result<Self, BootError> {
        let mut plan = Plan::new(paths, options, policy)?;
        plan.disk.apply()?;
        for path in [paths.console_log()].into_iter().chain(plan.serial.then(|| paths.serial_log())) {
            logs::rotate(&path).map_err(|source| BootError::Io { path, source })?;
        }
        remove_sockets(paths);
        let (channel, theirs) = vmm::channel()?;
        let (ports, own_ports) = open_ports(&mut plan).await;
        // The processes of devices come first: their streams travel to the vmm before it boots. A start that fails
        // further down drops them, which kills them.
        let network = match plan.network.clone() {
            Some(network) => {
                Some(device_process::start(NetServer::new(network, Arc::clone(&ports), log.clone())).await?)
            }
            None => None,
        };
        let shares = match plan.shares.clone() {
            Some(shares) => {
                let (server, changes) = ShareServer::new(shares, paths, &plan.image, log.clone());
                let (process, stream) = device_process::start(server).await.map_err(BootError::Shares)?;
                Some(((process, changes), stream))
            }
            None => None,
        };
        let child = vmm::spawn(&theirs, log)?;
        // Only the child may hold this end: its death must close the socket.
        drop(theirs);
        let pid = child.id().unwrap_or_default();
        info!(pid, cpus = plan.cpus, memory_mib = plan.memory_mib, "started a VM");
        let channel = Arc::new(channel);
        let (sender, events) = mpsc::channel(64);
        // Small on purpose: a question to the agent is refused when the queue is nearly full, see `diagnose`.
        let (agent_outbox, outbox) = mpsc::channel(4);
        // Read at each boot, because the host's list may have changed. The engine works without it, so a failure is a
        // warning.
        let mut preface = certificates::load(&plan.certificates).unwrap_or_else(|error| {
            plan.warn(chain(&error));
            Vec::new()
        });
        preface.extend(plan.time_zone.clone().map(HostMessage::TimeZone));
        let guest_shares = watch::Sender::new(plan.configuration.shares.clone());
        let agent = AgentServer {
            vmm: Arc::clone(&channel),
            preface,
            configuration: plan.configuration.clone(),
            shares: guest_shares.subscribe(),
            ports: Arc::clone(&ports),
            host_sockets: HostSockets::new(plan.host_sockets.clone(), paths.base()),
            events: sender.clone(),
        };
        let kill = Arc::new(Notify::new());
        let ((network, network_stream), (shares, shares_stream)) = (network.unzip(), shares.unzip());
        let (shares, share_changes) = shares.unzip();
        let devices = network
            .map(|process| DeviceSupervisor::new(process, Arc::clone(&channel), sender.clone()))
            .into_iter()
            .chain(shares.map(|process| DeviceSupervisor::new(process, Arc::clone(&channel), sender.clone())))
            .collect();
        let waiters = Arc::<VmWaiters>::default();
        let sharing = share_changes.map(|server| Sharing::new(server, guest_shares, &waiters));
        let watched = Watched { channel: Arc::clone(&channel), kill: Arc::clone(&kill), waiters: Arc::clone(&waiters) };
        tokio::spawn(watch(child, devices, watched, sender));
        // Last, when everything that the VM could report to is in place.
        let boot = Command::Boot(Box::new(plan.machine(paths)));
        let boot = async {
            // Before the boot, so that the agent's first attempt to connect succeeds.
            let agent = agent::offer(&channel).await?;
            if let Some(stream) = shares_stream {
                channel.send(&Command::Shares, Some(stream.as_fd())).await?;
            }
            channel.send(&boot, network_stream.as_ref().map(AsFd::as_fd)).await?;
            Ok::<_, ChildError>(agent)
        };
        let connection = boot.await;
        let agent = tokio::spawn(async move {
            match connection {
                Ok(stream) => agent.serve(stream, outbox).await,
                // The process is already gone. `watch` waits for it, learns the cause, and the state machine reports
                // it.
                Err(error) => warn!("{}", chain(&error)),
            }
        });
        let agent = agent.abort_handle();
        Ok(Self { plan, pid, channel, kill, agent_outbox, events, agent, ports, own_ports, waiters, sharing })
    }

    /// The channel to the vmm process.
    pub fn channel(&self) -> Arc<VmmChannel> {
        Arc::clone(&self.channel)
    }

    /// Returns the ports on which the host listens for containers and for the VM.
    pub fn ports(&self) -> Vec<Listening> {
        self.ports.list()
    }

    /// Publishes the VM's own ports that the settings name now, and no other ones of it.
    pub fn publish_own_ports(
        &self,
        paths: &Paths,
        policy: &Policy,
    ) -> impl Future<Output = Result<PortsAnswer, VmPortsError>> + Send + use<> {
        self.own_ports.clone().follow(paths.clone(), policy.clone())
    }

    /// Examines the VM while it runs; takes some seconds.
    pub fn examine(&self) -> impl Future<Output = Examination> + Send + use<> {
        let kernel = self.plan.image.kernel.clone();
        diagnose::examine(Arc::clone(&self.channel), self.agent_outbox.clone(), Arc::clone(&self.waiters), kernel)
    }

    /// Changes the shared directories to those of the settings; `None` for a VM that was started without any, which has
    /// no device for them.
    pub fn share(
        &self,
        paths: &Paths,
        options: &StartOptions,
        policy: &Policy,
    ) -> Option<impl Future<Output = Result<(), ShareError>> + Send + use<>> {
        let sharing = self.sharing.clone()?;
        Some(sharing.change(paths.clone(), options.clone(), policy.clone()))
    }

    /// Passes the guest's answer to a change of the shared directories on.
    pub fn shares_taken(&self, error: Option<String>) {
        self.waiters.shares.answer(&error);
    }

    /// Passes the guest's description on to every examination that waits for it.
    pub fn described(&self, description: &Description) {
        self.waiters.guest.answer(description);
    }

    /// Returns the next event; pending forever after [`VmEvent::Ended`].
    pub async fn next(&mut self) -> VmEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    /// Asks the agent to power the guest off.
    pub fn shut_down(&self, grace_ms: u64) {
        // Never waits: the supervisor has to go on whatever the agent does. Its deadline kills a VM that was not asked.
        if self.agent_outbox.try_send(HostMessage::Shutdown { mode: ShutdownMode::PowerOff, grace_ms }).is_err() {
            warn!("cannot ask the agent to shut down: it does not read its messages");
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
        self.ports.close("the VM has ended");
    }
}

/// Opens the table of published ports, with those of the VM itself.
async fn open_ports(plan: &mut Plan) -> (Arc<Ports>, VmPorts) {
    // init refuses ports by itself in a guest without a network; a hostile one is refused here.
    let no_ports = match &plan.network {
        Some(network) => network.no_ports(),
        None => Some("this VM has no network, so no port can be published".to_owned()),
    };
    let ports = Arc::new(no_ports.map_or_else(|| Ports::open(plan.ports_on_loopback), Ports::closed));
    let address = plan.network.as_ref().map(|network| network.guest().address);
    let own = VmPorts::new(&ports, address, plan.configuration.isolation);
    let problem = match own.publish(&plan.vm_ports).await {
        Ok(answer) => warning(&answer.problems),
        Err(error) => Some(chain(&error)),
    };
    if let Some(problem) = problem {
        plan.warn(problem);
    }
    (ports, own)
}

/// Removes the sockets of a VM that is gone.
pub fn remove_sockets(paths: &Paths) {
    let _ = fs::remove_file(paths.vsock_socket());
}

/// The part of a VM that [`watch`] shares.
struct Watched {
    channel: Arc<VmmChannel>,
    kill: Arc<Notify>,
    waiters: Arc<VmWaiters>,
}

/// Receives the vmm's packets until the process is gone, ends the processes of its devices, then reports how the VM
/// ended.
async fn watch(mut child: Child, devices: Vec<DeviceSupervisor>, watched: Watched, events: mpsc::Sender<VmEvent>) {
    let Watched { channel, kill, waiters } = watched;
    let mut reported = None;
    loop {
        let packet = tokio::select! {
            packet = channel.receive() => packet,
            // A signal, not a packet: it ends a process that does not read its socket, too.
            () = kill.notified() => {
                let _ = child.start_kill();
                break;
            }
        };
        match packet {
            Ok(Some(Event::Exited(reason))) => {
                reported = Some(reason);
                break;
            }
            Ok(Some(Event::Started { since_exec_us })) => info!(since_exec_us, "the guest runs"),
            Ok(Some(Event::Statistics(statistics))) => info!(?statistics),
            Ok(Some(Event::NoRoom { disks })) => {
                let _ = events.send(VmEvent::NoRoom(!disks.is_empty())).await;
            }
            Ok(Some(Event::Sample(sample))) => waiters.samples.answer(&sample),
            // The process ended without a report; its exit status has to explain it.
            Ok(None) => break,
            // A vmm that sends garbage may have been taken over by its guest. It gets no second chance.
            Err(error) => {
                warn!("{}", chain(&error));
                let _ = child.start_kill();
                break;
            }
        }
    }
    let end = vmm::reap(&mut child, reported).await;
    // All processes are gone before the event: the next boot may open the disk and the tap device again.
    for device in devices {
        device.end().await;
    }
    info!(?end, "the VM ended");
    let _ = events.send(VmEvent::Ended(end)).await;
}
