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

/// Whether a datagram says `READY=1` (one assignment a line).
fn says_ready(datagram: &[u8]) -> bool {
    datagram.split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
}

/// Descriptors that one datagram can bring.
const DESCRIPTORS: usize = 4;

fn receive(socket: &OwnedFd, store: &Store) -> nix::Result<Option<i32>> {
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
    Ok(sender.filter(|_| says_ready(datagram)))
}

/// Opens the socket, turns each `READY=1` into an event with its sender's process id, and keeps sockets in `store`.
pub(crate) fn watch(events: Sender<Event>, store: Store) -> Result<(), Error> {
    mounts::make_directory(mounts::PRIVATE, 0o700)?;
    let socket = UnixDatagram::bind(SOCKET).map_err(Error::file("listen on", SOCKET))?;
    let socket = OwnedFd::from(socket);
    setsockopt(&socket, PassCred, &true).map_err(Error::system("ask for senders' credentials"))?;
    spawn("notify", move || {
        loop {
            let event = match receive(&socket, &store) {
                Ok(Some(pid)) => Event::Ready(pid),
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
    use super::says_ready;

    #[test]
    fn readiness_is_a_line_of_its_own() {
        assert!(says_ready(b"READY=1"));
        assert!(says_ready(b"STATUS=up\nREADY=1\n"));
        assert!(!says_ready(b"STOPPING=1"));
        assert!(!says_ready(b"STATUS=READY=1"));
    }
}
