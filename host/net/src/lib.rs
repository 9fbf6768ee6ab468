//! User-mode networking: `bulkhead net`, the vhost-user backend of the VM's network device. For the guest it is the
//! whole internet: router, name server and the far end of every connection.
//!
//! No packet of the guest goes out, only its data: each connection ends here and continues as a socket of this process.
//! So nothing needs privileges, and the host's routes, VPNs and firewall apply as they do to any program.
//!
//! # Parts
//!
//! | Layer           | Files                                                                                      |
//! |-----------------|--------------------------------------------------------------------------------------------|
//! | Process         | `api` (commands of the backend), `event_loop`, `events` (epoll), `error`                   |
//! | Virtio device   | `frontend`, `vhost` (setup by the vmm), `ring` (the two queues), `sink`                     |
//! | Frames          | `guest_frame`, `frame`, `ethernet` (ARP, neighbours), `ip`, `fragments`, `offload`                        |
//! | Services        | `stack` (dispatch), `tcp`, `udp`, `dns` with `resolver` and `hosts`, `icmp`                |
//! | Shared          | `addresses`, `key`, `associations`, `socket`, `host_file`                                  |
//! | Another backend | `tap`: copies frames between the queues and a tap device, without any of the services      |
//!
//! # Addresses
//!
//! By default (`vpnkitCIDR`) the guest is 192.168.65.3, without DHCP: its init sets address, route and name server.
//! 192.168.65.1 is `gateway.docker.internal`, router and name server; 192.168.65.254 is `host.docker.internal`. ARP,
//! pings and connections for both are answered here. The guest also has an address of fd0b:ad:c0ff::/64; the host's
//! names stay IPv4 only (see `dns`).
//!
//! # TCP
//!
//! The TCP/IP stack is smoltcp: it does no I/O and has no runtime, so one thread with one epoll serves queues, sockets
//! and timers without a channel or a task for each connection. Each connection has an interface of its own: a packet
//! costs the same whether there is one connection or thousands, and any address can be the far end. ipstack was tried:
//! a gigabyte towards the guest through ipstack 1.0.1 behind a TUN device of the same MTU took 0.6 s of CPU, more than
//! here, and the end of the host's data never reached the guest.
//!
//! Bulk data does not go through smoltcp, in either direction; `tcp` describes both paths, and `tcp/retransmit.rs` sends
//! lost segments again.
//!
//! # Large segments
//!
//! Data moves up to 64 KiB at a time. The guest may send unsegmented TCP without checksums (`HOST_TSO4`, `CSUM`).
//! Towards the guest, smoltcp is shown a larger segment size than the guest's end announced, and virtio's segmentation
//! offload (`GUEST_TSO4` with the announced size) lets the guest's kernel cut the segments, or not. So `docker0` and
//! containers keep their MTU of 1500; `eth0` has 65520, for datagrams.
//!
//! # Limits
//!
//! One thread does everything, every table has a bound, and a guest that takes no frames stops the host's sockets from
//! being read. Not supported yet: ICMP errors (an unreachable UDP port is silence to the guest), and search domains of
//! the host.
//!
//! A network process that dies is started again by the backend. The vmm hands the new one the queues from where the
//! used rings are; connections that were open are reset.

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
mod guest_frame;
mod host_file;
mod hosts;
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

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    process::ExitCode,
    sync::Arc,
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::SockType,
};

use bulkhead_ipc::{inherited, report::chain, sandbox};

use addresses::Addresses;
use api::Command;
use error::NetError;
use event_loop::EventLoop;
use frontend::Frontend;
use stack::Stack;

pub use frame::VIRTIO_HEADER;
pub use resolver::nameservers;

/// Descriptors that the process may have open.
const MAX_DESCRIPTORS: u64 = 16_384;

/// Serves the network device until the vmm is gone; the main function of `bulkhead net`.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: network: {}", chain(&error));
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
    // Each connection, association and query is a descriptor, and all tables at their bounds fit into this. Under a
    // lower hard limit `socket` fails earlier, which refuses the connection.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most.min(MAX_DESCRIPTORS), most);
    }
    let frontend = Frontend::new(control, stream)?;
    // Before the first event: everything that comes from the guest or from a client is handled by a process that has IP
    // sockets, reads resolv.conf and the hosts file, and can do nothing else.
    sandbox::confine_net()?;
    EventLoop { stack: Stack::new(Arc::clone(&frontend.epoll), addresses), frontend }.run()
}
