//! A client that has closed only its sending half still wants its answer.
//!
//! To an HTTP server the end of input during a request means that the client is gone, and it drops the request. So
//! the end is reported late: when no request is in flight any more, or after a grace, for the clients that are gone.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    time::{Instant, Interval, interval_at},
};

/// How long an answer may take after the client has closed its sending half.
const HALF_CLOSE_GRACE: Duration = Duration::from_secs(30);
/// How often a half-closed connection is looked at.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Counts the requests in flight on a connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct InFlight(Arc<AtomicUsize>);

/// One request in flight, until dropped.
#[derive(Debug)]
pub(crate) struct InFlightGuard(InFlight);

impl InFlight {
    /// Counts a request.
    pub(crate) fn enter(&self) -> InFlightGuard {
        self.0.fetch_add(1, Ordering::AcqRel);
        InFlightGuard(self.clone())
    }

    fn is_empty(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Debug)]
struct InputEnd {
    since: Instant,
    check: Interval,
}

/// A stream that reports the end of its input late.
#[derive(Debug)]
pub(crate) struct HalfCloseStream {
    stream: UnixStream,
    in_flight: InFlight,
    input_end: Option<InputEnd>,
}

impl HalfCloseStream {
    /// Wraps a client's stream.
    pub(crate) fn new(stream: UnixStream, in_flight: InFlight) -> Self {
        Self { stream, in_flight, input_end: None }
    }

    /// The stream itself, on which a seen end is seen again.
    pub(crate) fn into_inner(self) -> UnixStream {
        self.stream
    }
}

impl AsyncRead for HalfCloseStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.input_end.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        let now = Instant::now();
        // The first look comes a moment later: the last answer may not be written out yet.
        let input_end = this
            .input_end
            .get_or_insert_with(|| InputEnd { since: now, check: interval_at(now + CHECK_INTERVAL, CHECK_INTERVAL) });
        loop {
            ready!(input_end.check.poll_tick(cx));
            if this.in_flight.is_empty() || input_end.since.elapsed() >= HALF_CLOSE_GRACE {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for HalfCloseStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
