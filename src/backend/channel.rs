//! Packets to and from a child process: one JSON object each, with at most one descriptor beside it, over a
//! `SOCK_SEQPACKET` socket pair. The child's end is the socket that [`super::child::spawn`] hands over.

use std::{
    fmt,
    io::{self, IoSlice},
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, recv, sendmsg, socketpair},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

use super::child::ChildError;

/// Interval between attempts to send a descriptor while too many of this user are in flight.
const IN_FLIGHT_INTERVAL: Duration = Duration::from_millis(5);

/// The backend's end of the socket pair: sends `Command`s and receives `Event`s.
pub(super) struct Channel<Command, Event> {
    child: &'static str,
    max_packet: usize,
    socket: AsyncFd<OwnedFd>,
    messages: PhantomData<fn(Command) -> Event>,
}

impl<Command, Event> Channel<Command, Event> {
    /// Returns a channel and its other end, for the child of this name, with packets of at most `max_packet` bytes.
    pub(super) fn pair(child: &'static str, max_packet: usize) -> Result<(Self, OwnedFd), ChildError> {
        let failed = |error: io::Error| ChildError::Socket(child, error);
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| failed(errno.into()))?;
        // O_NONBLOCK belongs to one end, so the child may still block on its own.
        fcntl(&ours, FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).map_err(|errno| failed(errno.into()))?;
        // SAFETY: the descriptor is owned, so it stays open and the same until the registration is dropped with it.
        let socket = unsafe { AsyncFd::register(ours) }.map_err(|error| failed(error.into()))?;
        Ok((Self { child, max_packet, socket, messages: PhantomData }, theirs))
    }

    fn socket_error(&self, error: io::Error) -> ChildError {
        ChildError::Socket(self.child, error)
    }
}

impl<Command: Serialize, Event> Channel<Command, Event> {
    /// Sends one packet, with a descriptor beside it, and waits while the child does not receive any.
    pub(super) async fn send(&self, command: &Command, descriptor: Option<BorrowedFd<'_>>) -> Result<(), ChildError> {
        let packet = serde_json::to_vec(command).map_err(|error| ChildError::Encode(self.child, error))?;
        if packet.len() > self.max_packet {
            return Err(ChildError::TooLong(self.child, self.max_packet));
        }
        let descriptors: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        // SOCK_SEQPACKET sends a packet whole or not at all, so a dropped future leaves no half packet behind.
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
                // The kernel limits the descriptors of one user that were sent and not yet received (unix(7)). The
                // socket counts as writable all the while, so waiting for readiness would spin.
                Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                    tokio::time::sleep(IN_FLIGHT_INTERVAL).await;
                }
                Err(error) => return Err(self.socket_error(error)),
            }
        }
    }
}

impl<Command, Event: DeserializeOwned> Channel<Command, Event> {
    /// Receives the next packet; returns `None` when the child has closed its end.
    pub(super) async fn receive(&self) -> Result<Option<Event>, ChildError> {
        // One byte more than allowed: the kernel cuts off the rest of a longer packet, and the extra byte shows it.
        let mut buffer = vec![0; self.max_packet + 1];
        let receive =
            |socket: &OwnedFd| recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from);
        let length = match self.socket.async_io(Interest::READABLE, receive).await {
            Ok(length) => length,
            // A child that ended with unread packets in its queue resets the socket instead of closing it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(self.socket_error(error)),
        };
        match length {
            0 => Ok(None),
            length if length > self.max_packet => Err(ChildError::TooLong(self.child, self.max_packet)),
            length => {
                let event = serde_json::from_slice(&buffer[..length]);
                Ok(Some(event.map_err(|error| ChildError::Decode(self.child, error))?))
            }
        }
    }
}

impl<Command, Event> fmt::Debug for Channel<Command, Event> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("child", &self.child).field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::fd::AsFd,
    };

    use super::*;
    use bulkhead_ipc::channel as packets;

    const MAX_PACKET: usize = 64;

    fn pair() -> (Channel<String, String>, OwnedFd) {
        Channel::pair("test", MAX_PACKET).unwrap()
    }

    /// Reads one packet as the child does.
    fn receive_blocking(socket: &OwnedFd) -> (String, Option<OwnedFd>) {
        packets::receive(socket, &mut [0; MAX_PACKET]).unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_descriptor_arrives_beside_its_packet_and_the_sender_can_close_its_copy() {
        let (channel, theirs) = pair();
        let (client, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
        channel.send(&"connect".to_owned(), Some(client.as_fd())).await.unwrap();
        drop(client);
        let (command, descriptor) = receive_blocking(&theirs);
        assert_eq!(command, "connect");
        let mut stream = std::os::unix::net::UnixStream::from(descriptor.unwrap());
        stream.write_all(b"x").unwrap();
        drop(stream);
        let mut text = String::new();
        far.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[tokio::test]
    async fn a_child_that_takes_no_packets_makes_the_sender_wait_and_nothing_is_lost() {
        let (channel, theirs) = pair();
        let command = "statistics".to_owned();
        let mut sent = 0;
        while tokio::time::timeout(Duration::from_millis(50), channel.send(&command, None)).await.is_ok() {
            sent += 1;
            assert!(sent < 100_000, "no back-pressure");
        }
        let reader = tokio::task::spawn_blocking(move || {
            for _ in 0..=sent {
                assert_eq!(receive_blocking(&theirs).0, "statistics");
            }
            theirs
        });
        channel.send(&command, None).await.unwrap();
        drop(reader.await.unwrap());
        // A child of another test holds a copy of the other end until it runs its program.
        let refused = async {
            loop {
                match channel.send(&command, None).await {
                    Ok(()) => tokio::time::sleep(Duration::from_millis(10)).await,
                    Err(error) => break error,
                }
            }
        };
        let refused = tokio::time::timeout(Duration::from_secs(10), refused).await.expect("no end");
        assert!(matches!(refused, ChildError::Socket("test", _)));
        assert!(channel.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_packet_that_is_no_message_is_an_error() {
        let (channel, theirs) = pair();
        nix::unistd::write(theirs.as_fd(), b"garbage").unwrap();
        assert!(matches!(channel.receive().await, Err(ChildError::Decode("test", _))));
    }

    #[tokio::test]
    async fn a_packet_beyond_the_bound_is_refused_in_both_directions() {
        let (channel, theirs) = pair();
        let too_long = channel.send(&"x".repeat(MAX_PACKET), None).await.unwrap_err();
        assert_eq!(too_long.to_string(), "a packet to or from the test process is longer than 64 bytes");
        nix::unistd::write(theirs.as_fd(), &[b'x'; MAX_PACKET + 9]).unwrap();
        assert!(matches!(channel.receive().await, Err(ChildError::TooLong("test", MAX_PACKET))));
    }
}
