//! Runs `bulkhead vmm` as its backend would and talks to it over the control socket.

#![allow(dead_code, reason = "each suite uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

pub mod guest;

use std::{
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command as Process, Stdio},
    time::{Duration, Instant},
};

use bulkhead::vmm::api::{CONTROL_FD, Command, Event, ExitReason, MAX_PACKET, VmConfig};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair},
};
use std::os::fd::AsFd;

/// A vmm process; killed when dropped.
pub struct Vmm {
    child: Option<Child>,
    socket: OwnedFd,
}

impl Vmm {
    /// Starts the process without telling it anything.
    pub fn spawn() -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut process = Process::new(env!("CARGO_BIN_EXE_bulkhead"));
        process.arg("vmm").stdin(Stdio::null()).stderr(Stdio::inherit());
        let raw = theirs.as_raw_fd();
        // SAFETY: dup2 and fcntl are async-signal-safe and take integers only.
        unsafe {
            process.pre_exec(move || {
                let done =
                    if raw == CONTROL_FD { libc::fcntl(raw, libc::F_SETFD, 0) } else { libc::dup2(raw, CONTROL_FD) };
                if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        Self { child: Some(process.spawn().unwrap()), socket: ours }
    }

    /// Starts the process and boots a machine.
    pub fn boot(config: VmConfig) -> Self {
        let vmm = Self::spawn();
        vmm.send(&Command::Boot(Box::new(config)), None);
        vmm
    }

    pub fn send(&self, command: &Command, fd: Option<&OwnedFd>) {
        self.send_raw(&serde_json::to_vec(command).unwrap(), fd);
    }

    pub fn send_raw(&self, packet: &[u8], fd: Option<&OwnedFd>) {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let messages = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(packet)], messages, MsgFlags::MSG_NOSIGNAL, None)
            .unwrap();
    }

    /// The next event; `None` when the process closed the socket.
    pub fn event(&self, within: Duration) -> Option<Event> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(within).unwrap();
        assert_eq!(poll(&mut fds, timeout).unwrap(), 1, "no event within {within:?}");
        let mut packet = vec![0; MAX_PACKET];
        let len = {
            let mut iov = [IoSliceMut::new(&mut packet)];
            recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, None, MsgFlags::empty()).unwrap().bytes
        };
        (len > 0).then(|| serde_json::from_slice(&packet[..len]).unwrap())
    }

    /// Waits for the machine's end.
    pub fn exit(&self, within: Duration) -> ExitReason {
        let deadline = Instant::now() + within;
        loop {
            match self.event(deadline.saturating_duration_since(Instant::now())) {
                Some(Event::Exited(reason)) => return reason,
                Some(_) => {}
                None => panic!("the vmm ended without a word"),
            }
        }
    }
}

impl Vmm {
    /// Closes the control socket, as a backend that died would, and leaves the process to itself.
    pub fn disconnect(mut self) -> Child {
        self.child.take().unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Whether the process ends by itself in time; one that does not is killed.
pub fn ended(child: &mut Child, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}
