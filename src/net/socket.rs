//! The host's sockets, without blocking.

use std::{
    io,
    net::{SocketAddrV4, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

fn new(kind: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes integers only.
    let fd = unsafe { libc::socket(libc::AF_INET, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn connect(socket: &OwnedFd, address: SocketAddrV4) -> io::Result<()> {
    let name = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    };
    let len = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: `name` is a valid address of `len` bytes that outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const name).cast(), len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set(socket: &impl AsRawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` is an int that outlives the call, as these options want it.
    unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), len) };
}

/// Begins a connection; it is writable once it is made or has failed.
pub(super) fn begin_tcp(address: SocketAddrV4) -> io::Result<TcpStream> {
    let socket = new(libc::SOCK_STREAM)?;
    set(&socket, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
    set(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    match connect(&socket, address) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

/// A socket that talks to one address only.
pub(super) fn udp(address: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = new(libc::SOCK_DGRAM)?;
    connect(&socket, address)?;
    Ok(socket.into())
}

/// Closes a connection so that the far side sees a reset, not an end.
pub(super) fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: `linger` is what SO_LINGER wants and outlives the call.
    unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len);
    }
    drop(stream);
}
