//! Sockets of the host in containers, such as that of its ssh-agent.
//!
//! Each is a unix socket in [`HOST_SERVICES`], which containers mount. A container's connection waits while the backend
//! connects to the host's socket. The stream arrives on the vsock port of that socket, and a thread of its own moves
//! the bytes between the two ([`relay`]). One more thread accepts on all sockets.
//!
//! Streams to one socket are alike: the one that comes next is for the container that has waited longest. A refusal
//! ends that one, too.

mod relay;

use std::{
    collections::VecDeque,
    fs,
    io::ErrorKind,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    thread,
    time::{Duration, Instant},
};

use bulkhead_policy::sources::HOST_SERVICES;
use bulkhead_protocol::{FIRST_HOST_SOCKET_PORT, HostSocket, MAX_HOST_CONNECTIONS, MAX_HOST_SOCKETS};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen, socket},
};

use crate::{
    error::Error,
    event::{Event, spawn},
    log, mounts,
};

/// Mode of the file system's root, and its size: it has nothing but names.
const OPTIONS: &str = "mode=755,size=64k";

/// Mode of the sockets: whether a container has one is decided by its mounts, and in it every user may connect.
const MODE: u32 = 0o666;

/// Time for the backend to connect. It answers at once, but a stream that the vsock device drops has no answer.
const HOST_TIMEOUT: Duration = Duration::from_secs(60);

/// Interval at which connections that wait are looked at.
const CHECK_INTERVAL: u16 = 1000;

/// Delay before the next attempt to accept when descriptors or memory have run out.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// A container's connection that waits for its stream.
#[derive(Debug)]
struct Waiting {
    stream: UnixStream,
    since: Instant,
    slot: Slot,
}

/// A place among [`MAX_HOST_CONNECTIONS`], free again when it is dropped.
#[derive(Debug)]
struct Slot(#[expect(dead_code, reason = "counted by its references")] Arc<()>);

/// The connections that wait, by the socket's number, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostSockets {
    queues: Arc<Mutex<Vec<Queue>>>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// The last reason for a refusal, which is in the log once.
    refusal: String,
}

/// The listeners of a socket.
#[derive(Debug)]
struct Listeners {
    containers: UnixListener,
    /// Takes the host's streams.
    host: OwnedFd,
    /// Returns true for a stream that comes from the host.
    is_from_host: fn(&OwnedFd) -> bool,
}

impl HostSockets {
    /// Makes the directory with these sockets, and the thread that turns connections into events.
    pub(crate) fn listen(sockets: &[HostSocket], events: Sender<Event>) -> Result<Self, Error> {
        mounts::make_directory(HOST_SERVICES, 0o755)?;
        // Read-only also without any socket: the engine, which makes missing sources of mounts, then cannot.
        let listeners: Vec<_> = mounts::sealed("host-services", HOST_SERVICES, OPTIONS, || {
            let sockets = sockets.iter().take(MAX_HOST_SOCKETS).enumerate();
            sockets.map(|(at, socket)| Listeners::open(at, &socket.name)).collect()
        })?;
        if listeners.is_empty() { Ok(Self::default()) } else { Self::serve(listeners, events) }
    }

    fn serve(listeners: Vec<Listeners>, events: Sender<Event>) -> Result<Self, Error> {
        let sockets = Self::default();
        sockets.lock().resize_with(listeners.len(), Queue::default);
        let acceptor = Acceptor { sockets: sockets.clone(), listeners, events, slots: Arc::default() };
        spawn("host-sockets", move || acceptor.run())?;
        Ok(sockets)
    }

