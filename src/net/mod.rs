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
//! Data on its way to the guest does not go through it (`tcp/sender.rs`).
//!
//! Data moves up to 64 KiB at a time. The guest may send unsegmented TCP without checksums. Towards the guest, the
//! stack is told of a larger segment size than the guest's end announced, and virtio's segmentation offload lets the
//! guest's kernel cut (or not cut) to the announced one. So containers keep their MTU of 1500.
//!
//! One thread does everything; all tables have bounds; a guest that takes no frames stops the host's sockets from being
//! read.

pub mod addresses;
pub mod api;
mod associations;
mod dns;
mod error;
mod ethernet;
mod event_loop;
mod events;
mod fragments;
mod frame;
mod frontend;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod icmp;
mod ip;
mod key;
mod offload;
mod phy;
mod resolver;
mod ring;
mod sink;
mod socket;
mod stack;
mod tap;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod vhost;

use std::{os::unix::net::UnixStream, process::ExitCode, sync::Arc};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::SockType,
};

use crate::{inherited, report::chain, sandbox};
use addresses::Addresses;
use api::Command;
use error::NetError;
use event_loop::Loop;
use frontend::Front;
use stack::Stack;

pub(crate) use frame::VIRTIO_HEADER;
pub(crate) use resolver::nameservers;
#[cfg(test)]
pub(crate) use {ring::Ring, vhost::Device};

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
    let (setup, stream) = match api::receive(&control)? {
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
