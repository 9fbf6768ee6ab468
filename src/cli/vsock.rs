//! `bulkhead vsock`: streams between host programs and vsock ports of the VM.
//!
//! They go through the hybrid socket of the VM's vsock device, which answers a line `CONNECT <port>` with `OK` once a
//! program in the VM has accepted, and a line `LISTEN <port>` once one has connected. Ports below 1024 are refused here:
//! the gate listens on one of them, and the engine's socket is the way to it.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileTypeExt,
    },
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::{Mode, umask},
};
use tokio::{
    fs::File,
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, copy_bidirectional},
    net::{TcpListener, UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::Semaphore,
    time::timeout,
};

use super::{CliError, client::Client, colour, command, print};
use crate::settings::Paths;
use bulkhead_ipc::report::chain;

/// First port that a program in the VM may offer: those below are reserved, as for TCP, and are the VM's own services'.
const FIRST_PORT: u32 = 1024;

/// `VMADDR_PORT_ANY` (vsock(7)) is not a port.
const LAST_PORT: u32 = u32::MAX - 1;

/// Last port at which the VM's device lets a client listen. Those after it are of connections to the VM.
const LAST_HOST_PORT: u32 = (1 << 30) - 1;

/// Time for the program in the VM to accept.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest answer of the device in bytes: `OK` and a port.
const MAX_ANSWER: usize = 32;

/// Most connections at once of one `forward`.
const MAX_CONNECTIONS: usize = 128;

/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connect to vsock ports of the VM, and let it connect to this machine, for tools of the command line.
///
/// Programs in the VM can use vsock only while Enhanced Container Isolation is off, and only in containers whose seccomp
/// profile allows it, such as those with --privileged: see docs/network.md. Ports below 1024 are those of the VM's own
/// services.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Connect standard input and output to a vsock port.
    ///
    /// Each direction ends by itself: the end of standard input is the end of what the program in the VM reads. Exits
    /// with 0 once the program has closed the connection, and with 1 if nothing listens on the port.
    #[command(after_help = "\
Examples:
  echo hello | bulkhead vsock connect 5000
  ssh -o ProxyCommand='bulkhead vsock connect 2222' root@vm")]
    Connect {
        /// Port in the VM.
        #[arg(value_parser = clap::value_parser!(u32).range(i64::from(FIRST_PORT)..=i64::from(LAST_PORT)))]
        port: u32,
    },
    /// Wait until a program in the VM connects to a vsock port of this machine, and connect standard input and output to it.
    ///
    /// Takes one connection; of several commands that wait at a port it goes to the first. Programs in the VM reach this
    /// machine by the context id 2. Each direction ends by itself, as with `connect`.
    #[command(after_help = "\
Examples:
  bulkhead vsock listen 5000 </dev/null >core &
  docker run --rm --privileged debian-with-socat sh -c 'socat -u OPEN:/core VSOCK-CONNECT:2:5000'")]
    Listen {
        /// Port of this machine.
        #[arg(value_parser = clap::value_parser!(u32).range(i64::from(FIRST_PORT)..=i64::from(LAST_HOST_PORT)))]
        port: u32,
    },
    /// Forward a port or socket of this machine to a vsock port, until interrupted.
    ///
    /// A TCP port listens on 127.0.0.1, where every user of this machine can connect. A Unix socket is this user's
    /// alone.
    #[command(after_help = "\
Examples:
  bulkhead vsock forward 2222:2222
  bulkhead vsock forward ./debugger.sock:5000")]
    Forward {
        /// TCP port or path of a socket on this machine, and the port in the VM.
        #[arg(value_name = "LOCAL:PORT")]
        forwarding: Forwarding,
    },
}

/// A place of this machine that leads to a port of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Forwarding {
    local: Local,
    port: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Local {
    Tcp(u16),
    Unix(PathBuf),
}

/// A text that is not a forwarding.
#[derive(Debug, thiserror::Error)]
#[error(
    "must be LOCAL:PORT, with a TCP port or the path of a socket with a / in it, and a vsock port from {FIRST_PORT} to \
     {LAST_PORT}"
)]
pub(super) struct InvalidForwarding;

impl FromStr for Forwarding {
    type Err = InvalidForwarding;

    fn from_str(text: &str) -> Result<Self, InvalidForwarding> {
        let (local, port) = text.rsplit_once(':').ok_or(InvalidForwarding)?;
        let port = port.parse().ok().filter(|port| (FIRST_PORT..=LAST_PORT).contains(port)).ok_or(InvalidForwarding)?;
        let local = if local.contains('/') {
            Local::Unix(local.into())
        } else {
            Local::Tcp(local.parse().ok().filter(|port| *port != 0).ok_or(InvalidForwarding)?)
        };
        Ok(Self { local, port })
    }
}

