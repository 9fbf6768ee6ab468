//! The main thread: the backend's control socket and the vmm's vhost-user stream.

use std::os::{
    fd::{AsFd, OwnedFd},
    unix::net::UnixStream,
};

use bulkhead_vhost_user::Connection;
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
    let mut connection = Connection::new(stream, device);
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
        if request && !connection.handle_request().map_err(ShareError::Protocol)? {
            return Ok(());
        }
    }
}
