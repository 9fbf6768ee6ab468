//! The backend's end of the connection to the agent, which is init in the guest. Nothing that the agent sends is
//! trusted.
//!
//! The agent connects to vsock port [`AGENT_PORT`] of the host. The vmm cannot connect to anything, so the backend
//! gives it one end of a stream in advance ([`offer`]), which the vsock device makes the host end of that connection.
//! Nobody else on the host can have the stream, and the device takes connections of the guest from ports below 1024
//! only, which needs a capability of the VM that no isolated container has. There is one stream at a time: while it is
//! taken the device refuses others, and the next one is handed over when it has ended.
//!
//! The agent introduces itself (Hello) and receives the host's certificates, then its configuration. From then on it
//! reports each stage of the start, publishes ports and answers questions; the backend sends questions, the time when
//! the host's clock jumps ([`super::host_clock`]) and, at the end, the shutdown. Lines are bounded, texts are shortened
//! and cleaned for a terminal, and a stage counts once ([`super::state`]).

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use bulkhead_protocol::{
    AGENT_PORT, Configuration, Description, GuestMessage, Hello, HostMessage, LineError, MAX_LINE, PROTOCOL_VERSION,
    Share, encode,
};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    sync::{mpsc, watch},
    time::timeout,
};
use tracing::{debug, info, warn};

use super::{
    child::ChildError,
    events::VmEvent,
    host_clock::{self, HostClock},
    host_sockets::HostSockets,
    logs,
    ports::Ports,
    vmm::{self, VmmChannel},
};
use bulkhead_ipc::report::chain;
use bulkhead_vmm::api::Command;

/// Time for the first message of a connection, from its first byte.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for the guest to read a message.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after a failed connection, so that a guest cannot fill the log.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Longest text of the guest that is passed on, in characters.
const MAX_TEXT: usize = 1000;

/// Most threads of a description that are passed on.
const MAX_THREADS: usize = 64;

/// Cause of the end of an agent's connection.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("the agent's connection failed")]
    Line(#[from] LineError),
    #[error("the agent did not read a message within {} s", WRITE_TIMEOUT.as_secs())]
    Slow,
    #[error("the agent did not introduce itself")]
    NoHello,
    #[error(
        "the guest image uses version {0} of the agent's protocol, this program version {PROTOCOL_VERSION}; build the \
         matching image with `scripts/image`"
    )]
    Version(u32),
}

/// Bounded lines from an asynchronous stream; the counterpart of [`bulkhead_protocol::LineReader`].
#[derive(Debug)]
struct AsyncLineReader<R> {
    inner: R,
    buffer: Vec<u8>,
    /// Bytes at the start of the buffer that are known to contain no line feed.
    searched: usize,
}

impl<R: AsyncRead + Unpin> AsyncLineReader<R> {
    fn new(inner: R) -> Self {
        Self { inner, buffer: Vec::new(), searched: 0 }
    }

    /// Reads the next message; returns `None` at a clean end. Nothing is lost when the future is dropped.
    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, LineError> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            // A guest that sends a long line byte by byte must not make each byte a search of the whole line.
            self.searched = self.buffer.len();
            if self.buffer.len() >= MAX_LINE {
                return Err(LineError::TooLong);
            }
            let room = (MAX_LINE - self.buffer.len()) as u64;
            // The only await: bytes are in the buffer before it returns, so a `select!` may drop it at any time.
            if (&mut self.inner).take(room).read_buf(&mut self.buffer).await? == 0 {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }
}

/// The backend's end of the agent's connection.
#[derive(Debug)]
pub(super) struct AgentServer {
    /// The channel to the vmm, which takes the other ends of streams.
    pub(super) vmm: Arc<VmmChannel>,
    /// Messages that precede the configuration: the host's certificates and time zone.
    pub(super) preface: Vec<HostMessage>,
    /// The configuration, but for the time of sending and the shared directories.
    pub(super) configuration: Configuration,
    /// The shared directories.
    pub(super) shares: watch::Receiver<Vec<Share>>,
    /// The ports that the guest may publish.
    pub(super) ports: Arc<Ports>,
    /// The host's sockets that containers may reach.
    pub(super) host_sockets: HostSockets,
    /// Receives the agent's reports.
    pub(super) events: mpsc::Sender<VmEvent>,
}

