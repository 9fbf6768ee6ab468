//! The common configuration structure (virtio 1.3, 4.1.4.3) as a state machine without devices or interrupts.
//!
//! A queue's configuration is frozen once it is enabled, and everything once the driver sets `DRIVER_OK`: to change
//! anything the driver has to reset the device. So a worker never sees a queue that moves under it.

use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use virtio_queue::{Queue, QueueT};

use crate::memory::GuestRam;

const STATUS_FEATURES_OK: u8 = 8;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_NEEDS_RESET: u8 = 64;
const STATUS_FAILED: u8 = 128;
const NO_VECTOR: u16 = 0xffff;
const FEATURE_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const FEATURE_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// An action that a write requires of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    None,
    Activate,
    Reset,
}

#[derive(Clone)]
struct QueueConfig {
    max: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueConfig {
    fn new(max: u16) -> Self {
        Self { max, size: max, vector: NO_VECTOR, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }
}

/// The registers of a device.
pub(super) struct Common {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    config_vector: u16,
    queue_select: u16,
    status: u8,
    vectors: usize,
    queues: Vec<QueueConfig>,
}

impl Common {
    pub(super) fn new(device_features: u64, queue_sizes: &[u16], vectors: usize) -> Self {
        Self {
            // Without it the driver would have to use the legacy interface, which does not exist here (6.1).
            offered: device_features | FEATURE_VERSION_1,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            status: 0,
            vectors,
            queues: queue_sizes.iter().map(|max| QueueConfig::new(*max)).collect(),
        }
    }

    pub(super) fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    pub(super) fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    pub(super) fn is_running(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        // Each field has one width; 64-bit fields may be read in halves (4.1.3.1). Other accesses read as zero.
        let queue = self.queues.get(usize::from(self.queue_select));
        let value = match (offset, data.len()) {
            (0x00, 4) => u64::from(self.device_feature_select),
            (0x04, 4) => feature_word(self.offered, self.device_feature_select),
            (0x08, 4) => u64::from(self.driver_feature_select),
            (0x0c, 4) => feature_word(self.accepted, self.driver_feature_select),
            (0x10, 2) => u64::from(self.config_vector),
            (0x12, 2) => self.queues.len() as u64,
            (0x14, 1) => u64::from(self.status),
            // queue_select, and queue_notify_off: each queue's notification address is its index (4.1.4.4).
            (0x16 | 0x1e, 2) => u64::from(self.queue_select),
            // A queue that does not exist has size 0 (4.1.4.3.1).
            (0x18, 2) => queue.map_or(0, |q| u64::from(q.size)),
            (0x1a, 2) => queue.map_or(u64::from(NO_VECTOR), |q| u64::from(q.vector)),
            (0x1c, 2) => queue.map_or(0, |q| u64::from(q.enabled)),
            // queue_desc, queue_driver, queue_device.
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(data.len() as u64) => queue.map_or(0, |q| {
                let address = [q.descriptors, q.driver, q.device][(offset as usize - 0x20) / 8];
                address >> (8 * (offset % 8))
            }),
            // Among them config_generation at 0x15: no device's configuration ever changes.
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(i).copied().unwrap_or(0);
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Request {
        let mut bytes = [0; 8];
        let Some(target) = bytes.get_mut(..data.len()) else { return Request::None };
        target.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            // Selectors and the status may be written at any time.
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x14, 1) => return self.set_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            // All else is frozen while the device runs.
            _ if self.is_running() => {}
            (0x0c, 4) => self.accept(value as u32),
            (0x10, 2) => self.config_vector = self.checked_vector(value as u16),
            _ => self.write_queue(offset, data.len(), value),
        }
        Request::None
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        // A vector that does not exist reads back as NO_VECTOR, by which the driver sees the failure (4.1.5.1.2.1).
        if usize::from(vector) < self.vectors { vector } else { NO_VECTOR }
    }

    fn accept(&mut self, bits: u32) {
        // With FEATURES_OK the negotiation is over: the bits were checked and must not change any more (3.1.1).
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(bits),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(bits) << 32,
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let vector = self.checked_vector(value as u16);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if queue.enabled {
            return;
        }
        match (offset, len) {
            (0x18, 2) => {
                // Other sizes are ignored; the driver reads back the old one.
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max {
                    queue.size = size;
                }
            }
            (0x1a, 2) => queue.vector = vector,
            // 0 is not a value that a driver may write (4.1.4.3.2): only a reset disables a queue.
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(len as u64) => {
                let address = match (offset - 0x20) / 8 {
                    0 => &mut queue.descriptors,
                    1 => &mut queue.driver,
                    _ => &mut queue.device,
                };
                // Not checked here but as a whole when the device starts, since the halves come one by one.
                *address = match (len, offset % 8) {
                    (8, _) => value,
                    (_, 0) => *address & !0xffff_ffff | value,
                    _ => *address & 0xffff_ffff | value << 32,
                };
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) -> Request {
        if value == 0 {
            return Request::Reset;
        }
        // NEEDS_RESET is the device's, and stays until the reset.
        let mut new = value | self.status & STATUS_NEEDS_RESET;
        let wants = |bit| new & bit != 0 && self.status & bit == 0;
        if wants(STATUS_FEATURES_OK) && (self.accepted & !self.offered != 0 || self.accepted & FEATURE_VERSION_1 == 0) {
            // Not accepted: the driver reads the status back and finds the bit cleared (2.2.2, 3.1.1).
            new &= !STATUS_FEATURES_OK;
        }
        // The device starts at the first DRIVER_OK after accepted features. DRIVER_OK before them does not stick,
        // either: a device must not touch queues whose features were never agreed on.
        let start = new & STATUS_DRIVER_OK != 0
            && self.status & STATUS_DRIVER_OK == 0
            && new & STATUS_FEATURES_OK != 0
            && new & STATUS_FAILED == 0;
        if !start && self.status & STATUS_DRIVER_OK == 0 {
            new &= !STATUS_DRIVER_OK;
        }
        // A driver must not clear bits other than by a reset (2.1.1), so those that matter cannot be cleared.
        self.status = new | self.status & (STATUS_DRIVER_OK | STATUS_FEATURES_OK);
        if start { Request::Activate } else { Request::None }
    }

    /// Returns the enabled queues at `DRIVER_OK` with their vectors; `None` if the driver configured one of them
    /// wrongly.
    pub(super) fn build_queues(&self, memory: &GuestRam) -> Option<Vec<Option<(Queue, u16)>>> {
        let build = |config: &QueueConfig| {
            if config.enabled { self.build_queue(config, memory).map(Some) } else { Some(None) }
        };
        self.queues.iter().map(build).collect()
    }

    fn build_queue(&self, config: &QueueConfig, memory: &GuestRam) -> Option<(Queue, u16)> {
        let mut queue = Queue::new(config.max).ok()?;
        queue.try_set_size(config.size).ok()?;
        queue.try_set_desc_table_address(vm_memory::GuestAddress(config.descriptors)).ok()?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(config.driver)).ok()?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(config.device)).ok()?;
        queue.set_event_idx(self.accepted & FEATURE_EVENT_IDX != 0);
        queue.set_ready(true);
        // The setters checked the alignment. This checks that table and rings lie inside of guest memory.
        queue.is_valid(memory).then_some((queue, config.vector))
    }
}

/// Returns the 32 feature bits of a selector.
fn feature_word(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn common() -> Common {
        Common::new(1 << 5 | FEATURE_EVENT_IDX, &[256, 128], 3)
    }

    fn read(common: &Common, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        common.read(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    fn negotiate(common: &mut Common, features: u64) {
        common.write(0x14, &[3]);
        for select in 0..2u32 {
            common.write(0x08, &select.to_le_bytes());
            common.write(0x0c, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        common.write(0x14, &[3 | STATUS_FEATURES_OK]);
    }

    fn enable_queue(common: &mut Common) {
        common.write(0x16, &0u16.to_le_bytes());
        common.write(0x20, &0x10_0000u64.to_le_bytes());
        common.write(0x28, &0x10_2000u64.to_le_bytes());
        common.write(0x30, &0x10_3000u64.to_le_bytes());
        common.write(0x1c, &1u16.to_le_bytes());
    }

    #[test]
    fn features_ok_sticks_only_for_offered_features_with_version_1() {
        for features in [0, 1 << 5, FEATURE_VERSION_1 | 1 << 6] {
            let mut common = common();
            negotiate(&mut common, features);
            assert_eq!(read(&common, 0x14, 1) as u8 & STATUS_FEATURES_OK, 0, "{features:#x}");
            assert_eq!(common.write(0x14, &[15]), Request::None);
            assert!(!common.is_running());
        }
    }

    #[test]
    fn every_register_write_after_driver_ok_leaves_the_queues_as_they_were() {
        let mut common = common();
        negotiate(&mut common, FEATURE_VERSION_1);
        enable_queue(&mut common);
        assert_eq!(common.write(0x14, &[15]), Request::Activate);
        for queue in 0..3u16 {
            common.write(0x16, &queue.to_le_bytes());
            let before: Vec<_> = (0x18..0x38).map(|offset| read(&common, offset, 2)).collect();
            for offset in (0x0c..0x14).chain(0x18..0x40) {
                for len in [1, 2, 4, 8] {
                    assert_eq!(common.write(offset, &[0x55; 8][..len]), Request::None);
                }
            }
            assert_eq!(before, (0x18..0x38).map(|offset| read(&common, offset, 2)).collect::<Vec<_>>());
        }
        assert_eq!(common.features(), FEATURE_VERSION_1);
    }

    #[test]
    fn an_enabled_queue_cannot_be_changed_even_before_driver_ok() {
        let mut common = common();
        negotiate(&mut common, FEATURE_VERSION_1);
        enable_queue(&mut common);
        common.write(0x18, &64u16.to_le_bytes());
        common.write(0x20, &0u64.to_le_bytes());
        assert_eq!((read(&common, 0x18, 2), read(&common, 0x20, 8)), (256, 0x10_0000));
    }

    #[test]
    fn a_queue_size_that_is_not_a_power_of_two_or_too_large_is_ignored() {
        let mut common = common();
        for size in [0u16, 3, 257, 512, 0x8000] {
            common.write(0x18, &size.to_le_bytes());
            assert_eq!(read(&common, 0x18, 2), 256, "{size}");
        }
        common.write(0x18, &64u16.to_le_bytes());
        assert_eq!(read(&common, 0x18, 2), 64);
    }

    #[test]
    fn a_vector_that_does_not_exist_reads_back_as_no_vector() {
        let mut common = common();
        common.write(0x10, &3u16.to_le_bytes());
        assert_eq!(read(&common, 0x10, 2) as u16, NO_VECTOR);
        common.write(0x10, &2u16.to_le_bytes());
        assert_eq!(read(&common, 0x10, 2), 2);
    }

    #[test]
    fn status_zero_asks_for_a_reset_which_restores_every_register() {
        let mut common = common();
        negotiate(&mut common, FEATURE_VERSION_1);
        enable_queue(&mut common);
        assert_eq!(common.write(0x14, &[0]), Request::Reset);
        common.reset();
        assert_eq!((read(&common, 0x14, 1), read(&common, 0x1c, 2), read(&common, 0x20, 8)), (0, 0, 0));
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_panics_or_activates_without_negotiation(
            accesses in proptest::collection::vec((0u64..0x48, 1usize..9, any::<u64>()), 0..200)
        ) {
            let memory = crate::memory::create(64).unwrap();
            let mut common = common();
            for (offset, len, value) in accesses {
                if common.write(offset, &value.to_le_bytes()[..len]) == Request::Activate {
                    prop_assert!(common.features() & FEATURE_VERSION_1 != 0);
                    let _ = common.build_queues(&memory);
                }
                read(&common, offset, len);
            }
        }
    }
}
