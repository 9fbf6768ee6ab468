//! The child `bulkhead net`: started before the VM, and again when it dies.

use std::{
    fs::File,
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::{Network, Network6};
use tokio::{process::Child, sync::mpsc, time::Instant};
use tracing::{info, warn};

use super::{
    child,
    vm::VmEvent,
    vmm::{Channel, VmmError},
};
use crate::{
    net::{
        addresses::{Addresses, MTU, PREFIX6},
        control::{self, Setup},
    },
    report::chain,
    vmm::api::Command,
};

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
    control: Channel,
    setup: Setup,
    log: File,
}

/// What the guest is told of its network.
pub(super) fn guest(addresses: &Addresses) -> Network {
    Network {
        address: addresses.guest,
        prefix: addresses.prefix,
        gateway: addresses.gateway,
        nameserver: addresses.gateway,
        host: addresses.host,
        ipv6: Some(Network6 {
            address: addresses.guest6,
            prefix: PREFIX6,
            gateway: addresses.gateway6,
            host: addresses.host6,
        }),
        mtu: MTU,
    }
}

/// Starts the process; the stream is the vmm's end.
pub(super) async fn start(setup: Setup, log: File) -> Result<(NetProcess, UnixStream), VmmError> {
    let (child, control, stream) = spawn(&setup, &log).await?;
    Ok((NetProcess { child, control, setup, log }, stream))
}

async fn spawn(setup: &Setup, log: &File) -> Result<(Child, Channel, UnixStream), VmmError> {
    let (control, theirs) = Channel::pair()?;
    let child = log.try_clone().and_then(|log| child::spawn("net", theirs.as_fd(), log)).map_err(VmmError::Spawn)?;
    info!(pid = child.id().unwrap_or_default(), "began a network process");
    let (frontend, backend) = UnixStream::pair().map_err(VmmError::Spawn)?;
    control.send(&control::Command::Setup(setup.clone()), Some(backend.as_fd())).await?;
    Ok((child, control, frontend))
}

/// Starts the process again whenever it ends, until the VM has ended; drop the future then.
pub(super) async fn keep(mut process: NetProcess, channel: Arc<Channel>, events: mpsc::Sender<VmEvent>) {
    let mut bad = 0;
    loop {
        let begun = Instant::now();
        let status = process.child.wait().await;
        let how = match status {
            // The vmm closed the stream; usually because the VM ends.
            Ok(status) if status.success() => "the network process ended with the vmm's connection".to_owned(),
            Ok(status) => format!("the network process ended ({status})"),
            Err(error) => format!("the network process is gone ({error})"),
        };
        info!("{how}");
        bad = if begun.elapsed() < STABLE { bad + 1 } else { 1 };
        if bad > BAD_STARTS {
            let warning = format!("the network is down: {how}, {bad} times in a row");
            let _ = events.send(VmEvent::NetworkDown(warning)).await;
            return;
        }
        tokio::time::sleep(PAUSE).await;
        match spawn(&process.setup, &process.log).await {
            Ok((child, control, stream)) => {
                (process.child, process.control) = (child, control);
                if let Err(error) = channel.send(&Command::Network, Some(stream.as_fd())).await {
                    warn!("{}", chain(&error));
                }
            }
            Err(error) => {
                let warning = format!("the network is down: its process cannot be started: {}", chain(&error));
                let _ = events.send(VmEvent::NetworkDown(warning)).await;
                return;
            }
        }
    }
}
