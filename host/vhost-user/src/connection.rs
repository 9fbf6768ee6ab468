//! The vmm's stream.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vhost::vhost_user::BackendReqHandler;

use super::{Backend, Device, Error, Result};

/// A stream of requests for one device.
pub struct Connection<D: Device> {
    // The handler's type demands a mutex. One thread uses it, so it is never contended.
    backend: Arc<Mutex<Backend<D>>>,
    handler: BackendReqHandler<Mutex<Backend<D>>>,
}

impl<D: Device> Connection<D> {
    /// Serves the vmm behind `stream`.
    pub fn new(stream: UnixStream, device: D) -> Self {
        let backend = Arc::new(Mutex::new(Backend::new(device)));
        Self { handler: BackendReqHandler::from_stream(stream, Arc::clone(&backend)), backend }
    }

    /// Handles the vmm's next request; false when the vmm is gone. An error leaves the stream at an unknown position
    /// within a message.
    pub fn handle_request(&mut self) -> Result<bool> {
        match self.handler.handle_request() {
            // A request that this device refuses was answered with an error, and the next one may be fine.
            Ok(()) | Err(Error::ReqHandlerError(_) | Error::InvalidParam | Error::InvalidOperation(_)) => Ok(true),
            Err(Error::Disconnected | Error::SocketBroken(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The device as the vmm has set it up.
    pub fn device(&self) -> MutexGuard<'_, Backend<D>> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
