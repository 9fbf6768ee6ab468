//! Serves the sockets of containers, and answers the runtime that asks for one.

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

/// Connections of one container at once; more wait in its socket's queue.
const MAX_CONNECTIONS: usize = 128;
/// How long the runtime may take to ask.
const GRANT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed accept or a lost watch.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Makes a container's socket, unless there is one.
fn open(gate: &Arc<Gate>, id: &str) -> io::Result<()> {
    let sockets = &gate.sockets;
    if sockets.open_sockets().contains_key(id) {
        return Ok(());
    }
    fs::create_dir_all(&sockets.directories.sockets)?;
    let path = sockets.socket(id);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = net::UnixListener::bind(&path)?;
    // Its owner is the container's root there: the mount maps the ids.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
    fd_store::keep(id, listener.as_fd());
    serve(gate, id, listener)
}

fn serve(gate: &Arc<Gate>, id: &str, listener: net::UnixListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let (socket, closed) = OpenSocket::new();
    gate.sockets.open_sockets().insert(id.to_owned(), socket);
    let gate_of_its_own = Arc::clone(gate);
    tokio::spawn(async move {
        let mut over = closed.clone();
        tokio::select! {
            () = accept(gate_of_its_own, listener, closed) => {}
            // The sender never sends: this is its end.
            _ = over.changed() => {}
        }
    });
    watch_removals(gate);
    Ok(())
}

async fn accept(gate: Arc<Gate>, listener: UnixListener, closed: watch::Receiver<()>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("can't accept a container's connection: {error}");
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            }
        };
        let (gate, caller, mut over) = (Arc::clone(&gate), Caller::Container(closed.clone()), closed.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = serve_connection(gate, stream, caller) => {}
                _ = over.changed() => {}
            }
            drop(slot);
        });
    }
}

fn close(gate: &Gate, id: &str) {
    if gate.sockets.open_sockets().remove(id).is_some() {
        let _ = fs::remove_file(gate.sockets.socket(id));
        fd_store::release(id);
    }
}

/// Closes the sockets of containers that are no more.
fn close_removed(gate: &Gate) {
    let known: Vec<String> = gate.sockets.open_sockets().keys().cloned().collect();
    let folder = gate.sockets.containers();
    for id in known.iter().filter(|id| !folder.join(id).exists()) {
        close(gate, id);
    }
}

/// Begins to watch for removed containers, once; the folder is there when the first socket is.
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
                close_removed(&gate);
                while let Some(names) = removals.next().await? {
                    for name in names {
                        close(&gate, &name);
                    }
                }
                Ok::<_, io::Error>(())
            };
            if let Err(error) = watching.await {
                eprintln!("can't watch for removed containers: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    });
}

/// Takes the sockets over that an earlier gate had.
pub fn adopt_socket(gate: &Arc<Gate>, id: &str, listener: net::UnixListener) {
    if !is_container_id(id) {
        eprintln!("a socket that is kept as {id:?} is none of a container");
    } else if let Err(error) = serve(gate, id, listener) {
        eprintln!("can't serve container {id} any more: {error}");
    }
}

/// The answer to the runtime's question.
fn answer(gate: &Arc<Gate>, question: &[u8]) -> String {
    let id = std::str::from_utf8(question).unwrap_or_default().trim_end_matches('\n');
    if !is_container_id(id) {
        // Steps of builds have ids of another form, and no socket.
        return Refusal::socket("").to_string();
    }
    match gate.sockets.admit(id) {
        Err(refusal) => refusal.to_string(),
        Ok(()) => match open(gate, id) {
            Ok(()) => GRANTED.to_owned(),
            Err(error) => format!("the container's docker socket could not be made: {error}"),
        },
    }
}

async fn converse(gate: &Arc<Gate>, mut stream: UnixStream) -> io::Result<()> {
    let mut question = Vec::new();
    while !question.ends_with(b"\n") && question.len() < 256 {
        if stream.read_buf(&mut question).await? == 0 {
            break;
        }
    }
    stream.write_all(answer(gate, &question).as_bytes()).await?;
    stream.shutdown().await
}

/// Answers the runtime.
pub async fn answer_runtime(gate: Arc<Gate>, stream: UnixStream) {
    match timeout(GRANT_TIMEOUT, converse(&gate, stream)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("the runtime got no answer: {error}"),
        Err(_) => eprintln!("the runtime never asked"),
    }
}

/// Makes something to bind at the path under which containers ask for the engine's socket.
pub fn create_placeholder(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().append(true).create(true).open(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
}
