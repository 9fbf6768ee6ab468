//! Connections that stop being HTTP: attach, exec, session, grpc (`101 Switching Protocols`).
//!
//! Each direction ends on its own: the end of input on one side closes the sending half of the other and no more,
//! because attach and exec tell the end of stdin by it while output goes on.

use std::io;

use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, BufReader, copy_buf},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::linger::Linger;

/// Bytes held per direction.
const BUFFER: usize = 64 * 1024;

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
    let parts = upgraded.downcast::<TokioIo<Linger>>().map_err(|_| HijackError::Kind)?;
    Ok((parts.io.into_inner().into_inner(), parts.read_buf))
}

fn engine_parts(upgraded: Upgraded) -> Result<(UnixStream, Bytes), HijackError> {
    let parts = upgraded.downcast::<TokioIo<UnixStream>>().map_err(|_| HijackError::Kind)?;
    Ok((parts.io.into_inner(), parts.read_buf))
}

/// Copies `early`, then everything from `from`, then closes the sending half of `to`.
async fn one_way(early: Bytes, from: OwnedReadHalf, mut to: OwnedWriteHalf) -> io::Result<()> {
    to.write_all(&early).await?;
    drop(early);
    copy_buf(&mut BufReader::with_capacity(BUFFER, from), &mut to).await?;
    match to.shutdown().await {
        // The other side is gone altogether, so it knows.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Joins the two sides of an upgraded request until both directions have ended or one has failed.
pub(crate) async fn tunnel(client: OnUpgrade, engine: OnUpgrade) -> Result<(), HijackError> {
    let (client, engine) = tokio::try_join!(client, engine)?;
    let (client, client_early) = client_parts(client)?;
    let (engine, engine_early) = engine_parts(engine)?;
    let (from_client, to_client) = client.into_split();
    let (from_engine, to_engine) = engine.into_split();
    tokio::try_join!(one_way(client_early, from_client, to_engine), one_way(engine_early, from_engine, to_client))?;
    Ok(())
}
