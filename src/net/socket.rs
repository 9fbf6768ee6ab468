//! The host's sockets, without blocking.

use std::{
    io,
    net::{SocketAddrV4, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt},
};

fn new(kind: SockType) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Inet, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
}

/// Begins a connection; it is writable once it is made or has failed.
pub(super) fn begin_tcp(address: SocketAddrV4) -> io::Result<TcpStream> {
    let socket = new(SockType::Stream)?;
    // Without these the connection works as well, if slower or longer.
    let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
    let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
    match connect(socket.as_raw_fd(), &SockaddrIn::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

/// A socket that talks to one address only.
pub(super) fn udp(address: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = new(SockType::Datagram)?;
    connect(socket.as_raw_fd(), &SockaddrIn::from(address))?;
    Ok(socket.into())
}

/// Closes a connection so that the far side sees a reset, not an end.
pub(super) fn reset(stream: TcpStream) {
    let _ = setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
    drop(stream);
}
