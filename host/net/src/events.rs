//! Event sources of the loop: epoll and the tokens that its events carry.

use std::{io, os::fd::AsRawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The source of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The backend has sent a command or is gone.
    Control,
    /// The vmm has sent a request or is gone.
    Frontend,
    /// The driver kicked this queue.
    Kick(usize),
    /// The host's side of a TCP connection.
    Tcp(u64),
    /// The host's side of a UDP association.
    Udp(u64),
    /// The socket of a query to a name server.
    Dns(u64),
    /// The ping socket of an identifier.
    Echo(u64),
    /// A published port's socket.
    Published(u64),
    /// The tap device.
    Tap,
}

impl Token {
    /// The kind in the upper 8 bits of an event's data, the number below.
    fn pack(self) -> u64 {
        // A number is never so large: it would take billions of connections each second for years.
        let (kind, id) = match self {
            Self::Control => (0, 0),
            Self::Kick(queue) => (1, queue as u64),
            Self::Tcp(id) => (2, id),
            Self::Udp(id) => (3, id),
            Self::Dns(id) => (4, id),
            Self::Echo(id) => (5, id),
            Self::Published(id) => (6, id),
            Self::Frontend => (7, 0),
            Self::Tap => (8, 0),
        };
        kind << 56 | id & 0x00ff_ffff_ffff_ffff
    }

    /// The token behind an event's data.
    pub(super) fn unpack(data: u64) -> Self {
        let id = data & 0x00ff_ffff_ffff_ffff;
        match data >> 56 {
            0 => Self::Control,
            1 => Self::Kick(id as usize),
            2 => Self::Tcp(id),
            3 => Self::Udp(id),
            4 => Self::Dns(id),
            5 => Self::Echo(id),
            6 => Self::Published(id),
            7 => Self::Frontend,
            _ => Self::Tap,
        }
    }
}

/// True if a short read does not prove that the socket is empty, and no other edge would report the rest.
///
/// That is so after the far end's FIN or an error, because nothing more will arrive, and with urgent data, before which
/// each read stops (tcp(7)).
pub(super) fn ending(event: &EpollEvent) -> bool {
    // EPOLLRDHUP comes with the FIN, EPOLLPRI with an urgent pointer.
    let last = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
    event.event_set().intersects(last | EventSet::PRIORITY)
}

/// Reports `fd` for as long as it is readable (level-triggered).
pub(super) fn watch(epoll: &Epoll, fd: &impl AsRawFd, token: Token) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, token.pack()))
}

/// Reports `fd` each time that it becomes readable or writable (edge-triggered): a guest that takes no data must not
/// keep the loop spinning over a readable socket.
pub(super) fn watch_edges(epoll: &Epoll, fd: &impl AsRawFd, token: Token) -> io::Result<()> {
    let events = EventSet::IN | EventSet::OUT | EventSet::PRIORITY | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, token.pack()))
}

/// Stops reporting `fd`.
pub(super) fn unwatch(epoll: &Epoll, fd: &impl AsRawFd) {
    // Fails for a descriptor that was never watched, which is fine.
    let _ = epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Control,
            Token::Frontend,
            Token::Kick(1),
            Token::Tcp(7),
            Token::Udp(1 << 55),
            Token::Dns(9),
            Token::Echo(1),
            Token::Published(u64::MAX >> 8),
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
