//! `docker.sock`: each client's descriptor goes to the vmm process, which makes it the host end of a vsock stream.
//! The backend copies no byte.

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

/// Clients that are told at once that there is no engine.
const MAX_REFUSALS: usize = 32;

/// Time for a client to send its request and to take the answer.
const REFUSAL: Duration = Duration::from_secs(2);

/// Bytes of a request that are read before the answer.
const MAX_HEAD: usize = 16 * 1024;

/// Accepts clients for ever.
///
/// While the vmm takes no packets, no further client is accepted: they wait in the socket's backlog.
pub async fn serve(
    listener: UnixListener,
    link: watch::Receiver<Option<Arc<VmmChannel>>>,
    status: watch::Receiver<Status>,
) {
    let permits = Arc::new(Semaphore::new(MAX_REFUSALS));
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                warn!("cannot accept a docker client: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let channel = link.borrow().clone();
        if let Some(channel) = channel {
            match channel.send(&Command::VsockConnect { port: DOCKER_PORT }, Some(client.as_fd())).await {
                Ok(()) => continue,
                Err(error) => warn!("{}", chain(&error)),
            }
        }
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let message = refusal(&status.borrow());
        tokio::spawn(async move {
            let _ = timeout(REFUSAL, refuse(client, &message)).await;
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
    // A client that is cut off while it still writes may never read the answer.
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
    // `HEAD /_ping` is what the docker command begins with.
    if !head.starts_with(b"HEAD ") {
        client.write_all(body.as_bytes()).await?;
    }
    client.shutdown().await?;
    let mut rest = [0; 1024];
    while client.read(&mut rest).await? > 0 {}
    Ok(())
}
