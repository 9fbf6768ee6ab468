//! The server side of sd_notify(3): readiness, signs of life, and descriptors that services store.
//!
//! A datagram is a list of assignments, one a line, with descriptors attached. The kernel adds the sender's process id,
//! by which the supervisor knows the service and the store the owner of a name.

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

/// The socket's path, for `NOTIFY_SOCKET`; only the VM's root can reach it.
pub(crate) const SOCKET: &str = "/run/bulkhead/notify";

/// Returns whether a datagram has this assignment as a line of its own.
fn has_line(datagram: &[u8], assignment: &[u8]) -> bool {
    datagram.split(|byte| *byte == b'\n').any(|line| line == assignment)
}

/// Maximum of descriptors in one datagram.
const MAX_DESCRIPTORS: usize = 4;

/// Returns the event in a datagram, if it has one.
fn event(datagram: &[u8], sender: i32) -> Option<Event> {
    if has_line(datagram, b"READY=1") {
        Some(Event::Ready(sender))
    } else if has_line(datagram, b"WATCHDOG=1") {
        Some(Event::Watchdog(sender))
    } else {
        None
    }
}

/// Receives one datagram, carries out its request to the store, and returns its event.
fn receive(socket: &OwnedFd, store: &FdStore) -> nix::Result<Option<Event>> {
    let mut buffer = [0; 4096];
    let mut control = cmsg_space!(libc::ucred, [RawFd; MAX_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let length = message.bytes;
    // Taken over first, whatever the datagram says: each one is open in this process now, and has to be closed
    // somewhere.
    let (mut sender, mut descriptors) = (None, Vec::new());
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials.pid()),
            ControlMessageOwned::ScmRights(raw) => {
                for fd in raw {
                    // SAFETY: the kernel has just made this descriptor for this process, and nothing else has its
                    // number.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
            _ => {}
        }
    }
    let datagram = &buffer[..length.min(buffer.len())];
    // Without a sender the datagram says nothing that could be believed.
    let Some(sender) = sender else { return Ok(None) };
    store.handle(sender, datagram, descriptors);
    Ok(event(datagram, sender))
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

/// Turns datagrams into events until the supervisor has ended.
fn forward(socket: &OwnedFd, events: &Sender<Event>, store: &FdStore) {
    loop {
        match receive(socket, store) {
            Ok(Some(event)) => {
                if events.send(event).is_err() {
                    return;
                }
            }
            Ok(None) | Err(nix::Error::EINTR) => {}
            // The kernel had to drop descriptors, and with them the datagram is lost. Going on matters more: a service
            // whose WATCHDOG=1 is not received is killed.
            Err(nix::Error::ENOBUFS) => log::info("cannot store a service's descriptor: too many are open"),
            Err(error) => {
                log::info(&format!("cannot receive messages of services any more: {error}"));
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
    fn datagrams_arrive_after_one_whose_descriptors_were_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = OwnedFd::from(UnixDatagram::bind(&path).unwrap());
        setsockopt(&socket, PassCred, &true).unwrap();
        let service = UnixDatagram::unbound().unwrap();
        service.connect(&path).unwrap();
        let (kept, _far) = UnixStream::pair().unwrap();
        // The kernel cuts the control message off in the same way at the limit of open files.
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
