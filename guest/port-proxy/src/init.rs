//! The connection to init, which is the mapping.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use bulkhead_protocol::{MAX_PORT_PACKET, PortAnswer, PortMapping};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket,
        sockopt::ReceiveTimeout,
    },
    time::{TimeVal, TimeValLike},
};

/// Seconds for the host to answer. dockerd itself waits for 16 and then has no reason to tell.
pub(crate) const PATIENCE: i64 = 10;

/// Why there is no mapping.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("the port can't be published: the guest's init does not take the request")]
    Connection(#[source] io::Error),
    #[error("the port can't be published: the host did not answer within {PATIENCE} s")]
    Slow,
    #[error("the port can't be published: the guest's init broke off")]
    Closed,
    #[error("the port can't be published: the answer is not understood")]
    Syntax(#[from] serde_json::Error),
    /// The host's own words.
    #[error("{0}")]
    Refused(String),
}

/// A mapping that exists as long as this does.
#[derive(Debug)]
pub(crate) struct Mapping {
    connection: OwnedFd,
}

impl Mapping {
    /// Asks init for it and waits for the host to listen, `patience` seconds at most.
    pub(crate) fn publish(path: &Path, port: &PortMapping, patience: i64) -> Result<Self, InitError> {
        let request = serde_json::to_vec(port)?;
        let connection = open(path, patience).map_err(InitError::Connection)?;
        send(connection.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL)
            .map_err(|errno| InitError::Connection(errno.into()))?;
        let mut packet = [0; MAX_PORT_PACKET];
        let len = loop {
            match recv(connection.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                Ok(0) => return Err(InitError::Closed),
                Ok(len) => break len,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Err(InitError::Slow),
                Err(errno) => return Err(InitError::Connection(errno.into())),
            }
        };
        match serde_json::from_slice::<PortAnswer>(&packet[..len])?.error {
            Some(reason) => Err(InitError::Refused(reason)),
            None => Ok(Self { connection }),
        }
    }

    /// Blocks until init ends the mapping; usually dockerd ends this process before.
    pub(crate) fn wait(self) {
        let _ = setsockopt(&self.connection, ReceiveTimeout, &TimeVal::seconds(0));
        while !matches!(recv(self.connection.as_raw_fd(), &mut [0; 64], MsgFlags::empty()), Ok(0)) {}
    }
}

fn open(path: &Path, patience: i64) -> io::Result<OwnedFd> {
    let connection = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&connection, ReceiveTimeout, &TimeVal::seconds(patience))?;
    connect(connection.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, thread};

    use bulkhead_protocol::Transport;
    use nix::sys::socket::{Backlog, accept, bind, listen};

    use super::*;

    const PORT: PortMapping = PortMapping {
        transport: Transport::Tcp,
        host_ip: std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        host_port: 8080,
        container_ip: std::net::IpAddr::V4(std::net::Ipv4Addr::new(172, 17, 0, 2)),
        container_port: 80,
    };

    fn listener(folder: &tempfile::TempDir) -> (PathBuf, OwnedFd) {
        let path = folder.path().join("ports.sock");
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(8).unwrap()).unwrap();
        (path, listener)
    }

    /// Publishes towards an init that answers with `answer`, or closes without one.
    fn publish(answer: Option<&'static str>) -> Result<Mapping, InitError> {
        let folder = tempfile::tempdir().unwrap();
        let (path, listener) = listener(&folder);
        let init = thread::spawn(move || {
            use std::os::fd::FromRawFd;
            // SAFETY: accept has just made the descriptor.
            let peer = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd()).unwrap()) };
            let mut packet = [0; 4096];
            let len = recv(peer.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
            assert_eq!(serde_json::from_slice::<PortMapping>(&packet[..len]).unwrap(), PORT);
            if let Some(answer) = answer {
                send(peer.as_raw_fd(), answer.as_bytes(), MsgFlags::empty()).unwrap();
            }
        });
        let mapping = Mapping::publish(&path, &PORT, 20);
        init.join().unwrap();
        mapping
    }

    #[test]
    fn the_mapping_lasts_until_init_closes() {
        publish(Some(r#"{"error":null}"#)).unwrap().wait();
    }

    #[test]
    fn the_hosts_reason_is_passed_on_word_for_word() {
        let error = publish(Some(r#"{"error":"listen tcp4 0.0.0.0:8080: bind: address already in use"}"#)).unwrap_err();
        assert_eq!(error.to_string(), "listen tcp4 0.0.0.0:8080: bind: address already in use");
    }

    #[test]
    fn an_init_that_says_nothing_understandable_is_an_error() {
        assert!(matches!(publish(None), Err(InitError::Closed | InitError::Connection(_))));
        assert!(matches!(publish(Some("garbage")), Err(InitError::Syntax(_))));
    }

    #[test]
    fn a_silent_init_is_not_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _listener) = listener(&folder);
        assert!(matches!(Mapping::publish(&path, &PORT, 1), Err(InitError::Slow)));
    }

    #[test]
    fn without_init_there_is_an_error_at_once() {
        assert!(matches!(Mapping::publish(Path::new("/nonexistent/sock"), &PORT, 1), Err(InitError::Connection(_))));
    }
}
