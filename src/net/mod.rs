//! The guest's network: `bulkhead net`, a child of the backend. It is the vhost-user backend of the vmm's network
//! device, and for the guest it is the whole internet: router, name server and the far end of every connection.
//!
//! No packet of the guest goes out, only its data: a TCP connection of the guest ends here and continues as a socket of
//! this process, so nothing needs privileges, and the host's routes, VPNs and firewall hold as for any program.
//!
//! The TCP/IP stack is smoltcp, not ipstack: it does no I/O and has no runtime, so that one thread with one epoll serves
//! queues, sockets and timers without a channel or a task for each connection; and its sockets hold their buffers, so
//! that data moves with one `recv` or `send` between them and the host's sockets. Each connection has an interface of
//! its own: a packet costs the same whether there is one connection or thousands, and any address can be the far end.
//!
//! Data moves up to 64 KiB at a time. The guest may send unsegmented TCP without checksums. Towards the guest, the
//! stack is told of a larger segment size than the guest's end announced, and virtio's segmentation offload lets the
//! guest's kernel cut (or not cut) to the announced one. So containers keep their MTU of 1500.
//!
//! One thread does everything; all tables have bounds; a guest that takes no frames stops the host's sockets from being
//! read.

pub mod addresses;
mod associations;
pub mod control;
mod dns;
mod echo;
mod events;
mod fragments;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod ip;
#[cfg(test)]
mod kernel_tests;
mod offload;
mod published;
mod resolver;
mod ring;
#[cfg(test)]
mod ring_tests;
mod socket;
mod stack;
mod tap;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod vhost;

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
};

use ::vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::SockType,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::{inherited, packets::PacketError, report::chain, sandbox};
use addresses::Addresses;
use control::Command;
use events::Token;
use stack::Stack;
use vhost::{RX, TX};

pub(crate) use frame::VIRTIO_HEADER;
pub(crate) use resolver::nameservers;
#[cfg(test)]
pub(crate) use ring::Ring;
pub(crate) use vhost::Device;

/// Frames taken from the guest before the host's sockets have their turn.
const BURST: usize = 128;
/// Events taken at once.
const EVENTS: usize = 256;

