//! Connections that containers make to a published port inside the VM, by the address of their bridge's gateway.
//!
//! The engine's netfilter rules leave out the container's own bridge, because Docker's proxy listens for that. Its place in
//! the VM is taken here; what comes from the host never gets here.

use std::{io, net::Ipv4Addr, net::SocketAddr, sync::Arc, thread, time::Duration};

use bulkhead_protocol::{PortMapping, Transport};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Maximum of connections at once. More wait in the listener's queue, so that containers cannot fill the VM with them.
const MAX_CONNECTIONS: usize = 256;

/// Stack of the one thread in bytes: it only copies.
const STACK: usize = 128 << 10;

/// Time for the container to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Delay before the next attempt to accept when descriptors or memory have run out.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Starts to accept connections of containers to a port of every address, in one thread for all of them.
///
/// A port of one address of the host is not the VM's, and only TCP is passed on.
pub(crate) fn start(port: &PortMapping) -> io::Result<()> {
    if port.transport != Transport::Tcp || port.host_ip != Ipv4Addr::UNSPECIFIED {
        return Ok(());
    }
    let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.host_port))?;
    serve(listener, SocketAddr::new(port.container_ip, port.container_port))
}

fn serve(listener: std::net::TcpListener, target: SocketAddr) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let work = move || {
        runtime.block_on(async {
            if let Ok(listener) = TcpListener::from_std(listener) {
                accept(&listener, target).await;
            }
        });
    };
    thread::Builder::new().name("relay".to_owned()).stack_size(STACK).spawn(work).map(drop)
}

async fn accept(listener: &TcpListener, target: SocketAddr) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Waits here and not in the task, so that what is too much stays in the kernel's queue.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => drop(tokio::spawn(async move {
                // An error ends this connection only, and both of its ends see it.
                let _ = relay(client, target).await;
                drop(slot);
            })),
            // The listener stays ready, so without a pause this would be a busy loop.
            Err(_) => sleep(ACCEPT_RETRY_INTERVAL).await,
        }
    }
}

async fn relay(mut client: TcpStream, target: SocketAddr) -> io::Result<()> {
    let mut server = timeout(CONNECT_TIMEOUT, TcpStream::connect(target)).await??;
    tokio::io::copy_bidirectional(&mut client, &mut server).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Shutdown, TcpListener, TcpStream},
    };

    use super::*;

    /// A relay to a server that does with each connection as `serve` does.
    fn relay_to(serve: impl Fn(TcpStream) + Send + 'static) -> SocketAddr {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap();
        thread::spawn(move || server.incoming().flatten().for_each(serve));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        super::serve(listener, target).unwrap();
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
    fn connections_beyond_the_limit_wait_until_others_have_ended() {
        let address = relay_to(|mut stream| {
            stream.write_all(b"x").unwrap();
            thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        });
        let connect = || {
            let client = TcpStream::connect(address).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            client
        };
        let mut held: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connect()).collect();
        for client in &mut held {
            client.read_exact(&mut [0]).unwrap();
        }
        let mut next = connect();
        next.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(next.read_exact(&mut [0]).is_err(), "it is served beyond the limit");
        next.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        drop(held);
        next.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn a_server_that_is_not_there_ends_the_connection() {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, gone).unwrap();
        assert_eq!(TcpStream::connect(address).unwrap().read(&mut [0]).unwrap_or(0), 0);
    }
}
