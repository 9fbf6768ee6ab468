//! The two sockets of the network process, the backend's control socket and the vmm's vhost-user stream, with the epoll
//! descriptor that everything is waited for with.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ::vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::{
    api::{self, Command},
    error::{NetError, cannot},
    events::{self, Token},
    vhost::Device,
};

/// Events taken from epoll at a time.
const MAX_EVENTS: usize = 256;

/// The sockets, the device that the vmm sets up through one of them, and epoll.
pub(super) struct Frontend {
    pub(super) epoll: Arc<Epoll>,
    // The handler's type demands a mutex. One thread uses it, so it is never contended.
    device: Arc<Mutex<Device>>,
    handler: BackendReqHandler<Mutex<Device>>,
    control: OwnedFd,
    events: Vec<EpollEvent>,
}

impl Frontend {
    /// Watches both sockets; the queues are watched from when the vmm hands over their kicks.
    pub(super) fn new(control: OwnedFd, stream: UnixStream) -> Result<Self, NetError> {
        let epoll = Arc::new(Epoll::new().map_err(cannot("create an epoll descriptor"))?);
        events::watch(&epoll, &control, Token::Control).map_err(cannot("watch the control socket"))?;
        events::watch(&epoll, &stream, Token::Frontend).map_err(cannot("watch the vhost-user socket"))?;
        let device = Device::new(Arc::clone(&epoll)).map_err(cannot("allocate the queues"))?;
        let device = Arc::new(Mutex::new(device));
        let handler = BackendReqHandler::from_stream(stream, Arc::clone(&device));
        Ok(Self { epoll, device, handler, control, events: vec![EpollEvent::default(); MAX_EVENTS] })
    }

    /// Waits at most `timeout` milliseconds, or forever if it is -1; returns the number of events.
    pub(super) fn wait(&mut self, timeout: i32) -> Result<usize, NetError> {
        match self.epoll.wait(timeout, &mut self.events) {
            Ok(ready) => Ok(ready),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(cannot("wait for events")(error)),
        }
    }

    /// The source of an event.
    pub(super) fn token(&self, index: usize) -> Token {
        Token::unpack(self.events[index].data())
    }

    /// See [`events::ending`].
    pub(super) fn ending(&self, index: usize) -> bool {
        events::ending(&self.events[index])
    }

    /// The backend's next command; `None` when the backend is gone.
    pub(super) fn receive_command(&self) -> Result<Option<(Command, Option<OwnedFd>)>, NetError> {
        Ok(api::receive(&self.control)?)
    }

    /// Handles the vmm's next request; false when the vmm is gone.
    pub(super) fn handle_request(&mut self) -> Result<bool, NetError> {
        match self.handler.handle_request() {
            // A request that this device refuses was answered with an error, and the next one may be fine.
            Ok(())
            | Err(VhostError::ReqHandlerError(_) | VhostError::InvalidParam | VhostError::InvalidOperation(_)) => {
                Ok(true)
            }
            Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => Ok(false),
            // Anything else leaves the stream at an unknown position within a message.
            Err(error) => Err(NetError::Protocol(error)),
        }
    }

    /// Resets the kick of a queue.
    pub(super) fn take_kick(&self, queue: usize) {
        if let Some(kick) = self.device().rings.get(queue).and_then(|ring| ring.kick.as_ref()) {
            let _ = kick.read();
        }
    }

    /// The device as the vmm has set it up.
    pub(super) fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
