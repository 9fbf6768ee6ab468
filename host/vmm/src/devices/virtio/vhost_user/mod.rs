//! Network device (virtio 1.3, 5.1): a vhost-user frontend. Frames never pass through this process: another process,
//! the backend of the device, maps guest memory and serves the queues.
//!
//! The guest kicks the backend and the backend interrupts the guest directly: it receives the ioeventfds and the
//! eventfds of the vectors. While a vector is masked, KVM is not connected to its eventfd, which keeps what is pending.
//!
//! If a backend dies, nothing moves until the next one continues the queues where they stand
//! ([`NetHandle::replace`]).

mod link;

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
};

use bulkhead_ipc::report::chain;
use link::{Link, LinkError, Rings};

use super::{ActivateError, Activation, VirtioDevice, spawn_confined};
use crate::exit::ExitSignal;

/// Receive queue and transmit queue.
const QUEUES: usize = 2;
const QUEUE_SIZES: [u16; QUEUES] = [1024; QUEUES];

/// Length of the configuration space that drivers read: MAC address, status, queue pairs, MTU (5.1.4).
const CONFIG_LEN: usize = 12;

/// State that the device and its handles share.
#[derive(Default)]
struct Shared {
    /// The connected backend; `None` after an error, until the next one comes.
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

/// A handle that gives the device another backend, from any thread.
#[derive(Clone)]
pub struct NetHandle {
    shared: Arc<Mutex<Shared>>,
    features: u64,
}

impl Net {
    /// Creates the device with the features and configuration of the backend behind `stream`.
    pub fn new(stream: UnixStream) -> Result<(Self, NetHandle), LinkError> {
        let mut link = Link::connect(stream)?;
        // Both stay as they are for the life of the machine, whatever later backends offer: the driver has read them.
        let config = link.config()?;
        let features = link.features();
        let shared = Arc::new(Mutex::new(Shared { link: Some(link), rings: None }));
        let handle = NetHandle { shared: Arc::clone(&shared), features };
        Ok((Self { shared, features, config }, handle))
    }
}

impl NetHandle {
    /// Continues with the backend behind `stream`, which must offer all features of the first one. An error is logged,
    /// and the old backend is kept, dead or alive.
    pub fn replace(&self, stream: UnixStream) {
        let mut shared = lock(&self.shared);
        // The lock is held while the backend answers, so a reset by the driver waits, and finds either of the two in
        // charge.
        let result = Link::connect(stream).and_then(|mut link| {
            if self.features & !link.features() != 0 {
                return Err(LinkError::Features);
            }
            if let Some(rings) = &shared.rings {
                link.start(rings)?;
                // The predecessor may have consumed a kick and not served the chain, or served it and not interrupted.
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

    /// Starts the thread of [`Successors`].
    pub fn follow(self, exit: &ExitSignal) -> io::Result<Successors> {
        let (sender, streams) = mpsc::channel();
        spawn_confined("net-link", exit, move || {
            for stream in streams {
                self.replace(stream);
            }
            Ok(())
        })?;
        Ok(Successors(sender))
    }
}

/// Backends on their way to the device. A thread of its own connects to each: one that hangs at its start takes seconds
/// to be given up, and the thread that received it has others to serve.
pub struct Successors(mpsc::Sender<UnixStream>);

impl Successors {
    /// Makes the device continue with the backend behind `stream`, see [`NetHandle::replace`]. Does not wait for it.
    pub fn replace(&self, stream: UnixStream) {
        // The thread ends only with this value.
        let _ = self.0.send(stream);
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
        // Both queues, since vhost-user serves them as a pair.
        for (index, queue) in activation.queues.into_iter().enumerate() {
            queues.push(queue.ok_or(ActivateError::MissingQueue(index))?);
        }
        let rings = Rings::new(activation.memory, activation.features, &queues)?;
        let mut shared = lock(&self.shared);
        if let Some(link) = &mut shared.link
            && let Err(error) = link.start(&rings)
        {
            // The driver keeps its interface. The backend's successor will serve it.
            tracing::warn!(error = %chain(&error), "the network backend rejected the queues");
            shared.link = None;
        }
        shared.rings = Some(rings);
        Ok(())
    }

    fn reset(&mut self) {
        let mut shared = lock(&self.shared);
        // Only after the backend has answered may the driver reuse the memory of its buffers (2.4.1). A backend that
        // does not answer loses its connection, and the device waits for the next one.
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
