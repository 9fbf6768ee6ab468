//! The child `bulkhead vmm` and the packets to and from it.

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::ExitStatusExt,
    },
    process::ExitStatus,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{
        signal::Signal,
        socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, recv, sendmsg, socketpair},
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    process::Child,
};

use serde::Serialize;

use bulkhead_vmm::api::{Event, ExitReason, MAX_PACKET};

use super::{child, state::End};

/// How long a vmm process may live on after it closed its socket or said that the machine ended.
const LAST_BREATH: Duration = Duration::from_secs(3);

/// Why the vmm cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The process could not be started.
    #[error("cannot start the vmm process")]
    Spawn(#[source] io::Error),
    /// The socket failed.
    #[error("the connection to the vmm process failed")]
    Socket(#[source] io::Error),
    /// A packet is no message.
    #[error("the vmm process sent a packet that is no message")]
    Syntax(#[from] serde_json::Error),
    /// A packet is too long.
    #[error("a packet for or from the vmm process has more than {MAX_PACKET} bytes")]
    TooLong,
}

/// The backend's end of the socket pair.
#[derive(Debug)]
pub struct Channel {
    socket: AsyncFd<OwnedFd>,
}

impl Channel {
    /// A channel and the other end for a child.
    pub fn pair() -> Result<(Self, OwnedFd), VmmError> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| VmmError::Socket(errno.into()))?;
        // Only this end: the flag belongs to the end, and the child may want to block.
        fcntl(&ours, FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
            .map_err(|errno| VmmError::Socket(errno.into()))?;
        // SAFETY: the descriptor is owned, so it stays open and the same until the registration is dropped with it.
        let socket = unsafe { AsyncFd::register(ours) }.map_err(|error| VmmError::Socket(error.into()))?;
        Ok((Self { socket }, theirs))
    }

    /// Sends one packet, with a descriptor beside it, and waits while the child does not take any.
    pub async fn send(&self, command: &impl Serialize, descriptor: Option<BorrowedFd<'_>>) -> Result<(), VmmError> {
        let packet = serde_json::to_vec(command)?;
        if packet.len() > MAX_PACKET {
            return Err(VmmError::TooLong);
        }
        let descriptors: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        let send = |socket: &OwnedFd| {
            sendmsg::<UnixAddr>(
                socket.as_raw_fd(),
                &[IoSlice::new(&packet)],
                control,
                MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                None,
            )
            .map_err(io::Error::from)
        };
        loop {
            match self.socket.async_io(Interest::WRITABLE, send).await {
                Ok(_) => return Ok(()),
                // Too many descriptors of this user are under way (unix(7)): the child has to take some.
                Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(VmmError::Socket(error)),
            }
        }
    }

    /// The next packet, or `None` when the child closed its end.
    pub async fn receive(&self) -> Result<Option<Event>, VmmError> {
        let mut buffer = vec![0; MAX_PACKET + 1];
        let receive =
            |socket: &OwnedFd| recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from);
        let length = match self.socket.async_io(Interest::READABLE, receive).await {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(VmmError::Socket(error)),
        };
        match length {
            0 => Ok(None),
            length if length > MAX_PACKET => Err(VmmError::TooLong),
            length => Ok(Some(serde_json::from_slice(&buffer[..length])?)),
        }
    }
}

/// Starts `bulkhead vmm` with `theirs` as its control socket and its output in `log`.
///
/// The child dies with the *thread* that calls this, as [`super::child::spawn`] says.
pub fn spawn(theirs: &OwnedFd, log: std::fs::File) -> Result<Child, VmmError> {
    child::spawn("vmm", theirs.as_fd(), log).map_err(VmmError::Spawn)
}

/// Waits for the process to be gone, killing it when it lingers, and says how the machine ended.
pub async fn reap(child: &mut Child, said: Option<ExitReason>) -> End {
    let status = if let Ok(status) = tokio::time::timeout(LAST_BREATH, child.wait()).await {
        status
    } else {
        let _ = child.start_kill();
        child.wait().await
    };
    explain(said, status.ok())
}

