//! Console device (virtio 1.3, 5.3) with one port, for the guest's log. It has no input.

mod log;
mod worker;

use std::sync::{Arc, Mutex};

pub(crate) use log::Pending;
pub use log::{ConsoleLog, LogWriter};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::devices::virtio::{ActivateError, Activation, VirtioDevice, Worker};

/// The device. The machine shares its log, to recognize a kernel panic.
pub struct Console {
    log: Arc<Mutex<ConsoleLog>>,
    worker: Option<Worker>,
}

impl Console {
    /// Creates a console that writes to `log`.
    pub fn new(log: Arc<Mutex<ConsoleLog>>) -> Self {
        Self { log, worker: None }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        3
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // Queue 0 is for input: its buffers would never be used, so it is left alone.
        let transmit = activation.queues.into_iter().nth(1).flatten().ok_or(ActivateError::MissingQueue(1))?;
        let (memory, log) = (activation.memory, Arc::clone(&self.log));
        self.worker =
            Some(Worker::spawn("console", &activation.exit, move |stop| worker::run(&stop, transmit, &memory, &log))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
