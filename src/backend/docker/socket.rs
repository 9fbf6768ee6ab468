//! `docker.sock`: each client's descriptor goes to the vmm process, which makes it the host's end of a vsock stream to
//! the gate in the guest.
//!
//! The backend copies no byte and closes its copy of the descriptor at once: one copy less for each byte, and no
//! process on the way that could be slow or leak. While no engine answers, a client gets an HTTP 503 with a message
//! that the docker command shows.

use std::{os::fd::AsFd, sync::Arc, time::Duration};

use bulkhead_protocol::DOCKER_PORT;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    time::timeout,
};
use tracing::warn;

use bulkhead_ipc::report::chain;
use bulkhead_vmm::api::Command;

use crate::backend::{api::Status, vmm::VmmChannel};

/// Clients at once that are being refused.
const MAX_REFUSALS: usize = 32;

/// Time for a client to send its request and to read the refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Most bytes of a request that are read before the refusal.
const MAX_HEAD: usize = 16 * 1024;

/// Accepts clients forever; `channel` leads to the vmm while the engine answers.
///
/// While the vmm receives no packets, no further client is accepted: they wait in the socket's backlog.
pub async fn serve(
    listener: UnixListener,
    channel: watch::Receiver<Option<Arc<VmmChannel>>>,
    status: watch::Receiver<Status>,
) {
    let permits = Arc::new(Semaphore::new(MAX_REFUSALS));
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
        let vmm = channel.borrow().clone();
        if let Some(vmm) = vmm {
            match vmm.send(&Command::VsockConnect { port: DOCKER_PORT }, Some(client.as_fd())).await {
                Ok(()) => continue,
                // The vmm is just ending. The client is still ours and gets the refusal below.
                Err(error) => warn!("{}", chain(&error)),
            }
        }
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let message = refusal(&status.borrow());
        tokio::spawn(async move {
            let _ = timeout(REFUSAL_TIMEOUT, refuse(client, &message)).await;
            drop(permit);
        });
    }
}

fn refusal(status: &Status) -> String {
    let profile = if status.profile.is_default() { String::new() } else { format!("--profile {} ", status.profile) };
    format!("Bulkhead's engine is not running (state: {}); run `bulkhead {profile}start`", status.state)
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
