//! The connection to the backend on the host.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    sync::mpsc::Sender,
    time::Duration,
};

use bulkhead_protocol::{
    AGENT_PORT, AGENT_SOURCE_PORT, Configuration, Failure, GuestMessage, Hello, HostMessage, LineError, LineReader,
    MAX_CERTIFICATES, PROTOCOL_VERSION, Stage, encode,
};
use nix::{
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, VsockAddr, bind, connect, setsockopt, socket,
            sockopt::{ReceiveTimeout, SendTimeout},
        },
        time::{TimeSpec, TimeVal, TimeValLike},
    },
    time::{ClockId, clock_settime},
};

use crate::{
    error::{Error, chain},
    event::{Event, spawn},
    fatal, log,
};

/// How long the host may take to accept the connection, to answer Hello, or to take a message.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(30);

/// `linux/vm_sockets.h`, in the form that takes the kernel's native timeval.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// The sending half of the agent connection.
#[derive(Debug)]
pub(crate) struct Agent {
    stream: File,
}

/// The receiving half, before and after the configuration.
#[derive(Debug)]
pub(crate) struct Inbox {
    stream: File,
    reader: LineReader<File>,
}

fn connect_to_host() -> io::Result<OwnedFd> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let timeout = libc::timeval { tv_sec: BACKEND_TIMEOUT.as_secs().cast_signed(), tv_usec: 0 };
    // SAFETY: the option value points to a timeval of the given size that outlives the call.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const timeout).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    setsockopt(&stream, SendTimeout, &TimeVal::seconds(BACKEND_TIMEOUT.as_secs().cast_signed()))?;
    setsockopt(&stream, ReceiveTimeout, &TimeVal::seconds(BACKEND_TIMEOUT.as_secs().cast_signed()))?;
    bind(stream.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_SOURCE_PORT))?;
    connect(stream.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, AGENT_PORT))?;
    Ok(stream)
}

/// Connects to the backend and says Hello.
pub(crate) fn connect_and_greet() -> Result<(Agent, Inbox), Error> {
    let no_backend = |source| Error::NoBackend { port: AGENT_PORT, source };
    let stream = File::from(connect_to_host().map_err(no_backend)?);
    let [second, third, spare] = [stream.try_clone(), stream.try_clone(), stream.try_clone()];
    fatal::set_agent_connection(spare.map_err(no_backend)?);
    let mut agent = Agent { stream };
    let kernel =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    agent.send(&GuestMessage::Hello(Hello { protocol: PROTOCOL_VERSION, kernel, uptime_us: log::uptime_us() }));
    let inbox = Inbox { stream: second.map_err(no_backend)?, reader: LineReader::new(third.map_err(no_backend)?) };
    Ok((agent, inbox))
}

impl Agent {
    /// Sends a message; a dead connection shows itself on the receiving side.
    pub(crate) fn send(&mut self, message: &GuestMessage) {
        let sent = encode(message).and_then(|line| Ok(self.stream.write_all(&line)?));
        if let Err(error) = sent {
            log::info(&format!("can't tell the backend: {}", chain(&error)));
        }
    }

    /// Reports a stage.
    pub(crate) fn reached(&mut self, stage: Stage) {
        self.send(&GuestMessage::Reached { stage, uptime_us: log::uptime_us() });
    }

    /// Reports that the start failed, here and on the console.
    pub(crate) fn failed(&mut self, stage: Stage, reason: String) {
        log::info(&format!("the start failed at stage {stage}: {reason}"));
        self.send(&GuestMessage::Failed(Failure { stage, reason }));
    }
}

/// What the backend answered to Hello.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Start with this, and trust these certificates (PEM) if there are any.
    Configure(Box<Configuration>, String),
    /// Another message came instead: end before the start.
    Other(HostMessage),
}

impl Inbox {
    /// Waits for the answer to Hello and sets the clock from it.
    pub(crate) fn configuration(&mut self) -> Result<Answer, Error> {
        let mut certificates = String::new();
        loop {
            match self.reader.read().map_err(Error::NoConfiguration)? {
                None => return Err(Error::BackendClosed),
                Some(HostMessage::Certificates { pem }) => {
                    if certificates.len() + pem.len() > MAX_CERTIFICATES {
                        return Err(Error::Certificates);
                    }
                    certificates.push_str(&pem);
                }
                Some(HostMessage::Configure(configuration)) => {
                    set_clock(configuration.time_unix_ns);
                    return Ok(Answer::Configure(Box::new(configuration), certificates));
                }
                Some(other) => return Ok(Answer::Other(other)),
            }
        }
    }

    /// Turns every further message into an event.
    pub(crate) fn watch(mut self, events: Sender<Event>) -> Result<(), Error> {
        setsockopt(&self.stream, ReceiveTimeout, &TimeVal::seconds(0))
            .map_err(Error::system("wait for the backend"))?;
        spawn("agent", move || {
            let reason = loop {
                match self.reader.read() {
                    Ok(Some(message)) => {
                        if events.send(Event::Host(message)).is_err() {
                            return;
                        }
                    }
                    Ok(None) => break "the backend closed the agent connection".to_owned(),
                    // The line was consumed whole, so the stream is still in step.
                    Err(error @ LineError::Syntax(_)) => {
                        log::info(&format!("ignored a message from the backend: {}", chain(&error)));
                    }
                    Err(error) => break format!("the agent connection broke: {}", chain(&error)),
                }
            };
            let _ = events.send(Event::HostDisconnected(reason));
        })
    }
}

fn set_clock(unix_ns: u64) {
    let now = TimeSpec::nanoseconds(i64::try_from(unix_ns).unwrap_or(0));
    if let Err(error) = clock_settime(ClockId::CLOCK_REALTIME, now) {
        log::info(&format!("can't set the clock: {error}"));
    }
}
