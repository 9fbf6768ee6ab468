//! The wire between one connection's stack and the guest.

use std::net::IpAddr;

use smoltcp::{
    iface::{Config, Interface},
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
    wire::{HardwareAddress, IpAddress, IpCidr},
};

use super::{
    frame::{self, ETHERNET_HEADER, Frame},
    tcp::Key,
};

/// The wire of one connection: a packet in, packets out.
pub(super) struct Wire {
    pub(super) incoming: Option<Vec<u8>>,
    pub(super) outgoing: Vec<Frame>,
    /// Packets that may go out now.
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

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < self.room).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(u16::MAX);
        // Between guest and here there is only memory.
        capabilities.checksum.tcp = Checksum::None;
        capabilities
    }
}

/// The interface of one connection: it has the far end's address, and everything else is behind it.
pub(super) fn interface(key: Key, wire: &mut Wire, now: Instant) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = random();
    let mut interface = Interface::new(config, wire, now);
    interface.update_ip_addrs(|addresses| {
        let address = IpAddress::from(key.peer.ip());
        // One address and one route always have room.
        let _ = addresses.push(IpCidr::new(address, if key.peer.is_ipv4() { 32 } else { 128 }));
    });
    let _ = match key.peer.ip() {
        IpAddr::V4(address) => interface.routes_mut().add_default_ipv4_route(address),
        IpAddr::V6(address) => interface.routes_mut().add_default_ipv6_route(address),
    };
    interface
}

/// Initial sequence numbers are not to be guessed.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: the pointer and length are those of `bytes`.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    u64::from_ne_bytes(bytes)
}
