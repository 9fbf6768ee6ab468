//! The process that serves the VM's network device: `bulkhead net`, or passt(1).
//!
//! With a new process only the guest's open connections are reset. Published ports survive, see
//! [`crate::backend::ports`].

use std::{
    collections::BTreeSet,
    convert::Infallible,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use tokio::process::Child;
use tracing::warn;

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
    device_process::Server,
    log_file::LogFile,
    ports::{Change, Ports},
};

/// Name of the process in errors.
const NAME: &str = "network";

/// The channel to a network process of ours, which answers nothing.
type NetChannel = Channel<api::Command, Infallible>;

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

/// The server of the network device.
#[derive(Debug)]
pub(in crate::backend) struct NetServer {
    plan: NetworkPlan,
    ports: Arc<Ports>,
    log: LogFile,
    /// `None` for passt, which has no control socket.
    control: Option<NetChannel>,
}

impl NetServer {
    /// A server of the planned network, to which the published ports are handed over.
    pub(in crate::backend) fn new(plan: NetworkPlan, ports: Arc<Ports>, log: LogFile) -> Self {
        Self { plan, ports, log, control: None }
    }

    /// Starts `bulkhead net`.
    fn own(&self) -> Result<(Child, NetChannel), ChildError> {
        let program = child::current_program().map_err(|error| ChildError::Start(NAME, error))?;
        let (control, theirs) = channel()?;
        Ok((child::spawn(NAME, &program, ["net"], theirs.as_fd(), &self.log)?, control))
    }
}

fn channel() -> Result<(NetChannel, OwnedFd), ChildError> {
    Channel::pair(NAME, api::MAX_PACKET)
}

impl Server for NetServer {
    const NAME: &str = NAME;
    const LOST: &str = "the network is down";
    const COMMAND: Command = Command::Network;

    type Error = StartError;

    async fn start(&mut self) -> Result<(Child, UnixStream), StartError> {
        let failed = |error| ChildError::Start(NAME, error);
        let (frontend, backend) = UnixStream::pair().map_err(failed)?;
        let (child, control) = match &self.plan.backend {
            Backend::BuiltIn(setup) => {
                let (child, control) = self.own()?;
                control.send(&api::Command::Setup(setup.clone()), Some(backend.as_fd())).await?;
                (child, Some(control))
            }
            Backend::Tap(tap) => {
                // Opened again for each process: the old one's queue of the device went away with its descriptor.
                let device = tap.open().await?;
                let (child, control) = self.own()?;
                // A packet carries one descriptor, so the device follows in a packet of its own.
                control.send(&api::Command::SetupTap, Some(backend.as_fd())).await?;
                control.send(&api::Command::Tap, Some(device.as_fd())).await?;
                (child, Some(control))
            }
            Backend::Passt(passt) => {
                // The stream takes the place of the control socket as the one descriptor that the child inherits.
                let arguments = Passt::arguments(self.plan.addresses());
                (child::spawn("passt", passt.program(), arguments, backend.as_fd(), &self.log)?, None)
            }
        };
        self.control = control;
        Ok((child, frontend))
    }

    async fn attend(&mut self) {
        match &self.control {
            Some(control) => match hand_over(control, &self.ports).await {},
            // passt publishes no ports, and the plan lets the guest publish none.
            None => std::future::pending().await,
        }
    }

    fn give_up(&self, reason: &str) {
        // Clients are refused instead of waiting in the backlog of a socket that nobody serves any more.
        self.ports.close(reason);
    }
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
