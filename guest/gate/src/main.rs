//! `bulkhead-gate`: serves the Docker API on vsock and on a unix socket, in front of dockerd.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use bulkhead_gate::{Caller, Gate, Isolation, ListenError, Places, Sockets, UnixEntrance, VsockEntrance};
use bulkhead_protocol::{ENGINE_SOCKET, GRANTS_SOCKET, SOCKET_EXCEPTIONS, SocketExceptions};
use tokio::{net::UnixStream, sync::Semaphore};

/// Connections served at once; more wait in the listeners' queues.
const CONNECTIONS: usize = 4096;

/// The command line.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    isolation: Isolation,
    upstream: PathBuf,
    listen: PathBuf,
    vsock_port: Option<u32>,
    block_load: bool,
}

const USAGE: &str = "usage: bulkhead-gate --isolation=on|off --upstream=SOCKET --listen=SOCKET [--vsock-port=PORT] \
                     [--block-load]";

/// The name under which the socket at [`ENGINE_SOCKET`] is kept while isolation is off.
const SHARED: &str = "engine";

impl Arguments {
    fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut isolation, mut upstream, mut listen, mut vsock_port) = (None, None, None, None);
        let mut block_load = false;
        for word in words {
            match word.split_once('=') {
                Some(("--isolation", "on")) => isolation = Some(Isolation::On),
                Some(("--isolation", "off")) => isolation = Some(Isolation::Off),
                Some(("--upstream", path)) => upstream = Some(PathBuf::from(path)),
                Some(("--listen", path)) => listen = Some(PathBuf::from(path)),
                Some(("--vsock-port", port)) => {
                    vsock_port = Some(port.parse().map_err(|_| format!("{port:?} is not a vsock port"))?);
                }
                None if word == "--block-load" => block_load = true,
                _ => return Err(format!("unknown argument {word:?}")),
            }
        }
        // No default for isolation: a forgotten option must not open the gate.
        match (isolation, upstream, listen) {
            (Some(isolation), Some(upstream), Some(listen)) => {
                Ok(Self { isolation, upstream, listen, vsock_port, block_load })
            }
            _ => Err("--isolation, --upstream and --listen are needed".to_owned()),
        }
    }
}

/// What new containers have in their environment: in a variable, because a command line is no place for passwords.
fn container_environment() -> Vec<String> {
    let Ok(text) = std::env::var(bulkhead_protocol::CONTAINER_ENVIRONMENT) else { return Vec::new() };
    serde_json::from_str(&text).unwrap_or_else(|error| {
        eprintln!("{} is no list: {error}", bulkhead_protocol::CONTAINER_ENVIRONMENT);
        Vec::new()
    })
}

/// Which containers may have the engine's socket. What can't be read allows nobody.
fn socket_exceptions() -> SocketExceptions {
    let Ok(text) = std::env::var(SOCKET_EXCEPTIONS) else { return SocketExceptions::default() };
    serde_json::from_str(&text).unwrap_or_else(|error| {
        eprintln!("{SOCKET_EXCEPTIONS} can't be read, no container may have the socket: {error}");
        SocketExceptions::default()
    })
}

/// Tells whoever started the gate that it serves (sd_notify(3)).
fn notify_ready() {
    if let Err(error) = bulkhead_guest_common::notify::ready() {
        eprintln!("can't report readiness: {error}");
    }
}

async fn admit(gate: &Arc<Gate>, slots: &Arc<Semaphore>, stream: UnixStream) {
    let Ok(slot) = Arc::clone(slots).acquire_owned().await else { return };
    let gate = Arc::clone(gate);
    tokio::spawn(async move {
        bulkhead_gate::serve_connection(gate, stream, Caller::Host).await;
        drop(slot);
    });
}

/// Serves everybody who comes through a unix socket.
async fn serve(gate: Arc<Gate>, slots: Arc<Semaphore>, entrance: UnixEntrance) {
    loop {
        let stream = entrance.accept().await;
        admit(&gate, &slots, stream).await;
    }
}

/// Sockets that containers have: one each with isolation, else the engine's own for all that mount it.
fn serve_containers(
    gate: &Arc<Gate>,
    isolation: Isolation,
    slots: &Arc<Semaphore>,
    inherited: Vec<(String, OwnedFd)>,
) -> Result<(), ListenError> {
    let mut shared = None;
    for (name, fd) in inherited {
        match isolation {
            Isolation::On => bulkhead_gate::adopt(gate, &name, fd.into()),
            Isolation::Off if name == SHARED => shared = Some(UnixEntrance::adopt(fd)?),
            Isolation::Off => {}
        }
    }
    if isolation == Isolation::Off {
        let entrance = match shared {
            Some(entrance) => entrance,
            None => UnixEntrance::bind_kept(Path::new(ENGINE_SOCKET), SHARED)?,
        };
        tokio::spawn(serve(Arc::clone(gate), Arc::clone(slots), entrance));
        return Ok(());
    }
    if let Err(error) = bulkhead_gate::mark_place(Path::new(ENGINE_SOCKET)) {
        eprintln!("containers can't ask for {ENGINE_SOCKET}: {error}");
    }
    let runtime = UnixEntrance::bind(Path::new(GRANTS_SOCKET))?;
    let gate = Arc::clone(gate);
    tokio::spawn(async move {
        loop {
            let stream = runtime.accept().await;
            tokio::spawn(bulkhead_gate::answer_runtime(Arc::clone(&gate), stream));
        }
    });
    Ok(())
}

async fn run(arguments: Arguments, inherited: Vec<(String, OwnedFd)>) -> Result<(), ListenError> {
    let isolation = arguments.isolation;
    let gate = Gate::new(arguments.upstream, isolation)
        .with_environment(container_environment())
        .with_sockets(Sockets::new(socket_exceptions(), Places::default()))
        .with_load_blocked(arguments.block_load);
    let gate = Arc::new(gate);
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let unix = UnixEntrance::bind(&arguments.listen)?;
    serve_containers(&gate, isolation, &slots, inherited)?;
    if let Some(port) = arguments.vsock_port {
        let vsock = VsockEntrance::bind(port)?;
        let (gate, slots) = (Arc::clone(&gate), Arc::clone(&slots));
        tokio::spawn(async move {
            loop {
                let stream = vsock.accept().await;
                admit(&gate, &slots, stream).await;
            }
        });
    }
    notify_ready();
    serve(gate, slots, unix).await;
    Ok(())
}

fn main() -> ExitCode {
    let inherited = bulkhead_gate::inherited();
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(reason) => {
            eprintln!("{reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_stack_size(512 * 1024)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(arguments, inherited)),
        Err(source) => {
            eprintln!("can't start the threads: {source}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = ended {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        eprintln!("{error}{cause}");
    }
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn isolation_has_no_default() {
        assert!(parse("--upstream=/u --listen=/l").is_err());
        assert!(parse("--isolation=maybe --upstream=/u --listen=/l").is_err());
        assert_eq!(parse("--isolation=on --upstream=/u --listen=/l").unwrap().isolation, Isolation::On);
    }

    #[test]
    fn an_unknown_argument_is_an_error() {
        assert!(parse("--isolation=on --upstream=/u --listen=/l --tcp=2375").is_err());
    }
}
