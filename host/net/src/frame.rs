//! Frames to the guest: Ethernet, and the header that virtio puts before each frame.

use std::cell::RefCell;

use super::addresses::{GATEWAY_MAC, GUEST_MAC};

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.3, 5.1.6).
pub const VIRTIO_HEADER: usize = 12;
/// Destination, source and EtherType.
pub(super) const ETHERNET_HEADER: usize = 14;
/// Largest frame: an IP packet of 65,535 bytes, the most its length field can say.
pub(super) const MAX_FRAME: usize = ETHERNET_HEADER + 65_535;

pub(super) const ETHERTYPE_IPV4: [u8; 2] = [8, 0];
pub(super) const ETHERTYPE_ARP: [u8; 2] = [8, 6];
pub(super) const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// A frame for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// virtio's header; `num_buffers` is set by the queue, which knows the buffers.
    pub(super) header: [u8; VIRTIO_HEADER],
    /// The Ethernet frame.
    pub(super) bytes: Vec<u8>,
}

/// Smallest buffer that is kept for reuse: to clear a fresh 64 KiB costs as much as to fill them.
const MIN_POOLED: usize = 16 * 1024;
/// Number of buffers that are kept.
const MAX_POOLED: usize = 32;

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of this length, filled with zeros or with an earlier frame.
pub(super) fn buffer(len: usize) -> Vec<u8> {
    // Earlier contents are the same guest's frames, and every caller overwrites the whole buffer.
    let used = if len < MIN_POOLED { None } else { BUFFERS.with_borrow_mut(Vec::pop) };
    let mut buffer = used.unwrap_or_default();
    buffer.resize(len, 0);
    buffer
}

/// Gives a buffer back for reuse.
pub(super) fn recycle(buffer: Vec<u8>) {
    if buffer.len() >= MIN_POOLED {
        BUFFERS.with_borrow_mut(|buffers| {
            if buffers.len() < MAX_POOLED {
                buffers.push(buffer);
            }
        });
    }
}

impl Frame {
    /// A frame of this EtherType with `len` bytes of payload.
    pub(super) fn ethernet(len: usize, ethertype: [u8; 2]) -> Self {
        let mut bytes = buffer(ETHERNET_HEADER + len);
        bytes[..6].copy_from_slice(&GUEST_MAC);
        bytes[6..12].copy_from_slice(&GATEWAY_MAC);
        bytes[12..14].copy_from_slice(&ethertype);
        Self { header: [0; VIRTIO_HEADER], bytes }
    }

    /// A frame for an IP packet of `len` bytes, to be filled from [`ETHERNET_HEADER`] on and then sealed.
    pub(super) fn ip(len: usize) -> Self {
        Self::ethernet(len, ETHERTYPE_IPV4)
    }

    /// Sets the EtherType by the version of the IP packet.
    pub(super) fn seal(&mut self) {
        if self.bytes.get(ETHERNET_HEADER).is_some_and(|first| first >> 4 == 6) {
            self.bytes[12..14].copy_from_slice(&ETHERTYPE_IPV6);
        }
    }
}
