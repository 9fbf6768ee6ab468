//! `bulkhead-gate`: serves the Docker API on vsock and on a unix socket, in front of dockerd.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use bulkhead_gate::{Gate, Isolation, ListenError, UnixEntrance, VsockEntrance};
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
}

const USAGE: &str = "usage: bulkhead-gate --isolation=on|off --upstream=SOCKET --listen=SOCKET [--vsock-port=PORT]";

impl Arguments {
    fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut isolation, mut upstream, mut listen, mut vsock_port) = (None, None, None, None);
        for word in words {
            match word.split_once('=') {
                Some(("--isolation", "on")) => isolation = Some(Isolation::On),
                Some(("--isolation", "off")) => isolation = Some(Isolation::Off),
                Some(("--upstream", path)) => upstream = Some(PathBuf::from(path)),
                Some(("--listen", path)) => listen = Some(PathBuf::from(path)),
                Some(("--vsock-port", port)) => {
                    vsock_port = Some(port.parse().map_err(|_| format!("{port:?} is not a vsock port"))?);
                }
                _ => return Err(format!("unknown argument {word:?}")),
            }
        }
        // No default for isolation: a forgotten option must not open the gate.
        match (isolation, upstream, listen) {
            (Some(isolation), Some(upstream), Some(listen)) => Ok(Self { isolation, upstream, listen, vsock_port }),
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
        bulkhead_gate::serve_connection(gate, stream).await;
        drop(slot);
    });
}

async fn run(arguments: Arguments) -> Result<(), ListenError> {
    let gate = Gate::new(arguments.upstream, arguments.isolation).with_environment(container_environment());
    let gate = Arc::new(gate);
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let unix = UnixEntrance::bind(&arguments.listen)?;
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
    loop {
        let stream = unix.accept().await;
        admit(&gate, &slots, stream).await;
    }
}

fn main() -> ExitCode {
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
        Ok(runtime) => runtime.block_on(run(arguments)),
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
