//! Readiness of services, pushed by them, and sockets that they have kept: the datagram protocol of sd_notify(3).

use std::{
    io::IoSliceMut,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixDatagram,
    },
    sync::mpsc::Sender,
};

use nix::{
    cmsg_space,
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, setsockopt, sockopt::PassCred},
};

use crate::{
    error::Error,
    event::{Event, spawn},
    mounts,
    store::Store,
};

/// The socket's path, for `NOTIFY_SOCKET`; only root can reach it.
pub(crate) const SOCKET: &str = "/run/bulkhead/notify";

/// Whether a datagram has this assignment (one a line).
fn says(datagram: &[u8], assignment: &[u8]) -> bool {
    datagram.split(|byte| *byte == b'\n').any(|line| line == assignment)
}

/// Descriptors that one datagram can bring.
const DESCRIPTORS: usize = 4;

/// What a datagram says, if it is of interest.
fn event(datagram: &[u8], sender: i32) -> Option<Event> {
    if says(datagram, b"READY=1") {
        Some(Event::Ready(sender))
    } else if says(datagram, b"WATCHDOG=1") {
        Some(Event::Alive(sender))
    } else {
        None
    }
}

fn receive(socket: &OwnedFd, store: &Store) -> nix::Result<Option<Event>> {
    let mut buffer = [0; 4096];
    let mut control = cmsg_space!(libc::ucred, [RawFd; DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let length = message.bytes;
    let (mut sender, mut descriptors) = (None, Vec::new());
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials.pid()),
            ControlMessageOwned::ScmRights(raw) => {
                for fd in raw {
                    // SAFETY: the kernel has just made this descriptor for this process, and nobody else knows it.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
            _ => {}
        }
    }
    let datagram = &buffer[..length.min(buffer.len())];
    store.handle(datagram, descriptors);
    Ok(sender.and_then(|sender| event(datagram, sender)))
}

/// Opens the socket, turns each `READY=1` and `WATCHDOG=1` into an event with its sender's process id, and keeps
/// sockets in `store`.
pub(crate) fn watch(events: Sender<Event>, store: Store) -> Result<(), Error> {
    mounts::make_directory(mounts::PRIVATE, 0o700)?;
    let socket = UnixDatagram::bind(SOCKET).map_err(Error::file("listen on", SOCKET))?;
    let socket = OwnedFd::from(socket);
    setsockopt(&socket, PassCred, &true).map_err(Error::system("ask for senders' credentials"))?;
    spawn("notify", move || {
        loop {
            let event = match receive(&socket, &store) {
                Ok(Some(event)) => event,
                Ok(None) | Err(nix::Error::EINTR) => continue,
                Err(_) => return,
            };
            if events.send(event).is_err() {
                return;
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_a_line_of_its_own() {
        for datagram in [&b"READY=1"[..], b"STATUS=up\nREADY=1\n"] {
            assert!(matches!(event(datagram, 5), Some(Event::Ready(5))));
        }
        for datagram in [&b"STOPPING=1"[..], b"STATUS=READY=1", b"WATCHDOG=trigger"] {
            assert!(event(datagram, 5).is_none());
        }
        assert!(matches!(event(b"WATCHDOG=1", 5), Some(Event::Alive(5))));
    }
}
