//! Connections that stop being HTTP: attach, exec, session, grpc (`101 Switching Protocols`).
//!
//! Each direction ends on its own: the end of input on one side closes the sending half of the other and no more,
//! because attach and exec tell the end of stdin by it while output goes on. Only when the engine has closed its end
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

/// Bytes held per direction.
const BUFFER_SIZE: usize = 64 * 1024;

/// A connection could not be tunnelled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HijackError {
    /// One side did not go through with the upgrade.
    #[error("the upgrade was not completed")]
    Upgrade(#[from] hyper::Error),
    /// The upgraded connection is not of the kind that this gate made.
    #[error("unexpected kind of connection")]
    Kind,
    /// A stream failed.
    #[error("the hijacked stream failed")]
    Stream(#[from] io::Error),
}

fn client_parts(upgraded: Upgraded) -> Result<(UnixStream, Bytes), HijackError> {
    let parts = upgraded.downcast::<TokioIo<HalfCloseStream>>().map_err(|_| HijackError::Kind)?;
    Ok((parts.io.into_inner().into_inner(), parts.read_buf))
}

fn engine_parts(upgraded: Upgraded) -> Result<(UnixStream, Bytes), HijackError> {
    let parts = upgraded.downcast::<TokioIo<UnixStream>>().map_err(|_| HijackError::Kind)?;
    Ok((parts.io.into_inner(), parts.read_buf))
}

/// Copies `early`, then everything from `from`, then closes the sending half of `to`.
async fn one_way(early: Bytes, from: impl AsyncRead + Unpin, mut to: OwnedWriteHalf) -> io::Result<()> {
    to.write_all(&early).await?;
    drop(early);
    copy_buf(&mut BufReader::with_capacity(BUFFER_SIZE, from), &mut to).await?;
    match to.shutdown().await {
        // The other side is gone altogether, so it knows.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Whether the peer has closed its end of a unix socket, and not just its sending half.
fn is_closed(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: the pointer is to one pollfd that outlives the call, which does not block.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready > 0 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Joins the two sides of an upgraded request until both directions have ended or one has failed.
pub(crate) async fn tunnel(client: OnUpgrade, engine: OnUpgrade) -> Result<(), HijackError> {
    let (client, engine) = tokio::try_join!(client, engine)?;
    let (client, client_early) = client_parts(client)?;
    let (engine, engine_early) = engine_parts(engine)?;
    let (from_client, to_client) = client.into_split();
    let (mut from_engine, to_engine) = engine.into_split();
    let input = one_way(client_early, from_client, to_engine);
    let output = async {
        one_way(engine_early, &mut from_engine, to_client).await?;
        Ok::<_, io::Error>(is_closed(from_engine.as_ref()))
    };
    tokio::pin!(input, output);
    tokio::select! {
        sent = &mut input => {
            match sent {
                // The engine takes no more input; its last output may still be on its way.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                sent => sent?,
            }
            output.await?;
        }
        closed = &mut output => {
            if !closed? {
                input.await?;
            }
        }
    }
    Ok(())
}
