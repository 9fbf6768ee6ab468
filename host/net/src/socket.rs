//! System calls on the host's sockets, all without blocking.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType,
        SockaddrStorage, connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
    },
};
use vm_memory::{VolatileSlice, volatile_memory::PtrGuardMut};

/// Seconds of silence after which the kernel probes the far end of a connection.
const KEEP_ALIVE_TIME: u32 = 75;
/// Seconds between two probes that are not answered.
const KEEP_ALIVE_INTERVAL: u32 = 30;

fn new(address: IpAddr, kind: SockType, protocol: Option<SockProtocol>) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, protocol)
}

/// Sets the options of every connection. Failures are ignored: without them a connection still works.
pub(super) fn tune(stream: &impl std::os::fd::AsFd) {
    // The guest's own TCP has applied Nagle's algorithm already, or was told not to.
    let _ = setsockopt(stream, sockopt::TcpNoDelay, &true);
    // Urgent data is passed on as ordinary data (RFC 6093, 6). Out of line, `MSG_PEEK` would count its byte and other
    // calls would not, and the two would disagree about positions.
    let _ = setsockopt(stream, sockopt::OobInline, &true);
    let _ = setsockopt(stream, sockopt::KeepAlive, &true);
    let _ = setsockopt(stream, sockopt::TcpKeepIdle, &KEEP_ALIVE_TIME);
    let _ = setsockopt(stream, sockopt::TcpKeepInterval, &KEEP_ALIVE_INTERVAL);
}

/// Starts a connection. The socket becomes writable when it is made or has failed.
pub(super) fn connect_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = new(address.ip(), SockType::Stream, None)?;
    tune(&socket);
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

/// A UDP socket that is connected to one address: the kernel drops datagrams of all others.
pub(super) fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = new(address.ip(), SockType::Datagram, None)?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket.into())
}

/// A ping socket (icmp(7)) that is connected to one address. Fails unless `net.ipv4.ping_group_range` covers this user.
pub(super) fn ping(address: IpAddr) -> io::Result<OwnedFd> {
    let protocol = if address.is_ipv4() { SockProtocol::Icmp } else { SockProtocol::IcmpV6 };
    let socket = new(address, SockType::Datagram, Some(protocol))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, 0)))?;
    Ok(socket)
}

fn call(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Sets the position of the next [`peek`], counted from the first byte in the socket (`SO_PEEK_OFF`). Each peek moves
/// it forward, each read back. Fails on kernels that have it for other sockets only (before Linux 6.9, for IPv6 before
/// 6.11).
pub(super) fn set_peek_offset(stream: &TcpStream, offset: u32) -> io::Result<()> {
    let (level, option, size) = (libc::SOL_SOCKET, libc::SO_PEEK_OFF, size_of::<u32>() as libc::socklen_t);
    // SAFETY: the pointer and size are those of `offset`.
    let result = unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const offset).cast(), size) };
    call(result as isize).map(drop)
}

/// Makes a call with a message of this memory, without an address or control data.
fn with_message(parts: &[VolatileSlice<'_>], make: impl FnOnce(&mut libc::msghdr) -> isize) -> io::Result<usize> {
    let guards: Vec<_> = parts.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let iovec = |guard: &PtrGuardMut| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
    let mut vector: Vec<_> = guards.iter().map(iovec).collect();
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (vector.as_mut_ptr(), vector.len());
    call(make(&mut message))
}

/// Copies arrived data without removing it; returns its length.
pub(super) fn peek(stream: &TcpStream, parts: &[VolatileSlice<'_>]) -> io::Result<usize> {
    // The kernel may write to guest memory while the guest does, which is why these are not slices.
    with_message(parts, |message| {
        // SAFETY: the message describes memory that `parts` borrows and that anyone may write to at any time.
        unsafe { libc::recvmsg(stream.as_raw_fd(), message, libc::MSG_PEEK | libc::MSG_DONTWAIT) }
    })
}

/// Sends data from memory that the guest may change meanwhile; returns the number of bytes that the socket has taken.
pub(super) fn send(stream: &TcpStream, parts: &[VolatileSlice<'_>]) -> io::Result<usize> {
    with_message(parts, |message| {
        // SAFETY: the message describes memory that `parts` borrows; the kernel only reads it.
        unsafe { libc::sendmsg(stream.as_raw_fd(), message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
    })
}

/// Removes up to `len` arrived bytes without copying them; returns their number.
pub(super) fn discard(stream: &TcpStream, len: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with MSG_TRUNC nothing is written to where the pointer leads (tcp(7)).
    call(unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), len, flags) })
}

/// Closes a connection with a reset, so that the far end does not take it for a complete one.
pub(super) fn reset(stream: TcpStream) {
    // Lingering for no time at all means a reset (socket(7)).
    let _ = setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
    drop(stream);
}

/// The host's address that a datagram was sent to, from where the answer has to come.
#[derive(Clone, Copy)]
pub(super) enum Local {
    /// IPv4.
    V4(libc::in_pktinfo),
    /// IPv6.
    V6(libc::in6_pktinfo),
}

/// Makes [`receive_from`] return the local address.
pub(super) fn request_local_address(socket: &UdpSocket) {
    // A socket supports one of the two. Without either, answers come from the address of the route.
    let _ = setsockopt(socket, sockopt::Ipv4PacketInfo, &true);
    let _ = setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true);
}

/// Receives a datagram: its length, sender and local address.
pub(super) fn receive_from(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<SocketAddr>, Option<Local>)> {
    let mut control = nix::cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let from = message.address.and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|address| SocketAddr::V4((*address).into()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddr::V6((*address).into())))
    });
    let local = message.cmsgs().ok().and_then(|mut messages| {
        messages.find_map(|message| match message {
            // Interface 0 leaves the way back to the routes; only the address matters.
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(Local::V4(libc::in_pktinfo { ipi_ifindex: 0, ..info })),
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(Local::V6(info)),
            _ => None,
        })
    });
    Ok((message.bytes, from, local))
}

/// Sends a datagram from the local address.
pub(super) fn send_to(socket: &UdpSocket, data: &[u8], to: SocketAddr, local: Option<Local>) -> io::Result<()> {
    let control = match &local {
        Some(Local::V4(info)) => Some(ControlMessage::Ipv4PacketInfo(info)),
        Some(Local::V6(info)) => Some(ControlMessage::Ipv6PacketInfo(info)),
        None => None,
    };
    let control = control.as_slice();
    let to = SockaddrStorage::from(to);
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(data)], control, MsgFlags::MSG_DONTWAIT, Some(&to))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_a_datagram_comes_from_the_address_that_was_asked() {
        let server = UdpSocket::bind("0.0.0.0:0").unwrap();
        request_local_address(&server);
        let port = server.local_addr().unwrap().port();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        // Lets in only datagrams from there.
        client.connect(("127.0.0.7", port)).unwrap();
        client.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        client.send(b"question").unwrap();
        let mut buffer = [0; 100];
        let (len, from, local) = loop {
            if let Ok(received) = receive_from(&server, &mut buffer) {
                break received;
            }
        };
        assert_eq!((&buffer[..len], from), (&b"question"[..], Some(client.local_addr().unwrap())));
        send_to(&server, b"answer", from.unwrap(), local).unwrap();
        let len = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"answer");
    }
}
