//! Connections that containers make to a published port inside the VM, by the address of their bridge's gateway.
//!
//! The engine's netfilter rules leave out the container's own bridge, because Docker's proxy listens for that. Its place in
//! the VM is taken here; what comes from the host never gets here.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use bulkhead_protocol::{PortMapping, Transport};

/// Maximum of connections at once; each has two threads.
const MAX_CONNECTIONS: usize = 256;

/// Stack of a thread in bytes: each only copies.
const STACK: usize = 64 << 10;

/// Time for the container to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Delay before the next attempt to accept when descriptors or memory have run out.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// A connection that counts for as long as it has threads.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(count: &Arc<AtomicUsize>) -> Option<Self> {
        let slot = Self(Arc::clone(count));
        (slot.0.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Starts to accept connections of containers to a port of every address, in threads of their own.
///
/// A port of one address of the host is not the VM's, and only TCP is passed on.
pub(crate) fn start(port: &PortMapping) -> io::Result<()> {
    if port.transport != Transport::Tcp || port.host_ip != Ipv4Addr::UNSPECIFIED {
        return Ok(());
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.host_port))?;
    let target = SocketAddr::new(port.container_ip, port.container_port);
    spawn("accept", move || accept(&listener, target))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work).map(drop)
}

fn accept(listener: &TcpListener, target: SocketAddr) {
    let count = Arc::default();
    loop {
        let Ok((client, _)) = listener.accept() else {
            // The listener stays ready, so without a pause this would be a busy loop.
            thread::sleep(ACCEPT_RETRY_INTERVAL);
            continue;
        };
        // Without a slot or a thread the connection is closed, as by a server that has too many.
        if let Some(slot) = Slot::take(&count) {
            let _ = spawn("relay", move || drop(relay(&client, target, slot)));
        }
    }
}

fn relay(client: &TcpStream, target: SocketAddr, slot: Slot) -> io::Result<()> {
    let server = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT)?;
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    // The slot is free when both directions have ended.
    let slot = Arc::new(slot);
    let other = Arc::clone(&slot);
    spawn("relay", move || {
        copy(&from, &to);
        drop(other);
    })?;
    copy(&server, client);
    drop(slot);
    Ok(())
}

/// Copies up to the end of one direction, and passes the end on.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let copied = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    if copied.is_err() {
        // The other direction cannot go on either: one of the ends is gone.
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// A relay to a server that does with each connection as `serve` does.
    fn relay_to(serve: impl Fn(TcpStream) + Send + 'static) -> SocketAddr {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap();
        thread::spawn(move || server.incoming().flatten().for_each(serve));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || accept(&listener, target));
        address
    }

    #[test]
    fn bytes_and_their_end_pass_both_ways() {
        let address = relay_to(|mut stream| {
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            request.reverse();
            stream.write_all(&request).unwrap();
        });
        for _ in 0..3 {
            let mut client = TcpStream::connect(address).unwrap();
            let request: Vec<u8> = (0..1_000_003_u32).map(|number| (number % 251) as u8).collect();
            client.write_all(&request).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            answer.reverse();
            assert!(answer == request);
        }
    }

    #[test]
    fn connections_beyond_the_limit_are_closed_and_those_that_ended_make_room() {
        let address = relay_to(|mut stream| {
            stream.write_all(b"x").unwrap();
            thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        });
        let connect = || {
            let mut client = TcpStream::connect(address).unwrap();
            client.read_exact(&mut [0]).map(|()| client)
        };
        let held: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connect().unwrap()).collect();
        assert!(connect().is_err());
        drop(held);
        let again = (0..200).any(|_| {
            thread::sleep(Duration::from_millis(50));
            connect().is_ok()
        });
        assert!(again);
    }

    #[test]
    fn a_server_that_is_not_there_ends_the_connection() {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || accept(&listener, gone));
        assert_eq!(TcpStream::connect(address).unwrap().read(&mut [0]).unwrap_or(0), 0);
    }
}
