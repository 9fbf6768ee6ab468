//! smoltcp's device and interface for one connection: a slot for the guest's packet, a list of frames for the guest.

use std::net::IpAddr;

use smoltcp::{
    iface::{Config, Interface},
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
    wire::{HardwareAddress, IpAddress, IpCidr},
};

use super::{
    frame::{self, ETHERNET_HEADER, Frame},
    key::Key,
};

/// smoltcp's view of the wire (`phy::Device`).
pub(super) struct Wire {
    /// The guest's packet, for the next poll.
    pub(super) incoming: Option<Vec<u8>>,
    /// Frames for the guest since they were last taken.
    pub(super) outgoing: Vec<Frame>,
    /// Length of `outgoing` from which on smoltcp emits no more by itself.
    pub(super) room: usize,
}

pub(super) struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.0);
        frame::recycle(self.0);
        result
    }
}

pub(super) struct Outgoing<'a>(&'a mut Vec<Frame>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = Frame::ip(len);
        let result = f(&mut frame.bytes[ETHERNET_HEADER..]);
        frame.seal();
        self.0.push(frame);
        result
    }
}

impl Wire {
    pub(super) fn new() -> Self {
        Self { incoming: None, outgoing: Vec::new(), room: usize::MAX }
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        // Not bounded by `room`: the guest's packet is always processed, and brings one answer at most.
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < self.room).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        // Segments up to the size of an IP packet; `offload` lets the guest cut them.
        capabilities.max_transmission_unit = usize::from(u16::MAX);
        // The guest leaves TCP's checksum out (VIRTIO_NET_F_CSUM), and `offload` makes the one towards it.
        capabilities.checksum.tcp = Checksum::None;
        capabilities
    }
}

/// The interface of one connection. It has the far end's address; every other address is behind a route.
pub(super) fn interface(key: Key, wire: &mut Wire, now: Instant) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = random();
    let mut interface = Interface::new(config, wire, now);
    interface.update_ip_addrs(|addresses| {
        let address = IpAddress::from(key.peer.ip());
        // The lists have a fixed capacity, of at least one each.
        let _ = addresses.push(IpCidr::new(address, if key.peer.is_ipv4() { 32 } else { 128 }));
    });
    let _ = match key.peer.ip() {
        IpAddr::V4(address) => interface.routes_mut().add_default_ipv4_route(address),
        IpAddr::V6(address) => interface.routes_mut().add_default_ipv6_route(address),
    };
    interface
}

/// A seed for smoltcp's initial sequence numbers: a container must not be able to guess those of another container's
/// connection (RFC 9293, 3.4.1).
fn random() -> u64 {
    let mut bytes = [0; 8];
    // Small requests are neither interrupted nor cut short once the kernel's pool is ready (getrandom(2)).
    // SAFETY: the pointer and length are those of `bytes`.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    u64::from_ne_bytes(bytes)
}
