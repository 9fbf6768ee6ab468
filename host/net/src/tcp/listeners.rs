//! Published TCP ports: the host's listening sockets, with their targets in the guest.
//!
//! While there is no room for connections, no socket is watched, and clients wait in the kernel's backlog.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener, TcpStream},
};

use vmm_sys_util::epoll::Epoll;

use crate::events::{self, Token};

/// Connections accepted from one socket before others have their turn.
const BURST: usize = 64;

struct Listener {
    socket: TcpListener,
    target: SocketAddr,
}

/// All published TCP ports.
#[derive(Default)]
pub(crate) struct Listeners {
    listeners: HashMap<u64, Listener>,
    /// The sockets are not watched.
    paused: bool,
}

/// A client's connection.
pub(crate) struct Accepted {
    pub(crate) stream: TcpStream,
    pub(crate) client: SocketAddr,
    pub(crate) target: SocketAddr,
}

impl Listeners {
    /// Publishes a listening socket.
    pub(crate) fn add(&mut self, epoll: &Epoll, id: u64, socket: TcpListener, target: SocketAddr) {
        let ready = socket.set_nonblocking(true).is_ok()
            && (self.paused || events::watch(epoll, &socket, Token::Published(id)).is_ok());
        if ready {
            self.listeners.insert(id, Listener { socket, target });
        }
    }

    /// Closes a published port; false if there was none.
    pub(crate) fn remove(&mut self, epoll: &Epoll, id: u64) -> bool {
        let Some(listener) = self.listeners.remove(&id) else { return false };
        // The backend has the same socket open: closing our descriptor alone would leave it registered.
        events::unwatch(epoll, &listener.socket);
        true
    }

    /// Accepts at most `room` waiting connections.
    pub(crate) fn accept(&mut self, epoll: &Epoll, id: u64, room: usize) -> Vec<Accepted> {
        let mut accepted = Vec::new();
        let Some(listener) = self.listeners.get(&id) else { return accepted };
        while accepted.len() < room.min(BURST) {
            match listener.socket.accept() {
                Ok((stream, client)) => accepted.push(Accepted { stream, client, target: listener.target }),
                Err(error) => match error.raw_os_error() {
                    // The client of one connection is gone; the next may be fine (accept(2)).
                    Some(libc::ECONNABORTED | libc::EINTR | libc::EPROTO) => {}
                    // Level-triggered events would make the loop spin over clients that cannot be accepted.
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        self.pause(epoll);
                        return accepted;
                    }
                    _ => return accepted,
                },
            }
        }
        if room == accepted.len() {
            self.pause(epoll);
        }
        accepted
    }

    fn pause(&mut self, epoll: &Epoll) {
        self.paused = true;
        self.listeners.values().for_each(|listener| events::unwatch(epoll, &listener.socket));
    }

    /// True while clients may wait for a connection to end.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Watches the sockets again, after a connection has ended.
    pub(crate) fn resume(&mut self, epoll: &Epoll) {
        if std::mem::take(&mut self.paused) {
            for (id, listener) in &self.listeners {
                if events::watch(epoll, &listener.socket, Token::Published(*id)).is_err() {
                    // The next call tries again; sockets that are watched already stay so.
                    self.paused = true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::epoll::EpollEvent;

    use super::*;

    #[test]
    fn with_no_room_clients_wait_and_nothing_spins() {
        let (epoll, mut published) = (Epoll::new().unwrap(), Listeners::default());
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        published.add(&epoll, 3, socket, "172.17.0.2:80".parse().unwrap());
        let clients: Vec<_> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        let mut events = [EpollEvent::default(); 4];
        assert_eq!(epoll.wait(1000, &mut events).unwrap(), 1);
        assert_eq!(Token::unpack(events[0].data()), Token::Published(3));
        assert_eq!(published.accept(&epoll, 3, 2).len(), 2);
        assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
        published.resume(&epoll);
        assert_eq!(epoll.wait(1000, &mut events).unwrap(), 1);
        let arrival = published.accept(&epoll, 3, 9).pop().unwrap();
        assert_eq!(arrival.client, clients[2].local_addr().unwrap());
        assert!(published.remove(&epoll, 3) && !published.remove(&epoll, 3));
    }
}
