//! The process that serves the VM's network device, `bulkhead net` or passt(1): started before the VM, and again when it
//! dies.

mod passt;
mod plan;
mod tap;

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fs::File,
    os::{fd::AsFd, unix::net::UnixStream},
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
    child,
    ports::{Change, Ports},
    vm::VmEvent,
    vmm::{Channel, VmmError},
};
use bulkhead_ipc::report::chain;
use bulkhead_net::control;
use bulkhead_vmm::api::Command;
use passt::Passt;
use plan::Backend;
use tap::TapError;

pub use plan::{NetworkError, NetworkPlan};

/// Starts in a row, each shorter than [`STABLE`], after which the network is given up.
const BAD_STARTS: u32 = 5;
/// A process that lived so long was a good one.
const STABLE: Duration = Duration::from_secs(60);
/// Pause before the next start.
const PAUSE: Duration = Duration::from_millis(200);

/// The process of one VM.
#[derive(Debug)]
pub(super) struct NetProcess {
    child: Child,
    control: Option<Channel>,
    plan: NetworkPlan,
    log: File,
}

/// Why the process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The process or its socket.
    #[error("the network process cannot be started")]
    Process(#[source] VmmError),
    /// The tap device.
    #[error(transparent)]
    Tap(#[from] TapError),
}

impl From<VmmError> for StartError {
    fn from(error: VmmError) -> Self {
        Self::Process(error)
    }
}

/// Starts the process; the stream is the vmm's end.
pub(super) async fn start(plan: NetworkPlan, log: File) -> Result<(NetProcess, UnixStream), StartError> {
    let (child, control, stream) = spawn(&plan, &log).await?;
    Ok((NetProcess { child, control, plan, log }, stream))
}

/// A process, our end of its control socket if it has one, and the vmm's end of its stream.
async fn spawn(plan: &NetworkPlan, log: &File) -> Result<(Child, Option<Channel>, UnixStream), StartError> {
    let (frontend, backend) = UnixStream::pair().map_err(VmmError::Spawn)?;
    let output = log.try_clone().map_err(VmmError::Spawn)?;
    let (child, control) = match &plan.backend {
        Backend::Own(setup) => {
            let (child, control) = own(output)?;
            control.send(&control::Command::Setup(setup.clone()), Some(backend.as_fd())).await?;
            (child, Some(control))
        }
        Backend::Tap(tap) => {
            let device = tap.open().await?;
            let (child, control) = own(output)?;
            control.send(&control::Command::SetupTap, Some(backend.as_fd())).await?;
            control.send(&control::Command::Tap, Some(device.as_fd())).await?;
            (child, Some(control))
        }
        Backend::Passt(passt) => {
            let arguments = Passt::arguments(plan.addresses());
            let child = child::spawn_program(passt.program(), arguments, backend.as_fd(), output);
            (child.map_err(VmmError::Spawn)?, None)
        }
    };
    info!(pid = child.id().unwrap_or_default(), "began a network process");
    Ok((child, control, frontend))
}

fn own(log: File) -> Result<(Child, Channel), VmmError> {
    let (control, theirs) = Channel::pair()?;
    Ok((child::spawn("net", theirs.as_fd(), log).map_err(VmmError::Spawn)?, control))
}

/// What serves a VM's network, until it is told that the VM has ended.
#[derive(Debug)]
pub(super) struct Keeper {
    task: JoinHandle<()>,
    end: Arc<Notify>,
}

impl Keeper {
    /// Keeps the process running, beside everything else.
    pub(super) fn new(
        mut process: NetProcess,
        ports: Arc<Ports>,
        channel: Arc<Channel>,
        events: mpsc::Sender<VmEvent>,
    ) -> Self {
        let end = Arc::new(Notify::new());
        let its = Arc::clone(&end);
        let task = tokio::spawn(async move {
            tokio::select! {
                () = keep(&mut process, &ports, &channel, &events) => {}
                () = its.notified() => {}
            }
            // It may be gone already.
            let _ = process.child.kill().await;
        });
        Self { task, end }
    }

    /// Ends the process; it is gone when this returns.
    pub(super) async fn end(self) {
        self.end.notify_one();
        let _ = self.task.await;
    }
}

/// Starts the process again whenever it ends, and hands the published ports over to it, until that is hopeless.
async fn keep(process: &mut NetProcess, ports: &Ports, channel: &Channel, events: &mpsc::Sender<VmEvent>) {
    let mut bad = 0;
    let warning = loop {
        let begun = Instant::now();
        let told = async {
            match &process.control {
                Some(control) => hand_over(control, ports).await,
                // passt is told of no ports, and none are published.
                None => std::future::pending().await,
            }
        };
        let status = tokio::select! {
            status = process.child.wait() => status,
            never = told => match never {},
        };
        let how = match status {
            // The vmm closed the stream; usually because the VM ends.
            Ok(status) if status.success() => "the network process ended with the vmm's connection".to_owned(),
            Ok(status) => format!("the network process ended ({status})"),
            Err(error) => format!("the network process is gone ({error})"),
        };
        info!("{how}");
        bad = if begun.elapsed() < STABLE { bad + 1 } else { 1 };
        if bad > BAD_STARTS {
            break format!("the network is down: {how}, {bad} times in a row");
        }
        tokio::time::sleep(PAUSE).await;
        match spawn(&process.plan, &process.log).await {
            Ok((child, control, stream)) => {
                (process.child, process.control) = (child, control);
                if let Err(error) = channel.send(&Command::Network, Some(stream.as_fd())).await {
                    warn!("{}", chain(&error));
                }
            }
            Err(error) => break format!("the network is down: its process cannot be started: {}", chain(&error)),
        }
    };
    // Clients shall be refused instead of waiting for nobody.
    ports.close(&warning);
    let _ = events.send(VmEvent::NetworkDown(warning)).await;
}

/// Tells a process of all published ports, and from then on of each change.
async fn hand_over(control: &Channel, ports: &Ports) -> Infallible {
    let mut known = BTreeSet::new();
    loop {
        for change in ports.changes(&mut known) {
            let sent = match change {
                Change::Listen { id, transport, target, socket } => {
                    let command = control::Command::Listen { id, transport, target };
                    control.send(&command, Some(socket.as_fd())).await
                }
                Change::Forget { id } => control.send(&control::Command::Forget { id }, None).await,
            };
            if let Err(error) = sent {
                // It is gone, and will be waited for; its successor is told everything.
                warn!("{}", chain(&error));
                std::future::pending::<()>().await;
            }
        }
        ports.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, TcpListener, TcpStream},
        os::fd::OwnedFd,
    };

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

    async fn next(process: &Arc<OwnedFd>) -> (control::Command, Option<OwnedFd>) {
        let process = Arc::clone(process);
        spawn_blocking(move || control::receive(&process).unwrap().unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn each_process_is_handed_the_sockets_that_listen_and_told_of_those_that_end() {
        let ports = Arc::new(Ports::open(false));
        let port = mapping();
        ports.publish(1, port).await.unwrap();
        // Before any process is there, and through all of them, the clients are kept.
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port.host_port)).unwrap();
        for _ in 0..3 {
            let (channel, process) = Channel::pair().unwrap();
            let (process, its) = (Arc::new(process), Arc::clone(&ports));
            let task = tokio::spawn(async move { hand_over(&channel, &its).await });
            let (command, socket) = next(&process).await;
            let target = "172.17.0.2:80".parse().unwrap();
            assert_eq!(command, control::Command::Listen { id: 1, transport: Transport::Tcp, target });
            let listener = TcpListener::from(socket.unwrap());
            assert_eq!(listener.local_addr().unwrap().port(), port.host_port);
            task.abort();
        }
        let (channel, process) = Channel::pair().unwrap();
        let (process, its) = (Arc::new(process), Arc::clone(&ports));
        tokio::spawn(async move { hand_over(&channel, &its).await });
        let listener = TcpListener::from(next(&process).await.1.unwrap());
        assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
        ports.unpublish(1);
        assert_eq!(next(&process).await.0, control::Command::Forget { id: 1 });
        ports.publish(2, mapping()).await.unwrap();
        assert!(matches!(next(&process).await.0, control::Command::Listen { id: 2, .. }));
    }
}
