//! Processes that serve a device of the VM over vhost-user: started before the VM, and again whenever they die.
//!
//! The vmm keeps the guest's memory and the state of the queues, so a new process continues where the used rings stand:
//! the guest sees no reset of its device.

use std::{os::fd::AsFd, os::unix::net::UnixStream, sync::Arc, time::Duration};

use bulkhead_ipc::report::chain;
use bulkhead_vmm::api::Command;
use tokio::{
    process::Child,
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::Instant,
};
use tracing::{info, warn};

use super::{events::VmEvent, vmm::VmmChannel};

/// Bad starts in a row, each of a process that did not live for [`STABLE_TIME`], after which the device is given up.
const MAX_BAD_STARTS: u32 = 5;
/// Lifetime from which on a start counts as a good one.
const STABLE_TIME: Duration = Duration::from_secs(60);
/// Pause before the next start.
const RESTART_INTERVAL: Duration = Duration::from_millis(200);

/// A kind of such a process.
pub(super) trait Server: Send + Sync + 'static {
    /// Its name in messages, as in "the … process".
    const NAME: &'static str;
    /// The consequence of its loss, as a sentence without an end.
    const LOST: &'static str;
    /// The command of the vmm that comes with the stream of a new process.
    const COMMAND: Command;

    /// Error of starting it.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Starts a process; returns it with the vmm's end of the vhost-user connection (vhost-user.rst in QEMU's sources):
    /// the vmm is its frontend, the process its backend.
    fn start(&mut self) -> impl Future<Output = Result<(Child, UnixStream), Self::Error>> + Send;

    /// Does what the running process needs besides; returns when a new process has to take its place. Nothing is lost
    /// when the future is dropped.
    fn attend(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Takes note that the vmm's device is connected to a new process.
    fn replaced(&mut self) {}

    /// Takes note that there will be no process any more, for this reason.
    fn give_up(&self, _reason: &str) {}
}

/// A running process.
#[derive(Debug)]
pub(super) struct DeviceProcess<S> {
    server: S,
    child: Child,
}

/// Starts a process; the returned stream is the vmm's end of the vhost-user connection.
pub(super) async fn start<S: Server>(mut server: S) -> Result<(DeviceProcess<S>, UnixStream), S::Error> {
    let (child, stream) = start_logged(&mut server).await?;
    Ok((DeviceProcess { server, child }, stream))
}

async fn start_logged<S: Server>(server: &mut S) -> Result<(Child, UnixStream), S::Error> {
    let (child, stream) = server.start().await?;
    info!(pid = child.id().unwrap_or_default(), "started a {} process", S::NAME);
    Ok((child, stream))
}

/// Keeps a process running until its VM has ended.
#[derive(Debug)]
pub(super) struct DeviceSupervisor {
    task: JoinHandle<()>,
    end: Arc<Notify>,
}

