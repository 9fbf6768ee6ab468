//! What each kind of network process has before it: the backend's control socket, the vmm's frontend and the queues.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ::vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::{
    NetError,
    control::{self, Command},
    events::{self, Token},
    host,
    vhost::Device,
};

/// Events taken at once.
const EVENTS: usize = 256;

/// Sockets, queues and what is waited for.
pub(super) struct Front {
    pub(super) epoll: Arc<Epoll>,
    device: Arc<Mutex<Device>>,
    handler: BackendReqHandler<Mutex<Device>>,
    control: OwnedFd,
    events: Vec<EpollEvent>,
}

impl Front {
    /// Watches both sockets; the queues are watched when the frontend hands them over.
    pub(super) fn new(control: OwnedFd, stream: UnixStream) -> Result<Self, NetError> {
        let epoll = Arc::new(Epoll::new().map_err(host("an epoll descriptor"))?);
        events::watch(&epoll, &control, Token::Control).map_err(host("an epoll event"))?;
        events::watch(&epoll, &stream, Token::Frontend).map_err(host("an epoll event"))?;
        let device = Arc::new(Mutex::new(Device::new(Arc::clone(&epoll)).map_err(host("memory for the queues"))?));
        let handler = BackendReqHandler::from_stream(stream, Arc::clone(&device));
        Ok(Self { epoll, device, handler, control, events: vec![EpollEvent::default(); EVENTS] })
    }

    /// Waits at most so many milliseconds, for ever if -1; how many events there are.
    pub(super) fn wait(&mut self, timeout: i32) -> Result<usize, NetError> {
        match self.epoll.wait(timeout, &mut self.events) {
            Ok(ready) => Ok(ready),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(source) => Err(NetError::Host { what: "to wait for events", source }),
        }
    }

    /// What one of the events is about.
    pub(super) fn token(&self, index: usize) -> Token {
        Token::unpack(self.events[index].data())
    }

    /// Whether it has to be looked into to the end.
    pub(super) fn ending(&self, index: usize) -> bool {
        events::ending(&self.events[index])
    }

    /// What the backend says; `None` when it is gone.
    pub(super) fn command(&self) -> Result<Option<(Command, Option<OwnedFd>)>, NetError> {
        Ok(control::receive(&self.control)?)
    }

    /// Does what the frontend says; false when it is gone.
    pub(super) fn heard(&mut self) -> Result<bool, NetError> {
        match self.handler.handle_request() {
            // What the frontend asked and may not is answered; the conversation goes on.
            Ok(())
            | Err(VhostError::ReqHandlerError(_) | VhostError::InvalidParam | VhostError::InvalidOperation(_)) => {
                Ok(true)
            }
            Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => Ok(false),
            Err(error) => Err(NetError::Protocol(error)),
        }
    }

    /// Takes the driver's kick of a queue.
    pub(super) fn kicked(&self, queue: usize) {
        if let Some(kick) = self.device().rings.get(queue).and_then(|ring| ring.kick.as_ref()) {
            let _ = kick.read();
        }
    }

    /// The queues as the frontend has set them up.
    pub(super) fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