    /// Ends the connection that has waited longest for this socket.
    pub(crate) fn refused(&self, socket: u32, reason: String) {
        let mut queues = self.lock();
        let Some(queue) = usize::try_from(socket).ok().and_then(|socket| queues.get_mut(socket)) else { return };
        queue.waiting.pop_front();
        if queue.refusal != reason {
            log::info(&format!("no connection to a socket of the host: {reason}"));
            queue.refusal = reason;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listeners {
    fn open(at: usize, name: &str) -> Result<Self, Error> {
        let path = Path::new(HOST_SERVICES).join(name);
        let containers = UnixListener::bind(&path).map_err(Error::file("listen on", &path))?;
        containers.set_nonblocking(true).map_err(Error::file("listen on", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(MODE)).map_err(Error::file("set the mode of", &path))?;
        let host = listen_for_host(FIRST_HOST_SOCKET_PORT + at as u32).map_err(Error::system("listen on vsock"))?;
        Ok(Self { containers, host, is_from_host })
    }
}

fn listen_for_host(port: u32) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// vsock has no namespaces, so a container that can make such a socket could connect as well.
fn is_from_host(stream: &OwnedFd) -> bool {
    getpeername::<VsockAddr>(stream.as_raw_fd()).is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST)
}

/// The thread that accepts.
struct Acceptor {
    sockets: HostSockets,
    listeners: Vec<Listeners>,
    events: Sender<Event>,
    /// One reference for each connection, and this one.
    slots: Arc<()>,
}

impl Acceptor {
    fn run(self) {
        loop {
            let is_idle = self.sockets.lock().iter().all(|queue| queue.waiting.is_empty());
            let limit = if is_idle { PollTimeout::NONE } else { PollTimeout::from(CHECK_INTERVAL) };
            let mut fds = Vec::with_capacity(2 * self.listeners.len());
            for listeners in &self.listeners {
                fds.push(PollFd::new(listeners.containers.as_fd(), PollFlags::POLLIN));
                fds.push(PollFd::new(listeners.host.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut fds, limit) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(errno) => return log::info(&format!("cannot serve the host's sockets any more: {errno}")),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            for (at, ready) in ready.chunks(2).enumerate() {
                if ready[0] && !self.accept_container(at) {
                    return;
                }
                if ready[1] {
                    self.accept_host(at);
                }
            }
            self.expire();
        }
    }

    /// Takes a container's connection; returns false when the supervisor has ended.
    fn accept_container(&self, at: usize) -> bool {
        let stream = match self.listeners[at].containers.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // The listener stays readable, so without a pause a lack of descriptors would be a busy loop.
                if error.kind() != ErrorKind::WouldBlock {
                    thread::sleep(ACCEPT_RETRY_INTERVAL);
                }
                return true;
            }
        };
        let slot = Slot(Arc::clone(&self.slots));
        // This thread's reference and the new one. More than all are closed at once: the client knows at once.
        if Arc::strong_count(&self.slots) > MAX_HOST_CONNECTIONS + 1 {
            return true;
        }
        self.sockets.lock()[at].waiting.push_back(Waiting { stream, since: Instant::now(), slot });
        self.events.send(Event::ConnectSocket(at as u32)).is_ok()
    }

    /// Takes a stream of the host and joins it with the container's connection that has waited longest.
    fn accept_host(&self, at: usize) {
        let listeners = &self.listeners[at];
        let stream = match accept4(listeners.host.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: the kernel has just made this descriptor for this process.
            Ok(number) => unsafe { OwnedFd::from_raw_fd(number) },
            Err(nix::Error::EAGAIN) => return,
            Err(_) => return thread::sleep(ACCEPT_RETRY_INTERVAL),
        };
        if !(listeners.is_from_host)(&stream) {
            return;
        }
        let Some(Waiting { stream: container, slot, .. }) = self.sockets.lock()[at].waiting.pop_front() else { return };
        let work = move || {
            relay::run(&container, &stream);
            drop(slot);
        };
        if let Err(error) = spawn("host-socket", work) {
            log::info(&crate::error::chain(&error));
        }
    }

    /// Ends the connections that have waited too long.
    fn expire(&self) {
        for queue in &mut *self.sockets.lock() {
            while queue.waiting.front().is_some_and(|waiting| waiting.since.elapsed() > HOST_TIMEOUT) {
                queue.waiting.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::Shutdown,
        sync::mpsc::{Receiver, channel},
    };

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// Two sockets, and a directory in which `c0` and `c1` are the containers' ends, `h0` and `h1` the host's.
    struct Fixture {
        directory: tempfile::TempDir,
        sockets: HostSockets,
        events: Receiver<Event>,
    }

    fn fixture(is_from_host: fn(&OwnedFd) -> bool) -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let bind = |name: String| {
            let listener = UnixListener::bind(directory.path().join(name)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let open =
            |at| Listeners { containers: bind(format!("c{at}")), host: bind(format!("h{at}")).into(), is_from_host };
        let listeners = (0..2).map(open).collect();
        let (sender, events) = channel();
        let sockets = HostSockets::serve(listeners, sender).unwrap();
        Fixture { directory, sockets, events }
    }

    impl Fixture {
        fn connect(&self, name: &str) -> UnixStream {
            let stream = UnixStream::connect(self.directory.path().join(name)).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream
        }

        /// A container's connection, whose request has arrived.
        fn container(&self, at: u32) -> UnixStream {
            let stream = self.connect(&format!("c{at}"));
            let event = self.events.recv_timeout(SOON).unwrap();
            assert!(matches!(event, Event::ConnectSocket(socket) if socket == at), "{event:?}");
            stream
        }
    }

    fn rest(mut stream: UnixStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn streams_go_to_the_containers_of_their_socket_in_the_order_of_their_requests() {
        let fixture = fixture(|_| true);
        let other = fixture.container(1);
        let waiting: Vec<_> = (0..100).map(|_| fixture.container(0)).collect();
        let hosts: Vec<_> = (0..100).map(|_| fixture.connect("h0")).collect();
        for (at, host) in hosts.iter().enumerate() {
            (&*host).write_all(at.to_string().as_bytes()).unwrap();
            host.shutdown(Shutdown::Write).unwrap();
        }
        for (at, container) in waiting.into_iter().enumerate() {
            (&container).write_all(b"seen").unwrap();
            container.shutdown(Shutdown::Write).unwrap();
            assert_eq!(rest(container), at.to_string());
        }
        for host in hosts {
            assert_eq!(rest(host), "seen");
        }
        fixture.connect("h1").write_all(b"one").unwrap();
        assert_eq!(rest(other), "one");
    }

    #[test]
    fn a_refusal_ends_the_connection_that_waits_and_no_other() {
        let fixture = fixture(|_| true);
        let (first, second) = (fixture.container(0), fixture.container(0));
        fixture.sockets.refused(7, "no such socket".to_owned());
        fixture.sockets.refused(0, "the agent is gone".to_owned());
        assert_eq!(rest(first), "");
        fixture.connect("h0").write_all(b"here").unwrap();
        assert_eq!(rest(second), "here");
    }

    #[test]
    fn a_stream_that_nobody_waits_for_or_that_is_not_the_hosts_is_closed() {
        let fixture_of_host = fixture(|_| true);
        assert_eq!(rest(fixture_of_host.connect("h0")), "");
        let fixture = fixture(|_| false);
        let waiting = fixture.container(0);
        assert_eq!(rest(fixture.connect("h0")), "");
        waiting.set_nonblocking(true).unwrap();
        assert_eq!((&waiting).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert!(!is_from_host(&waiting.into()), "only vsock has an address of the host");
    }

    #[test]
    fn more_connections_than_the_limit_are_closed_until_one_has_ended() {
        let fixture = fixture(|_| true);
        let mut waiting: Vec<_> = (0..MAX_HOST_CONNECTIONS).map(|_| fixture.container(0)).collect();
        assert_eq!(rest(fixture.connect("c1")), "");
        assert!(fixture.events.try_recv().is_err());
        fixture.sockets.refused(0, "gone".to_owned());
        assert_eq!(rest(waiting.remove(0)), "");
        fixture.container(1);
    }
}
