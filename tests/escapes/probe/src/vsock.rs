//! vsock: every way to a socket, and what can be reached with one.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use crate::{
    attempt::{At, Blocked, Outcome, any},
    ring, sys,
};

const AGENT_PORT: u32 = 1025;
const DOCKER_PORT: u32 = 1023;

/// Context ids: this machine by loopback, the host, and this machine as the host calls it.
const LOCAL: u32 = 1;
const HOST: u32 = 2;
const OWN: u32 = 3;
const ANY: u32 = u32::MAX;

const STREAM: i32 = libc::SOCK_STREAM;

/// Any port that is not reserved.
const BETWEEN: u32 = 5005;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

impl Address {
    fn new(cid: u32, port: u32) -> Self {
        Self { family: libc::AF_VSOCK as u16, reserved: 0, port, cid, zero: [0; 4] }
    }
}

fn owned(fd: u64) -> OwnedFd {
    // SAFETY: only called with what a call that makes a descriptor just returned.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// The plain call.
fn plain() -> io::Result<OwnedFd> {
    sys::open_call(libc::SYS_socket, &[&libc::AF_VSOCK, &STREAM, &0])
}

/// With bits above those that the kernel takes the family from.
fn high_bits() -> io::Result<OwnedFd> {
    sys::open_call(libc::SYS_socket, &[&(1_u64 << 32 | libc::AF_VSOCK as u64), &STREAM, &0])
}

/// In the 32-bit ABI.
fn narrow() -> io::Result<OwnedFd> {
    sys::call_32(359, [libc::AF_VSOCK as u32, STREAM as u32, 0]).map(owned)
}

/// In the 32-bit ABI by the call whose arguments are in memory.
fn multiplexed() -> io::Result<OwnedFd> {
    let page = sys::map(-1, 4096, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT)?;
    // SAFETY: the page is ours and long enough.
    unsafe { page.cast::<[u32; 3]>().write([libc::AF_VSOCK as u32, STREAM as u32, 0]) };
    sys::call_32(102, [1, page as u32, 0]).map(owned)
}

/// In the x32 ABI.
fn x32() -> io::Result<OwnedFd> {
    sys::open_call(libc::SYS_socket | 0x4000_0000, &[&libc::AF_VSOCK, &STREAM, &0])
}

/// By a ring.
fn by_ring() -> io::Result<OwnedFd> {
    ring::socket(libc::AF_VSOCK, STREAM).map(|fd| owned(fd as u64))
}

fn made(socket: io::Result<OwnedFd>) -> Outcome {
    socket.at("socket").map(|socket| format!("made socket {}", socket.as_raw_fd()))
}

/// See [`plain`].
pub(crate) fn socket_plain() -> Outcome {
    made(plain())
}

/// See [`high_bits`].
pub(crate) fn socket_high_bits() -> Outcome {
    made(high_bits())
}

/// See [`narrow`].
pub(crate) fn socket_32() -> Outcome {
    made(narrow())
}

/// See [`multiplexed`].
pub(crate) fn socketcall_32() -> Outcome {
    made(multiplexed())
}

/// See [`x32`].
pub(crate) fn socket_x32() -> Outcome {
    made(x32())
}

/// See [`by_ring`].
pub(crate) fn socket_by_ring() -> Outcome {
    made(by_ring())
}

/// A socket, by whatever way there is; those that may end the process come last.
fn socket() -> Result<OwnedFd, Blocked> {
    plain().or_else(|_| high_bits()).or_else(|_| by_ring()).or_else(|_| x32()).or_else(|_| multiplexed()).at("socket")
}

fn bind(socket: &OwnedFd, port: u32) -> io::Result<u64> {
    let address = Address::new(ANY, port);
    sys::call(libc::SYS_bind, &[&socket.as_raw_fd(), &&raw const address, &size_of::<Address>()])
}

fn connect(from: Option<u32>, cid: u32, port: u32) -> Result<File, Blocked> {
    let socket = socket()?;
    if let Some(from) = from {
        bind(&socket, from).at(&format!("bind to the reserved port {from}"))?;
    }
    let address = Address::new(cid, port);
    let connected = sys::call(libc::SYS_connect, &[&socket.as_raw_fd(), &&raw const address, &size_of::<Address>()]);
    connected.at(&format!("connect to {cid}:{port}"))?;
    Ok(socket.into())
}

/// The port of the host that belongs to the VM's agent.
pub(crate) fn agent() -> Outcome {
    any([None, Some(900)]
        .map(|from| connect(from, HOST, AGENT_PORT).map(|_| format!("connected to the host's port {AGENT_PORT}"))))
}

/// The port of the VM on which the host reaches the engine.
pub(crate) fn gate() -> Outcome {
    any([LOCAL, OWN].map(|cid| {
        let mut stream = connect(None, cid, DOCKER_PORT)?;
        stream.write_all(b"GET /_ping HTTP/1.0\r\n\r\n").at("write")?;
        let mut answer = [0; 64];
        match stream.read(&mut answer).at("read")? {
            0 => Err(Blocked::Refused(format!("{cid}:{DOCKER_PORT} closed the connection"))),
            some => Ok(String::from_utf8_lossy(&answer[..some]).into_owned()),
        }
    }))
}

/// Another container of the VM, on whatever network: here both ends are in one.
pub(crate) fn between() -> Outcome {
    let listener = socket()?;
    bind(&listener, BETWEEN).at("bind")?;
    sys::call(libc::SYS_listen, &[&listener.as_raw_fd(), &1_i32]).at("listen")?;
    any([LOCAL, OWN].map(|cid| connect(None, cid, BETWEEN).map(|_| format!("connected to {cid}:{BETWEEN}"))))
}

/// The engine's port, in the place of who has it.
pub(crate) fn impersonate() -> Outcome {
    let socket = socket()?;
    match bind(&socket, DOCKER_PORT) {
        Ok(_) => Ok("has the engine's port".into()),
        // A refusal comes before any other error.
        Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
            Ok("could have the port if it were free".into())
        }
        Err(error) => Err(Blocked::at("bind", &error)),
    }
}
