//! The connection to the backend on the host, see [`bulkhead_protocol`].

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    sync::mpsc::Sender,
    time::Duration,
};

use bulkhead_protocol::{
    AGENT_PORT, AGENT_SOURCE_PORT, Configuration, Failure, GuestMessage, Hello, HostMessage, LineError, LineReader,
    MAX_CERTIFICATES, PROTOCOL_VERSION, Stage, TimeZone, encode,
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
    clock::Clock,
    error::{Error, chain},
    event::{Event, spawn},
    fatal, log,
};

/// Timeout for the backend to accept the connection, to answer Hello, or to take a message.
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
    // A guest without a backend gives up after a while, since nothing could stop it.
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
    // The host's device accepts connections from reserved ports only. Binding to one needs CAP_NET_BIND_SERVICE in
    // the first user namespace, so a container cannot pose as the agent.
    bind(stream.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_SOURCE_PORT))?;
    connect(stream.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, AGENT_PORT))?;
    Ok(stream)
}

/// Connects to the backend and sends Hello.
pub(crate) fn connect_and_greet() -> Result<(Agent, Inbox), Error> {
    let no_backend = |source| Error::NoBackend { port: AGENT_PORT, source };
    let stream = File::from(connect_to_host().map_err(no_backend)?);
    // One descriptor for each user: the supervisor writes, the inbox reads and sets the timeout, and `fatal` keeps one
    // for the last message, because a panic can come from a thread that owns none.
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
    /// Sends a message. A failure is only logged: a lost connection ends the guest through [`Event::HostDisconnected`].
    pub(crate) fn send(&mut self, message: &GuestMessage) {
        let sent = encode(message).and_then(|line| Ok(self.stream.write_all(&line)?));
        if let Err(error) = sent {
            log::info(&format!("cannot send a message to the backend: {}", chain(&error)));
        }
    }

    /// Reports that a stage was reached.
    pub(crate) fn reached(&mut self, stage: Stage) {
        self.send(&GuestMessage::Reached { stage, uptime_us: log::uptime_us() });
    }

    /// Reports that the start failed, to the backend and on the console.
    pub(crate) fn failed(&mut self, stage: Stage, reason: String) {
        log::info(&format!("start failed at stage {stage}: {reason}"));
        self.send(&GuestMessage::Failed(Failure { stage, reason }));
    }
}

/// The backend's answer to Hello.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The configuration, and what came before it.
    Configure(Box<Configuration>, FromHost),
    /// Another message came instead, such as a shutdown.
    Other(HostMessage),
}

/// Contents of files that the host has.
#[derive(Debug, Default)]
pub(crate) struct FromHost {
    /// The certificates to trust (PEM); may be empty.
    pub(crate) certificates: String,
    pub(crate) time_zone: Option<TimeZone>,
}

impl Inbox {
    /// Waits for the answer to Hello and sets the clock from it.
    pub(crate) fn configuration(&mut self) -> Result<Answer, Error> {
        let mut from_host = FromHost::default();
        loop {
            match self.reader.read().map_err(Error::NoConfiguration)? {
                None => return Err(Error::BackendClosed),
                Some(HostMessage::Certificates { pem }) => {
                    // A host's bundle is longer than a line of the protocol may be, so it comes in pieces.
                    if from_host.certificates.len() + pem.len() > MAX_CERTIFICATES {
                        return Err(Error::Certificates);
                    }
                    from_host.certificates.push_str(&pem);
                }
                Some(HostMessage::TimeZone(zone)) => from_host.time_zone = Some(zone),
                Some(HostMessage::Configure(configuration)) => {
                    // At once: files are written from here on. The time is that of sending, so the clock is late by the
                    // message's way here.
                    set_clock(configuration.time_unix_ns);
                    return Ok(Answer::Configure(Box::new(configuration), from_host));
                }
                Some(other) => return Ok(Answer::Other(other)),
            }
        }
    }

    /// Turns every further message into an event, on a thread of its own, but for the host's time, which must not wait
    /// for the supervisor.
    pub(crate) fn watch(mut self, events: Sender<Event>, clock: Clock) -> Result<(), Error> {
        // From here on the backend may be silent for as long as it likes.
        setsockopt(&self.stream, ReceiveTimeout, &TimeVal::seconds(0))
            .map_err(Error::system("wait for the backend"))?;
        spawn("agent", move || {
            let reason = loop {
                match self.reader.read() {
                    Ok(Some(HostMessage::Time { unix_ns })) => clock.jumped(unix_ns),
                    Ok(Some(message)) => {
                        if events.send(Event::Host(message)).is_err() {
                            return;
                        }
                    }
                    Ok(None) => break "the backend closed the agent connection".to_owned(),
                    // The whole line has been read, so the next one is intact: an unknown message costs only itself.
                    Err(error @ LineError::Syntax(_)) => {
                        log::info(&format!("ignored a message from the backend: {}", chain(&error)));
                    }
                    Err(error) => break format!("the agent connection failed: {}", chain(&error)),
                }
            };
            let _ = events.send(Event::HostDisconnected(reason));
        })
    }
}

fn set_clock(unix_ns: u64) {
    // Not a reason to fail: without it only timestamps and the validity of certificates are wrong.
    let now = TimeSpec::nanoseconds(i64::try_from(unix_ns).unwrap_or(0));
    if let Err(error) = clock_settime(ClockId::CLOCK_REALTIME, now) {
        log::info(&format!("cannot set the clock: {error}"));
    }
}
