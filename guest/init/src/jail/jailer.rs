//! The process that makes the jail and starts the services in it.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    process::ExitCode,
};

use bulkhead_guest_common::error::chain;

use super::{
    Answer, Request, confine, root, spawn,
    sys::{self, Packet},
};

/// The reason why the jail cannot be made or a service cannot be started in it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// A file system of the jail could not be mounted, or a file in it made.
    #[error("cannot {action} {path} in the engine's jail")]
    Root {
        action: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    /// A step without a path failed.
    #[error("cannot {action} for the engine's jail")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel cannot make a Landlock domain with scopes.
    #[error("cannot keep the engine away from other processes: the kernel has no Landlock scopes (ABI 6)")]
    Landlock(#[source] landlock::RulesetError),
    /// The program of a service could not be executed.
    #[error("cannot start {program}")]
    Start {
        program: String,
        #[source]
        source: io::Error,
    },
    /// init sent something else than a request.
    #[error("unexpected request")]
    Request,
}

impl JailError {
    /// Returns the argument of `map_err` for a step without a path.
    pub(super) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action, source: source.into() }
    }
}

/// Runs the jailer. Standard input is the socket to init.
pub(crate) fn main() -> ExitCode {
    let socket = io::stdin();
    let made = root::enter().and_then(|()| confine::confine());
    let answer = made.map_or_else(|error| Answer::Failed(chain(&error)), |()| Answer::Ready);
    let ready = matches!(answer, Answer::Ready);
    if reply(socket.as_fd(), &answer).is_err() || !ready {
        return ExitCode::FAILURE;
    }
    // Ends when init closes its end, which it never does: the jailer is killed with everything else.
    loop {
        match sys::receive(socket.as_fd()) {
            Ok(Packet { bytes, .. }) if bytes.is_empty() => return ExitCode::SUCCESS,
            Ok(packet) => {
                let answer = serve(packet).map_or_else(|error| Answer::Failed(chain(&error)), Answer::Started);
                if reply(socket.as_fd(), &answer).is_err() {
                    return ExitCode::FAILURE;
                }
            }
            Err(error) => {
                eprintln!("cannot hear from init: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
}

fn serve(packet: Packet) -> Result<i32, JailError> {
    let request: Request = serde_json::from_slice(&packet.bytes).map_err(|_| JailError::Request)?;
    let [output, procs] = <[_; 2]>::try_from(packet.descriptors).map_err(|_| JailError::Request)?;
    spawn::spawn(&request, File::from(output), &File::from(procs))
}

fn reply(socket: BorrowedFd<'_>, answer: &Answer) -> io::Result<()> {
    sys::send(socket, &serde_json::to_vec(answer)?, &[])
}
