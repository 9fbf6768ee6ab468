//! The process that serves the file system device: `bulkhead share-server`.
//!
//! A new process after a crash continues with the guest's queues and with what its predecessor knew, which is in memory
//! that this process holds and never reads: a request that was under way is served again. For the same reason the list
//! of directories can change while the VM runs: a process is confined to those that it was started with, and another
//! one takes its place.

use std::{
    convert::Infallible,
    fs::{DirBuilder, File},
    io,
    os::{
        fd::AsFd,
        unix::{fs::DirBuilderExt, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use tokio::{
    process::Child,
    sync::{mpsc, oneshot},
};

use super::plan::SharesPlan;
use crate::{
    backend::{
        channel::Channel,
        child::{self, ChildError},
        device_process::Server,
        log_file::LogFile,
    },
    image::Image,
    settings::Paths,
};
use bulkhead_share::api;
use bulkhead_vmm::api::Command;

/// A change of the directories of a running VM.
#[derive(Debug)]
pub(in crate::backend) struct Change {
    /// All directories from now on.
    pub(in crate::backend) plan: SharesPlan,
    /// Hears when the guest's device has them.
    pub(in crate::backend) done: oneshot::Sender<()>,
}

/// The server of the file system device.
#[derive(Debug)]
pub(in crate::backend) struct ShareServer {
    plan: SharesPlan,
    /// Bulkhead's own files.
    hidden: Vec<PathBuf>,
    log: LogFile,
    changes: mpsc::Receiver<Change>,
    /// Those that wait for the next process, which has the last change.
    waiting: Vec<oneshot::Sender<()>>,
    /// Memory that each process leaves to its successor.
    state: Option<File>,
    /// The control socket of the running process, which ends with it.
    control: Option<Channel<api::Command, Infallible>>,
}

impl ShareServer {
    /// A server of the planned directories, in which the files of `paths`, of other profiles and of `image` are not; and
    /// the sender of changes.
    pub(in crate::backend) fn new(
        plan: SharesPlan,
        paths: &Paths,
        image: &Image,
        log: LogFile,
    ) -> (Self, mpsc::Sender<Change>) {
        let directories = paths.base().directories();
        for directory in directories {
            // One that exists is known by what it is, wherever it is moved. Without it, its name alone is taken.
            let _ = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        }
        // The disk may be a link to another place, and the image is where the user chose.
        let files = [paths.data_disk(), image.kernel.clone(), image.rootfs.clone()];
        let hidden = directories.into_iter().map(Path::to_owned).chain(files).collect();
        let (sender, changes) = mpsc::channel(1);
        (Self { plan, hidden, log, changes, waiting: Vec::new(), state: None, control: None }, sender)
    }

    /// The memory for the processes, zeros at first.
    fn state(&mut self) -> io::Result<&File> {
        let state = match self.state.take() {
            Some(state) => state,
            None => api::new_state()?,
        };
        Ok(self.state.insert(state))
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
        let state = self.state().map_err(failed)?;
        control.send(&api::Command::State, Some(state.as_fd())).await?;
        control.send(&self.plan.setup(&self.hidden), Some(backend.as_fd())).await?;
        self.control = Some(control);
        Ok((child, frontend))
    }

    async fn attend(&mut self) {
        match self.changes.recv().await {
            Some(Change { plan, done }) => {
                self.plan = plan.keeping(&self.plan);
                self.waiting.push(done);
            }
            // The VM ends.
            None => std::future::pending().await,
        }
    }

    fn replaced(&mut self) {
        for done in self.waiting.drain(..) {
            let _ = done.send(());
        }
    }
}
