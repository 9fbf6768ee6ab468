//! The backend's side of the control socket of a `bulkhead vmm` process.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command as Process},
    time::Duration,
};

use bulkhead_ipc::inherited::FD;
use bulkhead_vmm::api::{Event, MAX_PACKET};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::Signal,
        socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair},
    },
};

/// Our end and the child's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Starts a process that dies with the calling thread and finds `control`, if there is one, as its descriptor [`FD`].
pub fn spawn(process: &mut Process, control: Option<&OwnedFd>) -> io::Result<Child> {
    let raw = control.map(AsRawFd::as_raw_fd);
    // SAFETY: only system calls that take integers are made between fork and exec.
    unsafe {
        process.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            let done = match raw {
                Some(FD) => libc::fcntl(FD, libc::F_SETFD, 0),
                Some(raw) => libc::dup2(raw, FD),
                None => 0,
            };
            if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    process.spawn()
}

/// Sends one packet, with a descriptor beside it if there is one.
pub fn send(socket: &OwnedFd, packet: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let messages = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(packet)], messages, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The next event; `None` when the process closed its end, [`io::ErrorKind::TimedOut`] when none comes in time.
pub fn receive(socket: &OwnedFd, within: Duration) -> io::Result<Option<Event>> {
    let timeout = PollTimeout::try_from(within).map_err(io::Error::other)?;
    if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut packet = vec![0; MAX_PACKET];
    let len = recvmsg::<()>(socket.as_raw_fd(), &mut [IoSliceMut::new(&mut packet)], None, MsgFlags::empty())?.bytes;
    if len == 0 { Ok(None) } else { Ok(Some(serde_json::from_slice(&packet[..len])?)) }
}
