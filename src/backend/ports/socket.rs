//! The host's sockets that listen for published ports.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use bulkhead_protocol::Transport;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
        sockopt::{Ipv6V6Only, ReuseAddr},
    },
};

/// The first port that needs no privilege, ip(7).
const FIRST_UNPRIVILEGED: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// The host's refusal to listen, in the words of Go's `net` package, as dockerd reports it for its own `docker-proxy`.
#[derive(Debug, thiserror::Error)]
#[error("listen {transport}{} {address}: {step}: {}{remedy}", if address.is_ipv4() { 4 } else { 6 }, describe(*errno))]
pub(in crate::backend) struct ListenError {
    transport: Transport,
    address: SocketAddr,
    step: &'static str,
    errno: Errno,
    remedy: String,
}

impl ListenError {
    /// Returns whether another socket has the port.
    pub(super) fn is_in_use(&self) -> bool {
        self.errno == Errno::EADDRINUSE
    }

    /// Returns whether the host lacks this version of IP or has it disabled.
    pub(super) fn lacks_family(&self) -> bool {
        self.errno == Errno::EAFNOSUPPORT || self.errno == Errno::EADDRNOTAVAIL
    }
}

/// Returns the C library's text, in lower case as Go has it.
fn describe(errno: Errno) -> String {
    let text = io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_lowercase().chain(characters).collect())
}

/// Returns a remedy for an error whose text names none, else an empty string.
fn remedy(address: SocketAddr, errno: Errno) -> String {
    let first = std::fs::read_to_string(FIRST_UNPRIVILEGED).ok().and_then(|text| text.trim().parse().ok());
    match first.unwrap_or(1024) {
        // Not a file capability (CAP_NET_BIND_SERVICE): execve(2) of a program with capabilities clears the
        // parent-death signal, so the VM's processes would outlive a backend that was killed.
        first if errno == Errno::EACCES && address.port() < first => format!(
            " (this user may listen from port {first} on; publish such a port, or let users have this one: \
             `sudo sysctl net.ipv4.ip_unprivileged_port_start={}`)",
            address.port()
        ),
        _ => String::new(),
    }
}

/// Opens a listening TCP socket or a bound UDP socket at exactly this address; non-blocking, closed on exec.
pub(super) fn open(transport: Transport, address: SocketAddr) -> Result<OwnedFd, ListenError> {
    let failed = |step| move |errno| ListenError { transport, address, step, errno, remedy: remedy(address, errno) };
    let (kind, tcp) = match transport {
        Transport::Tcp => (SockType::Stream, true),
        Transport::Udp => (SockType::Datagram, false),
    };
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket =
        socket(family, kind, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None).map_err(failed("socket"))?;
    if address.is_ipv6() {
        // The engine publishes IPv4 beside it with a mapping of its own; a dual-stack socket would take that port.
        setsockopt(&socket, Ipv6V6Only, &true).map_err(failed("setsockopt"))?;
    }
    if tcp {
        // Connections of a previous container may still be in TIME_WAIT on this port. Not for UDP, where the option
        // would let two sockets share a port and split its datagrams.
        setsockopt(&socket, ReuseAddr, &true).map_err(failed("setsockopt"))?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address)).map_err(failed("bind"))?;
    if tcp {
        // The kernel cuts the backlog to net.core.somaxconn, 4096 by default. Clients wait in it while the network
        // process is restarted.
        listen(&socket, Backlog::MAXALLOWABLE).map_err(failed("listen"))?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_in_use_is_refused_in_gos_words() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let held = TcpListener::bind(taken).unwrap();
        let error = open(Transport::Tcp, taken).unwrap_err();
        assert_eq!(error.to_string(), format!("listen tcp4 {taken}: bind: address already in use"));
        assert!(error.is_in_use());
        // Another address has the same port free.
        let other = SocketAddr::new([127, 0, 0, 2].into(), taken.port());
        open(Transport::Tcp, other).unwrap();
        drop(held);
    }

    #[test]
    fn an_address_of_another_host_is_refused_in_gos_words() {
        let error = open(Transport::Udp, address("192.0.2.1:53535")).unwrap_err();
        assert_eq!(error.to_string(), "listen udp4 192.0.2.1:53535: bind: cannot assign requested address");
        let error = open(Transport::Tcp, address("[2001:db8::1]:53535")).unwrap_err().to_string();
        // Without IPv6 the socket is refused already.
        assert!(error.starts_with("listen tcp6 [2001:db8::1]:53535: "), "{error}");
    }

    #[test]
    fn a_privileged_port_is_refused_with_the_way_to_get_it() {
        let error = ListenError {
            transport: Transport::Tcp,
            address: address("0.0.0.0:1"),
            step: "bind",
            errno: Errno::EACCES,
            remedy: remedy(address("0.0.0.0:1"), Errno::EACCES),
        };
        let text = error.to_string();
        assert!(text.starts_with("listen tcp4 0.0.0.0:1: bind: permission denied"), "{text}");
        // A container's host may have no privileged ports.
        if std::fs::read_to_string(FIRST_UNPRIVILEGED).is_ok_and(|first| first.trim() != "0") {
            assert!(text.contains("net.ipv4.ip_unprivileged_port_start=1`"), "{text}");
        }
        assert_eq!(remedy(address("0.0.0.0:65535"), Errno::EACCES), "");
        if !nix::unistd::geteuid().is_root()
            && let Err(error) = open(Transport::Tcp, address("127.0.0.1:1"))
        {
            let text = error.to_string();
            assert!(text.starts_with("listen tcp4 127.0.0.1:1: bind: permission denied (this user"), "{text}");
        }
    }

    #[test]
    fn ipv4_and_ipv6_have_the_same_port() {
        let first = open(Transport::Tcp, address("0.0.0.0:0")).unwrap();
        let port = TcpListener::from(first.try_clone().unwrap()).local_addr().unwrap().port();
        match open(Transport::Tcp, SocketAddr::new([0; 16].into(), port)) {
            Ok(_) => {}
            Err(error) => assert!(error.lacks_family(), "{error}"),
        }
    }

    #[test]
    fn the_engines_two_sockets_for_udp_do_not_collide() {
        let first = UdpSocket::from(open(Transport::Udp, address("0.0.0.0:0")).unwrap());
        let port = first.local_addr().unwrap().port();
        match open(Transport::Udp, SocketAddr::new([0; 16].into(), port)) {
            Ok(_) => {}
            Err(error) => assert!(error.lacks_family(), "{error}"),
        }
        assert!(open(Transport::Udp, SocketAddr::new([0; 4].into(), port)).unwrap_err().is_in_use());
    }

    #[test]
    fn a_port_with_old_connections_can_be_had_again_at_once() {
        let first = open(Transport::Tcp, address("127.0.0.1:0")).unwrap();
        let listener = TcpListener::from(first);
        let at = listener.local_addr().unwrap();
        let client = TcpStream::connect(at).unwrap();
        listener.set_nonblocking(false).unwrap();
        // The server closes first, so its end stays in TIME_WAIT.
        drop(listener.accept().unwrap());
        drop(listener);
        drop(client);
        open(Transport::Tcp, at).unwrap();
    }
}