impl DeviceSupervisor {
    /// Supervises the process in a task of its own.
    pub(super) fn new<S: Server>(
        mut process: DeviceProcess<S>,
        channel: Arc<VmmChannel>,
        events: mpsc::Sender<VmEvent>,
    ) -> Self {
        let end = Arc::new(Notify::new());
        let ended = Arc::clone(&end);
        let task = tokio::spawn(async move {
            tokio::select! {
                reason = supervise(&mut process, &channel) => {
                    process.server.give_up(&reason);
                    let _ = events.send(VmEvent::DeviceDown(reason)).await;
                }
                () = ended.notified() => {}
            }
            // Fails if the process is gone already.
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

/// Restarts the process whenever it ends, until it has failed too often; returns the reason.
async fn supervise<S: Server>(process: &mut DeviceProcess<S>, channel: &VmmChannel) -> String {
    let mut bad_starts = 0;
    loop {
        let started = Instant::now();
        let status = tokio::select! {
            status = process.child.wait() => status,
            () = process.server.attend() => {
                // The next one continues where this one is cut off, as after a crash, but nobody is to blame.
                let _ = process.child.kill().await;
                match connect(process, channel).await {
                    Ok(()) => continue,
                    Err(error) => return format!("{}: {}", S::LOST, chain(&error)),
                }
            }
        };
        let end = match status {
            // The process ends in success when the vmm closes the stream, usually because the VM ends. Then
            // `DeviceSupervisor::end` follows and stops this task.
            Ok(status) if status.success() => format!("the {} process ended with the vmm's connection", S::NAME),
            Ok(status) => format!("the {} process ended ({status})", S::NAME),
            Err(error) => format!("the {} process is gone ({error})", S::NAME),
        };
        info!("{end}");
        // A guest can crash the process by a bug in it. Each start costs the host something, so a guest that does it on
        // purpose is stopped after some; one crash an hour is not held against it.
        bad_starts = if started.elapsed() < STABLE_TIME { bad_starts + 1 } else { 1 };
        if bad_starts > MAX_BAD_STARTS {
            return format!("{}: {end}, {bad_starts} times in a row", S::LOST);
        }
        tokio::time::sleep(RESTART_INTERVAL).await;
        if let Err(error) = connect(process, channel).await {
            return format!("{}: {}", S::LOST, chain(&error));
        }
    }
}

/// Starts a new process in the place of one that is gone, and connects the vmm's device to it.
async fn connect<S: Server>(process: &mut DeviceProcess<S>, channel: &VmmChannel) -> Result<(), S::Error> {
    let (child, stream) = start_logged(&mut process.server).await?;
    process.child = child;
    // The vmm connects its device to the new stream, with a kick and an interrupt for each queue: the old process may
    // have died between serving a request and reporting it.
    match channel.send(&S::COMMAND, Some(stream.as_fd())).await {
        Ok(()) => process.server.replaced(),
        // The vmm is gone. The process ends with `stream`, and `DeviceSupervisor::end` follows.
        Err(error) => warn!("{}", chain(&error)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        os::fd::OwnedFd,
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::*;
    use crate::backend::vmm;
    use bulkhead_ipc::channel as packets;
    use bulkhead_vmm::api::MAX_PACKET;

    /// Runs a shell line as the process, and counts its starts.
    struct Line {
        script: &'static str,
        starts: Arc<AtomicU32>,
        /// Demands for a new process, and the number of starts after each.
        replacements: Option<(mpsc::Receiver<()>, mpsc::Sender<u32>)>,
    }

    impl Server for Line {
        const NAME: &str = "test";
        const LOST: &str = "the test is down";
        const COMMAND: Command = Command::Shares;

        type Error = io::Error;

        async fn start(&mut self) -> io::Result<(Child, UnixStream)> {
            self.starts.fetch_add(1, Ordering::SeqCst);
            let child = tokio::process::Command::new("sh").args(["-c", self.script]).kill_on_drop(true).spawn()?;
            Ok((child, UnixStream::pair()?.0))
        }

        async fn attend(&mut self) {
            let demand = match &mut self.replacements {
                Some((demands, _)) => demands.recv().await,
                None => None,
            };
            if demand.is_none() {
                std::future::pending::<()>().await;
            }
        }

        fn replaced(&mut self) {
            if let Some((_, replaced)) = &self.replacements {
                let _ = replaced.try_send(self.starts.load(Ordering::SeqCst));
            }
        }
    }

    async fn supervised(line: &'static str) -> (DeviceSupervisor, mpsc::Receiver<VmEvent>, OwnedFd, Arc<AtomicU32>) {
        let starts = Arc::new(AtomicU32::new(0));
        let server = Line { script: line, starts: Arc::clone(&starts), replacements: None };
        let (supervisor, events, vmm) = supervise(server).await;
        (supervisor, events, vmm, starts)
    }

    async fn supervise(server: Line) -> (DeviceSupervisor, mpsc::Receiver<VmEvent>, OwnedFd) {
        let (process, _stream) = start(server).await.unwrap();
        let (channel, theirs) = vmm::channel().unwrap();
        let (sender, events) = mpsc::channel(4);
        (DeviceSupervisor::new(process, Arc::new(channel), sender), events, theirs)
    }

    fn assert_connected(vmm: &OwnedFd) {
        let (command, stream) = packets::receive::<Command>(vmm, &mut vec![0; MAX_PACKET]).unwrap().unwrap();
        assert!(command == Command::Shares && stream.is_some());
    }

    #[tokio::test]
    async fn the_vmm_gets_a_stream_to_each_new_process_until_too_many_have_died() {
        let (_supervisor, mut events, vmm, starts) = supervised("exit 3").await;
        let text = "the test is down: the test process ended (exit status: 3), 6 times in a row";
        assert_eq!(events.recv().await, Some(VmEvent::DeviceDown(text.to_owned())));
        assert_eq!(starts.load(Ordering::SeqCst), 1 + MAX_BAD_STARTS);
        for _ in 0..MAX_BAD_STARTS {
            assert_connected(&vmm);
        }
    }

    #[tokio::test]
    async fn a_process_is_replaced_on_demand_more_often_than_one_may_crash() {
        let (demand, demands) = mpsc::channel(1);
        let (replaced, mut replacements) = mpsc::channel(1);
        let demanded = Some((demands, replaced));
        let server = Line { script: "exec sleep 1000", starts: Arc::default(), replacements: demanded };
        let (supervisor, mut events, vmm) = supervise(server).await;
        for number in 0..2 * MAX_BAD_STARTS {
            demand.send(()).await.unwrap();
            assert_eq!(replacements.recv().await, Some(number + 2));
            assert_connected(&vmm);
        }
        supervisor.end().await;
        assert_eq!(events.recv().await, None);
    }

    #[tokio::test]
    async fn the_process_of_a_vm_that_has_ended_is_gone_and_not_started_again() {
        let (supervisor, mut events, _vmm, starts) = supervised("exec sleep 1000").await;
        supervisor.end().await;
        assert_eq!((events.recv().await, starts.load(Ordering::SeqCst)), (None, 1));
    }
}
