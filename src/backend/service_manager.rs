//! The protocols of a service manager such as systemd: the listening socket that the backend is started for
//! (sd_listen_fds(3)), and reports of its state (sd_notify(3)).

use std::{
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};
use sd_notify::NotifyState;
use tokio::sync::watch;
use tracing::warn;

use super::api::{StateName, Status};

/// Longest text of a report in bytes; the rest is left out.
const MAX_REPORT: usize = 512;

/// Reason that the sockets of a service manager cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The variables or the descriptors are not as sd_listen_fds(3) says.
    #[error("cannot take the sockets that LISTEN_FDS announces")]
    Descriptors(#[source] io::Error),
    /// There is more than one.
    #[error(
        "the service manager passed {0} sockets, but a backend takes one; leave one ListenStream= in the socket unit"
    )]
    Count(usize),
    /// It is another kind of socket.
    #[error(
        "the service manager passed a descriptor that is not a listening Unix socket; use ListenStream= with a path"
    )]
    Kind,
    /// Clients of the profile would not find it.
    #[error(
        "the service manager listens on {}, but clients of this profile use {expected}; correct ListenStream= in the \
         socket unit, or --profile in the service",
        found.as_ref().map_or("a socket without a path".into(), |path| path.display().to_string())
    )]
    Path {
        /// The socket's path, if it has one.
        found: Option<PathBuf>,
        /// The profile's `docker.sock`.
        expected: PathBuf,
    },
}

/// Takes the socket on which a service manager listens at `path`, if it started this process for one. Must be called
/// once, before anything else opens files.
pub(super) fn listener(path: &Path) -> Result<Option<UnixListener>, ListenError> {
    // Only for the process that LISTEN_PID names: a child, or a backend started from a service, finds none.
    let numbers = sd_notify::listen_fds().map_err(ListenError::Descriptors)?;
    // SAFETY: by the service manager's contract the descriptors are open (`listen_fds` has changed the flags of each)
    // and owned by nothing else in the process that LISTEN_PID names.
    let mut sockets: Vec<_> = numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect();
    let count = sockets.len();
    let Some(socket) = sockets.pop() else { return Ok(None) };
    if count > 1 {
        return Err(ListenError::Count(count));
    }
    check(&socket, path)?;
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(true).map_err(ListenError::Descriptors)?;
    Ok(Some(listener))
}

fn check(socket: &OwnedFd, path: &Path) -> Result<(), ListenError> {
    let stream = getsockopt(socket, sockopt::SockType) == Ok(SockType::Stream);
    if !stream || getsockopt(socket, sockopt::AcceptConn) != Ok(true) {
        return Err(ListenError::Kind);
    }
    let address: UnixAddr = getsockname(socket.as_raw_fd()).map_err(|_| ListenError::Kind)?;
    let found = address.path();
    if found != Some(path) {
        return Err(ListenError::Path { found: found.map(Path::to_owned), expected: path.to_owned() });
    }
    Ok(())
}

/// Reports that the sockets listen.
pub(super) fn ready() {
    send(&[NotifyState::Ready]);
}

/// Reports that the backend is ending.
pub(super) fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// Reports the state, now and after each change, until the backend ends.
pub(super) async fn follow(mut status: watch::Receiver<Status>) {
    loop {
        let (text, ending) = {
            let status = status.borrow_and_update();
            (line(&status), status.ending)
        };
        send(&[NotifyState::Status(&text)]);
        if ending {
            stopping();
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

/// Does nothing without a service manager (`NOTIFY_SOCKET`).
fn send(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("cannot report to the service manager: {error}");
    }
}

/// The state in one line. A reason may come from the guest: a line break in it would begin another assignment of the
/// protocol, such as `MAINPID=`.
fn line(status: &Status) -> String {
    let text = match (&status.reason, status.state) {
        (Some(reason), state) => format!("{state}: {reason}"),
        (None, StateName::Stopped) => "no VM; it starts with the first client or with `bulkhead start`".to_owned(),
        (None, state) => state.to_string(),
    };
    let mut line: String = text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect();
    line.truncate(line.floor_char_boundary(MAX_REPORT));
    line
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;
    use crate::settings::{Base, ProfileName};

    fn status() -> Status {
        let base = Base::from_variables(|name| (name == "HOME").then(|| "/h".into()), 0).unwrap();
        Status::stopped(&base.profile(&ProfileName::default()).unwrap())
    }

    #[test]
    fn only_a_listening_stream_socket_at_the_profiles_path_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("docker.sock");
        let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
        check(&listener, &path).unwrap();
        let elsewhere = check(&listener, &directory.path().join("other.sock"));
        assert!(matches!(elsewhere, Err(ListenError::Path { found: Some(found), .. }) if found == path));
        let connected = OwnedFd::from(UnixStream::connect(&path).unwrap());
        assert!(matches!(check(&connected, &path), Err(ListenError::Kind)));
        let datagrams = OwnedFd::from(UnixDatagram::bind(directory.path().join("datagrams")).unwrap());
        assert!(matches!(check(&datagrams, &path), Err(ListenError::Kind)));
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(matches!(check(&file, &path), Err(ListenError::Kind)));
    }

    #[test]
    fn a_reason_from_the_guest_is_one_short_line() {
        let reason = format!("x\nMAINPID=1\r\0\u{1b}[31m{}", "ä".repeat(1000));
        let status = Status { state: StateName::Failed, reason: Some(reason), ..status() };
        let line = line(&status);
        assert!(line.starts_with("failed: x MAINPID=1") && !line.chars().any(char::is_control), "{line}");
        assert!(line.len() <= MAX_REPORT);
    }
}
