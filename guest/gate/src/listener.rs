//! The ways in: a vsock port for the host and a unix socket for the guest itself.

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

/// Receive buffer of a vsock stream in bytes. The kernel charges every queued packet for more than its payload and
/// resets a stream that overflows, so small packets need a large buffer.
const VSOCK_BUFFER_SIZE: u64 = 8 * 1024 * 1024;

/// `linux/vm_sockets.h`.
const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;

const BACKLOG: libc::c_int = 1024;

/// Pause after a failed accept, which is mostly a lack of descriptors that others will free.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A listener could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The unix socket.
    #[error("can't listen on {path}")]
    Unix {
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The vsock port.
    #[error("can't listen on vsock port {port}; does the VM have a vsock device?")]
    Vsock {
        /// Its number.
        port: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A unix socket that only its owner may use (mode 0600).
#[derive(Debug)]
pub struct UnixAcceptor(UnixListener);

impl UnixAcceptor {
    /// Listens on `path`; a socket that an earlier process left there is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let bind = || {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            Ok(Self(listener))
        };
        bind().map_err(|source| ListenError::Unix { path: path.to_owned(), source })
    }

    /// Listens on `path` for all of its group, with a socket that outlives this process (see [`crate::store`]).
    pub fn bind_kept(path: &Path, name: &str) -> Result<Self, ListenError> {
        let acceptor = Self::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
            .map_err(|source| ListenError::Unix { path: path.to_owned(), source })?;
        fd_store::keep(name, acceptor.0.as_fd());
        Ok(acceptor)
    }

    /// Goes on with such a socket.
    pub fn adopt(socket: OwnedFd) -> Result<Self, ListenError> {
        let adopt = || {
            let listener = net::UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener).map(Self)
        };
        adopt().map_err(|source| ListenError::Unix { path: PathBuf::from("a kept socket"), source })
    }

    /// The next connection.
    pub async fn accept(&self) -> UnixStream {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => return stream,
                Err(error) => pause(&error).await,
            }
        }
    }
}

/// A vsock port of the guest that only the host may use.
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
    // Accepted sockets inherit both; the maximum comes first because it caps the size.
    set_buffer(&socket, SO_VM_SOCKETS_BUFFER_MAX_SIZE)?;
    set_buffer(&socket, SO_VM_SOCKETS_BUFFER_SIZE)?;
    // SAFETY: all-zero bytes are a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    // SAFETY: the address points to a sockaddr_vm of the given size that outlives the call.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_vm>() as libc::socklen_t)
    })?;
    // SAFETY: listen(2) takes no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(socket)
}

/// Accepts one connection; `None` when it does not come from the host.
fn accept(listener: RawFd) -> io::Result<Option<OwnedFd>> {
    // SAFETY: all-zero bytes are a valid sockaddr_vm.
    let mut peer: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: address and length point to a sockaddr_vm and its size, which outlive the call.
    let raw = check(unsafe { libc::accept4(listener, (&raw mut peer).cast(), &raw mut length, flags) })?;
    // SAFETY: `raw` was just returned by accept4(2) and has no other owner.
    let stream = unsafe { OwnedFd::from_raw_fd(raw) };
    // vsock is not namespaced: a container may be able to connect to the guest's own ports.
    Ok((peer.svm_cid == libc::VMADDR_CID_HOST).then_some(stream))
}

impl VsockAcceptor {
    /// Listens on `port` of every CID of this machine.
    pub fn bind(port: u32) -> Result<Self, ListenError> {
        let register = |socket| {
            // SAFETY: an `OwnedFd` is open and returns the same descriptor for as long as the `AsyncFd` owns it.
            unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
        };
        listen(port).and_then(register).map(Self).map_err(|source| ListenError::Vsock { port, source })
    }

    async fn try_accept(&self) -> io::Result<Option<UnixStream>> {
        let accepted = self.0.async_io(Interest::READABLE, |fd| accept(fd.as_raw_fd())).await?;
        // tokio's stream makes no other calls than epoll, recv, send, writev and shutdown, which every stream socket
        // has; so one type serves both families.
        accepted.map(|stream| UnixStream::from_std(net::UnixStream::from(stream))).transpose()
    }

    /// The next connection from the host.
    pub async fn accept(&self) -> UnixStream {
        loop {
            match self.try_accept().await {
                Ok(Some(stream)) => return stream,
                Ok(None) => eprintln!("refused a vsock connection that does not come from the host"),
                Err(error) => pause(&error).await,
            }
        }
    }
}

async fn pause(error: &io::Error) {
    eprintln!("can't accept a connection: {error}");
    tokio::time::sleep(RETRY_INTERVAL).await;
}
