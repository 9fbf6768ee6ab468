//! The main thread: the backend's control socket and the vmm's vhost-user stream.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex},
};

use ::vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{
    api,
    error::{ShareError, cannot},
    vhost::Device,
};

/// Serves the vmm's requests until it or the backend is gone.
pub(crate) fn run(control: &OwnedFd, stream: UnixStream, device: Device) -> Result<(), ShareError> {
    let waiting = stream.try_clone().map_err(cannot("watch the vhost-user socket"))?;
    // The handler's type demands a mutex. One thread uses it, so it is never contended.
    let mut handler = BackendReqHandler::from_stream(stream, Arc::new(Mutex::new(device)));
    loop {
        let mut events = [control.as_fd(), waiting.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut events, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(cannot("wait for requests")(error.into())),
        }
        let [command, request] = events.map(|event| event.any().unwrap_or_default());
        // A second setup: the backend sends none.
        if command && api::receive(control)?.is_none() {
            return Ok(());
        }
        if request && !answer(&mut handler)? {
            return Ok(());
        }
    }
}

/// Handles the vmm's next request; false when the vmm is gone.
fn answer(handler: &mut BackendReqHandler<Mutex<Device>>) -> Result<bool, ShareError> {
    match handler.handle_request() {
        // A request that this device refuses was answered with an error, and the next one may be fine.
        Ok(()) | Err(VhostError::ReqHandlerError(_) | VhostError::InvalidParam | VhostError::InvalidOperation(_)) => {
            Ok(true)
        }
        Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => Ok(false),
        // Anything else leaves the stream at an unknown position within a message.
        Err(error) => Err(ShareError::Protocol(error)),
    }
}
