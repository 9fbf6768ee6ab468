//! The process that serves the VM's network device, `bulkhead net` or passt(1): started before the VM, and again
//! whenever it dies.
//!
//! The vmm keeps the guest's memory and the state of the queues, so a new process continues where the used rings stand:
//! the guest sees no reset of its device, only its open connections are reset. Published ports survive, see
//! [`crate::backend::ports`].

use std::{
    collections::BTreeSet,
    convert::Infallible,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::Duration,
};

use tokio::{
    process::Child,
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::Instant,
};
use tracing::{info, warn};

use super::{
    passt::Passt,
    plan::{Backend, NetworkPlan},
    tap::TapError,
};
use bulkhead_ipc::report::chain;
use bulkhead_net::api;
use bulkhead_vmm::api::Command;

use crate::backend::{
    channel::Channel,
    child::{self, ChildError},
    events::VmEvent,
    log_file::LogFile,
    ports::{Change, Ports},
    vmm::VmmChannel,
};

/// Bad starts in a row, each of a process that did not live for [`STABLE_TIME`], after which the network is given up.
const MAX_BAD_STARTS: u32 = 5;
/// Lifetime from which on a start counts as a good one.
const STABLE_TIME: Duration = Duration::from_secs(60);
/// Pause before the next start.
const RESTART_INTERVAL: Duration = Duration::from_millis(200);

/// Name of the process in errors.
const NAME: &str = "network";

/// The channel to a network process of ours, which answers nothing.
type NetChannel = Channel<api::Command, Infallible>;

/// The network process of one VM.
#[derive(Debug)]
pub(in crate::backend) struct NetProcess {
    child: Child,
    /// `None` for passt, which has no control socket.
    control: Option<NetChannel>,
    plan: NetworkPlan,
    log: LogFile,
}

/// Error of starting the process that serves the network device.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The process or its control socket.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The tap device.
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// Starts the process; the returned stream is the vmm's end of the vhost-user connection.
pub(in crate::backend) async fn start(plan: NetworkPlan, log: LogFile) -> Result<(NetProcess, UnixStream), StartError> {
    let (child, control, stream) = spawn(&plan, &log).await?;
    Ok((NetProcess { child, control, plan, log }, stream))
}

/// Returns a process, the backend's end of its control socket if it has one, and the vmm's end of its stream.
async fn spawn(plan: &NetworkPlan, log: &LogFile) -> Result<(Child, Option<NetChannel>, UnixStream), StartError> {
    let failed = |error| ChildError::Start(NAME, error);
    // The vhost-user connection (vhost-user.rst in QEMU's sources): the vmm is its frontend, the process its backend.
    let (frontend, backend) = UnixStream::pair().map_err(failed)?;
    let (child, control) = match &plan.backend {
        Backend::BuiltIn(setup) => {
            let (child, control) = own(log)?;
            control.send(&api::Command::Setup(setup.clone()), Some(backend.as_fd())).await?;
            (child, Some(control))
        }
        Backend::Tap(tap) => {
            // Opened again for each process: the old one's queue of the device went away with its descriptor.
            let device = tap.open().await?;
            let (child, control) = own(log)?;
            // A packet carries one descriptor, so the device follows in a packet of its own.
            control.send(&api::Command::SetupTap, Some(backend.as_fd())).await?;
            control.send(&api::Command::Tap, Some(device.as_fd())).await?;
            (child, Some(control))
        }
        Backend::Passt(passt) => {
            // The stream takes the place of the control socket as the one descriptor that the child inherits.
            let arguments = Passt::arguments(plan.addresses());
            (child::spawn("passt", passt.program(), arguments, backend.as_fd(), log)?, None)
        }
    };
    info!(pid = child.id().unwrap_or_default(), "started a network process");
    Ok((child, control, frontend))
}

/// Starts `bulkhead net`.
fn own(log: &LogFile) -> Result<(Child, NetChannel), ChildError> {
    let program = child::current_program().map_err(|error| ChildError::Start(NAME, error))?;
    let (control, theirs) = channel()?;
    Ok((child::spawn(NAME, &program, ["net"], theirs.as_fd(), log)?, control))
}

fn channel() -> Result<(NetChannel, OwnedFd), ChildError> {
    Channel::pair(NAME, api::MAX_PACKET)
}

/// Keeps a VM's network process running until the VM has ended.
#[derive(Debug)]
pub(in crate::backend) struct NetSupervisor {
    task: JoinHandle<()>,
    end: Arc<Notify>,
}

impl NetSupervisor {
    /// Supervises the process in a task of its own.
    pub(in crate::backend) fn new(
        mut process: NetProcess,
        ports: Arc<Ports>,
        channel: Arc<VmmChannel>,
        events: mpsc::Sender<VmEvent>,
    ) -> Self {
        let end = Arc::new(Notify::new());
        let ended = Arc::clone(&end);
        let task = tokio::spawn(async move {
            tokio::select! {
                () = supervise(&mut process, &ports, &channel, &events) => {}
                () = ended.notified() => {}
            }
            // Fails if the process is gone already.
            let _ = process.child.kill().await;
        });
        Self { task, end }
    }

