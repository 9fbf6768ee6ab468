//! Sockets of the host that containers may mount, such as that of the user's ssh-agent.
//!
//! The guest asks over the agent's connection ([`super::agent`]), one request for each connection of a container. The
//! backend connects to the host's socket and hands that stream to the vmm, which makes it the host's end of a vsock
//! connection to init in the guest: as with docker.sock, no byte passes through this process, and the vmm connects to
//! nothing. A copy of the descriptor stays here only to notice the end, because connections are limited.
//!
//! The guest names a socket by its number in the list. Which socket that is, and that it is one to offer ([`target`]),
//! is decided here, for each connection.

mod target;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bulkhead_protocol::{self as protocol, FIRST_HOST_SOCKET_PORT, MAX_HOST_CONNECTIONS, Share};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sha2::{Digest, Sha256};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{api::StartOptions, child::ChildError, vmm::VmmChannel};
use crate::{
    hex::hex,
    settings::{AllowedDirectories, Base, Paths, Places, Settings, SshAgent},
};
use bulkhead_ipc::report::chain;
use bulkhead_vmm::api::Command;
pub use target::Refusal;

/// Name of the ssh-agent's socket in the guest's directory of such sockets, by Docker Desktop's convention.
const SSH_AGENT: &str = "ssh-auth.sock";

/// Digits of the names of other sockets.
const DIGITS: usize = 16;

/// A socket of the host that containers may mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSocket {
    /// Its path in the guest's directory of such sockets.
    pub name: String,
    /// Its path on the host.
    pub path: PathBuf,
    /// The directories in which it must be, if the policy has some.
    pub allowed: Option<AllowedDirectories>,
}

impl HostSocket {
    /// Plans the sockets of a VM that shares these directories. Also returns a line for each that is left out.
    ///
    /// A socket that is missing is offered all the same: its program may be started later.
    pub(super) fn plan(
        settings: &Settings,
        options: &StartOptions,
        base: &Base,
        shares: &[Share],
    ) -> (Vec<Self>, Vec<String>) {
        let agent = match settings.ssh_agent() {
            SshAgent::Off => None,
            SshAgent::OfEnvironment => options.ssh_agent.clone(),
            SshAgent::At(path) => Some(path),
        };
        if options.no_shares {
            return Default::default();
        }
        let allowed = settings.policy().allowed_directories();
        let (mut sockets, mut problems) = (Vec::new(), Vec::new());
        let mut add = |socket: Self, problem: &str| match socket.find(&own(base), shares) {
            Ok(_) | Err(Refusal::Missing(_)) => sockets.push(socket),
            Err(refusal) => problems.push(format!("{problem}: {}", chain(&refusal))),
        };
        if let Some(path) = agent {
            // Setting and variable can name any socket, so the policy's directories bound it like the others.
            let socket = Self { name: SSH_AGENT.to_owned(), path, allowed: allowed.clone() };
            add(socket, "the VM has no ssh-agent");
        }
        let places = Places::from_environment();
        let paths: BTreeSet<_> = settings.shared_sockets().iter().filter_map(|path| places.resolve(path)).collect();
        for path in paths {
            add(Self { name: name_of(&path), path, allowed: allowed.clone() }, "containers cannot have a socket");
        }
        (sockets, problems)
    }

    /// The guest's part.
    pub(super) fn guest(&self) -> protocol::HostSocket {
        protocol::HostSocket { name: self.name.clone(), path: self.path.to_string_lossy().into_owned() }
    }

    /// Finds and judges it as it is now.
    fn find(&self, own: &[PathBuf], shares: &[Share]) -> Result<File, Refusal> {
        target::find(&self.path, own, shares, self.allowed.as_ref())
    }
}

/// The name of a socket in the guest, which never means another one: a container keeps its mounts when the settings
/// change.
fn name_of(path: &Path) -> String {
    let digest = hex(&Sha256::digest(path.as_os_str().as_bytes()));
    format!("{}.sock", &digest[..DIGITS])
}

