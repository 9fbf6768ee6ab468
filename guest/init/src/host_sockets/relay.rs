//! Moves bytes between a container's connection and the stream to the host, until both directions have ended.
//!
//! The two directions end on their own: a program may say that it has sent everything and wait for the answer. What one
//! side has not read yet is held in one buffer of [`BUFFER_SIZE`]; meanwhile nothing more is read from the other.

use std::{
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, Shutdown, recv, send, shutdown},
};

/// Size of each direction's buffer in bytes.
const BUFFER_SIZE: usize = 16 * 1024;

/// Both directions of a connection are lost.
#[derive(Debug)]
struct Broken;

/// The state of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// The sender has ended; the rest is in the buffer.
    Ended,
    /// The receiver knows the end, or takes nothing more.
    Closed,
}

/// One direction of a connection.
#[derive(Debug)]
struct Direction {
    buffer: Box<[u8]>,
    /// The bytes that the receiver has not taken.
    pending: Range<usize>,
    state: State,
}

impl Direction {
    fn new() -> Self {
        Self { buffer: vec![0; BUFFER_SIZE].into(), pending: 0..0, state: State::Open }
    }

    fn wants_to_read(&self) -> bool {
        self.state == State::Open && self.pending.is_empty()
    }

    fn wants_to_write(&self) -> bool {
        !self.pending.is_empty()
    }

    fn read(&mut self, from: BorrowedFd<'_>) -> Result<(), Broken> {
        match recv(from.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => self.state = State::Ended,
            Ok(length) => self.pending = 0..length,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => return Err(Broken),
        }
        Ok(())
    }

    fn write(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Broken> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(to.as_raw_fd(), &self.buffer[self.pending.clone()], flags) {
            Ok(length) => self.pending.start += length,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // The receiver reads nothing more, but may go on sending.
            Err(Errno::EPIPE) => self.give_up(from),
            Err(_) => return Err(Broken),
        }
        Ok(())
    }

    /// Passes the end on when everything before it has been written.
    fn settle(&mut self, to: BorrowedFd<'_>) {
        if self.state == State::Ended && self.pending.is_empty() {
            let _ = shutdown(to.as_raw_fd(), Shutdown::Write);
            self.state = State::Closed;
        }
    }

    /// Drops what the receiver has not taken, and makes the sender see that.
    fn give_up(&mut self, from: BorrowedFd<'_>) {
        if self.state != State::Closed {
            let _ = shutdown(from.as_raw_fd(), Shutdown::Read);
            self.pending = 0..0;
            self.state = State::Closed;
        }
    }
}

/// Relays until both directions have ended or the connection is lost. Blocks.
pub(super) fn run(container: impl AsFd, host: impl AsFd) {
    let (container, host) = (container.as_fd(), host.as_fd());
    let (mut out, mut back) = (Direction::new(), Direction::new());
    let mut is_gone = false;
    while out.state != State::Closed || back.state != State::Closed {
        let wanted = |reads: bool, writes: bool| {
            let mut events = PollFlags::empty();
            events.set(PollFlags::POLLIN, reads);
            events.set(PollFlags::POLLOUT, writes);
            events
        };
        let of_container = wanted(out.wants_to_read(), back.wants_to_write());
        let of_host = wanted(back.wants_to_read(), out.wants_to_write());
        let mut fds = Vec::with_capacity(2);
        // A hang-up is reported even where nothing is wanted. The container's is waited for once; to be woken again and
        // again by one that is known would be a busy loop.
        let watches_container = !is_gone || !of_container.is_empty();
        if watches_container {
            fds.push(PollFd::new(container, of_container));
        }
        if !of_host.is_empty() {
            fds.push(PollFd::new(host, of_host));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        is_gone |= watches_container
            && fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR));
        // Each is tried where it is wanted: the sockets say themselves if it was too early.
        if exchange(&mut out, container, host).and_then(|()| exchange(&mut back, host, container)).is_err() {
            return;
        }
        if is_gone {
            back.give_up(host);
        }
    }
}

/// Reads and writes what is possible in one direction.
fn exchange(direction: &mut Direction, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Broken> {
    if direction.wants_to_read() {
        direction.read(from)?;
    }
    if direction.wants_to_write() {
        direction.write(from, to)?;
    }
    direction.settle(to);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::Shutdown,
        os::unix::net::UnixStream,
        thread::{self, JoinHandle},
        time::Duration,
    };

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    /// The ends of a container and of the host, and the relay between them.
    fn ends() -> (UnixStream, UnixStream, JoinHandle<()>) {
        let ((container, ours), (host, theirs)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        for end in [&container, &host] {
            end.set_read_timeout(Some(TIMEOUT)).unwrap();
            end.set_write_timeout(Some(TIMEOUT)).unwrap();
        }
        (container, host, thread::spawn(move || run(ours, theirs)))
    }

    fn rest(stream: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn each_direction_ends_on_its_own() {
        for host_first in [false, true] {
            let (container, host, relay) = ends();
            let (mut first, mut second) = if host_first { (host, container) } else { (container, host) };
            first.write_all(b"question").unwrap();
            first.shutdown(Shutdown::Write).unwrap();
            assert_eq!(rest(&mut second), b"question");
            second.write_all(b"answer").unwrap();
            second.shutdown(Shutdown::Write).unwrap();
            assert_eq!(rest(&mut first), b"answer");
            relay.join().unwrap();
        }
    }

    #[test]
    fn a_side_that_does_not_read_holds_up_its_sender_and_loses_nothing() {
        let (mut container, mut host, relay) = ends();
        let bytes: Vec<u8> = (0..2_000_000_u32).map(|at| at as u8).collect();
        let sent = bytes.clone();
        let writer = thread::spawn(move || {
            host.write_all(&sent).unwrap();
            host
        });
        // The other direction does not wait for it.
        container.write_all(b"x").unwrap();
        thread::sleep(Duration::from_millis(50));
        assert!(!writer.is_finished());
        let mut read = vec![0; bytes.len()];
        container.read_exact(&mut read).unwrap();
        assert!(read == bytes);
        let mut host = writer.join().unwrap();
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 1);
        drop(host);
        assert_eq!(rest(&mut container), b"");
        drop(container);
        relay.join().unwrap();
    }

    #[test]
    fn a_container_that_is_gone_ends_a_stream_whose_host_says_nothing() {
        let (mut container, mut host, relay) = ends();
        container.write_all(b"last words").unwrap();
        drop(container);
        relay.join().unwrap();
        assert_eq!(rest(&mut host), b"last words");
    }

    #[test]
    fn a_container_that_leaves_between_two_halves_is_noticed() {
        let (container, mut host, relay) = ends();
        container.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&mut host), b"");
        // Only the hang-up says so: this direction has ended, and nothing comes from the host.
        drop(container);
        relay.join().unwrap();
    }

    #[test]
    fn a_host_that_is_gone_ends_the_containers_connection() {
        let (mut container, host, relay) = ends();
        drop(host);
        assert_eq!(rest(&mut container), b"");
        container.write_all(b"too late").unwrap();
        relay.join().unwrap();
        assert!(container.write_all(b"later still").is_err());
    }
}
