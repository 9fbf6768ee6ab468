//! `bulkhead-gate`: serves the Docker API on vsock and on a unix socket, in front of dockerd.

use std::{error::Error, os::fd::OwnedFd, path::Path, process::ExitCode, sync::Arc};

use bulkhead_gate::{Caller, Directories, Gate, Isolation, ListenError, Sockets, UnixAcceptor, VsockAcceptor};
use bulkhead_protocol::{ENGINE_SOCKET, GRANTS_SOCKET, gate::Configuration};
use tokio::{net::UnixStream, sync::Semaphore};

/// Connections served at once; more wait in the listeners' queues.
const MAX_CONNECTIONS: usize = 4096;

/// The name under which the socket at [`ENGINE_SOCKET`] is kept while isolation is off.
const SHARED_SOCKET: &str = "engine";

/// Tells whoever started the gate that it serves (sd_notify(3)).
fn notify_ready() {
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET")
        && let Ok(socket) = std::os::unix::net::UnixDatagram::unbound()
        && let Err(error) = socket.send_to(b"READY=1", path)
    {
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
async fn serve(gate: Arc<Gate>, slots: Arc<Semaphore>, acceptor: UnixAcceptor) {
    loop {
        let stream = acceptor.accept().await;
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
            Isolation::On => bulkhead_gate::adopt_socket(gate, &name, fd.into()),
            Isolation::Off if name == SHARED_SOCKET => shared = Some(UnixAcceptor::adopt(fd)?),
            Isolation::Off => {}
        }
    }
    if isolation == Isolation::Off {
        let acceptor = match shared {
            Some(acceptor) => acceptor,
            None => UnixAcceptor::bind_kept(Path::new(ENGINE_SOCKET), SHARED_SOCKET)?,
        };
        tokio::spawn(serve(Arc::clone(gate), Arc::clone(slots), acceptor));
        return Ok(());
    }
    if let Err(error) = bulkhead_gate::create_placeholder(Path::new(ENGINE_SOCKET)) {
        eprintln!("containers can't ask for {ENGINE_SOCKET}: {error}");
    }
    let runtime = UnixAcceptor::bind(Path::new(GRANTS_SOCKET))?;
    let gate = Arc::clone(gate);
    tokio::spawn(async move {
        loop {
            let stream = runtime.accept().await;
            tokio::spawn(bulkhead_gate::answer_runtime(Arc::clone(&gate), stream));
        }
    });
    Ok(())
}

async fn run(configuration: Configuration, inherited: Vec<(String, OwnedFd)>) -> Result<(), ListenError> {
    let isolation = Isolation::from(configuration.isolation);
    let gate = Gate::new(configuration.dockerd_socket, isolation)
        .with_environment(configuration.container_environment)
        .with_sockets(Sockets::new(configuration.socket_exceptions, Directories::default()))
        .with_load_blocked(configuration.block_load);
    let gate = Arc::new(gate);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let unix = UnixAcceptor::bind(&configuration.unix_socket)?;
    serve_containers(&gate, isolation, &slots, inherited)?;
    if let Some(port) = configuration.vsock_port {
        let vsock = VsockAcceptor::bind(port)?;
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

/// Prints an error and its causes on one line.
fn report(error: &dyn Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    eprintln!("{text}");
}

fn main() -> ExitCode {
    let inherited = bulkhead_gate::inherited();
    let configuration = match bulkhead_gate::read_configuration() {
        Ok(configuration) => configuration,
        Err(error) => {
            report(&error);
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
        Ok(runtime) => runtime.block_on(run(configuration, inherited)),
        Err(source) => {
            eprintln!("can't start the threads: {source}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = ended {
        report(&error);
    }
    ExitCode::FAILURE
}
