//! The host's end of a TCP connection: a non-blocking socket of this process.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
};

use smoltcp::socket::tcp::Socket;
use vm_memory::VolatileSlice;

use crate::socket;

/// State of the host's direction: what of the far end's data has been read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// connect(2) is under way, and the guest's SYN waits for its result.
    Connecting { syn: Vec<u8> },
    /// The far end may send. A connection to the name server is open from the start: writes fail with `EAGAIN` until it
    /// is made.
    Open,
    /// The far end has sent its last byte, and it was read.
    Ended,
}

/// Result of connect(2).
pub(super) enum Connected {
    Pending,
    /// With the guest's SYN, to be answered.
    Yes(Vec<u8>),
    /// With the guest's SYN, to be refused.
    No(Vec<u8>),
}

/// The host's end of one connection.
pub(super) struct HostEnd {
    pub(super) state: Host,
    pub(super) stream: TcpStream,
    // epoll reports edges, so readiness is kept until a call says otherwise.
    pub(super) readable: bool,
    writable: bool,
    /// A short read does not mean that everything was read, see [`crate::events::ending`].
    pub(super) ending: bool,
}

impl HostEnd {
    pub(super) fn new(stream: TcpStream, state: Host) -> Self {
        Self { state, stream, readable: false, writable: false, ending: false }
    }

    /// Notes an event of the socket; `ending` as [`crate::events::ending`] says.
    pub(super) fn on_event(&mut self, ending: bool) {
        self.ending |= ending;
        // Readable, writable or failed: the next call of each kind finds out.
        self.readable = true;
        self.writable = true;
    }

    /// True while there may be something to read.
    pub(super) fn is_readable(&self) -> bool {
        self.readable && self.state != Host::Ended
    }

    /// The result of connect(2); `None` if it was there before. After a result the state is [`Host::Open`].
    pub(super) fn poll_connect(&mut self) -> Option<Connected> {
        let Host::Connecting { syn } = &mut self.state else { return None };
        // connect(2) makes the socket writable, whether it succeeds or fails.
        if !self.writable {
            return Some(Connected::Pending);
        }
        let connected = match (self.stream.take_error(), self.stream.peer_addr()) {
            (Ok(None), Ok(_)) => true,
            // Neither an error nor a peer: an event that came before the result.
            (Ok(None), Err(error)) if error.kind() == ErrorKind::NotConnected => {
                self.writable = false;
                return Some(Connected::Pending);
            }
            _ => false,
        };
        let syn = std::mem::take(syn);
        self.state = Host::Open;
        Some(if connected { Connected::Yes(syn) } else { Connected::No(syn) })
    }

    /// Writes what of `backlog` the socket takes.
    pub(super) fn write_backlog(&mut self, backlog: &mut Vec<u8>) -> io::Result<()> {
        while self.writable && !backlog.is_empty() {
            match self.stream.write(backlog) {
                Ok(len) => drop(backlog.drain(..len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// True while the socket may take more.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Writes the guest's data from its own buffers; returns the number of bytes that the socket has taken.
    pub(super) fn write_parts(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<usize> {
        loop {
            match socket::send(&self.stream, parts) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.writable = false;
                    return Ok(0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Writes the guest's data from smoltcp's buffer; true if some was taken.
    pub(super) fn write_from(&mut self, guest: &mut Socket<'_>) -> io::Result<bool> {
        let mut moved = false;
        // smoltcp's buffer is a ring, so all of it can take two rounds. Bytes stay in it until the socket has taken
        // them, and with a full buffer the guest's window closes: a slow far end slows the guest down.
        while self.writable && guest.can_recv() {
            match guest.recv(|data| match self.stream.write(data) {
                Ok(len) => (len, Ok(len)),
                Err(error) => (0, Err(error)),
            }) {
                Ok(Ok(len)) => moved |= len > 0,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                // smoltcp's state allows no receiving, whatever its buffer holds.
                Err(_) => break,
            }
        }
        Ok(moved)
    }

    /// Reads the far end's data into smoltcp's buffer, and its end; true if there was some.
    pub(super) fn read_into(&mut self, guest: &mut Socket<'_>) -> io::Result<bool> {
        let mut moved = false;
        // Read straight into smoltcp's buffer, and only as much as the guest has made room for: a guest that takes
        // nothing leaves the data in the socket, whose window closes towards the far end.
        while self.is_readable() && guest.can_send() {
            match guest.send(|space| match self.stream.read(space) {
                Ok(len) => (len, Ok(len)),
                Err(error) => (0, Err(error)),
            }) {
                Ok(Ok(0)) => {
                    self.state = Host::Ended;
                    // smoltcp sends its FIN behind the data in its buffer.
                    guest.close();
                    moved = true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(moved)
    }

    /// Passes the end of the guest's data on.
    pub(super) fn end(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }

    /// Closes the socket, in order or with a reset.
    pub(super) fn close(self, orderly: bool) {
        if orderly {
            // Unread data would make the kernel end the connection with a reset (RFC 2525, 2.17).
            let _ = socket::discard(&self.stream, i32::MAX as usize);
        } else {
            socket::reset(self.stream);
        }
    }
}
