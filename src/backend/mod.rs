//! The per-profile host process, `bulkhead backend`: it owns the VM, its sockets and its logs.
//!
//! One thread does everything: the work is small, and a VM must die with the thread that started it. The backend locks
//! the profile ([`lock`]), listens on `control.sock` (`api_server`) and `docker.sock` (`docker`), makes the docker
//! context and waits. A backend without a VM is a normal state: after a failure it stays to tell `status` the reason.
//! Backends of different profiles share nothing.
//!
//! - `supervisor` owns the VM and carries out the actions that `state` decides on; `events` are its inputs.
//! - `vm` is one VM from its boot to its end: `vmm` its process, `agent` the connection to init in the guest,
//!   `ports` and `network` its network, [`shares`] and [`host_sockets`] the host's directories and sockets, `device_process` what keeps the processes of
//!   both running, `diagnose` the examination of one that hangs, `host_clock` the jumps of the host's clock, which the
//!   guest's follows.
//! - [`plan`] checks beforehand everything that needs no VM, with [`host`], [`disk`], `proxy` and the plans of network and shares.
//!   `bulkhead start` makes the same plan before it starts a backend, so most errors appear at once.
//! - `child` and `channel` start a child process and exchange packets with it; they know nothing of the backend.
//! - [`data_format`] keeps this program from the files of a newer one.
//! - [`api`] has the messages of the control API, [`api_routes`] its routes, [`api_document`] describes both, and
//!   [`api_local`] answers what needs no VM.
//! - [`launch`] starts a backend from the command line; `service_manager` takes the socket of one that starts it.
//!   [`logs`] are the backend's files, of which `log_file` is written here.
//!
//! The administrator's policy is read once, when the backend starts, and holds for every VM until it exits: `restart`
//! can neither get around an older policy nor apply a newer one. Settings are read at each boot.

mod agent;
pub mod api;
pub mod api_body;
pub mod api_document;
pub mod api_local;
pub mod api_routes;
mod api_server;
pub mod certificates;
mod channel;
mod child;
pub mod data_format;
mod device_process;
mod diagnose;
pub mod disk;
pub mod docker;
mod events;
pub mod host;
mod host_clock;
pub mod host_sockets;
pub mod image_names;
pub mod launch;
pub mod lock;
mod log_file;
pub mod logs;
mod network;
pub mod plan;
mod ports;
mod proxy;
mod service_manager;
pub mod shares;
mod state;
mod supervisor;
mod time_zone;
mod vm;
mod vmm;

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::PermissionsExt, unix::net},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    stat::{Mode, umask},
};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, unix::pipe},
    signal::unix::{SignalKind, signal},
    sync::{Mutex, mpsc, oneshot},
};
use tracing::{error, info, warn};

use self::{
    api::{Readiness, StopOptions},
    api_server::Api,
    data_format::DataFormatError,
    docker::context::DockerContext,
    lock::{LockError, ProfileLock},
    log_file::LogFile,
    service_manager::ListenError,
    supervisor::{Request, Supervisor},
};
use bulkhead_ipc::report::chain;

pub use self::ports::vm::VmPortsError;
use crate::{
    log,
    settings::{PathError, Paths, Policy},
};

/// Reason that a backend could not run.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A directory of the profile.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The profile has another backend.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The profile's files are of a newer version.
    #[error(transparent)]
    DataFormat(#[from] DataFormatError),
    /// The socket of a service manager.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A socket or a log.
    #[error("cannot use {path}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The process could not be prepared.
    #[error("cannot set up the backend process")]
    Setup(#[source] io::Error),
}

/// Options of a backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Standard error is the log already, so lines are not written to it a second time.
    pub launched: bool,
    /// Exit when standard input ends, and leave no file of the profile behind.
    pub throw_away: bool,
}

/// Runs the backend of a profile until it is asked to stop. Blocks; must be called on the main thread, since a VM dies
/// with the thread that started it (`child::spawn`).
pub fn run(paths: &Paths, options: Options) -> Result<(), BackendError> {
    // Before anything else: the numbers of a service manager's descriptors are its only marks.
    let inherited = service_manager::listener(&paths.docker_socket()).map_err(BackendError::from);
    let (inherited, lock, log) = match inherited.and_then(|inherited| set_up(paths, options, inherited)) {
        Ok(ready) => ready,
        Err(error) => {
            announce(&Readiness::Error { message: chain(&error) });
            return Err(error);
        }
    };
    // A runtime with worker threads could start the vmm on one that ends before the backend does.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(BackendError::Setup);
    let result = runtime.and_then(|runtime| runtime.block_on(serve(paths, options, inherited, log)));
    if let Err(error) = &result {
        announce(&Readiness::Error { message: chain(error) });
    }
    if options.throw_away {
        paths.remove_all()?;
    }
    // The lock goes last: the next backend must find neither our sockets nor a directory that we are about to remove.
    drop(lock);
    paths.remove_empty_runtime();
    result
}

type Inherited = Option<net::UnixListener>;

fn set_up(
    paths: &Paths,
    options: Options,
    inherited: Inherited,
) -> Result<(Inherited, ProfileLock, LogFile), BackendError> {
    // Sockets and logs of this process are its user's alone, from the moment they exist.
    umask(Mode::from_bits_truncate(0o077));
    paths.create()?;
    let lock = ProfileLock::acquire(paths)?;
    data_format::claim(&paths.data_format())?;
    let log = LogFile::open(&paths.backend_log(), options.launched)
        .map_err(|source| BackendError::Io { path: paths.backend_log(), source })?;
    log::to_file(log.clone(), !options.launched);
    // Each published port and each docker client under way is a descriptor; the usual soft limit of 1024 is for
    // select(2).
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    info!(version = env!("CARGO_PKG_VERSION"), profile = %paths.name(), "the backend starts");
    Ok((inherited, lock, log))
}

