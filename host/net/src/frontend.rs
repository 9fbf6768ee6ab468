//! The two sockets of the network process, the backend's control socket and the vmm's vhost-user stream, with the epoll
//! descriptor that everything is waited for with.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, MutexGuard},
};

use bulkhead_vhost_user::{Backend, Connection};
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
    connection: Connection<Device>,
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
        let connection = Connection::new(stream, device);
        Ok(Self { epoll, connection, control, events: vec![EpollEvent::default(); MAX_EVENTS] })
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
        self.connection.handle_request().map_err(NetError::Protocol)
    }

    /// Resets the kick of a queue.
    pub(super) fn take_kick(&self, queue: usize) {
        if let Some(kick) = self.device().rings.get(queue).and_then(|ring| ring.kick.as_ref()) {
            let _ = kick.read();
        }
    }

    /// The device as the vmm has set it up.
    pub(super) fn device(&self) -> MutexGuard<'_, Backend<Device>> {
        self.connection.device()
    }
}
