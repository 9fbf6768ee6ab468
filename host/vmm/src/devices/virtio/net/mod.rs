//! Network device (virtio 1.3, section 5.1): a vhost-user frontend. Frames never pass through this process: a backend
//! process maps guest memory and serves the queues itself.
//!
//! The guest kicks the backend and the backend interrupts the guest directly: ioeventfds and the vectors' events are handed
//! over. While a vector is masked, KVM is not connected to its event, which keeps what is pending (virtio 1.3, 4.1.4.5).
//!
//! A backend that dies leaves a link on which nothing moves; the next one takes the queues over where its predecessor
//! left them ([`NetHandle::replace`]).

mod link;

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_ipc::report::chain;
use link::{Link, LinkError, Rings};

use super::{ActivateError, Activation, VirtioDevice};

/// Receive queue and transmit queue.
const QUEUES: usize = 2;
const QUEUE_SIZES: [u16; QUEUES] = [1024; QUEUES];

/// Bytes of configuration space that are known: MAC address, status, queue pairs, MTU (5.1.4).
const CONFIG_LEN: usize = 12;

/// What device and handle share.
#[derive(Default)]
struct Shared {
    link: Option<Link>,
    /// Present between `DRIVER_OK` and reset.
    rings: Option<Rings>,
}

/// The device.
pub struct Net {
    shared: Arc<Mutex<Shared>>,
    features: u64,
    config: [u8; CONFIG_LEN],
}

/// Gives the device another backend.
#[derive(Clone)]
pub struct NetHandle {
    shared: Arc<Mutex<Shared>>,
    features: u64,
}

impl Net {
    /// Asks the backend behind `stream` what it offers.
    pub fn new(stream: UnixStream) -> Result<(Self, NetHandle), LinkError> {
        let mut link = Link::connect(stream)?;
        let config = link.config()?;
        let features = link.features();
        let shared = Arc::new(Mutex::new(Shared { link: Some(link), rings: None }));
        let handle = NetHandle { shared: Arc::clone(&shared), features };
        Ok((Self { shared, features, config }, handle))
    }
}

impl NetHandle {
    /// Continues with the backend behind `stream`, which must offer what the first one offered.
    pub fn replace(&self, stream: UnixStream) {
        let mut shared = lock(&self.shared);
        let result = Link::connect(stream).and_then(|mut link| {
            if self.features & !link.features() != 0 {
                return Err(LinkError::Features);
            }
            if let Some(rings) = &shared.rings {
                link.start(rings)?;
                // What the predecessor took a kick for and did not answer, or answered and did not tell of.
                rings.signal_all();
            }
            Ok(link)
        });
        match result {
            Ok(link) => shared.link = Some(link),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "cannot use the new network backend");
            }
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        1
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let from = usize::try_from(offset).ok().and_then(|offset| self.config.get(offset..)).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = Vec::new();
        for (index, queue) in activation.queues.into_iter().enumerate() {
            queues.push(queue.ok_or(ActivateError::MissingQueue(index))?);
        }
        let rings = Rings::new(activation.memory, activation.features, &queues)?;
        let mut shared = lock(&self.shared);
        if let Some(link) = &mut shared.link
            && let Err(error) = link.start(&rings)
        {
            // The guest keeps its interface; the backend's successor will move its frames.
            tracing::warn!(error = %chain(&error), "the network backend rejected the queues");
            shared.link = None;
        }
        shared.rings = Some(rings);
        Ok(())
    }

    fn reset(&mut self) {
        let mut shared = lock(&self.shared);
        if shared.rings.take().is_some()
            && let Some(link) = &mut shared.link
            && let Err(error) = link.stop()
        {
            tracing::warn!(error = %chain(&error), "the network backend did not stop");
            shared.link = None;
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
