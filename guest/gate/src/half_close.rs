//! A client stream that reports the end of its input late.
//!
//! A client may close its sending half after the request and wait for the response; `docker run` without stdin does so
//! on its attach. hyper takes the end of input during a request for the end of the client and drops the request. So the
//! end is withheld until no request is in flight. A client that is really gone looks the same to a read, so a grace
//! bounds the wait.

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

/// Time that a response may take after the client has closed its sending half.
const HALF_CLOSE_GRACE: Duration = Duration::from_secs(30);
/// Interval at which a half-closed connection is checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Number of requests in flight on a connection; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct InFlight(Arc<AtomicUsize>);

/// A request in flight, until dropped.
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

/// A withheld end of input.
#[derive(Debug)]
struct InputEnd {
    since: Instant,
    check: Interval,
}

/// A client's stream under hyper.
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

    /// Returns the stream itself. An end that was withheld is not lost: the next read on the socket reports it again.
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
            // A read without room for bytes says nothing about the end.
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        let now = Instant::now();
        // The first check comes an interval later and not at once. The guard of a request is dropped when hyper takes
        // the last bytes of the response, which may still have to be written to the socket.
        let input_end = this
            .input_end
            .get_or_insert_with(|| InputEnd { since: now, check: interval_at(now + CHECK_INTERVAL, CHECK_INTERVAL) });
        loop {
            // Polling by time: nothing wakes this task when another one drops the last guard. It happens only on the
            // few connections that are half-closed, so the cost is small.
            ready!(input_end.check.poll_tick(cx));
            if this.in_flight.is_empty() || input_end.since.elapsed() >= HALF_CLOSE_GRACE {
                // No bytes and no error: the end of input, as hyper expects it.
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
