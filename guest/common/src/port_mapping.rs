//! The connection to the guest's init: the mapping exists for as long as it is open.
//!
//! One request and one answer, each a JSON packet on a `SOCK_SEQPACKET` socket. After that the open connection alone
//! counts, so a mapping ends however this process ends.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use bulkhead_protocol::{MAX_PORT_PACKET, PortAnswer, PortMapping};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket,
        sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};

/// Time for the host to answer. dockerd gives up after 16 seconds, and could then show no reason.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The reason why a port is not published; `docker run` shows it.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// init cannot be reached.
    #[error("cannot publish the port: the guest's init does not accept the request")]
    Connection(#[source] io::Error),
    /// The answer did not come within [`ANSWER_TIMEOUT`].
    #[error("cannot publish the port: the host did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// init ended the mapping before it existed.
    #[error("cannot publish the port: the guest's init closed the connection")]
    Closed,
    /// The answer is not a [`PortAnswer`].
    #[error("cannot publish the port: invalid answer from the guest's init")]
    Syntax(#[from] serde_json::Error),
    /// The host's own text, often that of Docker's proxy.
    #[error("{0}")]
    Refused(String),
}

/// A published port; dropping it ends the publication.
#[derive(Debug)]
pub struct Mapping {
    connection: OwnedFd,
}

impl Mapping {
    /// Asks init for a mapping and waits until the host listens, or `timeout` is over.
    pub fn publish(path: &Path, port: &PortMapping, timeout: Duration) -> Result<Self, InitError> {
        let request = serde_json::to_vec(port)?;
        let connection = open(path, timeout).map_err(InitError::Connection)?;
        send(connection.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL)
            .map_err(|errno| InitError::Connection(errno.into()))?;
        let mut packet = [0; MAX_PORT_PACKET];
        let len = loop {
            match recv(connection.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                // A packet is never empty, so this is the end of the connection.
                Ok(0) => return Err(InitError::Closed),
                Ok(len) => break len,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Err(InitError::Timeout),
                Err(errno) => return Err(InitError::Connection(errno.into())),
            }
        };
        match serde_json::from_slice::<PortAnswer>(&packet[..len])?.error {
            Some(reason) => Err(InitError::Refused(reason)),
            None => Ok(Self { connection }),
        }
    }

    /// Blocks until init ends the mapping; usually dockerd kills this process first.
    pub fn wait(self) {
        // No timeout any more: the connection is silent for as long as the container runs.
        let _ = setsockopt(&self.connection, ReceiveTimeout, &TimeVal::new(0, 0));
        while !matches!(recv(self.connection.as_raw_fd(), &mut [0; 64], MsgFlags::empty()), Ok(0)) {}
    }
}

fn open(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    let connection = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let timeout = TimeVal::new(timeout.as_secs() as i64, i64::from(timeout.subsec_micros()));
    setsockopt(&connection, ReceiveTimeout, &timeout)?;
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

    fn listener(directory: &tempfile::TempDir) -> (PathBuf, OwnedFd) {
        let path = directory.path().join("ports.sock");
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(8).unwrap()).unwrap();
        (path, listener)
    }

    /// Publishes with an init that answers `answer`, or closes without one.
    fn publish(answer: Option<&'static str>) -> Result<Mapping, InitError> {
        let directory = tempfile::tempdir().unwrap();
        let (path, listener) = listener(&directory);
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
        let mapping = Mapping::publish(&path, &PORT, Duration::from_secs(20));
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
        let directory = tempfile::tempdir().unwrap();
        let (path, _listener) = listener(&directory);
        assert!(matches!(Mapping::publish(&path, &PORT, Duration::from_secs(1)), Err(InitError::Timeout)));
    }

    #[test]
    fn without_init_there_is_an_error_at_once() {
        assert!(matches!(
            Mapping::publish(Path::new("/nonexistent/sock"), &PORT, Duration::from_secs(1)),
            Err(InitError::Connection(_))
        ));
    }
}