pub(super) async fn run(paths: &Paths, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::Connect { port } => carry(connect(paths, port)).await,
        Verb::Listen { port } => carry(listen(paths, port)).await,
        Verb::Forward { forwarding } => forward(paths, &forwarding).await,
    }
}

/// Connects standard input and output to a stream, once there is one.
async fn carry(stream: impl Future<Output = Result<UnixStream, CliError>>) -> Result<(), CliError> {
    let standard = |stream: BorrowedFd| stream.try_clone_to_owned().map(|owned| File::from_std(owned.into()));
    let ends = (standard(io::stdin().as_fd()), standard(io::stdout().as_fd()));
    let (Ok(input), Ok(output)) = ends else {
        return Err(CliError::Failed("standard input and output must be open".to_owned()));
    };
    relay(stream.await?, input, output).await.map_err(CliError::io("the connection failed"))
}

/// Connects to the VM's vsock device.
async fn device(paths: &Paths) -> Result<UnixStream, CliError> {
    UnixStream::connect(paths.vsock_socket()).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => not_running(paths),
        _ => CliError::io("cannot connect to the VM's vsock device")(error),
    })
}

/// Waits for a connection of the VM to a port of this machine.
async fn listen(paths: &Paths, port: u32) -> Result<UnixStream, CliError> {
    let client = Client::connect(paths).await?.ok_or_else(|| not_running(paths))?;
    let status = client.status().await?;
    if status.vm.is_some_and(|vm| vm.enhanced_container_isolation) {
        return Err(CliError::Failed(
            "nothing in the VM can connect to this machine: with Enhanced Container Isolation on, containers cannot use \
             vsock; `docker exec` carries a program's input and output"
                .to_owned(),
        ));
    }
    let mut stream = device(paths).await?;
    match greet(&mut stream, "LISTEN", port).await {
        Ok(true) => Ok(stream),
        _ => Err(CliError::Failed(format!("the VM's vsock device ended the wait for port {port}; did the VM stop?"))),
    }
}

/// Connects to a port of the VM.
async fn connect(paths: &Paths, port: u32) -> Result<UnixStream, CliError> {
    let mut stream = device(paths).await?;
    match timeout(ACCEPT_TIMEOUT, greet(&mut stream, "CONNECT", port)).await {
        Ok(Ok(true)) => Ok(stream),
        Ok(_) => Err(CliError::Failed(format!(
            "nothing listens on vsock port {port} in the VM; with Enhanced Container Isolation on, containers cannot"
        ))),
        Err(_) => Err(CliError::Failed(format!(
            "vsock port {port} did not accept within {} s; is the VM busy? `{}` checks it",
            ACCEPT_TIMEOUT.as_secs(),
            command(paths, "doctor")
        ))),
    }
}

fn not_running(paths: &Paths) -> CliError {
    CliError::Failed(format!("the engine is not running; `{}` starts it", command(paths, "start")))
}

