//! Serves the sockets of containers, and answers the runtime when it asks for one.
//!
//! A socket is made at the first start of its container and stays until the container is removed, so that it is the
//! same one after a restart of the container.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::PermissionsExt, unix::net},
    path::Path,
    sync::{Arc, PoisonError},
    time::Duration,
};

use bulkhead_protocol::{GRANTED, is_container_id};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    time::timeout,
};

use crate::{
    fd_store,
    gate::{Caller, Gate},
    proxy::serve_connection,
    removals::Removals,
    rules::Refusal,
    sockets::OpenSocket,
};

/// Maximum HTTP connections of one container at a time; more wait in its socket's queue. Upgraded connections (attach,
/// exec) do not count.
const MAX_CONNECTIONS: usize = 128;
/// Limit for an exchange with the runtime.
const GRANT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept or a lost watch for removals.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Makes a container's socket, unless it is open already.
fn open(gate: &Arc<Gate>, id: &str) -> io::Result<()> {
    let sockets = &gate.sockets;
    // A container that is started again, or whose socket was adopted from an earlier gate. A new socket at the path
    // would not reach containers that have mounted the old one.
    if sockets.open_sockets().contains_key(id) {
        return Ok(());
    }
    fs::create_dir_all(&sockets.directories.sockets)?;
    let path = sockets.socket(id);
    // Left by a gate that ended before it could store the descriptor.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = net::UnixListener::bind(&path)?;
    // Root and its group, which inside are the container's root: the bind mount maps the IDs. The directory of the
    // sockets keeps processes of the VM and other containers away.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
    // Before the runtime has its answer and the container can connect, so that no client is lost if the gate dies at
    // any later moment.
    fd_store::store(id, listener.as_fd());
    serve(gate, id, listener)
}

/// Serves a socket until it is dropped from the open ones.
fn serve(gate: &Arc<Gate>, id: &str, listener: net::UnixListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let (socket, closed) = OpenSocket::new();
    gate.sockets.open_sockets().insert(id.to_owned(), socket);
    let task_gate = Arc::clone(gate);
    tokio::spawn(async move {
        let mut dropped = closed.clone();
        tokio::select! {
            () = accept(task_gate, listener, closed) => {}
            // Nothing is ever sent: this resolves when the sender is dropped.
            _ = dropped.changed() => {}
        }
    });
    watch_removals(gate);
    Ok(())
}

/// Accepts connections of one container.
async fn accept(gate: Arc<Gate>, listener: UnixListener, closed: watch::Receiver<()>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // A container can open connections without end; beyond the limit they wait in the socket's backlog.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("cannot accept a connection of a container: {error}");
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            }
        };
        let (gate, caller, mut dropped) = (Arc::clone(&gate), Caller::Container(closed.clone()), closed.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = serve_connection(gate, stream, caller) => {}
                // Ends the HTTP connection. An upgraded one has left it by now and watches the socket itself
                // (`forward`).
                _ = dropped.changed() => {}
            }
            drop(slot);
        });
    }
}

/// Closes a container's socket with its connections, here, in the file system and in init's store.
fn close(gate: &Gate, id: &str) {
    if gate.sockets.open_sockets().remove(id).is_some() {
        let _ = fs::remove_file(gate.sockets.socket(id));
        fd_store::remove(id);
    }
}

/// Closes the sockets of containers that no longer exist.
fn close_removed(gate: &Gate) {
    let known: Vec<String> = gate.sockets.open_sockets().keys().cloned().collect();
    let directory = gate.sockets.containers();
    for id in known.iter().filter(|id| !directory.join(id).exists()) {
        close(gate, id);
    }
}

/// Starts the task that watches for removed containers, unless it runs. Called with the first socket, when dockerd's
/// directory of containers exists.
fn watch_removals(gate: &Arc<Gate>) {
    let mut watching = gate.sockets.watching.lock().unwrap_or_else(PoisonError::into_inner);
    if std::mem::replace(&mut *watching, true) {
        return;
    }
    let gate = Arc::clone(gate);
    tokio::spawn(async move {
        loop {
            let watching = async {
                let removals = Removals::of(&gate.sockets.containers())?;
                // Only now, with the watch in place: a container that was removed before it has no event.
                close_removed(&gate);
                while let Some(names) = removals.next().await? {
                    for name in names {
                        close(&gate, &name);
                    }
                }
                // Events were lost. The next round checks all containers.
                Ok::<_, io::Error>(())
            };
            if let Err(error) = watching.await {
                eprintln!("cannot watch for removed containers: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    });
}

/// Continues to serve a socket that an earlier gate stored under a container's ID.
pub fn adopt_socket(gate: &Arc<Gate>, id: &str, listener: net::UnixListener) {
    if !is_container_id(id) {
        eprintln!("ignoring stored socket {id:?}: not a container ID");
    } else if let Err(error) = serve(gate, id, listener) {
        eprintln!("cannot continue to serve container {id}: {error}");
    }
}

/// Answers the runtime's question, a container ID and a line feed.
fn answer(gate: &Arc<Gate>, question: &[u8]) -> String {
    let id = std::str::from_utf8(question).unwrap_or_default().trim_end_matches('\n');
    if !is_container_id(id) {
        // A build step: BuildKit gives it an ID of another form, and it gets no socket.
        return Refusal::socket("").to_string();
    }
    match gate.sockets.check_grant(id) {
        Err(refusal) => refusal.to_string(),
        // The socket exists before the answer, because the runtime opens it as soon as it has that.
        Ok(()) => match open(gate, id) {
            Ok(()) => GRANTED.to_owned(),
            Err(error) => format!("cannot create the Docker socket of the container: {error}"),
        },
    }
}

/// Reads the runtime's question and writes the answer.
async fn exchange(gate: &Arc<Gate>, mut stream: UnixStream) -> io::Result<()> {
    let mut question = Vec::new();
    // An ID has 64 bytes; a longer question is answered as an unknown ID.
    while !question.ends_with(b"\n") && question.len() < 256 {
        if stream.read_buf(&mut question).await? == 0 {
            break;
        }
    }
    stream.write_all(answer(gate, &question).as_bytes()).await?;
    stream.shutdown().await
}

/// Serves one connection of the runtime (see `bulkhead_protocol`'s `GRANTS_SOCKET`).
pub async fn answer_runtime(gate: Arc<Gate>, stream: UnixStream) {
    match timeout(GRANT_TIMEOUT, exchange(&gate, stream)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("cannot answer the runtime: {error}"),
        Err(_) => eprintln!("the runtime did not ask for a socket in time"),
    }
}

/// Creates an empty file at the path under which containers ask for the engine's socket.
///
/// For a source that does not exist, dockerd would create a directory (`-v`) or refuse the bind (`--mount`). An empty
/// file is enough, because the runtime binds the container's own socket instead.
pub fn create_placeholder(path: &Path) -> io::Result<()> {
    // Appending, because the file stays as it is if an earlier gate has made it.
    fs::OpenOptions::new().append(true).create(true).open(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
}
