//! The guest's network: `bulkhead net`, a child of the backend. It is the vhost-user backend of the vmm's network
//! device, and for the guest it is the whole internet: router, name server and the far end of every connection.
//!
//! No packet of the guest goes out, only its data: a TCP connection of the guest ends here and continues as a socket of
//! this process, so nothing needs privileges, and the host's routes, VPNs and firewall hold as for any program.
//!
//! The TCP/IP stack is smoltcp, not ipstack: it does no I/O and has no runtime, so that one thread with one epoll serves
//! queues, sockets and timers without a channel or a task for each connection. Each connection has an interface of its
//! own: a packet costs the same whether there is one connection or thousands, and any address can be the far end.
//! Tried: a gigabyte towards the guest through ipstack 1.0.1 behind a TUN device of the same MTU took 0.6 s of CPU, more
//! than here, and the end of the host's data never reached the guest.
//! Data on its way to the guest does not go through it (`sender.rs`).
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
#[cfg(test)]
mod driver_tests;
mod echo;
mod events;
mod fragments;
mod frame;
mod front;
#[cfg(test)]
mod frontend_tests;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod ip;
#[cfg(test)]
mod kernel_tests;
#[cfg(test)]
mod loop_tests;
mod offload;
mod published;
mod resolver;
mod ring;
#[cfg(test)]
mod ring_tests;
mod sender;
#[cfg(test)]
mod sender_tests;
mod socket;
mod stack;
mod tap;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod vhost;
mod window;
#[cfg(test)]
mod window_tests;
mod wire;

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::ExitCode,
    sync::Arc,
};

use ::vhost::vhost_user::Error as VhostError;
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::SockType,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};

use bulkhead_ipc::{channel::PacketError, inherited, report::chain, sandbox};

use addresses::Addresses;
use control::Command;
use events::Token;
use front::Front;
use ring::Offered;
use sender::Sent;
use stack::Stack;
use vhost::{RX, TX};

pub use frame::VIRTIO_HEADER;
pub use resolver::nameservers;
use vhost::Device;

/// Frames taken from the guest before the host's sockets have their turn.
const BURST: usize = 128;

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
    let front = Front::new(control, stream)?;
    sandbox::confine_net()?;
    Loop { stack: Stack::new(Arc::clone(&front.epoll), addresses), front }.run()
}

/// The one thread.
struct Loop {
    front: Front,
    stack: Stack,
}

impl Loop {
    fn run(mut self) -> Result<(), NetError> {
        let mut more = false;
        loop {
            let timeout = if more { 0 } else { self.stack.timeout() };
            for index in 0..self.front.wait(timeout)? {
                match self.front.token(index) {
                    Token::Control => match self.front.command()? {
                        Some((command, descriptor)) => self.obey(command, descriptor),
                        None => return Ok(()),
                    },
                    Token::Frontend => {
                        if !self.front.heard()? {
                            return Ok(());
                        }
                    }
                    Token::Kick(queue) => self.front.kicked(queue),
                    token => self.stack.host_ready(token, self.front.ending(index)),
                }
            }
            more = self.move_frames();
        }
    }

    fn obey(&mut self, command: Command, descriptor: Option<OwnedFd>) {
        match (command, descriptor) {
            (Command::Listen { id, transport, target }, Some(socket)) => {
                self.stack.publish(id, transport, socket, target);
            }
            (Command::Forget { id }, _) => self.stack.forget(id),
            // A second setup, or a port without its socket: nothing that the backend does.
            _ => {}
        }
    }

    /// Moves frames both ways; true when there may be more to do at once.
    fn move_frames(&mut self) -> bool {
        let device = &mut *self.front.device();
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
            let mut room = true;
            while let Some(frame) = self.stack.out.front() {
                if ring.give(&memory, frame, mergeable) {
                    if let Some(given) = self.stack.out.pop_front() {
                        frame::recycle(given.bytes);
                    }
                } else if !ring.await_buffers(&memory) {
                    room = false;
                    break;
                }
            }
            while room {
                match self.stack.send(&mut Offered { ring, memory: &memory, mergeable }) {
                    // Before more is sent the guest's acknowledgements have their turn.
                    Sent::More => {
                        more = true;
                        break;
                    }
                    Sent::Blocked => room = ring.await_buffers(&memory),
                    Sent::Idle | Sent::End => break,
                }
            }
            ring.signal(&memory);
            let before = self.stack.out.len();
            self.stack.resume();
            if self.stack.out.len() == before || before > 0 {
                // Sending may end a connection, whose frames then wait here and are told of by nobody. A guest without
                // buffers is waited for: its kick continues.
                return more || room && self.stack.has_output();
            }
        }
    }
}