impl AgentServer {
    /// Serves the agent on a stream that the vmm was offered, and then on new ones until the events have no reader or
    /// the vmm is gone.
    pub(super) async fn serve(self, first: UnixStream, mut outbox: mpsc::Receiver<HostMessage>) {
        let mut stream = first;
        loop {
            // The stream is older than the guest. Its first byte, or its end, is the agent's.
            let _ = stream.readable().await;
            let ended = self.converse(stream, &mut outbox).await;
            // init asked for the published ports. It is gone or starting over, and then asks for them again.
            self.ports.clear();
            self.host_sockets.clear();
            // Sent before the next connection is possible, so that events of two connections never interleave.
            let _ = self.events.send(VmEvent::AgentLost).await;
            match ended {
                Ok(()) => info!("the agent closed its connection"),
                // Trying again is useless: the image stays what it is.
                Err(error @ AgentError::Version(_)) => {
                    let _ = self.events.send(VmEvent::GuestFailed(error.to_string())).await;
                }
                Err(error) => {
                    warn!("{}", chain(&error));
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
            if self.events.is_closed() {
                return;
            }
            stream = match offer(&self.vmm).await {
                Ok(stream) => stream,
                // The vmm is gone, and its end is reported elsewhere.
                Err(error) => return warn!("{}", chain(&error)),
            };
        }
    }

    async fn converse<S: AsyncRead + AsyncWrite>(
        &self,
        stream: S,
        outbox: &mut mpsc::Receiver<HostMessage>,
    ) -> Result<(), AgentError> {
        let (reader, mut writer) = tokio::io::split(stream);
        let mut reader = AsyncLineReader::new(reader);
        let hello = match timeout(HELLO_TIMEOUT, reader.next()).await {
            Ok(Ok(Some(GuestMessage::Hello(hello)))) => hello,
            Ok(Err(error)) => return Err(error.into()),
            // A clean end, another message first, or silence.
            _ => return Err(AgentError::NoHello),
        };
        let Hello { protocol, kernel, uptime_us } = hello;
        if protocol != PROTOCOL_VERSION {
            return Err(AgentError::Version(protocol));
        }
        let _ = self.events.send(VmEvent::AgentConnected { kernel: shorten(&kernel), uptime_us }).await;
        // First, because the configuration starts the services that need the certificates.
        for message in &self.preface {
            write(&mut writer, message).await?;
        }
        let mut clock = HostClock::watch();
        let mut shares = self.shares.clone();
        let configuration = self.configuration(shares.borrow_and_update().clone());
        write(&mut writer, &HostMessage::Configure(configuration)).await?;
        loop {
            tokio::select! {
                message = reader.next() => match message? {
                    Some(GuestMessage::Publish { id, port }) => {
                        // One request at a time, and none before the answer to the last one is written: a guest that
                        // asks without end, or does not read, delays only itself.
                        let error = self.ports.publish(id, port).await.err().map(|error| error.to_string());
                        debug!(?port, ?error, "the guest publishes a port");
                        write(&mut writer, &HostMessage::Published { id, error }).await?;
                    }
                    Some(GuestMessage::Unpublish { id }) => self.ports.unpublish(id),
                    Some(GuestMessage::ConnectSocket { socket }) => {
                        let shares = shares.borrow().clone();
                        if let Err(error) = self.host_sockets.connect(socket, &self.vmm, &shares).await {
                            let reason = chain(&error);
                            debug!(socket, reason, "no connection to a socket of the host");
                            write(&mut writer, &HostMessage::SocketRefused { socket, reason }).await?;
                        }
                    }
                    Some(message) => {
                        if let Some(event) = event(message) {
                            let _ = self.events.send(event).await;
                        }
                    }
                    None => return Ok(()),
                },
                unix_ns = clock.changed() => write(&mut writer, &HostMessage::Time { unix_ns }).await?,
                Ok(()) = shares.changed() => {
                    let shares = shares.borrow_and_update().clone();
                    write(&mut writer, &HostMessage::Shares { shares }).await?;
                }
                message = outbox.recv() => match message {
                    Some(message) => write(&mut writer, &message).await?,
                    // The VM was dropped.
                    None => return Ok(()),
                },
            }
        }
    }

    /// Returns the configuration with the current time, to which the guest sets its clock.
    fn configuration(&self, shares: Vec<Share>) -> Configuration {
        Configuration { time_unix_ns: host_clock::unix_ns(), shares, ..self.configuration.clone() }
    }
}

/// Hands the vmm one end of a new stream, for the agent's next connection, and returns the other.
pub(super) async fn offer(vmm: &VmmChannel) -> Result<UnixStream, ChildError> {
    // The backend makes the pair: flags of a descriptor that the vmm sent would be the vmm's to change.
    let (ours, theirs) = UnixStream::pair().map_err(|error| ChildError::Socket(vmm::NAME, error))?;
    vmm.send(&Command::VsockOffer { port: AGENT_PORT }, Some(theirs.as_fd())).await?;
    Ok(ours)
}

/// Converts a report into an event, with its texts shortened and cleaned.
fn event(message: GuestMessage) -> Option<VmEvent> {
    match message {
        GuestMessage::Reached { stage, .. } => Some(VmEvent::Reached(stage)),
        GuestMessage::Failed(failure) => {
            Some(VmEvent::GuestFailed(format!("stage {}: {}", failure.stage, shorten(&failure.reason))))
        }
        GuestMessage::EngineDown { reason } => Some(VmEvent::EngineDown(shorten(&reason))),
        GuestMessage::Goodbye => {
            info!("the guest is going down");
            None
        }
        GuestMessage::SharesTaken { error } => Some(VmEvent::SharesTaken(error.map(|error| shorten(&error)))),
        GuestMessage::Described(description) => Some(VmEvent::Described(bounded(description))),
        // Answered in `converse`.
        GuestMessage::Publish { .. } | GuestMessage::Unpublish { .. } | GuestMessage::ConnectSocket { .. } => None,
        GuestMessage::Hello(_) => {
            warn!("the agent introduced itself twice");
            None
        }
    }
}

/// Cuts a description to the bounds of an honest one and cleans its texts.
fn bounded(mut description: Description) -> Description {
    description.load = shorten(&description.load);
    description.busiest.truncate(MAX_THREADS);
    for thread in &mut description.busiest {
        thread.name = shorten(&thread.name);
        thread.waits = shorten(&thread.waits);
        thread.state = if thread.state.is_ascii_graphic() { thread.state } else { '?' };
    }
    description
}

/// Returns the guest's text on one line, at most [`MAX_TEXT`] characters, without anything that a terminal acts on.
fn shorten(text: &str) -> String {
    logs::clean(&text.replace('\n', " ")).chars().take(MAX_TEXT).collect()
}

async fn write<W: AsyncWrite + Unpin>(writer: &mut W, message: &HostMessage) -> Result<(), AgentError> {
    let line = encode(message)?;
    // A guest that reads nothing fills the vsock buffers; without a limit it would block its own shutdown here.
    match timeout(WRITE_TIMEOUT, writer.write_all(&line)).await {
        Ok(result) => result.map_err(|error| LineError::from(error).into()),
        Err(_) => Err(AgentError::Slow),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use bulkhead_protocol::{Failure, ShutdownMode, Stage};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use proptest::prelude::*;
    use tokio::io::{AsyncBufReadExt, BufReader, duplex};

    use super::*;
    use crate::settings::Base;

    /// A server, and the vmm's end of its channel.
    fn server(events: mpsc::Sender<VmEvent>) -> (AgentServer, OwnedFd) {
        let configuration = serde_json::json!({
            "hostname": "bulkhead", "time_unix_ns": 0, "isolation": true, "data_disk_serial": "data"
        });
        let (channel, theirs) = vmm::channel().unwrap();
        let base = Base::from_variables(|_| Some("/nothing".into()), 0).unwrap();
        let server = AgentServer {
            vmm: Arc::new(channel),
            preface: vec![HostMessage::Certificates { pem: "one\n".into() }],
            configuration: serde_json::from_value(configuration).unwrap(),
            shares: watch::channel(Vec::new()).1,
            ports: Arc::new(Ports::open(false)),
            host_sockets: HostSockets::new(Vec::new(), &base),
            events,
        };
        (server, theirs)
    }

    fn hello(protocol: u32) -> GuestMessage {
        GuestMessage::Hello(Hello { protocol, kernel: "6.12.0\u{1b}[2J".into(), uptime_us: 5 })
    }

    #[tokio::test]
    async fn the_agent_speaks_first_and_is_configured_then_reports_and_is_ordered() {
        let (ours, theirs) = duplex(1 << 16);
        let (events, mut received) = mpsc::channel(8);
        let (orders, mut outbox) = mpsc::channel(1);
        let (server, _vmm) = server(events);
        let certificates = server.preface[0].clone();
        let backend = tokio::spawn(async move { server.converse(ours, &mut outbox).await });
        let mut agent = BufReader::new(theirs);
        agent.write_all(&encode(&hello(PROTOCOL_VERSION)).unwrap()).await.unwrap();
        let mut line = String::new();
        agent.read_line(&mut line).await.unwrap();
        assert_eq!(serde_json::from_str::<HostMessage>(&line).unwrap(), certificates);
        line.clear();
        agent.read_line(&mut line).await.unwrap();
        let Ok(HostMessage::Configure(configuration)) = serde_json::from_str(&line) else { panic!("{line}") };
        assert!(configuration.isolation && configuration.time_unix_ns > 1 << 60);
        agent.write_all(&encode(&GuestMessage::Reached { stage: Stage::Disk, uptime_us: 9 }).unwrap()).await.unwrap();
        let shutdown = HostMessage::Shutdown { mode: ShutdownMode::PowerOff, grace_ms: 7 };
        orders.send(shutdown.clone()).await.unwrap();
        line.clear();
        agent.read_line(&mut line).await.unwrap();
        assert_eq!(serde_json::from_str::<HostMessage>(&line).unwrap(), shutdown);
        drop(agent);
        backend.await.unwrap().unwrap();
        let kernel = "6.12.0".to_owned();
        assert_eq!(received.recv().await, Some(VmEvent::AgentConnected { kernel, uptime_us: 5 }));
        assert_eq!(received.recv().await, Some(VmEvent::Reached(Stage::Disk)));
    }

    /// A serving backend, the vmm's end of its channel, and its reports.
    async fn serving() -> (tokio::task::JoinHandle<()>, OwnedFd, mpsc::Receiver<VmEvent>) {
        let (events, received) = mpsc::channel(64);
        let (orders, outbox) = mpsc::channel(1);
        let (server, theirs) = server(events);
        let first = offer(&server.vmm).await.unwrap();
        let serving = async move {
            server.serve(first, outbox).await;
            drop(orders);
        };
        (tokio::spawn(serving), theirs, received)
    }

    /// Returns the stream that waits for the agent, as the vmm receives it; `None` if there is none.
    async fn offered(vmm: &OwnedFd, within: Duration) -> Option<UnixStream> {
        let vmm = vmm.try_clone().unwrap();
        let received = tokio::task::spawn_blocking(move || {
            let limit = PollTimeout::try_from(within).unwrap();
            if poll(&mut [PollFd::new(vmm.as_fd(), PollFlags::POLLIN)], limit).unwrap() == 0 {
                return None;
            }
            let mut buffer = vec![0; bulkhead_vmm::api::MAX_PACKET];
            bulkhead_ipc::channel::receive::<Command>(&vmm, &mut buffer).unwrap()
        });
        let (command, stream) = received.await.unwrap()?;
        assert_eq!(command, Command::VsockOffer { port: AGENT_PORT });
        let stream = std::os::unix::net::UnixStream::from(stream.unwrap());
        stream.set_nonblocking(true).unwrap();
        Some(UnixStream::from_std(stream).unwrap())
    }

    /// Connects, says Hello and is configured.
    async fn connect_as_agent(vmm: &OwnedFd) -> BufReader<UnixStream> {
        let mut agent = BufReader::new(offered(vmm, WRITE_TIMEOUT).await.unwrap());
        agent.write_all(&encode(&hello(PROTOCOL_VERSION)).unwrap()).await.unwrap();
        loop {
            let mut line = String::new();
            agent.read_line(&mut line).await.unwrap();
            match serde_json::from_str(&line).unwrap() {
                HostMessage::Certificates { .. } => {}
                HostMessage::Configure(_) => return agent,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Returns whether the other side has closed the stream: nothing to read, or an error because it was not read.
    async fn is_closed(stream: &mut UnixStream) -> bool {
        matches!(timeout(WRITE_TIMEOUT, stream.read(&mut [0])).await, Ok(Ok(0) | Err(_)))
    }

    #[tokio::test]
    async fn there_is_no_stream_for_another_agent_until_the_first_has_ended() {
        let (serving, vmm, mut received) = serving().await;
        let mut agent = connect_as_agent(&vmm).await;
        let connected = received.recv().await;
        assert!(matches!(connected, Some(VmEvent::AgentConnected { .. })), "{connected:?}");
        assert!(offered(&vmm, Duration::from_millis(50)).await.is_none());
        agent.write_all(&encode(&GuestMessage::Reached { stage: Stage::Disk, uptime_us: 9 }).unwrap()).await.unwrap();
        assert_eq!(received.recv().await, Some(VmEvent::Reached(Stage::Disk)));
        drop(agent);
        assert_eq!(received.recv().await, Some(VmEvent::AgentLost));
        assert!(offered(&vmm, WRITE_TIMEOUT).await.is_some());
        serving.abort();
    }

    #[tokio::test]
    async fn a_guest_that_connects_and_leaves_without_end_gets_streams_at_a_slow_pace() {
        let (serving, vmm, _received) = serving().await;
        let begun = std::time::Instant::now();
        for _ in 0..3 {
            drop(offered(&vmm, WRITE_TIMEOUT).await.unwrap());
        }
        assert!(begun.elapsed() >= 2 * RETRY_INTERVAL);
        serving.abort();
    }

    #[tokio::test]
    async fn the_server_ends_with_the_vmm() {
        let (serving, vmm, _received) = serving().await;
        drop(vmm);
        timeout(WRITE_TIMEOUT, serving).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn another_version_of_the_protocol_is_refused() {
        let (ours, mut theirs) = duplex(1 << 16);
        let (events, _received) = mpsc::channel(8);
        let (_orders, mut outbox) = mpsc::channel(1);
        theirs.write_all(&encode(&hello(99)).unwrap()).await.unwrap();
        let (server, _vmm) = server(events);
        let error = server.converse(ours, &mut outbox).await.unwrap_err();
        assert!(matches!(error, AgentError::Version(99)));
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused_after_the_bound() {
        let mut reader = AsyncLineReader::new(tokio::io::repeat(b'x'));
        assert!(matches!(reader.next::<GuestMessage>().await, Err(LineError::TooLong)));
        assert_eq!(reader.buffer.len(), MAX_LINE);
    }

    #[test]
    fn what_the_guest_writes_cannot_act_on_a_terminal() {
        let failure = Failure { stage: Stage::Disk, reason: "a\u{1b}[31m\nb\u{7}".repeat(1000) };
        let Some(VmEvent::GuestFailed(reason)) = event(GuestMessage::Failed(failure)) else { panic!() };
        assert!(reason.starts_with("stage disk: a b") && reason.len() < 1100);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        /// 0: the agent reports; 1: the agent goes and comes back.
        #[test]
        fn events_of_two_connections_never_interleave(steps in prop::collection::vec(0..2, 0..12)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (serving, vmm, mut received) = serving().await;
                let mut agent = connect_as_agent(&vmm).await;
                let mut expected = vec!["connected"];
                for step in steps {
                    if step == 0 {
                        let report = GuestMessage::Reached { stage: Stage::Disk, uptime_us: 9 };
                        agent.write_all(&encode(&report).unwrap()).await.unwrap();
                        expected.push("reached");
                    } else {
                        agent.shutdown().await.unwrap();
                        assert!(is_closed(agent.get_mut()).await);
                        // The end is reported before the next stream is offered.
                        expected.extend(["lost", "connected"]);
                        agent = connect_as_agent(&vmm).await;
                    }
                }
                for event in expected {
                    let is = match received.recv().await.unwrap() {
                        VmEvent::AgentConnected { .. } => "connected",
                        VmEvent::Reached(_) => "reached",
                        VmEvent::AgentLost => "lost",
                        other => panic!("{other:?}"),
                    };
                    assert_eq!(is, event);
                }
                serving.abort();
            });
        }
    }

    proptest! {
        #[test]
        fn messages_survive_any_fragmentation(stages in prop::collection::vec(0_usize..4, 0..8), cut in 1_usize..64) {
            let all = [Stage::Kernel, Stage::Agent, Stage::Disk, Stage::Engine];
            let sent: Vec<_> =
                stages.iter().map(|index| GuestMessage::Reached { stage: all[*index], uptime_us: 1 }).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(|message| encode(message).unwrap()).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let received = runtime.block_on(async {
                let (mut near, far) = duplex(cut);
                let writer = tokio::spawn(async move { near.write_all(&bytes).await });
                let mut reader = AsyncLineReader::new(far);
                let mut received = Vec::new();
                while let Some(message) = reader.next::<GuestMessage>().await.unwrap() {
                    received.push(message);
                }
                writer.await.unwrap().unwrap();
                received
            });
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let mut reader = AsyncLineReader::new(&bytes[..]);
                while let Ok(Some(_)) = reader.next::<GuestMessage>().await {}
            });
        }
    }
}
