//! `docker.sock`: each client's descriptor goes to the vmm process, which makes it the host's end of a vsock stream to
//! the gate in the guest.
//!
//! The backend copies no byte and closes its copy of the descriptor at once: one copy less for each byte, and no
//! process on the way that could be slow or leak. While no engine answers, a client gets an HTTP 503 with a message
//! that the docker command shows. Where a service manager started the backend for its socket, the first client starts
//! the engine, and clients wait for it.

use std::{
    io::ErrorKind,
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
    time::Duration,
};

use bulkhead_protocol::DOCKER_PORT;
use nix::sys::socket::{MsgFlags, recv};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    sync::{Mutex, Semaphore, mpsc, oneshot, watch},
    time::timeout,
};
use tracing::warn;

use bulkhead_ipc::report::chain;
use bulkhead_vmm::api::Command;

use crate::{
    backend::{
        api::{StartOptions, StateName, Status},
        supervisor::Request,
        vmm::VmmChannel,
    },
    settings::ProxyEnvironment,
};

/// Clients at once that are being refused or wait for the engine.
const MAX_WAITING: usize = 32;

/// Time for which a client waits for the engine, as `bulkhead start` does by default.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// Time for a client to send its request and to read the refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Most bytes of a request that are read before the refusal.
const MAX_HEAD: usize = 16 * 1024;

/// The engine as docker clients meet it.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The vmm while the engine answers.
    pub channel: watch::Receiver<Option<Arc<VmmChannel>>>,
    /// The state of the profile.
    pub status: watch::Receiver<Status>,
    /// Starts the engine when a client comes, for one client at a time; `None` leaves that to `bulkhead start`.
    pub start: Option<Arc<Mutex<mpsc::Sender<Request>>>>,
}

/// Accepts clients forever.
///
/// While the vmm receives no packets, no further client is accepted: they wait in the socket's backlog.
pub async fn serve(listener: UnixListener, engine: Engine) {
    let permits = Arc::new(Semaphore::new(MAX_WAITING));
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                // Without a pause, EMFILE would make this a busy loop.
                warn!("cannot accept a docker client: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if engine.connect(&client).await {
            continue;
        }
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let mut engine = engine.clone();
        tokio::spawn(async move {
            if !(engine.started(&client).await && engine.connect(&client).await) {
                let message = refusal(&engine.status.borrow());
                let _ = timeout(REFUSAL_TIMEOUT, refuse(client, &message)).await;
            }
            drop(permit);
        });
    }
}

impl Engine {
    /// Passes the client to the vmm; returns false if no engine answers.
    async fn connect(&self, client: &UnixStream) -> bool {
        let vmm = self.channel.borrow().clone();
        let Some(vmm) = vmm else { return false };
        match vmm.send(&Command::VsockConnect { port: DOCKER_PORT }, Some(client.as_fd())).await {
            Ok(()) => true,
            // The vmm is just ending; the client is still ours.
            Err(error) => {
                warn!("{}", chain(&error));
                false
            }
        }
    }

    /// Starts the engine for a client that sends a request, and waits until it answers or has failed; returns false if
    /// nothing was started.
    async fn started(&mut self, client: &UnixStream) -> bool {
        let Some(requests) = &self.start else { return false };
        let sends = timeout(REFUSAL_TIMEOUT, sends(client)).await;
        if !matches!(sends, Ok(Ok(true))) {
            return false;
        }
        let requests = requests.lock().await;
        let mut boot = self.status.borrow().boot;
        // Not after a failure: a program that asks every second would boot a broken VM for ever.
        if self.status.borrow().state == StateName::Stopped {
            let proxy = ProxyEnvironment::read(|name| std::env::var(name).ok());
            let (reply, answer) = oneshot::channel();
            let options = Box::new(StartOptions { proxy, ..StartOptions::default() });
            if requests.send(Request::Start(options, reply)).await.is_err() {
                return false;
            }
            let Ok(answer) = answer.await else { return false };
            boot = answer.boot;
        }
        drop(requests);
        let settled = |status: &Status| {
            status.ending || status.boot >= boot && matches!(status.state, StateName::Running | StateName::Failed)
        };
        timeout(START_TIMEOUT, self.status.wait_for(settled)).await.is_ok_and(|status| status.is_ok())
    }
}

/// Waits until a client has sent something; returns false for one that closes without it, as a probe of the socket
/// does.
async fn sends(client: &UnixStream) -> std::io::Result<bool> {
    loop {
        client.readable().await?;
        let peek = || recv(client.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK).map_err(std::io::Error::from);
        match client.try_io(Interest::READABLE, peek) {
            Ok(length) => return Ok(length > 0),
            // The wake-up was spurious. tokio makes an error of its own of EAGAIN, which has no number.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

fn refusal(status: &Status) -> String {
    let profile = if status.profile.is_default() { String::new() } else { format!("--profile {} ", status.profile) };
    let reason = status.reason.as_deref().map(|reason| format!(", {reason}")).unwrap_or_default();
    format!("Bulkhead's engine is not running (state: {}{reason}); run `bulkhead {profile}start`", status.state)
}

/// Answers as the Docker API does, so that the docker command shows the message.
async fn refuse(mut client: UnixStream, message: &str) -> std::io::Result<()> {
    // The request is read to the end of its head: a client whose connection is closed while it writes may report a
    // broken pipe instead of reading the answer.
    let mut head = Vec::with_capacity(1024);
    while head.len() < MAX_HEAD && !head.windows(4).any(|window| window == b"\r\n\r\n") {
        if client.read_buf(&mut head).await? == 0 {
            break;
        }
    }
    let body = serde_json::json!({ "message": message }).to_string();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    client.write_all(answer.as_bytes()).await?;
    // The docker command starts with `HEAD /_ping`, and an answer to HEAD has no body (RFC 9110, 9.3.2).
    if !head.starts_with(b"HEAD ") {
        client.write_all(body.as_bytes()).await?;
    }
    client.shutdown().await?;
    // The rest of the request is read until the client closes, because closing with unread data resets the connection
    // and may discard the answer.
    let mut rest = [0; 1024];
    while client.read(&mut rest).await? > 0 {}
    Ok(())
}