    /// Ends the process; it is gone when this returns.
    pub(in crate::backend) async fn end(self) {
        self.end.notify_one();
        let _ = self.task.await;
    }
}

/// Restarts the process whenever it ends and hands the published ports over to it, until it has failed too often.
async fn supervise(process: &mut NetProcess, ports: &Ports, channel: &VmmChannel, events: &mpsc::Sender<VmEvent>) {
    let mut bad_starts = 0;
    let warning = loop {
        let started = Instant::now();
        let handed_over = async {
            match &process.control {
                Some(control) => hand_over(control, ports).await,
                // passt publishes no ports, and the plan lets the guest publish none.
                None => std::future::pending().await,
            }
        };
        let status = tokio::select! {
            status = process.child.wait() => status,
            never = handed_over => match never {},
        };
        let end = match status {
            // The process ends in success when the vmm closes the stream, usually because the VM ends. Then `end`
            // follows and stops this task.
            Ok(status) if status.success() => "the network process ended with the vmm's connection".to_owned(),
            Ok(status) => format!("the network process ended ({status})"),
            Err(error) => format!("the network process is gone ({error})"),
        };
        info!("{end}");
        // A guest can crash the process by a bug in its stack. Each start costs the host something, so a guest that
        // does it on purpose is stopped after some; one crash an hour is not held against it.
        bad_starts = if started.elapsed() < STABLE_TIME { bad_starts + 1 } else { 1 };
        if bad_starts > MAX_BAD_STARTS {
            break format!("the network is down: {end}, {bad_starts} times in a row");
        }
        tokio::time::sleep(RESTART_INTERVAL).await;
        match spawn(&process.plan, &process.log).await {
            Ok((child, control, stream)) => {
                (process.child, process.control) = (child, control);
                // The vmm connects its device to the new stream, with a kick and an interrupt for each queue: the old
                // process may have died between serving a request and reporting it.
                if let Err(error) = channel.send(&Command::Network, Some(stream.as_fd())).await {
                    // The vmm is gone. The process ends with `stream`, and `end` follows.
                    warn!("{}", chain(&error));
                }
            }
            Err(error) => break format!("the network is down: {}", chain(&error)),
        }
    };
    // Clients are refused instead of waiting in the backlog of a socket that nobody serves any more.
    ports.close(&warning);
    let _ = events.send(VmEvent::NetworkDown(warning)).await;
}

/// Hands all published ports to a process, and from then on each change.
async fn hand_over(control: &NetChannel, ports: &Ports) -> Infallible {
    let mut known = BTreeSet::new();
    loop {
        for change in ports.changes(&mut known) {
            let sent = match change {
                Change::Listen { id, transport, target, socket } => {
                    let command = api::Command::Listen { id, transport, target };
                    control.send(&command, Some(socket.as_fd())).await
                }
                Change::Forget { id } => control.send(&api::Command::Forget { id }, None).await,
            };
            if let Err(error) = sent {
                // The process is gone. The supervisor waits for its end and starts this from scratch for the next one,
                // so a change may be lost here.
                warn!("{}", chain(&error));
                std::future::pending::<()>().await;
            }
        }
        ports.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use bulkhead_protocol::{PortMapping, Transport};
    use tokio::task::spawn_blocking;

    use super::*;

    /// A mapping of a port that was free a moment ago.
    fn mapping() -> PortMapping {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        PortMapping {
            transport: Transport::Tcp,
            host_ip: Ipv4Addr::LOCALHOST.into(),
            host_port: free,
            container_ip: [172, 17, 0, 2].into(),
            container_port: 80,
        }
    }

    async fn next(process: &Arc<OwnedFd>) -> (api::Command, Option<OwnedFd>) {
        let process = Arc::clone(process);
        spawn_blocking(move || api::receive(&process).unwrap().unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn each_process_is_handed_the_sockets_that_listen_and_told_of_those_that_end() {
        let ports = Arc::new(Ports::open(false));
        let port = mapping();
        ports.publish(1, port).await.unwrap();
        // Before any process is there, and through all of them, the clients are kept.
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port.host_port)).unwrap();
        for _ in 0..3 {
            let (channel, process) = channel().unwrap();
            let (process, its) = (Arc::new(process), Arc::clone(&ports));
            let task = tokio::spawn(async move { hand_over(&channel, &its).await });
            let (command, socket) = next(&process).await;
            let target = "172.17.0.2:80".parse().unwrap();
            assert_eq!(command, api::Command::Listen { id: 1, transport: Transport::Tcp, target });
            let listener = TcpListener::from(socket.unwrap());
            assert_eq!(listener.local_addr().unwrap().port(), port.host_port);
            task.abort();
        }
        let (channel, process) = channel().unwrap();
        let (process, its) = (Arc::new(process), Arc::clone(&ports));
        tokio::spawn(async move { hand_over(&channel, &its).await });
        let listener = TcpListener::from(next(&process).await.1.unwrap());
        assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
        ports.unpublish(1);
        assert_eq!(next(&process).await.0, api::Command::Forget { id: 1 });
        ports.publish(2, mapping()).await.unwrap();
        assert!(matches!(next(&process).await.0, api::Command::Listen { id: 2, .. }));
    }
}
