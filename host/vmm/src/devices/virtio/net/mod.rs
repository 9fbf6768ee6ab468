//! Network device (virtio 1.3, 5.1), a vhost-user frontend: frames never pass through this process.

use std::os::unix::net::UnixStream;

use virtio_bindings::{
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::vhost_user::{Kind, LinkError, VhostUser, VhostUserHandle};

/// A control queue, several pairs of queues and the packed ring are not supported.
static KIND: Kind = Kind {
    process: "network",
    thread: "net-link",
    device_type: 1,
    // Receive queue and transmit queue.
    queue_sizes: &[1024; 2],
    // vhost-user serves them as a pair.
    required_queues: 2,
    features: 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_GUEST_CSUM
        | 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_GUEST_TSO4
        | 1 << VIRTIO_NET_F_GUEST_TSO6
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_MRG_RXBUF
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX,
    // Both are in the configuration space.
    configured_features: 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU,
    // MAC address, status, queue pairs, MTU (5.1.4).
    config_len: 12,
    // Without the features above it means nothing.
    accepts: |_| true,
};

/// Creates the device with the features and configuration of the backend behind `stream`.
pub fn connect(stream: UnixStream) -> Result<(VhostUser, VhostUserHandle), LinkError> {
    VhostUser::new(&KIND, stream)
}