/// Sends the device a request for a port and reads its answer; returns whether the connection exists.
async fn greet(stream: &mut UnixStream, request: &str, port: u32) -> io::Result<bool> {
    stream.write_all(format!("{request} {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: those behind the line are the program's.
    while answer.len() < MAX_ANSWER && answer.last() != Some(&b'\n') {
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            // The device closes the stream of a connection that is refused.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(answer.starts_with(b"OK ") && answer.ends_with(b"\n"))
}

/// Moves bytes both ways until the other side has ended both, and passes on the end of each.
async fn relay(
    stream: UnixStream,
    mut input: impl AsyncRead + Unpin,
    mut output: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let hung_up = stream.as_fd().try_clone_to_owned()?;
    let (mut reader, mut writer) = stream.into_split();
    let received = async {
        copy(&mut reader, &mut output).await?;
        output.flush().await
    };
    let sent = async {
        match copy(&mut input, &mut writer).await {
            // The other side reads no more; what it sends still counts.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.map(drop),
        }?;
        writer.shutdown().await
    };
    tokio::pin!(received, sent);
    tokio::select! {
        result = &mut received => result?,
        result = &mut sent => {
            result?;
            return received.await;
        }
    }
    // It sends no more. While it still reads, standard input goes on; a program at a terminal must not wait for input
    // that nobody reads.
    let closed = tokio::task::spawn_blocking(move || {
        poll(&mut [PollFd::new(hung_up.as_fd(), PollFlags::empty())], PollTimeout::NONE)
    });
    tokio::select! {
        result = sent => result,
        _ = closed => Ok(()),
    }
}

async fn forward(paths: &Paths, Forwarding { local, port }: &Forwarding) -> Result<(), CliError> {
    // Found now and not with the first connection; the program in the VM may begin to listen later.
    if !paths.vsock_socket().exists() {
        return Err(not_running(paths));
    }
    let mut signals = [SignalKind::interrupt(), SignalKind::terminate()].map(signal).into_iter();
    let (Some(Ok(mut interrupt)), Some(Ok(mut terminate))) = (signals.next(), signals.next()) else {
        return Err(CliError::Failed("cannot receive signals".to_owned()));
    };
    tokio::select! {
        result = serve(paths, local, *port) => result,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// A Unix socket in the file system; dropping the value removes it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Only while it is a socket: somebody may have put another file there.
        if fs::symlink_metadata(&self.0).is_ok_and(|file| file.file_type().is_socket()) {
            let _ = fs::remove_file(&self.0);
        }
    }
}

async fn serve(paths: &Paths, local: &Local, port: u32) -> Result<(), CliError> {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let failed = |place: &str, error: io::Error| CliError::Failed(format!("cannot listen on {place}: {error}"));
    match local {
        Local::Tcp(number) => {
            let place = format!("{}:{number}", Ipv4Addr::LOCALHOST);
            let listener = TcpListener::bind(&place).await.map_err(|error| failed(&place, error))?;
            print(&format!("forwarding {place} to vsock port {port}"))?;
            loop {
                let accepted = listener.accept().await.map(|(client, _)| client);
                accept(paths, port, accepted, &permits).await;
            }
        }
        Local::Unix(path) => {
            // Closed to other users from the moment that it exists.
            umask(Mode::from_bits_truncate(0o177));
            let place = path.display().to_string();
            let listener = UnixListener::bind(path).map_err(|error| failed(&place, error))?;
            let _file = SocketFile(path.clone());
            print(&format!("forwarding {place} to vsock port {port}"))?;
            loop {
                let accepted = listener.accept().await.map(|(client, _)| client);
                accept(paths, port, accepted, &permits).await;
            }
        }
    }
}

/// Connects a client in a task of its own; waits while there are too many.
async fn accept<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    paths: &Paths,
    port: u32,
    accepted: io::Result<S>,
    permits: &Arc<Semaphore>,
) {
    let mut client = match accepted {
        Ok(client) => client,
        Err(error) => {
            // Without a pause, EMFILE would make this a busy loop.
            colour::warn(format_args!("cannot accept a connection: {error}"));
            return tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    };
    let Ok(permit) = Arc::clone(permits).acquire_owned().await else { return };
    let paths = paths.clone();
    tokio::spawn(async move {
        match connect(&paths, port).await {
            // A reset is the end of a connection like any other.
            Ok(mut stream) => drop(copy_bidirectional(&mut client, &mut stream).await),
            Err(error) => colour::warn(chain(&error)),
        }
        drop(permit);
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_forwarding_has_a_port_or_a_path_and_no_port_of_the_vms_services() {
        let forwarding = |text: &str| text.parse::<Forwarding>().ok();
        assert_eq!(forwarding("22:5000"), Some(Forwarding { local: Local::Tcp(22), port: 5000 }));
        let unix = Forwarding { local: Local::Unix("./a:b".into()), port: LAST_PORT };
        assert_eq!(forwarding("./a:b:4294967294"), Some(unix));
        for text in ["5000", "1:1023", "1:0", "0:5000", "70000:5000", "a:5000", ":5000", "1:4294967295", "1:-1", "/a"] {
            assert_eq!(forwarding(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut output_reader, output) = tokio::io::duplex(64);
        let relay = tokio::spawn(relay(ours, &b"question"[..], output));
        // Their end of input comes while they have said nothing yet.
        let mut question = Vec::new();
        theirs.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");
        theirs.write_all(b"answer").await.unwrap();
        drop(theirs);
        relay.await.unwrap().unwrap();
        let mut answer = Vec::new();
        output_reader.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
    }

    #[tokio::test]
    async fn input_goes_on_after_the_other_side_has_said_all_and_stops_when_it_is_gone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut typist, input) = tokio::io::duplex(64);
        let relay = tokio::spawn(relay(ours, input, tokio::io::sink()));
        theirs.shutdown().await.unwrap();
        typist.write_all(b"later").await.unwrap();
        let mut later = [0; 5];
        theirs.read_exact(&mut later).await.unwrap();
        assert_eq!(&later, b"later");
        drop(theirs);
        // The input is still open.
        timeout(Duration::from_secs(20), relay).await.unwrap().unwrap().unwrap();
        drop(typist);
    }

    proptest! {
        #[test]
        fn no_text_leads_to_a_reserved_port(text in "[0-9./a:-]{0,20}") {
            if let Ok(forwarding) = text.parse::<Forwarding>() {
                prop_assert!(forwarding.port >= FIRST_PORT);
            }
        }
    }
}
