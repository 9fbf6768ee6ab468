//! Published TCP ports: the host's listening sockets, and where in the guest their connections go.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener, TcpStream},
};

use vmm_sys_util::epoll::Epoll;

use super::events::{self, Token};

/// Connections taken from one socket before others have their turn.
const BURST: usize = 64;

struct Listener {
    socket: TcpListener,
    target: SocketAddr,
}

/// All published TCP ports.
#[derive(Default)]
pub(super) struct Published {
    listeners: HashMap<u64, Listener>,
    /// Whether the sockets are not looked at, because there are too many connections: clients wait in the backlog.
    paused: bool,
}

/// A client's connection.
pub(super) struct Arrival {
    pub(super) stream: TcpStream,
    pub(super) client: SocketAddr,
    pub(super) target: SocketAddr,
}

impl Published {
    /// Publishes a listening socket.
    pub(super) fn add(&mut self, epoll: &Epoll, id: u64, socket: TcpListener, target: SocketAddr) {
        let ready = socket.set_nonblocking(true).is_ok()
            && (self.paused || events::watch(epoll, &socket, Token::Published(id)).is_ok());
        if ready {
            self.listeners.insert(id, Listener { socket, target });
        }
    }

    /// Ends a published port; true if there was one.
    pub(super) fn remove(&mut self, epoll: &Epoll, id: u64) -> bool {
        let Some(listener) = self.listeners.remove(&id) else { return false };
        // The backend has the same socket open: closing our descriptor alone would leave it registered.
        events::forget(epoll, &listener.socket);
        true
    }

    /// Takes at most `room` connections that wait.
    pub(super) fn accept(&mut self, epoll: &Epoll, id: u64, room: usize) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        let Some(listener) = self.listeners.get(&id) else { return arrivals };
        while arrivals.len() < room.min(BURST) {
            match listener.socket.accept() {
                Ok((stream, client)) => arrivals.push(Arrival { stream, client, target: listener.target }),
                Err(error) => match error.raw_os_error() {
                    // Not this host's fault, and nobody is left to be served.
                    Some(libc::ECONNABORTED | libc::EINTR | libc::EPROTO) => {}
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        self.pause(epoll);
                        return arrivals;
                    }
                    _ => return arrivals,
                },
            }
        }
        if room == arrivals.len() {
            self.pause(epoll);
        }
        arrivals
    }

    fn pause(&mut self, epoll: &Epoll) {
        self.paused = true;
        self.listeners.values().for_each(|listener| events::forget(epoll, &listener.socket));
    }

    /// Whether clients wait for something to end.
    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Looks at the sockets again, after something has ended.
    pub(super) fn resume(&mut self, epoll: &Epoll) {
        if std::mem::take(&mut self.paused) {
            for (id, listener) in &self.listeners {
                if events::watch(epoll, &listener.socket, Token::Published(*id)).is_err() {
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
    fn with_no_room_clients_wait_and_nobody_spins() {
        let (epoll, mut published) = (Epoll::new().unwrap(), Published::default());
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
