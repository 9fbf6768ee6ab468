//! Devices that another process serves (QEMU documentation, "Vhost-user Protocol"). Requests never pass through this
//! process: the other one, the backend of the device, maps guest memory and serves the queues.
//!
//! The guest kicks the backend and the backend interrupts the guest directly: it receives the ioeventfds and the
//! eventfds of the vectors. While a vector is masked, KVM is not connected to its eventfd, which keeps what is pending.
//!
//! If a backend dies, nothing moves until the next one continues the queues where they stand
//! ([`VhostUserHandle::replace`]).

mod link;

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
};

use bulkhead_ipc::report::chain;
pub use link::LinkError;
use link::{Link, Rings};

use super::{ActivateError, Activation, VirtioDevice, spawn_confined};
use crate::exit::ExitSignal;

/// A kind of device: its part of the virtio specification.
#[derive(Debug)]
pub struct Kind {
    /// The backend's name in messages, as in "the … process".
    pub(super) process: &'static str,
    /// Name of the thread that connects to backends.
    pub(super) thread: &'static str,
    /// Device ID (virtio 1.3, section 5).
    pub(super) device_type: u32,
    /// Maximum size of each queue.
    pub(super) queue_sizes: &'static [u16],
    /// Number of queues, from the first one on, without which the driver cannot use the device.
    pub(super) required_queues: usize,
    /// Virtio features of the backend that are offered to the driver. Others need parts that the frontend does not
    /// have.
    pub(super) features: u64,
    /// Those of the features that mean nothing without the backend's configuration space.
    pub(super) configured_features: u64,
    /// Length in bytes of the configuration space that drivers read.
    pub(super) config_len: usize,
    /// Accepts a configuration space that the driver can work with.
    pub(super) accepts: fn(&[u8]) -> bool,
}

/// State that the device and its handles share.
#[derive(Default)]
struct Shared {
    /// The connected backend; `None` after an error, until the next one comes.
    link: Option<Link>,
    /// Present between `DRIVER_OK` and reset.
    rings: Option<Rings>,
}

/// The device.
pub struct VhostUser {
    kind: &'static Kind,
    shared: Arc<Mutex<Shared>>,
    features: u64,
    config: Vec<u8>,
}

/// A handle that gives the device another backend, from any thread.
#[derive(Clone)]
pub struct VhostUserHandle {
    kind: &'static Kind,
    shared: Arc<Mutex<Shared>>,
    features: u64,
}

impl VhostUser {
    /// Creates the device with the features and configuration of the backend behind `stream`.
    pub(super) fn new(kind: &'static Kind, stream: UnixStream) -> Result<(Self, VhostUserHandle), LinkError> {
        let mut link = Link::connect(kind, stream)?;
        // Both stay as they are for the life of the machine, whatever later backends offer: the driver has read them.
        let config = link.config()?;
        let features = link.features();
        let shared = Arc::new(Mutex::new(Shared { link: Some(link), rings: None }));
        let handle = VhostUserHandle { kind, shared: Arc::clone(&shared), features };
        Ok((Self { kind, shared, features, config }, handle))
    }
}

impl VhostUserHandle {
    /// Continues with the backend behind `stream`, which must offer all features of the first one. An error is logged,
    /// and the old backend is kept, dead or alive.
    pub fn replace(&self, stream: UnixStream) {
        let mut shared = lock(&self.shared);
        // The lock is held while the backend answers, so a reset by the driver waits, and finds either of the two in
        // charge.
        let result = Link::connect(self.kind, stream).and_then(|mut link| {
            if self.features & !link.features() != 0 {
                return Err(LinkError::Features(self.kind.process));
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
                tracing::warn!(error = %chain(&error), "cannot use the new {} process", self.kind.process);
            }
        }
    }

    /// Starts the thread of [`Successors`].
    pub fn follow(self, exit: &ExitSignal) -> io::Result<Successors> {
        let (sender, streams) = mpsc::channel();
        spawn_confined(self.kind.thread, exit, move || {
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
    /// Makes the device continue with the backend behind `stream`, see [`VhostUserHandle::replace`]. Does not wait for
    /// it.
    pub fn replace(&self, stream: UnixStream) {
        // The thread ends only with this value.
        let _ = self.0.send(stream);
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.kind.device_type
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.kind.queue_sizes
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
        if let Some(missing) = activation.queues.iter().take(self.kind.required_queues).position(Option::is_none) {
            return Err(ActivateError::MissingQueue(missing));
        }
        let rings = Rings::new(activation.memory, activation.features, &activation.queues)?;
        let mut shared = lock(&self.shared);
        if let Some(link) = &mut shared.link
            && let Err(error) = link.start(&rings)
        {
            // The driver keeps its device. The backend's successor will serve it.
            tracing::warn!(error = %chain(&error), "the {} process rejected the queues", self.kind.process);
            shared.link = None;
        }
        shared.rings = Some(rings);
        Ok(())
    }

    fn reset(&mut self) {
        let mut shared = lock(&self.shared);
        // Only after the backend has answered may the driver reuse the memory of its buffers (2.4.1). A backend that
        // does not answer loses its connection, and the device waits for the next one.
        if let Some(rings) = shared.rings.take()
            && let Some(link) = &mut shared.link
            && let Err(error) = link.stop(&rings)
        {
            tracing::warn!(error = %chain(&error), "the {} process did not stop", self.kind.process);
            shared.link = None;
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