/// Writes the line for which process supervisors and the command line wait.
fn announce(readiness: &Readiness) {
    use io::Write;
    let mut output = io::stdout().lock();
    let _ = serde_json::to_writer(&mut output, readiness);
    let _ = writeln!(output).and_then(|()| output.flush());
}

async fn serve(paths: &Paths, options: Options, inherited: Inherited, log: LogFile) -> Result<(), BackendError> {
    // A backend that was killed leaves the sockets of its VM behind.
    vm::remove_sockets(paths);
    let on_demand = inherited.is_some();
    let docker = match inherited {
        Some(listener) => adopt(listener, &paths.docker_socket())?,
        None => listen(&paths.docker_socket())?,
    };
    let control = listen(&paths.control_socket())?;
    // A full channel makes the API's connections wait, which are bounded themselves.
    let (requests, inbox) = mpsc::channel(16);
    forward_signals(&requests)?;
    if options.throw_away {
        stop_with_input(requests.clone())?;
    }
    // A throw-away engine is reached through DOCKER_HOST only.
    let context = if options.throw_away { Ok(None) } else { create_context(paths).map(Some) };
    let name = context.as_ref().map(|context| context.as_ref().map(|context| context.name().to_owned()));
    let supervisor = Supervisor::new(paths.clone(), policy(), log, name.map_err(Clone::clone));
    let (end, ended) = oneshot::channel();
    let engine = docker::socket::Engine {
        channel: supervisor.docker_channel(),
        status: supervisor.status(),
        start: on_demand.then(|| Arc::new(Mutex::new(requests.clone()))),
    };
    let api = Api { paths: paths.clone(), requests, status: supervisor.status() };
    let clients = tokio::spawn(docker::socket::serve(docker, engine));
    let control = tokio::spawn(api_server::serve(control, api, ended));
    // Both sockets listen: whatever connects from now on waits in a backlog instead of failing.
    announce(&Readiness::Ready { docker_host: paths.docker_host() });
    // A backend that the command line started may have the environment of a service that is not its own.
    if !options.launched {
        service_manager::ready();
        tokio::spawn(service_manager::follow(supervisor.status()));
    }
    supervisor.run(inbox).await;
    // No VM is left, and the status has no publisher any more, which ends the event streams. `bulkhead stop` waits for
    // that and for the profile's lock, so everything below is done when it returns.
    clients.abort();
    if !options.launched {
        service_manager::stopping();
    }
    let _ = fs::remove_file(paths.control_socket());
    // The service manager goes on listening on its own.
    if !on_demand {
        let _ = fs::remove_file(paths.docker_socket());
    }
    vm::remove_sockets(paths);
    // The context leads to the service manager's socket, too, which starts the next backend.
    if let Ok(Some(context)) = context
        && !on_demand
        && let Err(error) = context.remove()
    {
        warn!("{}", chain(&error));
    }
    info!("the backend exits");
    // The API is the last to go: the answer to `stop` may still be on its way to the client.
    let _ = end.send(());
    let _ = control.await;
    Ok(())
}

/// Reads the administrator's policy and logs what the administrator should know about it.
fn policy() -> Policy {
    let policy = Policy::system();
    if let Some(facts) = policy.facts() {
        if let Some(warning) = facts.warning() {
            error!("{warning}");
        } else {
            info!(file = %facts.file.display(), "a policy is in force");
        }
    }
    for key in policy.unknown() {
        warn!("ignoring the policy's key {key}: it is unknown");
    }
    policy
}

/// Listens on a socket of the profile.
fn listen(path: &Path) -> Result<UnixListener, BackendError> {
    let io_error = |source| BackendError::Io { path: path.to_owned(), source };
    // This process holds the profile's lock, so a socket that exists belongs to a backend that died.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(io_error)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io_error)?;
    Ok(listener)
}

/// Makes a service manager's listening socket that of the profile.
fn adopt(listener: net::UnixListener, path: &Path) -> Result<UnixListener, BackendError> {
    let io_error = |source| BackendError::Io { path: path.to_owned(), source };
    // Its unit may leave the socket open to other users (`SocketMode=` is 0666 by default).
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io_error)?;
    UnixListener::from_std(listener).map_err(io_error)
}

/// Makes the docker context; returns a warning if it cannot be made, since DOCKER_HOST reaches the engine without it.
fn create_context(paths: &Paths) -> Result<DockerContext, String> {
    let context = DockerContext::new(paths.name(), &paths.docker_host());
    context.and_then(|context| context.create().map(|()| context)).map_err(|error| {
        let warning = format!("cannot create the docker context: {}", chain(&error));
        warn!("{warning}");
        warning
    })
}

fn forward_signals(requests: &mpsc::Sender<Request>) -> Result<(), BackendError> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(BackendError::Setup)?;
        let requests = requests.clone();
        // For ever, not once: a second signal kills the VM.
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                if requests.send(Request::Signal).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(())
}

/// Stops the backend at once when standard input, a pipe from `bulkhead run`, is closed.
fn stop_with_input(requests: mpsc::Sender<Request>) -> Result<(), BackendError> {
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(BackendError::Setup)?;
    let mut input = pipe::Receiver::from_owned_fd(input).map_err(BackendError::Setup)?;
    tokio::spawn(async move {
        // The command writes nothing. The kernel closes its end however it dies, which no signal handler could promise.
        let mut buffer = [0; 64];
        while matches!(input.read(&mut buffer).await, Ok(1..)) {}
        info!("the command that started this backend is gone");
        let (reply, _answer) = oneshot::channel();
        let _ = requests.send(Request::Stop(StopOptions { force: true, timeout_seconds: None }, reply)).await;
    });
    Ok(())
}
