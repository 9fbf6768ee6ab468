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
    fd_store::FdStore,
    log, mounts,
};

/// The socket's path, for `NOTIFY_SOCKET`; only root can reach it.
pub(crate) const SOCKET: &str = "/run/bulkhead/notify";

/// Whether a datagram has this assignment (one a line).
fn has_line(datagram: &[u8], assignment: &[u8]) -> bool {
    datagram.split(|byte| *byte == b'\n').any(|line| line == assignment)
}

/// Descriptors that one datagram can bring.
const MAX_DESCRIPTORS: usize = 4;

/// What a datagram says, if it is of interest.
fn event(datagram: &[u8], sender: i32) -> Option<Event> {
    if has_line(datagram, b"READY=1") {
        Some(Event::Ready(sender))
    } else if has_line(datagram, b"WATCHDOG=1") {
        Some(Event::Watchdog(sender))
    } else {
        None
    }
}

fn receive(socket: &OwnedFd, store: &FdStore) -> nix::Result<Option<Event>> {
    let mut buffer = [0; 4096];
    let mut control = cmsg_space!(libc::ucred, [RawFd; MAX_DESCRIPTORS]);
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
pub(crate) fn watch(events: Sender<Event>, store: FdStore) -> Result<(), Error> {
    mounts::make_directory(mounts::PRIVATE_DIRECTORY, 0o700)?;
    let socket = UnixDatagram::bind(SOCKET).map_err(Error::file("listen on", SOCKET))?;
    let socket = OwnedFd::from(socket);
    setsockopt(&socket, PassCred, &true).map_err(Error::system("ask for senders' credentials"))?;
    spawn("notify", move || forward(&socket, &events, &store))
}

/// Turns datagrams into events until nobody wants them.
fn forward(socket: &OwnedFd, events: &Sender<Event>, store: &FdStore) {
    loop {
        match receive(socket, store) {
            Ok(Some(event)) => {
                if events.send(event).is_err() {
                    return;
                }
            }
            Ok(None) | Err(nix::Error::EINTR) => {}
            // Without a place for its descriptors one datagram is lost. The next ones are not: who is not heard is killed.
            Err(nix::Error::ENOBUFS) => log::info("a descriptor of a service can't be kept: too many are open"),
            Err(error) => {
                log::info(&format!("services are heard no more: {error}"));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::IoSlice, os::unix::net::UnixStream, sync::mpsc, time::Duration};

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    #[test]
    fn services_are_heard_after_descriptors_for_which_there_was_no_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = OwnedFd::from(UnixDatagram::bind(&path).unwrap());
        setsockopt(&socket, PassCred, &true).unwrap();
        let service = UnixDatagram::unbound().unwrap();
        service.connect(&path).unwrap();
        let (kept, _far) = UnixStream::pair().unwrap();
        // The kernel says the same of one that does not fit under the limit of open files.
        let (parts, rights) = ([IoSlice::new(b"FDSTORE=1\nFDNAME=a")], [kept.as_raw_fd(); MAX_DESCRIPTORS + 1]);
        let rights = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(service.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
        service.send(b"WATCHDOG=1").unwrap();
        let (events, inbox) = mpsc::channel();
        std::thread::spawn(move || forward(&socket, &events, &FdStore::default()));
        assert!(matches!(inbox.recv_timeout(Duration::from_secs(10)), Ok(Event::Watchdog(_))));
    }

    #[test]
    fn readiness_is_a_line_of_its_own() {
        for datagram in [&b"READY=1"[..], b"STATUS=up\nREADY=1\n"] {
            assert!(matches!(event(datagram, 5), Some(Event::Ready(5))));
        }
        for datagram in [&b"STOPPING=1"[..], b"STATUS=READY=1", b"WATCHDOG=trigger"] {
            assert!(event(datagram, 5).is_none());
        }
        assert!(matches!(event(b"WATCHDOG=1", 5), Some(Event::Watchdog(5))));
    }
}
