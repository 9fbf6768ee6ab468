//! Starts a backend from the command line and waits for its word, without polling.

use std::{fs::File, io, path::PathBuf, process::Stdio, time::Duration};

use nix::fcntl::{Flock, FlockArg};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
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
const READY: Duration = Duration::from_secs(30);

/// Longest first line of a backend in bytes.
const MAX_LINE: u64 = 64 * 1024;

/// Why no backend could be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A folder.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The process.
    #[error("cannot start the backend")]
    Spawn(#[source] io::Error),
    /// It gave up, in its own words.
    #[error("{0}")]
    Refused(String),
    /// It said nothing.
    #[error("the backend ended without a word; its log is {0}")]
    Silent(PathBuf),
}

/// Which kind of backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It outlives the command that started it.
    Detached,
    /// It ends, and removes the profile's files, when the command that started it does.
    ThrowAway,
}

/// Only one command at a time starts a backend, so that the second finds the first one's; blocks.
pub fn turn(paths: &Paths) -> Result<Flock<File>, LaunchError> {
    let root = paths.runtime_root();
    let folder_error = |source| PathError::Folder { path: root.to_owned(), source };
    let folder = File::open(root).map_err(folder_error)?;
    Ok(Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, errno)| folder_error(errno.into()))?)
}

/// Starts a backend and returns once it listens. The pipe is a throw-away backend's life line: it ends when that closes.
pub async fn launch(paths: &Paths, mode: Mode) -> Result<Option<ChildStdin>, LaunchError> {
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
    // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            close_on_exec_from(3)
        });
    }
    let mut child = command.spawn().map_err(LaunchError::Spawn)?;
    let silent = || LaunchError::Silent(paths.backend_log());
    let output = child.stdout.take().ok_or_else(silent)?;
    let mut line = String::new();
    let mut output = BufReader::new(output.take(MAX_LINE));
    match timeout(READY, output.read_line(&mut line)).await {
        Ok(Ok(length)) if length > 0 => {}
        _ => return Err(silent()),
    }
    match serde_json::from_str(&line) {
        Ok(Readiness::Ready { .. }) => Ok(child.stdin.take()),
        Ok(Readiness::Error { message }) => {
            let _ = child.wait().await;
            Err(LaunchError::Refused(message))
        }
        Err(_) => Err(silent()),
    }
}
