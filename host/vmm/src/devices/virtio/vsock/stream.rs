//! The host stream of a connection.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, Shutdown, recv, shutdown},
};

use super::segments::Segment;

/// Maximum number of pieces of guest memory in one system call. The rest of a longer list is left to the next call.
const MAX_IOVECS: usize = 64;

/// Maximum number of bytes that are discarded when a stream is ended: a few socket buffers.
const MAX_DISCARDED: usize = 4 << 20;

/// A byte stream on the host. No call blocks; instead it returns [`io::ErrorKind::WouldBlock`].
pub(super) trait HostStream {
    /// Reads straight into guest memory; `Ok(0)` is the end of the stream. `into` is not empty.
    fn read(&mut self, into: &[Segment<'_>]) -> io::Result<usize>;

    /// Writes straight from guest memory.
    fn write(&mut self, from: &[Segment<'_>]) -> io::Result<usize>;

    /// Writes the two halves of a ring buffer.
    fn write_bytes(&mut self, first: &[u8], second: &[u8]) -> io::Result<usize>;

    /// Lets the peer read the end of the stream behind the bytes written so far.
    fn shutdown_write(&mut self);

    /// Makes the peer's writes fail.
    fn shutdown_read(&mut self);

    /// Ends both directions. Unread bytes of the peer are discarded, so that the peer finds a clean end of the stream
    /// behind the bytes written to it, and not `ECONNRESET`.
    fn finish(&mut self);

    /// True if the next read would find the end of the stream.
    fn is_at_end(&self) -> bool;

    /// True if the peer closed both directions and there is nothing left to read.
    fn is_abandoned(&self) -> bool;
}

/// A connected stream socket. Every call passes `MSG_DONTWAIT`, because `O_NONBLOCK` belongs to the open file, which
/// another process may share.
#[derive(Debug)]
pub(super) struct SocketStream(OwnedFd);

impl SocketStream {
    /// Wraps a connected stream socket.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Reads the next bytes and leaves them in the socket.
    pub(super) fn peek(&self, bytes: &mut [u8]) -> io::Result<usize> {
        retry(|| recv(self.as_raw_fd(), bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).map_err(Into::into))
    }

    /// Reads the next bytes.
    pub(super) fn take(&self, bytes: &mut [u8]) -> io::Result<usize> {
        retry(|| recv(self.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT).map_err(Into::into))
    }

    /// True if the peer closed both directions.
    pub(super) fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }

    fn send(&self, iovecs: &mut [libc::iovec]) -> io::Result<usize> {
        // MSG_NOSIGNAL: a peer that is gone is an error here, not a SIGPIPE that ends the vmm.
        let message = message(iovecs);
        retry(|| {
            // SAFETY: the header and its iovecs outlive the call, and each iovec describes memory that the caller
            // keeps mapped; the kernel only reads it.
            let sent =
                unsafe { libc::sendmsg(self.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
            usize::try_from(sent).map_err(|_| io::Error::last_os_error())
        })
    }
}

impl AsFd for SocketStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SocketStream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl HostStream for SocketStream {
    fn read(&mut self, into: &[Segment<'_>]) -> io::Result<usize> {
        let mut iovecs = [EMPTY_IOVEC; MAX_IOVECS];
        let used = into.len().min(MAX_IOVECS);
        for (iovec, segment) in iovecs.iter_mut().zip(into) {
            *iovec = libc::iovec { iov_base: segment.ptr_guard_mut().as_ptr().cast(), iov_len: segment.len() };
        }
        let mut message = message(&mut iovecs[..used]);
        retry(|| {
            // SAFETY: each iovec describes a slice of guest memory that stays mapped while `into` is borrowed. The
            // guest may access it at the same time; Rust never holds a reference to it.
            let read = unsafe { libc::recvmsg(self.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
            usize::try_from(read).map_err(|_| io::Error::last_os_error())
        })
    }

    fn write(&mut self, from: &[Segment<'_>]) -> io::Result<usize> {
        let mut iovecs = [EMPTY_IOVEC; MAX_IOVECS];
        let used = from.len().min(MAX_IOVECS);
        for (iovec, segment) in iovecs.iter_mut().zip(from) {
            *iovec = libc::iovec { iov_base: segment.ptr_guard().as_ptr().cast_mut().cast(), iov_len: segment.len() };
        }
        self.send(&mut iovecs[..used])
    }

    fn write_bytes(&mut self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        let piece = |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        self.send(&mut [piece(first), piece(second)])
    }

    fn shutdown_write(&mut self) {
        // An error means that the peer is gone and reads nothing anyway.
        let _ = shutdown(self.as_raw_fd(), Shutdown::Write);
    }

    fn shutdown_read(&mut self) {
        let _ = shutdown(self.as_raw_fd(), Shutdown::Read);
    }

    fn finish(&mut self) {
        let _ = shutdown(self.as_raw_fd(), Shutdown::Both);
        // On a unix socket, closing with unread bytes resets the peer. They are read first, and
        // a peer that writes faster than this loop reads cannot keep it going: its direction is shut down.
        let mut bin = [0; 16 << 10];
        let mut discarded = 0;
        while discarded < MAX_DISCARDED {
            match self.take(&mut bin) {
                Ok(0) | Err(_) => break,
                Ok(len) => discarded += len,
            }
        }
    }

    fn is_at_end(&self) -> bool {
        matches!(self.peek(&mut [0]), Ok(0))
    }

    fn is_abandoned(&self) -> bool {
        // A hangup alone is not enough: the peer may have written something before it left.
        self.is_hung_up() && !matches!(self.peek(&mut [0]), Ok(1..))
    }
}

const EMPTY_IOVEC: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Returns a message of these pieces, without an address and without room for ancillary data: the kernel drops
/// descriptors that a client sends along.
fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero bytes are a valid `msghdr`: null pointers and zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len() as _;
    message
}

/// Repeats a system call that a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