/// The paths of a profile's own Docker socket: as `DOCKER_HOST` names it, and without links. Clients that start a
/// container with the socket take its source from that variable.
pub(super) fn engine_sockets(paths: &Paths) -> Box<[String]> {
    let named = paths.docker_socket();
    // By its directory: the socket itself may not be there yet.
    let directory = named.parent().and_then(|directory| fs::canonicalize(directory).ok());
    let real = directory.zip(named.file_name()).map(|(directory, name)| directory.join(name));
    let all: BTreeSet<_> = real.into_iter().chain([named]).collect();
    all.into_iter().filter_map(|path| path.into_os_string().into_string().ok()).collect()
}

/// The directories with Bulkhead's own sockets.
fn own(base: &Base) -> Vec<PathBuf> {
    base.directories().map(Path::to_owned).into()
}

/// Reason that a container has no connection to a socket of the host.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// The guest names a socket that was not offered.
    #[error("the host offers no socket with the number {0}")]
    Unknown(u32),
    /// The socket is not one to offer now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nothing listens, or too many wait.
    #[error("cannot connect to the socket {}", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The limit is reached.
    #[error("containers have {MAX_HOST_CONNECTIONS} connections to sockets of the host already; close some")]
    Full,
    /// The vmm is gone.
    #[error(transparent)]
    Vmm(#[from] ChildError),
}

/// The sockets of a VM, and the connections to them.
#[derive(Debug)]
pub(super) struct HostSockets {
    sockets: Vec<HostSocket>,
    own: Vec<PathBuf>,
    permits: Arc<Semaphore>,
    /// One task for each connection, which waits for its end.
    connections: Mutex<JoinSet<()>>,
}

impl HostSockets {
    /// The sockets of a plan, for a VM without connections.
    pub(super) fn new(sockets: Vec<HostSocket>, base: &Base) -> Self {
        Self {
            sockets,
            own: own(base),
            permits: Arc::new(Semaphore::new(MAX_HOST_CONNECTIONS)),
            connections: Mutex::default(),
        }
    }

    /// Connects the guest to the socket of this number. `shares` is what containers may change at the moment.
    pub(super) async fn connect(&self, number: u32, vmm: &VmmChannel, shares: &[Share]) -> Result<(), ConnectError> {
        let at = usize::try_from(number).ok();
        let socket = at.and_then(|at| self.sockets.get(at)).ok_or(ConnectError::Unknown(number))?;
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| ConnectError::Full)?;
        let found = socket.find(&self.own, shares)?;
        // Never waits: a unix socket has a connection at once, or none.
        let stream = UnixStream::connect(target::path_of(&found))
            .await
            .map_err(|source| ConnectError::Connect { path: socket.path.clone(), source })?;
        let port = FIRST_HOST_SOCKET_PORT.saturating_add(number);
        vmm.send(&Command::VsockConnect { port }, Some(stream.as_fd())).await?;
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that have ended leave the set here, so that it stays as small as the limit.
        while connections.try_join_next().is_some() {}
        connections.spawn(wait_for_end(stream, permit));
        Ok(())
    }

    /// Forgets all connections, whose guest is gone.
    pub(super) fn clear(&self) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

/// Waits until both directions of a stream have ended, and then closes it. The vmm has the same stream and ends it, also
/// if the host's program never does.
async fn wait_for_end(stream: UnixStream, permit: OwnedSemaphorePermit) {
    let is_over = || {
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        let hung_up = poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].any().unwrap_or(true);
        if hung_up { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WouldBlock)) }
    };
    // Not readability: one direction may have ended long before the other, and would wake this task without end.
    while stream.writable().await.is_ok() {
        // A stream that is merely writable is not looked at again before something changes.
        match stream.try_io(Interest::WRITABLE, is_over) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => break,
        }
    }
    drop((stream, permit));
}

#[cfg(test)]
mod tests;
