//! Pings of the engine: one at a time, repeated a limited number of times.
//!
//! `READY=1` of each service says only that the service itself is up. The engine counts as reached when one
//! `GET /_ping` on the clients' own way, through the gate, returns 200.

use std::time::{Duration, Instant};

/// Time from a failed ping to the next one, while every service is ready.
const PING_RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// Failed pings in a row after which the start has failed.
const MAX_FAILED_PINGS: u32 = 20;

/// The state of the pings.
#[derive(Debug, Default)]
pub(super) struct Readiness {
    in_flight: bool,
    failed_pings: u32,
    retry_at: Option<Instant>,
}

impl Readiness {
    /// Forgets failed pings: a service has become ready, so circumstances have changed.
    pub(super) fn reset(&mut self) {
        self.failed_pings = 0;
    }

    /// Returns whether a ping has been sent and not yet answered.
    pub(super) fn in_flight(&self) -> bool {
        self.in_flight
    }

    /// Records a ping that has been sent.
    pub(super) fn sent(&mut self) {
        self.in_flight = true;
    }

    /// Records the end of a ping, whatever its result.
    pub(super) fn answered(&mut self) {
        self.in_flight = false;
    }

    /// Counts a failed ping and plans the next one; returns false after the last attempt.
    pub(super) fn retry(&mut self, now: Instant) -> bool {
        self.failed_pings += 1;
        if self.failed_pings >= MAX_FAILED_PINGS {
            return false;
        }
        self.retry_at = Some(now + PING_RETRY_INTERVAL);
        true
    }

    /// Returns the time of the next attempt.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Returns true once when the next attempt is due.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        self.retry_at.take_if(|at| *at <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_limited_until_a_service_becomes_ready() {
        let (mut readiness, now) = (Readiness::default(), Instant::now());
        for _ in 1..MAX_FAILED_PINGS {
            assert!(readiness.retry(now));
        }
        assert!(!readiness.retry(now));
        readiness.reset();
        assert!(readiness.retry(now));
    }

    #[test]
    fn an_attempt_is_due_once() {
        let (mut readiness, now) = (Readiness::default(), Instant::now());
        readiness.retry(now);
        assert!(!readiness.take_due(now));
        let at = readiness.deadline().unwrap();
        assert!(readiness.take_due(at) && !readiness.take_due(at));
        assert_eq!(readiness.deadline(), None);
    }
}
