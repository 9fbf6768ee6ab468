//! Starting a backend from the command line, and waiting without polling until it is ready.
//!
//! The backend writes one line of JSON to its standard output ([`Readiness`]) when its sockets listen or when it cannot
//! run. So the command reports the backend's own error and not a timeout.
//!
//! A service manager that listens on `docker.sock` starts the backend itself: a second listener on the same path would
//! take its clients.

use std::{fs::File, io, path::PathBuf, process::Stdio, time::Duration};

use nix::fcntl::{Flock, FlockArg};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::{ChildStdin, Command},
    time::timeout,
};

use super::{
    api::Readiness,
    child::{close_on_exec_from, current_program},
    logs,
};
use crate::settings::{PathError, Paths};

/// Time for a new backend to listen on its sockets.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest first line of a backend in bytes.
const MAX_LINE: u64 = 64 * 1024;

/// Reason that a backend could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A directory of the profile.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The process.
    #[error("cannot start the backend")]
    Spawn(#[source] io::Error),
    /// The backend's own error.
    #[error("{0}")]
    Refused(String),
    /// It exited without a report, or sent none in time.
    #[error("the backend did not become ready; see {0}")]
    Silent(PathBuf),
    /// The service manager that listens for the backend did not start one.
    #[error(
        "a service manager listens on {0}, but its backend did not become ready; see `journalctl --user -u \
         'bulkhead*'`, or end that with `systemctl --user stop bulkhead.socket`"
    )]
    Service(PathBuf),
}

/// Lifetime of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The backend outlives the command that started it.
    Detached,
    /// The backend exits and removes the profile's files when the command that started it ends.
    ThrowAway,
}

/// Blocks until no other command is starting a backend, so that the second of two finds the backend of the first.
pub fn lock_start(paths: &Paths) -> Result<Flock<File>, LaunchError> {
    let root = paths.runtime_root();
    let directory_error = |source| PathError::Folder { path: root.to_owned(), source };
    let directory = File::open(root).map_err(directory_error)?;
    Ok(Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| directory_error(errno.into()))?)
}

/// Lets the service manager that listens on the profile's `docker.sock` start its backend, and returns once that
/// listens; false if nobody listens there. The caller has made sure that no backend holds the profile.
async fn activate(paths: &Paths) -> Result<bool, LaunchError> {
    let Ok(mut client) = UnixStream::connect(paths.docker_socket()).await else { return Ok(false) };
    // The backend closes a connection without a request and starts nothing for it. It accepts the first one when its
    // control socket listens.
    let accepted = async {
        client.shutdown().await?;
        client.read_to_end(&mut Vec::new()).await
    };
    let accepted = timeout(READY_TIMEOUT, accepted).await;
    // A service that fails closes it, too.
    if accepted.is_err() || UnixStream::connect(paths.control_socket()).await.is_err() {
        return Err(LaunchError::Service(paths.docker_socket()));
    }
    Ok(true)
}

/// Starts a backend and returns once it listens, with the pipe to a throw-away backend: that exits when the pipe
/// closes.
pub async fn launch(paths: &Paths, mode: Mode) -> Result<Option<ChildStdin>, LaunchError> {
    if activate(paths).await? {
        return Ok(None);
    }
    let log = logs::append(&paths.backend_log()).map_err(LaunchError::Spawn)?;
    let mut command = Command::new(current_program().map_err(LaunchError::Spawn)?);
    command
        .args(["--profile", paths.name().as_str(), "backend", "--launched"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .current_dir("/");
    if mode == Mode::ThrowAway {
        command.arg("--throw-away").stdin(Stdio::piped());
    }
    // A session of its own: neither Ctrl-C nor the end of the terminal reaches a backend that outlives the command. The
    // shell's descriptors stay behind, or a pipe in `bulkhead start | cat` would never end.
    // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            close_on_exec_from(3)
        });
    }
    let mut child = command.spawn().map_err(LaunchError::Spawn)?;
    // The child is dropped without being waited for: it is not killed by that, and init adopts it with this command's
    // end.
    let silent = || LaunchError::Silent(paths.backend_log());
    let output = child.stdout.take().ok_or_else(silent)?;
    let mut line = String::new();
    let mut output = BufReader::new(output.take(MAX_LINE));
    match timeout(READY_TIMEOUT, output.read_line(&mut line)).await {
        Ok(Ok(length)) if length > 0 => {}
        _ => return Err(silent()),
    }
    match serde_json::from_str(&line) {
        Ok(Readiness::Ready { .. }) => Ok(child.stdin.take()),
        Ok(Readiness::Error { message }) => {
            // It still holds the profile's lock. The caller may try again, and must not meet it.
            let _ = child.wait().await;
            Err(LaunchError::Refused(message))
        }
        Err(_) => Err(silent()),
    }
}
