//! Listeners: a vsock port for the host, and unix sockets.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{fs::PermissionsExt, net},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{UnixListener, UnixStream},
};

use crate::fd_store;

/// Receive buffer of a vsock stream in bytes. The kernel charges each queued packet for more than its payload and
/// resets a stream that overflows, so small packets need a large buffer.
const VSOCK_BUFFER_SIZE: u64 = 8 * 1024 * 1024;

/// Socket options of `linux/vm_sockets.h`; their level is `AF_VSOCK` itself.
const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;

/// Connections that wait to be accepted, for instance while a new gate starts.
const BACKLOG: libc::c_int = 1024;

/// Pause after a failed accept. The usual cause is a lack of descriptors, which connections that end will free.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A listener that could not be created.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A unix socket.
    #[error("cannot listen on {path}")]
    Unix {
        /// The path asked for.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A vsock port.
    #[error("cannot listen on vsock port {port}; does the VM have a vsock device?")]
    Vsock {
        /// The port asked for.
        port: u32,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// A listening unix socket that only root may use (mode 0600) unless it is shared.
#[derive(Debug)]
pub struct UnixAcceptor(UnixListener);

impl UnixAcceptor {
    /// Listens on `path`, and replaces a socket that an earlier process left there.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let bind = || {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            // bind(2) used the umask. In between nobody else gets in, because the directory is root's own (0700).
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            Ok(Self(listener))
        };
        bind().map_err(|source| ListenError::Unix { path: path.to_owned(), source })
    }

    /// Listens on `path` for root and its group, with a socket that outlives this process (see `fd_store`).
    pub fn bind_stored(path: &Path, name: &str) -> Result<Self, ListenError> {
        let acceptor = Self::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
            .map_err(|source| ListenError::Unix { path: path.to_owned(), source })?;
        fd_store::store(name, acceptor.0.as_fd());
        Ok(acceptor)
    }

    /// Continues with a socket that an earlier gate left in the store.
    pub fn adopt(socket: OwnedFd) -> Result<Self, ListenError> {
        let adopt = || {
            let listener = net::UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener).map(Self)
        };
        adopt().map_err(|source| ListenError::Unix { path: PathBuf::from("a stored socket"), source })
    }

    /// Returns the next connection; retries after errors.
    pub async fn accept(&self) -> UnixStream {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => return stream,
                Err(error) => pause(&error).await,
            }
        }
    }
}

/// A listening vsock port of the guest that only the host may use.
#[derive(Debug)]
pub struct VsockAcceptor(AsyncFd<OwnedFd>);

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn set_buffer(socket: &OwnedFd, option: libc::c_int) -> io::Result<()> {
    let bytes = VSOCK_BUFFER_SIZE;
    // SAFETY: the option value points to a u64 of the given size that outlives the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            option,
            (&raw const bytes).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    })
    .map(drop)
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket(2) takes no pointers.
    let raw = check(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    // SAFETY: `raw` was just returned by socket(2) and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // Before listen(2), because accepted sockets inherit both. The maximum comes first because it caps the size.
    set_buffer(&socket, SO_VM_SOCKETS_BUFFER_MAX_SIZE)?;
    set_buffer(&socket, SO_VM_SOCKETS_BUFFER_SIZE)?;
    // SAFETY: all-zero bytes are a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    // The port is below 1024, so it takes CAP_NET_BIND_SERVICE in the VM's user namespace. A container cannot have that
    // and take the gate's place while a new gate starts.
    address.svm_port = port;
    // SAFETY: the address points to a sockaddr_vm of the given size that outlives the call.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_vm>() as libc::socklen_t)
    })?;
    // SAFETY: listen(2) takes no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(socket)
}

/// Accepts a connection; `None` if it does not come from the host.
fn accept(listener: RawFd) -> io::Result<Option<OwnedFd>> {
    // SAFETY: all-zero bytes are a valid sockaddr_vm.
    let mut peer: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: address and length point to a sockaddr_vm and its size, which outlive the call.
    let raw = check(unsafe { libc::accept4(listener, (&raw mut peer).cast(), &raw mut length, flags) })?;
    // SAFETY: `raw` was just returned by accept4(2) and has no other owner.
    let stream = unsafe { OwnedFd::from_raw_fd(raw) };
    // vsock is not namespaced, and the guest can connect to its own ports (VMADDR_CID_LOCAL, or its own CID). So a
    // process in a container that can make a vsock socket arrives here, too, and is closed at once.
    Ok((peer.svm_cid == libc::VMADDR_CID_HOST).then_some(stream))
}

impl VsockAcceptor {
    /// Listens on `port` of all CIDs of this machine.
    pub fn bind(port: u32) -> Result<Self, ListenError> {
        let register = |socket| {
            // SAFETY: an `OwnedFd` is open and returns the same descriptor for as long as the `AsyncFd` owns it.
            unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
        };
        listen(port).and_then(register).map(Self).map_err(|source| ListenError::Vsock { port, source })
    }

    async fn try_accept(&self) -> io::Result<Option<UnixStream>> {
        let accepted = self.0.async_io(Interest::READABLE, |fd| accept(fd.as_raw_fd())).await?;
        // tokio's stream uses epoll, recv, send, writev and shutdown, which every stream socket has. So one type serves
        // both families, and the code behind this point does not distinguish them.
        accepted.map(|stream| UnixStream::from_std(net::UnixStream::from(stream))).transpose()
    }

    /// Returns the next connection from the host; retries after errors.
    pub async fn accept(&self) -> UnixStream {
        loop {
            match self.try_accept().await {
                Ok(Some(stream)) => return stream,
                Ok(None) => eprintln!("refused a vsock connection that did not come from the host"),
                Err(error) => pause(&error).await,
            }
        }
    }
}

async fn pause(error: &io::Error) {
    eprintln!("cannot accept a connection: {error}");
    tokio::time::sleep(RETRY_INTERVAL).await;
}
