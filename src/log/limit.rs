//! A limit on the number of lines of one kind, which is a place in the program that logs.
//!
//! There are as many kinds as such places, so the table is bounded. Lines of the levels DEBUG and TRACE have no limit:
//! a user who turns them on wants to see all of them.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Subscriber, callsite::Identifier};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Lines of one kind that may come at once.
pub const BURST: u32 = 50;

/// Time in which one more becomes possible.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// The limits of all kinds.
#[derive(Debug)]
pub struct Limits<K>(HashMap<K, Kind>);

/// The state of one kind.
#[derive(Debug)]
struct Kind {
    /// Lines that may come now.
    left: u32,
    /// Time up to which `left` was counted.
    counted: Instant,
    /// Lines left out since the last one that was written.
    left_out: u64,
}

impl<K> Default for Limits<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash> Limits<K> {
    /// Decides on a line of this kind: `None` to leave it out, else the number of those left out before it.
    pub fn admit(&mut self, kind: K, now: Instant) -> Option<u64> {
        let kind = self.0.entry(kind).or_insert(Kind { left: BURST, counted: now, left_out: 0 });
        let intervals = now.saturating_duration_since(kind.counted).as_secs() / INTERVAL.as_secs();
        kind.left = u32::try_from(intervals).unwrap_or(u32::MAX).saturating_add(kind.left).min(BURST);
        kind.counted += INTERVAL.saturating_mul(u32::try_from(intervals).unwrap_or(u32::MAX));
        if kind.left == 0 {
            kind.left_out = kind.left_out.saturating_add(1);
            return None;
        }
        kind.left -= 1;
        Some(std::mem::take(&mut kind.left_out))
    }
}

/// Formats the events that are within their limits, as `F` does.
#[derive(Debug)]
pub(super) struct Limited<F> {
    format: F,
    limits: Mutex<Limits<Identifier>>,
}

impl<F> Limited<F> {
    pub(super) fn new(format: F) -> Self {
        Self { format, limits: Mutex::default() }
    }
}

impl<S, N, F> FormatEvent<S, N> for Limited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        if *event.metadata().level() <= Level::INFO {
            let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
            match limits.admit(event.metadata().callsite(), Instant::now()) {
                // Nothing is written for an event without a text.
                None => return Ok(()),
                Some(0) => {}
                Some(left_out) => writeln!(writer, "({left_out} lines like the next one were left out)")?,
            }
        }
        self.format.format_event(context, writer, event)
    }
}
