//! Connections that stop being HTTP: attach, exec, session, grpc (`101 Switching Protocols`).
//!
//! Each direction ends on its own. The end of input on one side closes the sending half of the other and no more,
//! because for attach and exec it means the end of stdin while output goes on. Only when dockerd has closed its end
//! altogether is there nothing left to send to, and the whole connection ends.

use std::{io, os::fd::AsRawFd};

use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWriteExt, BufReader, copy_buf},
    net::{UnixStream, unix::OwnedWriteHalf},
};

use crate::half_close::HalfCloseStream;

/// Size of the buffer of each direction, in bytes.
const BUFFER_SIZE: usize = 64 * 1024;

/// A tunnel that could not be set up or broke.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HijackError {
    #[error("the upgrade was not completed")]
    Upgrade(#[from] hyper::Error),
    #[error("unexpected type of upgraded connection")]
    Kind,
    #[error("the hijacked stream failed")]
    Stream(#[from] io::Error),
}

/// Takes the client's stream out of hyper, with the bytes that hyper has read beyond the request's head.
fn client_parts(upgraded: Upgraded) -> Result<(UnixStream, Bytes), HijackError> {
    // The delayed end of input is for HTTP only; from here on an end is passed on at once.
    let parts = upgraded.downcast::<TokioIo<HalfCloseStream>>().map_err(|_| HijackError::Kind)?;
    Ok((parts.io.into_inner().into_inner(), parts.read_buf))
}

/// The same for dockerd's stream: a container's first output may have come with the response's head.
fn dockerd_parts(upgraded: Upgraded) -> Result<(UnixStream, Bytes), HijackError> {
    let parts = upgraded.downcast::<TokioIo<UnixStream>>().map_err(|_| HijackError::Kind)?;
    Ok((parts.io.into_inner(), parts.read_buf))
}

/// Copies `early`, then everything from `from`, then closes the sending half of `to`.
async fn one_way(early: Bytes, from: impl AsyncRead + Unpin, mut to: OwnedWriteHalf) -> io::Result<()> {
    to.write_all(&early).await?;
    // A slice of hyper's read buffer, which would otherwise be held for the whole session.
    drop(early);
    copy_buf(&mut BufReader::with_capacity(BUFFER_SIZE, from), &mut to).await?;
    // Half-close: the other direction uses the same socket and goes on.
    match to.shutdown().await {
        // The other side has closed both directions already.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Returns true if the peer has closed its end of a unix socket, and not just its sending half.
fn is_closed(stream: &UnixStream) -> bool {
    // On a unix stream, a peer that has only shut down its sending half gives POLLRDHUP, which is not asked for here.
    // POLLHUP means both directions; it and POLLERR are always reported.
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: the pointer is to one pollfd that outlives the call, which does not block.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready > 0 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Joins the two sides of an upgraded request until both directions have ended, one has failed, or dockerd has closed.
pub(crate) async fn tunnel(client: OnUpgrade, dockerd: OnUpgrade) -> Result<(), HijackError> {
    // Both sides: dockerd's 101 has been received, and the gate's has been written to the client.
    let (client, dockerd) = tokio::try_join!(client, dockerd)?;
    let (client, client_early) = client_parts(client)?;
    let (dockerd, dockerd_early) = dockerd_parts(dockerd)?;
    let (from_client, to_client) = client.into_split();
    let (mut from_dockerd, to_dockerd) = dockerd.into_split();
    let input = one_way(client_early, from_client, to_dockerd);
    let output = async {
        one_way(dockerd_early, &mut from_dockerd, to_client).await?;
        // Asked once, at the end of output: a container that exits makes dockerd close both directions.
        Ok::<_, io::Error>(is_closed(from_dockerd.as_ref()))
    };
    tokio::pin!(input, output);
    tokio::select! {
        sent = &mut input => {
            match sent {
                // dockerd takes no more input, but its last output may still be in the socket's buffer. Dropping the
                // streams now would lose the end of what the container printed.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                sent => sent?,
            }
            // End of stdin (`echo x | docker run -i`): the output is still to come.
            output.await?;
        }
        closed = &mut output => {
            // dockerd has closed: no input can reach the container, and a client at a terminal would wait forever for
            // the end of a session that is over. Otherwise only output has ended (the process closed its stdout) and
            // input goes on. An error means that the client is gone; dropping dockerd's end then lets it notice.
            if !closed? {
                input.await?;
            }
        }
    }
    Ok(())
}
