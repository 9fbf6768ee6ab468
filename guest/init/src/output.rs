//! The output of services, on the console: whole lines with the service's name, limited in rate.
//!
//! Each byte of the console costs time of the vCPU and space in the host's log, and containers can make dockerd print.
//! So a service that prints without end loses lines, and slows nothing down.

use std::{
    collections::VecDeque,
    io::{PipeReader, Read},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{error::Error, event::spawn, log};

/// Longest line in bytes; the rest of a longer one is dropped.
const MAX_LINE: usize = 2048;
/// Last lines that are kept for the reason of a failure.
const TAIL_LINES: usize = 3;
/// Bytes that a service may print at once.
const BURST_BYTES: u64 = 256 * 1024;
/// Bytes that a service may print per second in the long run.
const BYTES_PER_SECOND: u64 = 32 * 1024;

/// The last lines of a service's output. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn push(&self, line: &[u8]) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(line).into_owned());
    }

    /// Returns the last line, if there is one.
    pub(crate) fn last(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).back().cloned()
    }
}

/// A token bucket: one token for each byte.
#[derive(Debug)]
struct Budget {
    left: u64,
    at: Instant,
    dropped: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { left: BURST_BYTES, at: now, dropped: 0 }
    }

    /// Takes `bytes` tokens; returns false, and counts a dropped line, when fewer are left.
    fn take(&mut self, bytes: usize, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.at);
        let gained = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).saturating_mul(BYTES_PER_SECOND) / 1000;
        // The clock moves on only with a gain: many small steps would otherwise each round down to nothing.
        if gained > 0 {
            self.left = self.left.saturating_add(gained).min(BURST_BYTES);
            self.at = now;
        }
        let wanted = bytes as u64;
        if wanted > self.left {
            self.dropped += 1;
            return false;
        }
        self.left -= wanted;
        true
    }
}

/// Cuts a byte stream into console lines with a prefix.
#[derive(Debug)]
struct Lines {
    prefix: &'static str,
    partial: Vec<u8>,
    budget: Budget,
    tail: Tail,
}

impl Lines {
    /// Returns the console text of the lines that `bytes` complete.
    fn feed(&mut self, bytes: &[u8], now: Instant) -> Vec<u8> {
        let mut text = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                self.finish(&mut text, now);
            } else if self.partial.len() < MAX_LINE {
                // Control characters could send commands to the terminal on which the log is read.
                self.partial.push(if byte < b' ' && byte != b'\t' || byte == 0x7f { b'?' } else { byte });
            }
        }
        text
    }

    fn finish(&mut self, text: &mut Vec<u8>, now: Instant) {
        let line = std::mem::take(&mut self.partial);
        if line.is_empty() {
            return;
        }
        // Before the limit: a reason for a failure is kept even when the console loses the line.
        self.tail.push(&line);
        if !self.budget.take(line.len(), now) {
            return;
        }
        let dropped = std::mem::take(&mut self.budget.dropped);
        if dropped > 0 {
            text.extend_from_slice(format!("{}: ({dropped} lines dropped)\n", self.prefix).as_bytes());
        }
        text.extend_from_slice(self.prefix.as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(&line);
        text.push(b'\n');
    }
}

/// Relays the output that arrives in `pipe`, on a thread of its own, until the last writer has closed it.
pub(crate) fn relay(prefix: &'static str, mut pipe: PipeReader, tail: Tail) -> Result<(), Error> {
    spawn("output", move || {
        let mut lines = Lines { prefix, partial: Vec::new(), budget: Budget::new(Instant::now()), tail };
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => return,
                // Many lines in one write cost one exit of the vCPU, not one each.
                Ok(read) => log::console(&lines.feed(&buffer[..read], Instant::now())),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// Time for the last output of a service that has ended to get through the pipe, before its last line is quoted.
pub(crate) const OUTPUT_GRACE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines() -> Lines {
        Lines { prefix: "d", partial: Vec::new(), budget: Budget::new(Instant::now()), tail: Tail::default() }
    }

    #[test]
    fn a_line_in_pieces_is_printed_whole_and_once() {
        let (mut lines, now) = (lines(), Instant::now());
        assert_eq!(lines.feed(b"one\ntw", now), b"d: one\n");
        assert_eq!(lines.feed(b"o\n\n", now), b"d: two\n");
        assert_eq!(lines.tail.last().unwrap(), "two");
    }

    #[test]
    fn terminal_control_sequences_do_not_reach_the_console() {
        assert_eq!(lines().feed(b"\x1b[2Jx\r\x07\n", Instant::now()), b"d: ?[2Jx??\n");
    }

    #[test]
    fn a_flood_is_cut_at_the_budget_and_the_loss_is_reported() {
        let (mut lines, now) = (lines(), Instant::now());
        let flood = [b'x'; 1024].iter().copied().chain([b'\n']).collect::<Vec<u8>>().repeat(1000);
        assert!((lines.feed(&flood, now).len() as u64) < BURST_BYTES + 16 * 1024);
        let later = String::from_utf8(lines.feed(b"y\n", now + Duration::from_secs(1))).unwrap();
        assert!(later.starts_with("d: (744 lines dropped)\nd: y"), "{later}");
    }

    proptest! {
        #[test]
        fn an_unfinished_line_is_bounded(bytes in proptest::collection::vec(any::<u8>(), 0..10_000)) {
            let mut lines = lines();
            lines.feed(&bytes, Instant::now());
            prop_assert!(lines.partial.len() <= MAX_LINE);
        }
    }
}
