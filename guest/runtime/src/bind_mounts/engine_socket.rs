//! The engine's socket: the gate decides whether a container may have one, and serves it on a socket of the container's
//! own, so that it knows the container behind each request.

use std::{
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bulkhead_protocol::{ENGINE_SOCKET, GRANTED, GRANTS_SOCKET, MAX_GRANT, container_socket};

use crate::{mount_fd, spec::mounts::MountError};

/// Time for the gate to answer, including a restart of the gate.
const GATE_TIMEOUT: Duration = Duration::from_secs(20);

/// Time between two attempts to connect.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// True for the path under which containers ask for the engine's socket.
pub(super) fn is_engine_socket(path: &Path) -> bool {
    path == Path::new(ENGINE_SOCKET)
}

/// Opens the container's own socket, if the gate grants it.
pub(super) fn open_granted(container: Option<&String>) -> Result<OwnedFd, MountError> {
    let restricted = || MountError::Restricted(ENGINE_SOCKET.to_owned());
    let container = container.ok_or_else(restricted)?;
    let failed = |source| MountError::Open { path: ENGINE_SOCKET.to_owned(), source };
    // dockerd holds locks while it waits for this program, so neither side of this question may ask dockerd anything.
    match ask(Path::new(GRANTS_SOCKET), container).map_err(failed)? {
        answer if answer == GRANTED => mount_fd::open_path(&container_socket(container)).map_err(failed),
        // The gate ended in the middle of the question. Without its decision the path is one of the VM's.
        answer if answer.is_empty() => Err(restricted()),
        // The refusal in Docker's documented words, or the reason why the gate has no socket to give.
        answer => Err(MountError::Socket(answer)),
    }
}

/// Sends a container's id to the gate and returns the answer, all of it.
fn ask(gate: &Path, container: &str) -> io::Result<String> {
    let mut stream = connect(gate)?;
    stream.set_read_timeout(Some(GATE_TIMEOUT))?;
    stream.set_write_timeout(Some(GATE_TIMEOUT))?;
    stream.write_all(format!("{container}\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_GRANT).read_to_string(&mut answer)?;
    Ok(answer)
}

/// Connects; a gate that is being restarted has the time to come up.
fn connect(gate: &Path) -> io::Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(gate) {
            // Between two gates the socket is missing, or is still there without a listener.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
                    && start.elapsed() < GATE_TIMEOUT =>
            {
                thread::sleep(RETRY_INTERVAL);
            }
            connected => return connected,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_gate_that_comes_up_late_is_waited_for_and_its_answer_is_read_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gate");
        let late = path.clone();
        let gate = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            let (mut stream, _) = UnixListener::bind(late).unwrap().accept().unwrap();
            let mut question = [0; 3];
            stream.read_exact(&mut question).unwrap();
            for part in ["den", "ied"] {
                stream.write_all(part.as_bytes()).unwrap();
            }
            question
        });
        assert_eq!(ask(&path, "id").unwrap(), "denied");
        assert_eq!(&gate.join().unwrap(), b"id\n");
    }

    #[test]
    fn without_a_container_there_is_no_socket() {
        assert!(matches!(open_granted(None), Err(MountError::Restricted(_))));
    }
}