/// Why the network process ends in failure.
#[derive(Debug, thiserror::Error)]
enum NetError {
    #[error("descriptor {} is no control socket; `bulkhead net` is started by the backend", inherited::FD)]
    Descriptor,
    #[error("the backend's control socket failed")]
    Control(#[from] PacketError),
    #[error("the backend's first packet sets up no network")]
    NoSetup,
    #[error("the guest's network {0}/{1} has not room for its addresses")]
    Subnet(std::net::Ipv4Addr, u8),
    #[error("the host refused {what}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the vmm broke the vhost-user protocol")]
    Protocol(#[source] VhostError),
    #[error("the network process cannot confine itself")]
    Sandbox(#[from] sandbox::SandboxError),
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> NetError {
    move |source| NetError::Host { what, source }
}

/// The process: serves the network device until the vmm is gone.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: network: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), NetError> {
    let control = inherited::socket(SockType::SeqPacket).ok_or(NetError::Descriptor)?;
    let (setup, stream) = match control::receive(&control)? {
        Some((Command::Setup(setup), Some(stream))) => (setup, UnixStream::from(stream)),
        Some((Command::SetupTap, Some(stream))) => return tap::serve(control, stream.into()),
        _ => return Err(NetError::NoSetup),
    };
    let addresses = Addresses::new(&setup).ok_or(NetError::Subnet(setup.subnet.0, setup.subnet.1))?;
    // Each connection is a descriptor.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most.min(16_384), most);
    }
    let epoll = Arc::new(Epoll::new().map_err(host("an epoll descriptor"))?);
    events::watch(&epoll, &control, Token::Control).map_err(host("an epoll event"))?;
    events::watch(&epoll, &stream, Token::Frontend).map_err(host("an epoll event"))?;
    let device = Arc::new(Mutex::new(Device::new(Arc::clone(&epoll)).map_err(host("memory for the queues"))?));
    let handler = BackendReqHandler::from_stream(stream, Arc::clone(&device));
    sandbox::confine_net()?;
    Loop { stack: Stack::new(Arc::clone(&epoll), addresses), epoll, device, handler, control }.run()
}

/// Does what the frontend says; false when it is gone.
fn heard(handler: &mut BackendReqHandler<Mutex<Device>>) -> Result<bool, NetError> {
    match handler.handle_request() {
        // What the frontend asked and may not is answered; the conversation goes on.
        Ok(()) | Err(VhostError::ReqHandlerError(_) | VhostError::InvalidParam | VhostError::InvalidOperation(_)) => {
            Ok(true)
        }
        Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => Ok(false),
        Err(error) => Err(NetError::Protocol(error)),
    }
}

/// The one thread.
struct Loop {
    epoll: Arc<Epoll>,
    device: Arc<Mutex<Device>>,
    handler: BackendReqHandler<Mutex<Device>>,
    control: OwnedFd,
    stack: Stack,
}

impl Loop {
    fn run(mut self) -> Result<(), NetError> {
        let mut events = vec![EpollEvent::default(); EVENTS];
        let mut more = false;
        loop {
            let timeout = if more { 0 } else { self.stack.timeout() };
            let ready = match self.epoll.wait(timeout, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(source) => return Err(NetError::Host { what: "to wait for events", source }),
            };
            for event in &events[..ready] {
                match Token::unpack(event.data()) {
                    Token::Control => {
                        if !self.commanded()? {
                            return Ok(());
                        }
                    }
                    Token::Frontend => {
                        if !heard(&mut self.handler)? {
                            return Ok(());
                        }
                    }
                    Token::Kick(queue) => self.kicked(queue),
                    token => self.stack.host_ready(token),
                }
            }
            more = self.move_frames();
        }
    }

    /// Does what the backend says; false when it is gone.
    fn commanded(&mut self) -> Result<bool, NetError> {
        match control::receive(&self.control)? {
            None => return Ok(false),
            Some((Command::Listen { id, transport, target }, Some(socket))) => {
                self.stack.publish(id, transport, socket, target);
            }
            Some((Command::Forget { id }, _)) => self.stack.forget(id),
            // A second setup, or a port without its socket: nothing that the backend does.
            Some(_) => {}
        }
        Ok(true)
    }

    fn kicked(&self, queue: usize) {
        let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kick) = device.rings.get(queue).and_then(|ring| ring.kick.as_ref()) {
            let _ = kick.read();
        }
    }

    /// Moves frames both ways; true when there may be more to do at once.
    fn move_frames(&mut self) -> bool {
        let device = &mut *self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(memory) = device.memory.clone() else { return false };
        self.stack.offload.checksum = device.has(VIRTIO_NET_F_GUEST_CSUM);
        self.stack.offload.segmentation = device.has(VIRTIO_NET_F_GUEST_TSO4) && device.has(VIRTIO_NET_F_GUEST_TSO6);
        let mergeable = device.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut more = false;
        if device.rings[TX].runs() {
            more = device.rings[TX].take(&memory, BURST, |frame| self.stack.receive(frame));
        }
        self.stack.run_timers();
        let ring = &mut device.rings[RX];
        if !ring.runs() {
            return more;
        }
        loop {
            while let Some(frame) = self.stack.out.front() {
                if ring.give(&memory, frame, mergeable) {
                    if let Some(given) = self.stack.out.pop_front() {
                        frame::recycle(given.bytes);
                    }
                } else if !ring.await_buffers(&memory) {
                    break;
                }
            }
            ring.signal(&memory);
            let before = self.stack.out.len();
            self.stack.resume();
            if self.stack.out.len() == before {
                return more;
            }
            if before > 0 {
                // The guest has no buffers; its kick continues.
                return more;
            }
        }
    }
}
