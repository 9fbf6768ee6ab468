//! The watchdog of the procfs service, by `WATCHDOG=1` of sd_notify(3).
//!
//! Programs in containers that read a file of this service wait for its answer. A service that hangs would make them
//! wait forever, so it is killed, and the next one continues on the same FUSE connection.
//!
//! A process ends only when its last thread does, and a thread that sleeps uninterruptibly ends when what it waits for
//! comes. The next one does not wait for that: its descriptors are init's, and both may hold copies.

use std::time::{Duration, Instant};

/// Longest silence; the service sends `WATCHDOG=1` every two seconds while none of its threads is stuck.
const WATCHDOG_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a killed service to end.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// The times of the last sign of life and of the kill.
#[derive(Debug, Default)]
pub(super) struct Watchdog {
    /// `None` while the service does not run, and once it was killed.
    last_message: Option<Instant>,
    /// `None` unless the service was killed and has not ended.
    killed: Option<Instant>,
}

impl Watchdog {
    /// Records a start.
    pub(super) fn start(&mut self, now: Instant) {
        *self = Self { last_message: Some(now), killed: None };
    }

    /// Records a `WATCHDOG=1`.
    pub(super) fn renew(&mut self, now: Instant) {
        // A message from before the kill may arrive after it.
        if self.last_message.is_some() {
            self.last_message = Some(now);
        }
    }

    /// Stops waiting: the service has ended.
    pub(super) fn stop(&mut self) {
        *self = Self::default();
    }

    /// Returns the time at which the service has been silent for too long, or has not ended for too long.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let silent = self.last_message.map(|last| last + WATCHDOG_TIMEOUT);
        silent.or(self.killed.map(|killed| killed + END_TIMEOUT))
    }

    /// Returns true once when the service has been silent for too long and has to be killed.
    pub(super) fn take_expired(&mut self, now: Instant) -> bool {
        let is_due = |last: &mut Instant| now.saturating_duration_since(*last) >= WATCHDOG_TIMEOUT;
        let expired = self.last_message.take_if(is_due).is_some();
        if expired {
            self.killed = Some(now);
        }
        expired
    }

    /// Returns true once when the service was killed and has not ended in time.
    pub(super) fn take_endless(&mut self, now: Instant) -> bool {
        self.killed.take_if(|killed| now.saturating_duration_since(*killed) >= END_TIMEOUT).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_expires_once_and_a_message_renews_it() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        assert!(watchdog.deadline().is_none() && !watchdog.take_expired(start + WATCHDOG_TIMEOUT));
        watchdog.start(start);
        let deadline = watchdog.deadline().unwrap();
        watchdog.renew(start + Duration::from_secs(1));
        assert!(!watchdog.take_expired(deadline));
        assert!(watchdog.take_expired(deadline + Duration::from_secs(1)));
        assert!(!watchdog.take_expired(deadline + Duration::from_secs(2)));
    }

    #[test]
    fn a_killed_service_has_a_time_to_end_in_and_says_nothing_any_more() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        watchdog.start(start);
        let killed = watchdog.deadline().unwrap();
        assert!(watchdog.take_expired(killed));
        watchdog.renew(killed);
        let deadline = watchdog.deadline().unwrap();
        assert_eq!(deadline, killed + END_TIMEOUT);
        assert!(!watchdog.take_endless(killed));
        assert!(watchdog.take_endless(deadline) && !watchdog.take_endless(deadline));
        assert_eq!(watchdog.deadline(), None);
    }

    #[test]
    fn a_killed_service_that_ends_is_not_endless() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        watchdog.start(start);
        assert!(watchdog.take_expired(start + WATCHDOG_TIMEOUT));
        watchdog.stop();
        assert!(!watchdog.take_endless(start + 2 * WATCHDOG_TIMEOUT));
        watchdog.start(start);
        assert!(!watchdog.take_endless(start + 2 * WATCHDOG_TIMEOUT));
    }

    #[test]
    fn a_service_that_has_ended_is_not_silent() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        watchdog.start(start);
        watchdog.stop();
        assert!(!watchdog.take_expired(start + WATCHDOG_TIMEOUT));
    }
}
