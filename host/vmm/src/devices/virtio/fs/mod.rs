//! File system device (virtio 1.3, 5.11), a vhost-user frontend: files of the host never pass through this process.

use std::os::unix::net::UnixStream;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::vhost_user::{Kind, LinkError, VhostUser, VhostUserHandle};

/// Length of the tag at the start of the configuration space (5.11.4).
const TAG_LEN: usize = 36;

/// Queues for requests, besides the one of high priority. A driver uses at most one for each vCPU.
const REQUEST_QUEUES: usize = 4;

/// `VIRTIO_FS_F_NOTIFICATION`: the second queue is for notifications.
const NOTIFICATION: u64 = 1 << 0;

/// The DAX window is not supported.
static KIND: Kind = Kind {
    process: "share",
    thread: "fs-link",
    device_type: 26,
    // The queue of high priority, that of notifications, then those of requests; without notifications one less
    // (5.11.2). A request of 1 MiB has 256 pages and some headers.
    queue_sizes: &[1024; 2 + REQUEST_QUEUES],
    required_queues: 2,
    features: 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | NOTIFICATION,
    // The size of a notification's buffer is in the configuration.
    configured_features: NOTIFICATION,
    // Tag, number of request queues, size of a notification's buffer.
    config_len: TAG_LEN + 8,
    accepts: is_usable,
};

/// Creates the device with the features and configuration of the backend behind `stream`.
pub fn connect(stream: UnixStream) -> Result<(VhostUser, VhostUserHandle), LinkError> {
    VhostUser::new(&KIND, stream)
}

/// Accepts a configuration with a tag, and with no more request queues than the device has.
fn is_usable(config: &[u8]) -> bool {
    let Some((tag, [a, b, c, d, _, _, _, _])) = config.split_at_checked(TAG_LEN) else { return false };
    let queues = u32::from_le_bytes([*a, *b, *c, *d]);
    tag.first().is_some_and(|first| *first != 0) && (1..=REQUEST_QUEUES as u32).contains(&queues)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_must_name_its_file_system_and_ask_for_no_more_queues_than_there_are() {
        let config = |tag: &[u8], queues: u32| {
            let mut config = [0; TAG_LEN + 8];
            config[..tag.len()].copy_from_slice(tag);
            config[TAG_LEN..TAG_LEN + 4].copy_from_slice(&queues.to_le_bytes());
            config
        };
        assert!(is_usable(&config(b"bulkhead", 4)) && is_usable(&config(&[b'x'; TAG_LEN], 1)));
        for bad in [config(b"", 4), config(b"bulkhead", 0), config(b"bulkhead", 5), config(b"bulkhead", 1 << 31)] {
            assert!(!is_usable(&bad), "{bad:?}");
        }
        assert!(!is_usable(b"bulkhead"));
    }
}
