//! The child `bulkhead net`: started before the VM, and again when it dies.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::Network;
use tokio::{process::Child, sync::mpsc, time::Instant};
use tracing::{info, warn};

use super::{child, vm::VmEvent, vmm::Channel};
use crate::{net::addresses, vmm::api::Command};

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
    log: File,
}

/// What the guest is told of its network.
pub(super) fn guest() -> Network {
    Network {
        address: addresses::GUEST,
        prefix: addresses::PREFIX,
        gateway: addresses::GATEWAY,
        nameserver: addresses::GATEWAY,
        host: addresses::HOST,
        ipv6: None,
        mtu: addresses::MTU,
    }
}

/// Starts the process; the stream is the vmm's end.
pub(super) fn start(log: File) -> io::Result<(NetProcess, UnixStream)> {
    let (child, stream) = spawn(&log)?;
    Ok((NetProcess { child, log }, stream))
}

fn spawn(log: &File) -> io::Result<(Child, UnixStream)> {
    let (theirs, vmms) = UnixStream::pair()?;
    let child = child::spawn("net", theirs.as_fd(), log.try_clone()?)?;
    info!(pid = child.id().unwrap_or_default(), "began a network process");
    Ok((child, vmms))
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
        match spawn(&process.log) {
            Ok((child, stream)) => {
                process.child = child;
                if let Err(error) = channel.send(&Command::Network, Some(stream.as_fd())).await {
                    warn!("{}", crate::report::chain(&error));
                }
            }
            Err(error) => {
                let warning = format!("the network is down: its process cannot be started: {error}");
                let _ = events.send(VmEvent::NetworkDown(warning)).await;
                return;
            }
        }
    }
}
