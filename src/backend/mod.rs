//! The per-profile process: it owns the VM, its sockets and its logs.
//!
//! `state` decides, `supervisor` does; `api_server` and `docker` are how others reach them; `vm`, `vmm` and `agent` are
//! the child process, the packets to it and the guest's voice; `plan`, `host` and `disk` say beforehand what cannot work.

mod agent;
pub mod api;
mod api_server;
mod certificates;
mod channel;
mod child;
mod diagnose;
pub mod disk;
mod docker;
mod events;
pub mod host;
pub mod launch;
pub mod lock;
pub mod logs;
mod network;
pub mod plan;
mod ports;
mod proxy;
mod state;
mod supervisor;
mod vm;
mod vmm;

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    stat::{Mode, umask},
};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, unix::pipe},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};
use tracing::{error, info, warn};

use self::{
    api::{Readiness, StopOptions},
    api_server::Api,
    docker::context::DockerContext,
    lock::{LockError, ProfileLock},
    supervisor::{Request, Supervisor},
};
use bulkhead_ipc::report::chain;

use crate::settings::{PathError, Paths, Policy};

/// Size in bytes from which the backend's log is begun anew when a backend starts.
const MAX_LOG: u64 = 4 << 20;

/// Why a backend could not run.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A folder.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The profile is taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A socket or a log.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The process itself.
    #[error("cannot set up the backend process")]
    Setup(#[source] io::Error),
}

/// How a backend runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Standard error is the log already: do not write every line twice.
    pub launched: bool,
    /// End when standard input does, and leave no file of the profile behind.
    pub throw_away: bool,
}

/// Runs the backend of a profile until it is asked to end. Blocks; to be called on the main thread, with which a VM
/// dies when the backend is killed.
pub fn run(paths: &Paths, options: Options) -> Result<(), BackendError> {
    let lock = match set_up(paths, options) {
        Ok(lock) => lock,
        Err(error) => {
            announce(&Readiness::Error { message: chain(&error) });
            return Err(error);
        }
    };
    // One thread: the work is small, and the child is bound to the life of the thread that starts it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(BackendError::Setup);
    let result = runtime.and_then(|runtime| runtime.block_on(serve(paths, options)));
    if let Err(error) = &result {
        announce(&Readiness::Error { message: chain(error) });
    }
    if options.throw_away {
        paths.remove_all()?;
    }
    drop(lock);
    paths.remove_empty_runtime();
    result
}

fn set_up(paths: &Paths, options: Options) -> Result<ProfileLock, BackendError> {
    umask(Mode::from_bits_truncate(0o077));
    paths.create()?;
    let lock = ProfileLock::acquire(paths)?;
    start_log(&paths.backend_log(), options)
        .map_err(|source| BackendError::Io { path: paths.backend_log(), source })?;
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    info!(version = env!("CARGO_PKG_VERSION"), profile = %paths.name(), "backend begins");
    Ok(lock)
}

fn start_log(path: &Path, options: Options) -> io::Result<()> {
    use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

    if fs::metadata(path).is_ok_and(|metadata| metadata.len() > MAX_LOG) {
        logs::rotate(path)?;
    }
    let file = logs::append(path)?;
    let filter = EnvFilter::try_from_env("BULKHEAD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let to_file = fmt::layer().with_ansi(false).with_writer(std::sync::Mutex::new(file));
    let to_terminal = (!options.launched).then(|| fmt::layer().with_writer(io::stderr).with_target(false));
    // A second call in one process is a test's.
    let _ = tracing_subscriber::registry().with(filter).with(to_file).with(to_terminal).try_init();
    Ok(())
}

/// Supervisors and the command line wait for this line.
fn announce(readiness: &Readiness) {
    use io::Write;
    let mut output = io::stdout().lock();
    let _ = serde_json::to_writer(&mut output, readiness);
    let _ = writeln!(output).and_then(|()| output.flush());
}

async fn serve(paths: &Paths, options: Options) -> Result<(), BackendError> {
    vm::remove_sockets(paths);
    let docker = listen(&paths.docker_socket())?;
    let control = listen(&paths.control_socket())?;
    let (requests, inbox) = mpsc::channel(16);
    forward_signals(&requests)?;
    if options.throw_away {
        follow_life_line(requests.clone())?;
    }
    // A throw-away engine is reached through DOCKER_HOST only.
    let context = if options.throw_away { Ok(None) } else { create_context(paths).map(Some) };
    let name = context.as_ref().map(|context| context.as_ref().map(|context| context.name().to_owned()));
    let supervisor = Supervisor::new(paths.clone(), policy(), name.map_err(Clone::clone));
    let (end, ended) = oneshot::channel();
    let api = Api { requests, status: supervisor.status() };
    let clients = tokio::spawn(docker::socket::serve(docker, supervisor.link(), supervisor.status()));
    let control = tokio::spawn(api_server::serve(control, api, ended));
    announce(&Readiness::Ready { docker_host: paths.docker_host() });
    supervisor.run(inbox).await;
    clients.abort();
    for socket in [paths.docker_socket(), paths.control_socket()] {
        let _ = fs::remove_file(socket);
    }
    vm::remove_sockets(paths);
    if let Ok(Some(context)) = context
        && let Err(error) = context.remove()
    {
        warn!("{}", chain(&error));
    }
    info!("backend ends");
    let _ = end.send(());
    let _ = control.await;
    Ok(())
}

/// The administrator's policy, which is read once: it holds until this backend ends.
fn policy() -> Policy {
    let policy = Policy::system();
    if let Some(facts) = policy.facts() {
        if let Some(warning) = facts.warning() {
            error!("{warning}");
        } else {
            info!(file = %facts.file.display(), "a policy holds");
        }
    }
    for key in policy.unknown() {
        warn!("the policy's key {key} is not known and is ignored");
    }
    policy
}

/// Only the holder of the profile's lock comes here: a socket that exists is a dead backend's.
fn listen(path: &Path) -> Result<UnixListener, BackendError> {
    let io_error = |source| BackendError::Io { path: path.to_owned(), source };
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(io_error)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io_error)?;
    Ok(listener)
}

/// The context, or why there is none: the engine is as good without it, DOCKER_HOST reaches it.
fn create_context(paths: &Paths) -> Result<DockerContext, String> {
    let context = DockerContext::new(paths.name(), &paths.docker_host());
    context.and_then(|context| context.create().map(|()| context)).map_err(|error| {
        let warning = format!("no docker context was made: {}", chain(&error));
        warn!("{warning}");
        warning
    })
}

fn forward_signals(requests: &mpsc::Sender<Request>) -> Result<(), BackendError> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).map_err(BackendError::Setup)?;
        let requests = requests.clone();
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

/// Ends the backend at once when whoever holds the other end of standard input, a pipe, is gone.
fn follow_life_line(requests: mpsc::Sender<Request>) -> Result<(), BackendError> {
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(BackendError::Setup)?;
    let mut input = pipe::Receiver::from_owned_fd(input).map_err(BackendError::Setup)?;
    tokio::spawn(async move {
        let mut buffer = [0; 64];
        while matches!(input.read(&mut buffer).await, Ok(1..)) {}
        info!("the life line ended");
        let (reply, _answer) = oneshot::channel();
        let _ = requests.send(Request::Stop(StopOptions { force: true, timeout_seconds: None }, reply)).await;
    });
    Ok(())
}
