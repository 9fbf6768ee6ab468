//! The process that serves the file system device: `bulkhead share-server`.
//!
//! A new process after a crash continues with the guest's queues: a request that was under way is served again.

use std::{
    convert::Infallible,
    os::{fd::AsFd, unix::net::UnixStream},
};

use tokio::process::Child;

use super::plan::SharesPlan;
use crate::backend::{
    channel::Channel,
    child::{self, ChildError},
    device_process::Server,
    log_file::LogFile,
};
use bulkhead_share::api;
use bulkhead_vmm::api::Command;

/// The server of the file system device.
#[derive(Debug)]
pub(in crate::backend) struct ShareServer {
    plan: SharesPlan,
    log: LogFile,
    /// The control socket of the running process, which ends with it.
    control: Option<Channel<api::Command, Infallible>>,
}

impl ShareServer {
    /// A server of the planned directories.
    pub(in crate::backend) fn new(plan: SharesPlan, log: LogFile) -> Self {
        Self { plan, log, control: None }
    }
}

impl Server for ShareServer {
    const NAME: &str = "share";
    const LOST: &str = "containers cannot use the shared directories";
    const COMMAND: Command = Command::Shares;

    type Error = ChildError;

    async fn start(&mut self) -> Result<(Child, UnixStream), ChildError> {
        let failed = |error| ChildError::Start(Self::NAME, error);
        let (frontend, backend) = UnixStream::pair().map_err(failed)?;
        let program = child::current_program().map_err(failed)?;
        let (control, theirs) = Channel::pair(Self::NAME, api::MAX_PACKET)?;
        let child = child::spawn(Self::NAME, &program, ["share-server"], theirs.as_fd(), &self.log)?;
        control.send(&self.plan.setup(), Some(backend.as_fd())).await?;
        self.control = Some(control);
        Ok((child, frontend))
    }
}
