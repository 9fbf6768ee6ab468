//! Entropy device (virtio 1.3, 5.4): one queue, whose buffers the device fills with random bytes.

mod worker;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::devices::virtio::{ActivateError, Activation, VirtioDevice, Worker};

/// The device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        4
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().flatten().ok_or(ActivateError::MissingQueue(0))?;
        let memory = activation.memory;
        self.worker = Some(Worker::spawn("rng", &activation.exit, move |stop| worker::run(&stop, queue, &memory))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
