//! The engine's socket: the gate decides whether a container may have one, and it is one of the container's own.

use std::{
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bulkhead_protocol::{ENGINE_SOCKET, GRANTED, GRANTS_SOCKET, MAX_GRANT, container_socket};

use crate::{spec::mounts::MountError, staging};

/// How long the gate may take, a new start of it included.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(100);

/// Whether a container that binds this path asks for the engine's socket.
pub(crate) fn is_engines(path: &Path) -> bool {
    path == Path::new(ENGINE_SOCKET)
}

/// The socket that the container is given instead.
pub(crate) fn own(container: Option<&String>) -> Result<OwnedFd, MountError> {
    let restricted = || MountError::Restricted(ENGINE_SOCKET.to_owned());
    let container = container.ok_or_else(restricted)?;
    let failed = |source| MountError::Open { path: ENGINE_SOCKET.to_owned(), source };
    match ask(Path::new(GRANTS_SOCKET), container).map_err(failed)? {
        answer if answer == GRANTED => staging::open_path(&container_socket(container)).map_err(failed),
        answer if answer.is_empty() => Err(restricted()),
        answer => Err(MountError::Socket(answer)),
    }
}

/// Asks whoever listens at `gate`.
fn ask(gate: &Path, container: &str) -> io::Result<String> {
    let mut stream = connect(gate)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{container}\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(MAX_GRANT).read_to_string(&mut answer)?;
    Ok(answer)
}

/// Connects, also to a gate that is just being started again.
fn connect(gate: &Path) -> io::Result<UnixStream> {
    let begin = Instant::now();
    loop {
        match UnixStream::connect(gate) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
                    && begin.elapsed() < PATIENCE =>
            {
                thread::sleep(PAUSE);
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
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gate");
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
        assert!(matches!(own(None), Err(MountError::Restricted(_))));
    }
}
