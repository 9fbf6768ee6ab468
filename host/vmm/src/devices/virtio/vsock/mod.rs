//! The virtio-vsock device (virtio 1.3, 5.10), served in this process by one thread.
//!
//! Host programs reach it in two ways. The *hybrid socket* is a unix socket on which a client writes `CONNECT <port>\n`
//! and reads `OK <host port>\n` once the guest accepted, or `LISTEN <port>\n` and reads `OK <guest port>\n` once the guest
//! has connected to that port of the host. A [`VsockHandle`] takes a stream that is open already, without a greeting.
//!
//! A connection of the guest to port P of the host (context id 2) takes the stream that a handle has offered for P, if
//! it comes from a reserved port (below 1024), and otherwise the client that listens at P, if the VM may have any. Without
//! one it is refused: this process connects to nothing.
//!
//! # The data path
//!
//! Host to guest: one `recvmsg` reads from the host's socket straight into the guest's receive buffer, behind the
//! header, as much as there is and fits. One copy, by the kernel; one system call a packet, and one more that finds
//! the socket empty after each burst. Guest to host: one `sendmsg` writes straight from the guest's buffers, over
//! however many descriptors the payload is spread. One copy, one system call a packet. Only while a host reader is
//! slower than the guest are bytes copied twice more, into and out of a buffer of at most 256 KiB a connection, which
//! is the credit the guest has. Streams and kicks are watched edge-triggered and readiness is remembered, so nothing
//! is re-armed, and a stream that cannot be served (no buffer, no credit) does not wake the thread.
//!
//! # Parts
//!
//! `packet` is the wire format, `segments` the memory behind a descriptor chain, `credit` the flow control, `stream` a
//! host socket, `offers` and `listeners` the streams for the guest's connections, `connection` the state machine of one
//! connection, `hybrid` the line protocol, `muxer` all connections, `worker` the thread and the queues.

mod connection;
mod credit;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod hybrid;
mod listeners;
mod muxer;
mod offers;
mod packet;
mod segments;
mod stream;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    fs,
    io::{self, ErrorKind},
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::Arc,
    thread::JoinHandle,
};

use virtio_bindings::{
    virtio_ids::VIRTIO_ID_VSOCK,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;

use self::{
    muxer::{Endpoint, MAX_CONNECTIONS},
    offers::Offers,
    worker::{ConnectRequest, Parts, Shared},
};
use super::{ActivateError, Activation, ActiveQueue, VirtioDevice, spawn_confined};

/// Sizes of the receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 256];

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// `VIRTIO_VSOCK_F_STREAM`: stream sockets are supported (5.10.3).
const F_STREAM: u64 = 1 << 0;

/// The first context ID that is not reserved (5.10.4).
const FIRST_GUEST_CID: u32 = 3;

/// Maximum length of a path in `sockaddr_un`, without its terminator.
const MAX_PATH: usize = 107;

/// The device. Its socket file stays when it is dropped: a confined process cannot remove it, so its parent does.
pub struct Vsock {
    endpoint: Endpoint,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A handle that connects host streams to the guest, from any thread.
#[derive(Clone, Debug)]
pub struct VsockHandle {
    shared: Arc<Shared>,
    offers: Arc<Offers>,
}

impl VsockHandle {
    /// Makes an open stream socket the host end of a connection to a port of the guest. If the guest refuses, does not
    /// answer or is gone, the stream is closed. Until the driver is up, the stream waits.
    pub fn connect(&self, port: u32, stream: OwnedFd) {
        self.shared.request(ConnectRequest { guest_port: port, stream });
    }

    /// Makes an open stream socket the host end of the guest's next connection to a port of the host. It replaces one
    /// that the guest has not taken.
    pub fn offer(&self, port: u32, stream: OwnedFd) {
        self.offers.put(port, stream);
    }
}

impl Vsock {
    /// Creates the device of the guest with context ID `cid` and listens on the hybrid socket, whose clients may wait for
    /// connections of the guest if `clients_listen`. A socket file without a listener is replaced.
    ///
    /// # Errors
    ///
    /// A reserved `cid`, a path that cannot be bound or is too long, or one on which another process listens.
    pub fn new(cid: u32, socket_path: &Path, clients_listen: bool) -> io::Result<(Self, VsockHandle)> {
        if !(FIRST_GUEST_CID..u32::MAX).contains(&cid) {
            let text = format!("invalid guest context ID {cid}: must be at least {FIRST_GUEST_CID}");
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        }
        let listener = listen(socket_path)?;
        let offers = Arc::new(Offers::new());
        let endpoint = Endpoint {
            guest_cid: u64::from(cid),
            offers: Arc::clone(&offers),
            listener: Arc::new(listener),
            clients_listen,
            max_connections: MAX_CONNECTIONS,
        };
        let shared = Arc::new(Shared::new()?);
        let handle = VsockHandle { shared: Arc::clone(&shared), offers };
        Ok((Self { endpoint, shared, thread: None }, handle))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_vsock_config` is the guest's context id, 64 bits (5.10.4).
        let config = self.endpoint.guest_cid.to_le_bytes();
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or(&[]);
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // The transport resets before it activates again; a second thread must not exist even if it did not.
        self.reset();
        let Activation { memory, features, queues, config_interrupt: _, exit } = activation;
        let mut queues = queues.into_iter();
        let mut next = |index: usize| -> Result<Option<ActiveQueue>, ActivateError> {
            let Some(mut active) = queues.next().flatten() else { return Ok(None) };
            // The transport has done both; tests activate the device without one.
            active.queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
            if active.queue.is_valid(&*memory) {
                return Ok(Some(active));
            }
            Err(ActivateError::InvalidQueue(index))
        };
        let (rx, tx, event) = (next(RX)?, next(TX)?, next(EVENT)?);
        let parts = Parts {
            rx: rx.ok_or(ActivateError::MissingQueue(RX))?,
            tx: tx.ok_or(ActivateError::MissingQueue(TX))?,
            event,
            memory,
            endpoint: self.endpoint.clone(),
            shared: Arc::clone(&self.shared),
        };
        // Errors up to here reach the driver as DEVICE_NEEDS_RESET.
        let muxer = worker::prepare(&parts)?;
        self.shared.set_stop(false);
        self.thread = Some(spawn_confined("vsock", &exit, move || worker::run(parts, muxer))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Connections end with the thread: their host streams are closed. The hybrid socket and requests that wait
            // for a driver survive.
            self.shared.set_stop(true);
            let _ = thread.join();
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
        self.shared.close();
        self.endpoint.offers.close();
    }
}

/// Binds the hybrid socket, for its owner only.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().as_bytes().len() > MAX_PATH {
        let text = format!("socket path too long: at most {MAX_PATH} bytes are possible");
        return Err(io::Error::new(ErrorKind::InvalidInput, text));
    }
    let listener = match UnixListener::bind(path) {
        // Left by a process that was killed. The profile's lock keeps others from doing the same at this moment.
        Err(error) if error.kind() == ErrorKind::AddrInUse && is_stale(path)? => {
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        result => result?,
    };
    // A second barrier: the backend's directory for sockets is private as well.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// True for a socket file without a listener. Other files are never touched.
fn is_stale(path: &Path) -> io::Result<bool> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Ok(false);
    }
    Ok(UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused))
}
