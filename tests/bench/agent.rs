//! The backend's part towards the guest: configures the agent, waits for its report of the engine, pings the engine.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bulkhead::backend::plan::DATA_SERIAL;
use bulkhead_protocol::{AGENT_PORT, Configuration, DOCKER_PORT, GuestMessage, HostMessage, LineReader, Stage, encode};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername, listen,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::{TimeVal, TimeValLike},
    },
};

use crate::{
    Result,
    launch::{Contender, Setup},
    round::Happening,
};

/// Time until the thread notices that it must end, in milliseconds.
const STOP_INTERVAL_MS: u16 = 200;
/// Time for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// The place where the agent's connection arrives.
pub enum Meeting {
    /// Our end of a stream whose other end the VMM has.
    Stream(File),
    /// A socket of the kernel's vsock.
    Listener(OwnedFd),
}

/// The sockets between host and guest, in both directions.
pub enum Way {
    /// Our device's hybrid socket.
    Hybrid(PathBuf),
    /// The kernel's vsock, to this guest.
    Kernel(u32),
}

impl Way {
    /// The contender's.
    pub fn of(setup: &Setup, contender: Contender) -> Self {
        match contender {
            Contender::Bulkhead => Self::Hybrid(setup.vsock()),
            Contender::Microvm | Contender::Q35 => Self::Kernel(contender.cid()),
        }
    }

    /// Makes the place for the agent's connection, if the guest can be reached, and the VMM's end of it.
    pub fn meet(&self, reachable: bool) -> Result<(Option<Meeting>, Option<OwnedFd>)> {
        match self {
            Self::Hybrid(_) => {
                let (ours, theirs) = UnixStream::pair()?;
                Ok((Some(Meeting::Stream(File::from(OwnedFd::from(ours)))), Some(theirs.into())))
            }
            Self::Kernel(_) if reachable => {
                let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT))?;
                listen(&listener, Backlog::new(1)?)?;
                Ok((Some(Meeting::Listener(listener)), None))
            }
            Self::Kernel(_) => Ok((None, None)),
        }
    }

    /// Takes the agent's connection, nobody else's.
    fn accept(&self, listener: &OwnedFd) -> Result<Option<File>> {
        let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: accept4 has just made this descriptor and nobody else owns it.
        let stream = unsafe { OwnedFd::from_raw_fd(raw) };
        let ours = match self {
            Self::Hybrid(_) => true,
            Self::Kernel(cid) => getpeername::<VsockAddr>(stream.as_raw_fd())?.cid() == *cid,
        };
        Ok(ours.then(|| File::from(stream)))
    }

    /// A stream to the Docker API.
    fn connect(&self) -> Result<File> {
        match self {
            Self::Hybrid(path) => {
                let mut stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                stream.write_all(format!("CONNECT {DOCKER_PORT}\n").as_bytes())?;
                let mut answer = Vec::new();
                let mut byte = [0];
                while byte != *b"\n" && answer.len() < 64 {
                    stream.read_exact(&mut byte)?;
                    answer.extend(byte);
                }
                if !answer.starts_with(b"OK ") {
                    return Err("the vsock device refused the connection".into());
                }
                Ok(File::from(OwnedFd::from(stream)))
            }
            Self::Kernel(cid) => {
                let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                setsockopt(&stream, ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT.as_secs().cast_signed()))?;
                connect(stream.as_raw_fd(), &VsockAddr::new(*cid, DOCKER_PORT))?;
                Ok(File::from(stream))
            }
        }
    }

    /// Asks for `/_ping`; the time when the answer had come.
    fn ping(&self) -> Result<Instant> {
        let mut stream = self.connect()?;
        stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")?;
        let mut status = String::new();
        BufReader::new(stream).take(4096).read_line(&mut status)?;
        let at = Instant::now();
        if status.split(' ').nth(1) == Some("200") {
            Ok(at)
        } else {
            Err(format!("the engine answered `_ping` with {status:?}").into())
        }
    }
}

/// The thread that talks to the guest; ended when dropped.
pub struct Peer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// Waits for the agent from now on.
    pub fn start(way: Way, meeting: Meeting, happenings: Sender<Happening>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            if let Err(error) = converse(&way, meeting, &seen, &happenings) {
                let _ = happenings.send(Happening::Failed(error.to_string()));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the agent's connection; `None` when the thread has to end before there is one.
fn connection(way: &Way, meeting: Meeting, stop: &AtomicBool) -> Result<Option<File>> {
    let listener = match meeting {
        Meeting::Stream(stream) => return Ok(Some(stream)),
        Meeting::Listener(listener) => listener,
    };
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(STOP_INTERVAL_MS))? > 0
            && let Some(stream) = way.accept(&listener)?
        {
            return Ok(Some(stream));
        }
    }
    Ok(None)
}

fn converse(way: &Way, meeting: Meeting, stop: &AtomicBool, happenings: &Sender<Happening>) -> Result<()> {
    let Some(stream) = connection(way, meeting, stop)? else { return Ok(()) };
    let mut writer = stream.try_clone()?;
    let mut reader = LineReader::new(stream);
    // The guest's death, at the latest, ends the stream and with it this loop.
    while let Some(message) = reader.read()? {
        match message {
            GuestMessage::Hello(_) => writer.write_all(&encode(&HostMessage::Configure(configuration()))?)?,
            GuestMessage::Reached { stage: Stage::Engine, .. } => {
                let at = way.ping()?;
                let _ = happenings.send(Happening::Ping { at });
            }
            GuestMessage::Failed(failure) => {
                return Err(format!("the guest failed at stage {}: {}", failure.stage, failure.reason).into());
            }
            _ => {}
        }
    }
    Ok(())
}

fn configuration() -> Configuration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Configuration {
        hostname: "bench".to_owned(),
        time_unix_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        isolation: true,
        network: None,
        data_disk_serial: DATA_SERIAL.to_owned(),
        daemon_options: serde_json::Map::new(),
        container_environment: Vec::new(),
        socket_exceptions: Box::default(),
        block_load: false,
        shares: Vec::new(),
        host_sockets: Vec::new(),
        engine_sockets: Box::default(),
    }
}