/// How a machine ended, from what the vmm said and how its process ended.
fn explain(said: Option<ExitReason>, status: Option<ExitStatus>) -> End {
    match said {
        Some(ExitReason::PowerOff) => End::PowerOff,
        Some(ExitReason::Reset) => End::Reset,
        Some(ExitReason::Panic) => End::Broken("the guest kernel panicked".into()),
        Some(ExitReason::TripleFault) => End::Broken("a virtual CPU shut down (triple fault)".into()),
        Some(ExitReason::Error { message }) => End::Broken(message),
        None => End::Broken(match status {
            Some(status) => match (status.signal(), status.code()) {
                (Some(signal), _) => {
                    let name = Signal::try_from(signal).map_or("unknown", Signal::as_str);
                    format!("the vmm process was killed by signal {signal} ({name})")
                }
                (_, Some(code)) => format!("the vmm process ended with status {code} before its machine did"),
                _ => "the vmm process ended".into(),
            },
            None => "the vmm process is gone".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use bulkhead_ipc::channel;
    use bulkhead_vmm::api::Command;

    /// Reads one packet as the child does.
    fn receive_blocking(socket: &OwnedFd) -> (Command, Option<OwnedFd>) {
        channel::receive(socket, MAX_PACKET).unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_descriptor_arrives_beside_its_packet_and_the_sender_can_close_its_copy() {
        let (channel, theirs) = Channel::pair().unwrap();
        let (client, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
        channel.send(&Command::VsockConnect { port: 1024 }, Some(client.as_fd())).await.unwrap();
        drop(client);
        let (command, descriptor) = receive_blocking(&theirs);
        assert_eq!(command, Command::VsockConnect { port: 1024 });
        let mut stream = std::os::unix::net::UnixStream::from(descriptor.unwrap());
        stream.write_all(b"x").unwrap();
        drop(stream);
        let mut text = String::new();
        far.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[tokio::test]
    async fn a_child_that_takes_no_packets_makes_the_sender_wait_and_nothing_is_lost() {
        let (channel, theirs) = Channel::pair().unwrap();
        let mut sent = 0;
        while tokio::time::timeout(Duration::from_millis(50), channel.send(&Command::Statistics, None)).await.is_ok() {
            sent += 1;
            assert!(sent < 100_000, "no back-pressure");
        }
        let reader = tokio::task::spawn_blocking(move || {
            for _ in 0..=sent {
                assert_eq!(receive_blocking(&theirs).0, Command::Statistics);
            }
            theirs
        });
        channel.send(&Command::Statistics, None).await.unwrap();
        drop(reader.await.unwrap());
        // A child of another test holds a copy of the other end until it runs its program.
        let refused = async {
            loop {
                match channel.send(&Command::Statistics, None).await {
                    Ok(()) => tokio::time::sleep(Duration::from_millis(10)).await,
                    Err(error) => break error,
                }
            }
        };
        let refused = tokio::time::timeout(Duration::from_secs(10), refused).await.expect("no end");
        assert!(matches!(refused, VmmError::Socket(_)));
        assert!(channel.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_packet_that_is_no_message_is_an_error() {
        let (channel, theirs) = Channel::pair().unwrap();
        nix::unistd::write(theirs.as_fd(), b"garbage").unwrap();
        assert!(matches!(channel.receive().await, Err(VmmError::Syntax(_))));
    }

    #[test]
    fn a_vmm_that_was_killed_is_told_from_a_guest_that_powered_off() {
        assert_eq!(explain(Some(ExitReason::PowerOff), None), End::PowerOff);
        let End::Broken(reason) = explain(None, Some(ExitStatus::from_raw(9))) else { panic!() };
        assert!(reason.contains("signal 9 (SIGKILL)"), "{reason}");
    }
}
